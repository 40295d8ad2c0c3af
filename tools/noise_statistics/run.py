"""All statistics over one stream of groups, in bounded memory."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from score_kernels.backends import choose
from tools.noise_statistics.dependence import Correlations, Repeats
from tools.noise_statistics.distribution import TAILS, Cells, Distribution, Moments
from tools.noise_statistics.findings import Finding
from tools.noise_statistics.streams import BLOCKS, Source, group, native

# Normals of a block.
SIZE = 1 << 20


@dataclass(frozen=True)
class Result:
    """Of a run.

    Attributes:
        count: normals.
        tails, above, below: how many were above each of tails and below its negative.
        seconds: all of it took.
    """

    findings: list[Finding]
    count: int
    seed: int
    backend: str
    seconds: float
    tails: np.ndarray
    above: np.ndarray
    below: np.ndarray


def run(
    count: int, seed: int, *, source: Source = native, size: int = SIZE, progress: bool = True
) -> Result:
    """Test at least count normals, whole groups of 8 blocks of size, from seeds counted from seed.

    The same arguments give the same findings.
    """
    started = time.perf_counter()
    groups = math.ceil(count / (BLOCKS * size))
    moments, distribution, cells = Moments(), Distribution(), Cells()
    total = groups * BLOCKS * size
    correlations, repeats = Correlations(), Repeats(total)
    with tqdm(total=total, unit="normals", unit_scale=True, disable=not progress) as bar:
        for index in range(groups):
            g = group(index, seed, size)
            blocks = {}
            for name, key in g.keys.items():
                block = source(g.rows, g.elements, key)
                correlations.add_within(block)
                z = blocks[name] = block.ravel()
                moments.add(z)
                cells.add(z)
                repeats.add(z)
                distribution.add(np.sort(z))
                bar.update(size)
            correlations.add_group(blocks)
            correlations.add_far(blocks[0, 0, 0], g, source)
    findings = [
        finding
        for statistic in (moments, distribution, cells, correlations, repeats)
        for finding in statistic.findings()
    ]
    backend = choose(torch.device("cpu"), torch.float32).name
    seconds = time.perf_counter() - started
    tails = (TAILS, distribution.above, distribution.below)
    return Result(findings, total, seed, backend, seconds, *tails)
