"""python -m tools.noise_statistics"""

import sys

from tools.noise_statistics.cli import main

sys.exit(main())
