"""Two numbers at a time: correlations of neighbours in every sense, and repeats."""

from __future__ import annotations

import math

import numpy as np

from tools.noise_statistics import laws
from tools.noise_statistics.findings import Finding
from tools.noise_statistics.streams import FIELDS, Group, Source

LAGS = range(1, 9)


class Correlations:
    """Sums over pairs of ``z w`` and of ``(z^2 - 1) (w^2 - 1)``, whose variances are 1 and 4."""

    def __init__(self) -> None:
        # name -> [pairs, plain sum, sum of squares]
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, z: np.ndarray, w: np.ndarray) -> None:
        self._add(name, z, w, _centred(z), _centred(w))

    def _add(self, name: str, z: np.ndarray, w: np.ndarray, z2: np.ndarray, w2: np.ndarray) -> None:
        sums = self.sums.setdefault(name, [0, 0.0, 0.0])
        sums[0] += len(z)
        sums[1] += float(np.dot(z, w))
        sums[2] += float(np.dot(z2, w2))

    def add_within(self, block: np.ndarray) -> None:
        """block: [rows, elements]. A lag also joins the end of a row and the start of the next."""
        z = block.ravel()
        z2 = _centred(z)
        for lag in LAGS:
            self._add(f"elements {lag} apart", z[:-lag], z[lag:], z2[:-lag], z2[lag:])
        self._add("the two of a pair", z[::2], z[1::2], z2[::2], z2[1::2])
        row = block.shape[1]
        if len(block) > 1:
            self._add("consecutive samples", z[:-row], z[row:], z2[:-row], z2[row:])

    def add_group(self, blocks: dict[tuple[int, ...], np.ndarray]) -> None:
        """The blocks of a group, flat: pairs whose keys differ by one in one field."""
        for key, z in blocks.items():
            for axis, field in enumerate(FIELDS):
                if key[axis] == 0:
                    neighbour = (*key[:axis], 1, *key[axis + 1 :])
                    self.add(f"consecutive {field}", z, blocks[neighbour])

    def add_far(self, z: np.ndarray, group: Group, source: Source) -> None:
        for name, key in group.far.items():
            self.add(name, z, source(group.rows, group.elements, key).ravel())

    def findings(self) -> list[Finding]:
        out = []
        for name, (pairs, plain, squares) in self.sums.items():
            # The correlation is over the mean squares, 1 of z and 2 of z^2 - 1.
            for what, total, square in (("", plain, 1), (", squares", squares, 2)):
                correlation, scale = total / square / pairs, 1 / math.sqrt(pairs)
                p = laws.two_sided(correlation / scale)
                full = f"correlation, {name}{what}"
                out.append(Finding(full, f"{correlation:+.2e}", f"0 +- {scale:.1e}", p))
        return out


def _centred(z: np.ndarray) -> np.ndarray:
    return z * z - 1


class Repeats:
    """Four numbers out of every 4096, compared with all the others kept."""

    STRIDE = 4096
    NAME = f"stretches of {STRIDE} that repeat"

    def __init__(self, count: int) -> None:
        """For count numbers: their place is made at once, as small arrays kept between large ones
        that come and go would stop memory from being used again."""
        self.kept = np.empty(count // self.STRIDE, "V16")
        self.filled = 0

    def add(self, z: np.ndarray) -> None:
        stretches = z[: len(z) // self.STRIDE * self.STRIDE].reshape(-1, self.STRIDE)
        starts = np.ascontiguousarray(stretches[:, :4]).view("V16").ravel()
        self.kept[self.filled : self.filled + len(starts)] = starts
        self.filled += len(starts)

    def findings(self) -> list[Finding]:
        kept = self.kept[: self.filled]
        repeats = len(kept) - len(np.unique(kept))
        # Chance repeats four normals, about 100 bits, once in 10^18 runs of 10^9.
        p = 0.0 if repeats else 1.0
        return [Finding(self.NAME, f"{repeats} of {len(kept):,}", "0", p)]
