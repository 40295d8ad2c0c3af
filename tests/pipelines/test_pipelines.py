"""Loops of public pipelines, restated in float64, against the calls of docs/pipelines.md.

The noise is this library's. A loop takes from the page its score, levels and starts, and no
coefficient: each states its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import score_kernels as sk
from score_kernels import NoiseKey, Purpose, ops
from tools import run_docs

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
LOOPS: dict[str, Callable[[Any], dict[str, Tensor]]] = {}


def loop(function: Callable[[Any], dict[str, Tensor]]) -> Callable[[Any], dict[str, Tensor]]:
    """A pipeline by its code: from the page's names, what the page's results must be."""
    LOOPS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The names of the page after its last block."""
    return SimpleNamespace(**run_docs.run(PAGE, tmp_path_factory.mktemp("page")))


def draw(shape: Any, t: int = 0, purpose: int = Purpose.LANGEVIN, seed: int = 0, **rows: Any):
    key = NoiseKey(seed, purpose=purpose).at(t)
    return ops.normal(tuple(shape), key.rows(**rows) if rows else key).double()


def uniform(shape: Any, key: NoiseKey, **rows: Any) -> Tensor:
    return ops.uniform(tuple(shape), key.rows(**rows) if rows else key).double()


def at(score: Callable[..., Tensor], x: Tensor, sigma: float) -> Tensor:
    return score(x, torch.full((len(x),), sigma, dtype=torch.float32))


def by_molecule(values: Tensor, graph: Tensor) -> Tensor:
    """Sums over the rows of each molecule."""
    return values.new_zeros((3, *values.shape[1:])).index_add(0, graph, values)


# Starts of seed 0.
PRIOR = NoiseKey(0, purpose=Purpose.PRIOR)


@loop
def CG(p: Any) -> dict[str, Tensor]:
    x, t, states = draw((9, 3), purpose=Purpose.PRIOR, **p.rows), 0, []
    for sigma in p.levels.tolist():
        if sigma < 0.5:
            break
        eta = 0.01 * (sigma / float(p.levels[-1])) ** 2
        for _ in range(3):
            s = at(p.score, x, sigma)
            norm = s.norm(dim=1, keepdim=True)
            s = torch.where(norm > 1.0, s / norm, s)
            x = x + eta * s + math.sqrt(2 * eta) * draw(x.shape, t, **p.rows)
            states.append(x)
            t += 1
    assert 0 < t < 3 * len(p.levels)
    return {"cg": torch.stack(states)}


def geodiff(p: Any, frozen: Tensor | None = None) -> Tensor:
    x, t = draw((9, 3), purpose=Purpose.PRIOR, **p.rows), 0
    counts = torch.bincount(p.graph)[:, None]
    for sigma in p.levels.tolist():
        eta = 0.01 * (sigma / float(p.levels[-1])) ** 2
        for _ in range(3):
            s = at(p.score, x, sigma)
            if sigma < 2:
                whole = 0.5 * x.cos()
                s = s + 0.2 * whole * (0.6 / whole.norm(dim=1, keepdim=True)).clamp(max=1)
            x = x + eta * s + math.sqrt(2 * eta) * draw(x.shape, t, **p.rows)
            if frozen is not None:
                x[frozen] = 0.25
            x = x - (by_molecule(x, p.graph) / counts)[p.graph]
            x = x.clamp(-8, 8)
            t += 1
    return x


@loop
def GD(p: Any) -> dict[str, Tensor]:
    return {"gd": geodiff(p)}


@loop
def CD(p: Any) -> dict[str, Tensor]:
    x, t = uniform((9, 3), PRIOR, **p.rows), 0
    lattice = p.lattice.double()
    for sigma in p.levels.tolist():
        eta = 0.01 * (sigma / float(p.levels[-1])) ** 2
        for _ in range(3):
            cartesian = torch.einsum("ni,nij->nj", x, lattice)
            step = eta * at(p.score, cartesian, sigma)
            cartesian = cartesian + step + math.sqrt(2 * eta) * draw(x.shape, t, **p.rows)
            x = torch.einsum("ni,nij->nj", cartesian, torch.linalg.pinv(lattice)) % 1
            t += 1
    return {"cd": torch.einsum("ni,nij->nj", x, lattice)}


