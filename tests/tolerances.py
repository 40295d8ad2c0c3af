"""Every tolerance of the tests, with its reason. Bit-exact comparisons have none."""

from __future__ import annotations

import torch

# Normals against the exact function of u and the angle: the contract's bound. The radius is within
# 5.6e-7, cos and sin within 1.9e-7, times a radius of up to 6.8, and the product rounds.
NORMAL = 2e-6

# fp32 arithmetic against the same formula in fp64: a few roundings of values of order one.
FP32_RELATIVE = 1e-6

# A fused chain against the same chain step by step, relative to its largest number: the score's
# functions are within four units in the last place, and a chain of 60 steps adds them up.
FUSED = 1e-4

# Statistical tests have fixed keys. Each asserts at this level, that is, a correct generator would
# fail one in 10,000 if the key were drawn anew; a test of many comparisons divides it among them.
ALPHA = 1e-4

# Mode mass of the 2-D toy: facts of the literature's setting, 0.783 +- 0.0015 for annealed chains
# with exact scores over several independent codes, and 3.9 binomial deviations of 0.0013 at
# 100,000 chains.
TOY_ANNEALED, TOY_ANNEALED_TOLERANCE = 0.783, 0.0066
# Plain Langevin keeps what its start gave it, half of a uniform start on either side; the published
# figure is about 0.52. Deviation at 20,000 chains 0.0035.
TOY_PLAIN, TOY_PLAIN_TOLERANCE = 0.52, 0.03

# Triton's interpreter truncates fp32 to bfloat16 where a GPU rounds: one unit in the last place.
INTERPRETER_ROUNDING = {torch.float32: FP32_RELATIVE, torch.float16: 1e-6, torch.bfloat16: 2**-7}
# Whole chains in float64 whose score sees sigma in float32, a relative 6e-8 off, which the steps of
# clipped scores and adaptive step sizes grow: 4e-6 was the worst of 40 chains of each sampler.
FLOAT32_SIGMA = 5e-5
