"""Writes data/golden.json: words from the oracle, normals from the reference backend.

    python tests/make_golden.py

Only for a new version of the noise contract: released bits must not change.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import oracle

import score_kernels
from score_kernels import NoiseKey, ops

CASES = [
    ((2, 9), {"seed": 0}),
    ((3, 5), {"seed": 1, "draw": 1}),
    ((2, 2, 3), {"seed": 2**64 - 1, "purpose": 255, "draw": 2**32 - 1, "first_sample": 2**56 - 2}),
    ((3, 4), {"seed": 42, "purpose": 2, "draw": 7, "first_sample": 2**32 - 2}),
    ((5, 1), {"seed": 0xDEADBEEFCAFEF00D, "first_sample": 12345}),
    ((1, 64), {"seed": 7, "purpose": 4, "draw": 1000}),
]


def main() -> None:
    cases = []
    for shape, key in CASES:
        full = {"purpose": 0, "draw": 0, "first_sample": 0, **key}
        word = oracle.words(shape[0], math.prod(shape[1:]), **full)
        with score_kernels.use_backend("reference"):
            z = ops.normal(shape, NoiseKey(**full))
        cases.append(
            {
                "key": full,
                "shape": shape,
                "words": word.flatten().tolist(),
                "normals": [v.hex() for v in z.flatten().tolist()],
            }
        )
    path = Path(__file__).parent / "data/golden.json"
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