@loop
def MI(p: Any) -> dict[str, Tensor]:
    x, t = uniform((3, 4, 3), PRIOR), 0
    sigmas = p.cells.flip(0).tolist()
    for i in range(len(sigmas) - 1, 0, -1):
        w = sigmas[i] ** 2 - sigmas[i - 1] ** 2
        x = (x + w * at(p.score, x, sigmas[i]) + math.sqrt(w) * draw(x.shape, t)) % 1
        w = 0.5 * 1e-4 * sigmas[i - 1] ** 2 / sigmas[1] ** 2
        x = x + w * at(p.score, x, sigmas[i - 1]) + math.sqrt(2 * w) * draw(x.shape, t + 1)
        x = x % 1
        t += 2
    return {"mi": x}


@loop
def MG(p: Any) -> dict[str, Tensor]:
    x = start = (5 * p.x0).remainder(1).double()
    levels = [*p.cells.tolist(), 0.0]

    def norms(v: Tensor) -> Tensor:
        return by_molecule(v.square().sum(1), p.graph).sqrt().mean()

    def predicted(x: Tensor, s: Tensor, z: Tensor, sigma: Any, then: Any) -> Tensor:
        std = (sigma**2 - then**2) ** 0.5
        return (x + std**2 * s + std * then / sigma * z) % 1

    capped = []
    for t, (sigma, then) in enumerate(pairwise(levels)):
        s, z = at(p.score, x, sigma), draw(x.shape, 2 * t, **p.rows)
        e = float(2 * (0.1 * norms(z) / norms(s)) ** 2)
        capped.append(e > 0.05)
        e = min(e, 0.05)
        x = (x + e * s + (2 * e) ** 0.5 * z) % 1
        s, z = at(p.score, x, sigma), draw(x.shape, 2 * t + 1, **p.rows)
        x = predicted(x, s, z, sigma, then)
    assert any(capped) and not all(capped)
    # Standard deviations times n^(-1/3) of each crystal; predictor alone.
    rows, size = start, torch.bincount(p.graph)[p.graph, None] ** (-1 / 3)
    for t, (sigma, then) in enumerate(pairwise(levels)):
        s, z = p.score(rows, (sigma * size)[:, 0]), draw(x.shape, t, **p.rows)
        rows = predicted(rows, s, z, sigma * size.double(), then * size.double())
    return {"mg": x, "mixed": rows}


@loop
def SG(p: Any) -> dict[str, Tensor]:
    x, t = 3 * uniform((2, 6, 3), PRIOR) - 1.5, 0
    for sigma in p.levels.tolist():
        delta = 2 * sigma**2 * 0.1
        for _ in range(3):
            x = x + 0.8 * math.sqrt(delta) * draw(x.shape, t)
            x = x + 0.5 * delta * at(p.score, x, sigma)
            t += 1
    return {"sg": x}


@loop
def BZ(p: Any) -> dict[str, Tensor]:
    sigmas = [*p.angstroms.tolist(), 0.0]
    x = sigmas[0] * draw((2, 5, 3), purpose=Purpose.PRIOR)
    for k, (sigma, following) in enumerate(pairwise(sigmas)):
        x = x - x.mean(1, keepdim=True)
        turn = sk.random_rotation(2, NoiseKey(0).at(k)).double()
        x = torch.einsum("bni,bij->bnj", x, turn) + draw((2, 1, 3), k, purpose=0, seed=1)
        t = sigma * (1 + (0.8 if following > 1 else 0.0))
        x = x + 1.003 * math.sqrt(t**2 - sigma**2) * draw(x.shape, k)
        d = x + t**2 * at(p.score, x - p.places.double(), t)
        # Kabsch: the proper rotation of x to d.
        a, b = x - x.mean(1, keepdim=True), d - d.mean(1, keepdim=True)
        u, _, v = torch.linalg.svd(torch.einsum("bni,bnj->bij", a, b))
        signs = torch.diag_embed(torch.ones(2, 3).double())
        signs[:, 2, 2] = torch.linalg.det(u) * torch.linalg.det(v)
        x = a @ u @ signs @ v + d.mean(1, keepdim=True)
        x = x + 1.5 * (following - t) * (x - d) / t
    return {"bz": x}


