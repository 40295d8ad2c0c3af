"""Every op and sampler of ``score-kernels bench`` as pytest-benchmark's, variants interleaved.

Names of variants are those of score_kernels/bench/cases.py; the quotients are over ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.cases import OPS, Case, cases
from benchmarks.harness import compare

CASES = list(cases(list(OPS), torch.device("cpu"), quick=False, compiled=True))


def name_of(make: partial[Case]) -> str:
    op, shape, dtype = make.args[:3]
    return f"{op}, {'x'.join(map(str, shape))}, {dtype}"


@pytest.mark.parametrize("make", CASES, ids=name_of)
def test_case(benchmark: Any, make: partial[Case]) -> None:
    torch.set_num_threads(2)
    case = make()
    others = [name for name in case.variants if name != "ours"]
    with torch.set_grad_enabled(case.op.startswith("dsm")):
        compare(
            benchmark,
            case.variants,
            "ours",
            {f"{name}/ours": (name, "ours") for name in others},
            shape=(case.elements,),
            threads=2,
        )
