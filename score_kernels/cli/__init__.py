"""The command ``score-kernels``: info, selfcheck, train, sample."""