@loop
def CS(p: Any) -> dict[str, Tensor]:
    x, t, q = uniform((2, 2, 8, 8), PRIOR), 0, 1.3
    for sigma, steps in zip(p.levels.tolist(), [0, 0, 2, 3, 3], strict=True):
        eta = 0.01 * (sigma / float(p.levels[-1])) ** 2
        for _ in range(steps):
            s = at(p.score, x, sigma)
            k = torch.fft.fft2(torch.complex(x[:, 0], x[:, 1]) * q, norm="ortho")
            h = torch.fft.ifft2(p.sampled * (p.sampled * k - p.kspace), norm="ortho") / q
            h = torch.stack([h.real, h.imag], 1)
            g = 5 * s.square().sum().sqrt() / h.square().sum().sqrt() * h
            x = x + eta * (s - g) + math.sqrt(2 * eta) * draw(x.shape, t)
            t += 1
    return {"cs": x}


def predict_and_correct(x: Tensor, p: Any, after: Callable[[Tensor, int, float], Tensor]) -> Tensor:
    """Corrector and reverse diffusion on VE levels, with noise in the last step too."""
    t = 0
    for sigma, then in pairwise([*p.levels.tolist(), 0.0]):
        s, z = at(p.score, x, sigma), draw(x.shape, t)
        norms = [v.flatten(1).norm(dim=1).mean() for v in (z, s)]
        e = 2 * (0.16 * norms[0] / norms[1]) ** 2
        x = after(x + e * s + (2 * e).sqrt() * z, t, sigma)
        g = sigma**2 - then**2
        x = x + g * at(p.score, x, sigma) + math.sqrt(g) * draw(x.shape, t + 1)
        x = after(x, t + 1, sigma)
        t += 2
    return x


@loop
def SM(p: Any) -> dict[str, Tensor]:
    def measured(x: Tensor, t: int = 0, sigma: float = 0) -> Tensor:
        k = ~p.sampled * torch.fft.fft2(x, norm="ortho") + p.kspace
        return torch.fft.ifft2(k, norm="ortho").real

    x = float(p.levels[0]) * draw((2, 1, 8, 8), purpose=Purpose.PRIOR)
    return {"sm": predict_and_correct(measured(x), p, measured)}


@loop
def SI(p: Any) -> dict[str, Tensor]:
    def known(x: Tensor, t: int, sigma: float) -> Tensor:
        z = draw(x.shape, t, Purpose.KNOWN)
        return ~p.left * x + p.left * (p.picture + sigma * z)

    x = ~p.left * float(p.levels[0]) * draw((2, 3, 4, 4), purpose=Purpose.PRIOR)
    x = predict_and_correct(x + p.left * p.picture, p, known)
    return {"si": ~p.left * x + p.left * p.picture}


@loop
def SN(p: Any) -> dict[str, Tensor]:
    v, s0 = p.basis.double(), 0.5
    u, t = uniform((3, 6), PRIOR) @ v, 0
    kappa = 0.01 / float(p.levels[-1]) ** 2
    for sigma in p.levels.tolist():
        for _ in range(3):
            s, z = at(p.score, u @ v.T, sigma) @ v, draw(u.shape, t)
            for j, (d, y) in enumerate(zip(p.d.tolist(), p.y.tolist(), strict=True)):
                pull = d * (y - d * u[:, j])
                if d * sigma > s0:
                    eta, g = kappa * (sigma**2 - s0**2 / d**2), pull / (d**2 * sigma**2 - s0**2)
                elif 0 < d * sigma < s0:
                    eta = kappa * sigma**2 * (1 - d**2 * sigma**2 / s0**2)
                    g = s[:, j] + pull / (s0**2 - d**2 * sigma**2)
                else:
                    eta, g = kappa * sigma**2, s[:, j] if d == 0 else 0
                u[:, j] += eta * g + math.sqrt(2 * eta) * z[:, j]
            t += 1
    return {"sn": u @ v.T}


