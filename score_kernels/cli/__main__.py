from score_kernels.cli.main import main

raise SystemExit(main())