def annealed(x: Tensor, p: Any, z: Any, before: Any = None, denoise: bool = True) -> Tensor:
    """Annealed Langevin dynamics of NCSNv2."""
    t = 0
    for sigma in p.levels.tolist():
        eta = 0.01 * (sigma / float(p.levels[-1])) ** 2
        for _ in range(3):
            x = x if before is None else before(x, t, sigma)
            x = x + eta * at(p.score, x, sigma) + math.sqrt(2 * eta) * z(x, t)
            t += 1
    return x + sigma**2 * at(p.score, x, sigma) if denoise else x


@loop
def NC(p: Any) -> dict[str, Tensor]:
    def plain(x: Tensor, t: int) -> Tensor:
        return draw(x.shape, t)

    def known(x: Tensor, t: int, sigma: float) -> Tensor:
        return ~p.left * x + p.left * (p.picture + sigma * draw(x.shape, t, Purpose.KNOWN))

    def mixed(x: Tensor, t: int) -> Tensor:
        theta = torch.linspace(0, math.pi / 2, 5).double()[:, None, None]
        first, second = draw((2, 3, 4), t)
        return theta.cos() * first + theta.sin() * second

    x = uniform((2, 3, 4, 4), PRIOR)
    return {
        "nc": annealed(x, p, plain),
        "inpainted": annealed(x, p, plain, known, denoise=False),
        "interpolated": annealed(uniform((5, 3, 4), PRIOR), p, mixed),
    }


@loop
def DI(p: Any) -> dict[str, Tensor]:
    a, y, states = p.physics.double(), p.seen.double(), []
    x = y @ a
    for t in range(20):
        drift = (y - x @ a.T) @ a / 0.4**2 + 0.8 * at(p.score, x, 0.05)
        x = (x + 0.05 * drift + math.sqrt(2 * 0.05) * draw(x.shape, t)).clamp(-0.5, 1)
        if t % 5 == 4:
            states.append(x)
    return {"di": torch.stack(states)}


@loop
def JM(p: Any) -> dict[str, Tensor]:
    buffer, age = 2 * uniform((50, 8), PRIOR) - 1, torch.arange(50)
    rows = torch.tensor([41, 7, 12])
    x = buffer[rows]
    for t in range(20):
        x = x + p.force(x) + 0.01 * draw(x.shape, t, samples=rows, draws=age[rows])
    buffer[rows] = x
    return {"jm": x, "buffer": buffer}


@loop
def IG(p: Any) -> dict[str, Tensor]:
    x = uniform((3, 2, 4, 4), PRIOR)
    for t in range(10):
        x = x + 0.005 * draw(x.shape, t)
        x = (x - 10 * (-p.flat(x)).clamp(-0.01, 0.01)).clamp(0, 1)
    return {"ig": x}


@loop
def NA(p: Any) -> dict[str, Tensor]:
    x = draw((3, 4), purpose=Purpose.PRIOR)
    x = x / x.norm(dim=1, keepdim=True)
    for t in range(10):
        x = x + p.force(x) + 0.02 * draw(x.shape, t)
        x = x / x.norm(dim=1, keepdim=True)
    latent, nu = x, 0.05
    x = (latent @ torch.linspace(-1, 1, 24).view(4, 6).double()).clamp(0, 1)
    for t in range(10):
        g = (-p.flat(x)).clamp(-0.01, 0.01)
        x = (x - 10 * g + nu * draw(x.shape, t, seed=1)).clamp(0, 1)
        nu = 0.05 / (1 + t)
    chain, lam, rejected = draw((40, 2), purpose=Purpose.PRIOR), 0.3, 0
    for t in range(10):
        kick = math.sqrt(2 * lam) * draw((40, 2), t)
        g = -p.force(chain)
        moved = chain - lam * g + kick
        turned = ((g - p.force(moved)) * lam - kick).square().sum(1) - kick.square().sum(1)
        log_a = p.energy(chain) - p.energy(moved) - turned / (4 * lam)
        accepted = uniform((40,), NoiseKey(0).at(t)) < log_a.exp()
        chain = torch.where(accepted[:, None], moved, chain)
        rejected += int((~accepted).sum())
    assert rejected > 0
    return {"latent": latent, "na": x, "metropolis": chain}


@loop
def TE(p: Any) -> dict[str, Tensor]:
    x = draw((3, 5), purpose=Purpose.PRIOR)
    for t in range(10):
        eta, nu = 0.3 / (1 + t), 1 / (1 + t)
        x = x + eta * p.force(x) + nu * math.sqrt(2 * eta) * draw(x.shape, t)
        x = x.clamp(-1, 1)
    q, m, h = draw((40, 2), purpose=Purpose.PRIOR), draw((40, 2)), 0.2
    start, before = q, p.energy(q) + 0.5 * m.square().sum(-1)
    for _ in range(10):
        m = m + 0.5 * h * p.force(q)
        q = q + h * m
        m = m + 0.5 * h * p.force(q)
    fall = (before - p.energy(q) - 0.5 * m.square().sum(-1)).clamp(-50, 50)
    accepted = uniform((40,), NoiseKey(0)) < fall.exp().clamp(max=1)
    return {"te": x, "hmc": torch.where(accepted[:, None], q, start)}


@loop
def FG(p: Any) -> dict[str, Tensor]:
    x, z = draw((3, 4, 2, 2), purpose=Purpose.PRIOR), draw((3, 4, 2, 2))
    v = draw(x.shape, 1, Purpose.PRIOR) + 0.7
    fg, fg_cps = x.clone(), x.clone()
    for row, (s, s1) in enumerate([(0.9, 0.7), (0.6, 0.3), (0.4, 0.35)]):
        std, h = 0.7 * math.sqrt(s / (1 - s)), s - s1
        mean = x * (1 - std**2 * h / (2 * s)) - v * h * (1 + std**2 * (1 - s) / (2 * s))
        fg[row] = (mean + std * math.sqrt(h) * z)[row]
        # Estimates of the data and of the noise, of which some is kept and some is new.
        data, kept = x - s * v, x + (1 - s) * v
        angle = 0.7 * math.pi / 2
        moved = (1 - s1) * data + s1 * math.cos(angle) * kept + s1 * math.sin(angle) * z
        fg_cps[row] = moved[row]
    return {"fg": fg, "fg_cps": fg_cps}


@loop
def DV(p: Any) -> dict[str, Tensor]:
    starts = [[0.5, -1.2, 0.9], [0.4, 0.8]]
    results = []
    for i, (start, mask) in enumerate(zip(starts, [[1, 0, 1], [1, 1]], strict=True)):
        w0, m = torch.tensor([start]).double(), torch.tensor([mask])
        w = w0
        for t in range(8):
            z = ops.normal(w.shape, NoiseKey(0, purpose=Purpose.LANGEVIN).at(t).for_samples(i))
            pull = -5 * p.force(w) + 0.1 * w + 2 * (w - w0)
            w = w - 0.5 * 0.1 * m * pull + m * math.sqrt(0.1) * 0.9 * z.double()
            w = torch.minimum(torch.maximum(w, w0 - 0.5), w0 + 0.5)
        results.append(w)
    w0 = torch.tensor(starts[:1]).double()
    w, v = w0, torch.zeros(1, 3).double()
    for t in range(8):
        g = -p.force(w)
        v = 0.99 * v + 0.01 * g * g
        gain = 1 / (v.sqrt() + 0.1)
        pull = 5 * g + 2 * (w - w0)
        w = w - 0.5 * 0.01 * gain * pull + (0.01 * gain).sqrt() * draw(w.shape, t)
    return {"weights[0]": results[0], "weights[1]": results[1], "sgmcmc": w}


@loop
def PO(p: Any) -> dict[str, Tensor]:
    e, alpha, beta, tau = 0.1, 0.5, 0.2, 0.9
    first = torch.tensor([[0.5, -1.2, 0.9]]).double()
    sgld = sghmc = baoa = first
    m = n = draw((1, 3), purpose=Purpose.PRIOR)
    for t in range(8):
        z = draw((1, 3), t)
        sgld = sgld + e * p.force(sgld) + math.sqrt(tau * e * (2 - tau * e * beta)) * z
        noise = math.sqrt(tau * e * (2 * alpha - tau * e * beta)) * z
        sghmc, m = sghmc + e * m, m + e * p.force(sghmc) - e * alpha * m + noise
        n = n + e * p.force(baoa)
        half = baoa + e / 2 * n
        n = math.exp(-alpha * e) * n + math.sqrt(tau * (1 - math.exp(-2 * alpha * e))) * z
        baoa = half + e / 2 * n
    return {"sgld": sgld, "sghmc": sghmc, "baoa": baoa}


@loop
def MZ(p: Any) -> dict[str, Tensor]:
    theta = [torch.tensor([[0.5, -1.2, 0.9]]).double(), torch.tensor([[0.4, 0.8]]).double()]
    key = NoiseKey(0, purpose=Purpose.LANGEVIN)
    z = [ops.normal(w.shape, key.for_samples(i)).double() for i, w in enumerate(theta)]

    def loss(k: float) -> float:
        return sum(float(p.energy(w + k * 0.01 * zw).sum()) for w, zw in zip(theta, z, strict=True))

    g = (loss(1) - loss(-1)) / 0.02
    moved = [w - 0.05 * (g * zw + 0.1 * w) for w, zw in zip(theta, z, strict=True)]
    return {"theta[0]": moved[0], "theta[1]": moved[1]}


@loop
def ES(p: Any) -> dict[str, Tensor]:
    w = torch.tensor([[0.5, -1.2, 0.9]]).double()
    z = torch.stack([draw(w.shape, purpose=0, seed=i) for i in range(4)])
    r = -p.energy((w + 0.1 * z)[:, 0])
    r = (r - r.mean()) / r.std()
    return {"p": w + 0.05 / 4 * (r[:, None, None] * z).sum(0)}


@pytest.mark.parametrize("code", LOOPS)
def test_the_page_s_call_gives_the_loop_s_states(code: str, page: SimpleNamespace) -> None:
    for name, want in LOOPS[code](page).items():
        got = eval(name, vars(page))
        assert got.shape == want.shape and got.dtype == torch.float32
        error = float((got - want).abs().max() / want.abs().max())
        assert error <= 1e-6, f"{name}: {error:.2g}"


def test_frozen_atoms_leave_the_others_their_path(page: SimpleNamespace) -> None:
    frozen = torch.tensor([0, 4, 7])
    mask = torch.zeros(9, 3, dtype=torch.bool)
    mask[frozen] = True
    p = page
    got = sk.annealed_langevin(
        p.parts, p.x0, p.levels, steps_per_level=3, step_size=0.02, denoise=False, center=p.graph,
        project=lambda x, sigma: x.clamp_(-8, 8), known=torch.tensor(0.25), mask=mask,
        known_noise=False, seed=0, **p.rows,
    )  # fmt: skip
    want = geodiff(p, frozen)
    assert not torch.allclose(want[frozen], torch.tensor(0.25).double())
    want[frozen] = 0.25
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-6


def test_crystals_of_one_size_have_scaled_levels(page: SimpleNamespace) -> None:
    """By the one call, what lines of coefficients for each row give."""
    x = draw((8, 3), purpose=Purpose.PRIOR).remainder(1)
    start, size = x.float(), 4 ** (-1 / 3)
    levels = (page.cells.double() * size).tolist()
    got = sk.predictor_corrector(
        page.score, start, levels, predictor="ancestral", corrector=None, wrap=1.0, seed=0
    )
    for t, (sigma, then) in enumerate(pairwise([*page.cells.tolist(), 0.0])):
        s, std = at(page.score, x, sigma * size), size * math.sqrt(sigma**2 - then**2)
        x = (x + std**2 * s + std * then / sigma * draw(x.shape, t)) % 1
    assert float((got - x).abs().max()) <= 1e-6


def test_the_page_counts_its_pipelines() -> None:
    text = PAGE.read_text(encoding="utf-8")
    kinds = dict(re.findall(r"^\| ([A-Z]{2}) \|.*\| (whole|in part|own loop) \|$", text, re.M))
    assert kinds.keys() == LOOPS.keys()
    steps = list(kinds.values())
    langevin = [kind for code, kind in kinds.items() if kind != "own loop" and code != "BZ"]
    whole, part = langevin.count("whole"), langevin.count("in part")
    words = " ".join(text.split())
    assert f"Of the {len(langevin)} Langevin loops" in words
    assert f"{whole} are one call whole and {part} in part" in words
    assert f"in {len(LOOPS)} of {len(steps)}" in words
    needs = text[text.index("## Needs and options") :]
    named = set(re.findall(r"\b[A-Z]{2}\b", needs))
    assert named == LOOPS.keys()
