"""Rows with addresses have the noise of their sample, wherever they are."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances
import torch
from addressed import ELEMENTS, EXACT, KEY, SUMS, Batch
from conftest import on_backend
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import score_kernels as sk
from score_kernels import NoiseKey, ops
from score_kernels.backends import reference
from score_kernels.noise import _restored
from score_kernels.sampling.sde import norm_ratio

EVERY = {**EXACT, **SUMS}
each_op = pytest.mark.parametrize("name", EVERY)


@pytest.mark.parametrize("elements", ELEMENTS)
def test_noise_is_the_counter_s(backend: str, elements: int) -> None:
    batch = Batch(150 if elements < 64 else 9, elements)
    want = oracle.addressed_words(batch.addresses, elements, KEY.seed, KEY.purpose)
    got = batch.apply(EXACT["words"]).numpy()
    np.testing.assert_array_equal(got, want[:, :elements].astype(np.int64))


@each_op
def test_rows_do_not_depend_on_those_beside_them(backend: str, name: str) -> None:
    """Permuted, dropped, repeated and merged rows, and each alone."""
    for elements in (1, 2, 3, 4, 6, 63, 132, 1030):
        rows = 70 if elements < 64 else 5
        batch = Batch(rows, elements)
        whole = batch.apply(EVERY[name])
        for chosen in (
            torch.randperm(rows),
            torch.randperm(rows)[: rows // 2],
            torch.randint(rows, (2 * rows,)),
            torch.arange(rows - 1, rows),
        ):
            assert torch.equal(batch[chosen].apply(EVERY[name]), whole[chosen])


@each_op
def test_backends_agree(backend: str, name: str) -> None:
    for elements in ELEMENTS:
        batch = Batch(70 if elements < 64 else 5, elements)
        got = batch.apply(EVERY[name])
        with on_backend("reference"):
            want = batch.apply(EVERY[name])
        if name in EXACT:
            assert torch.equal(got, want)
        else:
            scale = math.sqrt(elements) * want.abs().max() + 1
            assert (got - want).abs().max() <= tolerances.FP32_RELATIVE * scale


def test_plain_keys_and_pieces_are_addresses(backend: str) -> None:
    """A batch is its samples in order, and a sample the pieces that it is cut into."""
    samples = torch.arange(2**32 - 3, 2**32 + 4)
    for elements in (1, 3, 4, 12, 1024):
        plain = KEY.for_samples(2**32 - 3)
        got = ops.normal((7, elements), KEY.rows(samples))
        assert torch.equal(got, ops.normal((7, elements), plain))
        alone = ops.normal((1, elements), NoiseKey(KEY.seed, purpose=2, draw=22, first_sample=8))
        row = KEY.rows(torch.tensor([8]), draws=torch.tensor([5]))
        assert torch.equal(ops.normal((1, elements), row), alone)
        if elements % 4 == 0:
            whole = ops.normal((7, 3 * elements), plain).view(21, elements)
            pieces = KEY.rows(samples.repeat_interleave(3), pieces=torch.arange(3).repeat(7))
            assert torch.equal(ops.normal((21, elements), pieces), whole)


def test_addresses_change_in_place() -> None:
    """As under a captured graph: kernels read them where they are."""
    first, second = (KEY.rows(torch.tensor(rows)) for rows in ([1, 2], [9, 4]))
    want = ops.normal((2, 5), second)
    assert first.addresses is not None and second.addresses is not None
    first.addresses.copy_(second.addresses)
    assert torch.equal(ops.normal((2, 5), first), want)


def test_kernels_on_a_gpu_make_bad_rows_nan() -> None:
    """Where nothing waits for a check: no other row changes, and none is left out."""
    rows, most = 5, 2**32 - 1
    sample = [3, -1, 2**56, 7, 8]
    draw, piece = [0, 0, 0, most, 0], [0, 0, 0, 0, most]
    packed = torch.stack([torch.tensor(sample), torch.tensor(draw) << 32 | torch.tensor(piece)], 1)
    bad = _restored(*KEY[:4], torch.cat([packed, packed[:1]]))
    good = KEY.rows(torch.tensor([3] * rows))
    for elements in (5, 8, 132, 1028):
        batch = Batch(rows, elements)
        with on_backend("fibers"):
            for name, op in EVERY.items():
                got, want = op(bad, *batch.parts[3:]), op(good, *batch.parts[3:])
                assert torch.equal(got[0], want[0])
                wrong = got[1:] == -1 if name == "words" else got[1:].isnan()
                # Signs are cut by a mask, and known elements may have no noise.
                if name == "known":
                    wrong = wrong | batch.parts[6][1:]
                assert wrong.all(), name


@each_op
def test_compiled(name: str) -> None:
    batch = Batch(7, 130)

    def inside(samples: Tensor, draws: Tensor, pieces: Tensor, *rest: Tensor) -> Tensor:
        return EVERY[name](KEY.rows(samples, draws=draws, pieces=pieces), *rest)

    want = batch.apply(EVERY[name])
    compiled = partial(torch.compile, fullgraph=name != "dsm gradient", backend="aot_eager")
    torch._dynamo.reset()
    for function, arguments in (
        (compiled(inside), batch.parts),
        (compiled(EVERY[name]), [batch.key, *batch.parts[3:]]),
    ):
        torch.testing.assert_close(function(*arguments), want, rtol=1e-6, atol=1e-5)


def test_autograd_and_checkpointing() -> None:
    batch = Batch(4, 6)
    x, s, _, _, sigma, _ = (p.double() if p.dtype == torch.float32 else p for p in batch.parts[3:])
    sigma, key = sigma.float(), batch.key

    def chain(x: Tensor, s: Tensor) -> Tensor:
        moved = ops.langevin_step(x, s, 0.1, key)
        noisy = ops.perturb(moved, sigma, key.at(1))
        return ops.dsm_loss_from_score(noisy * s, sigma, key) + ops.ssm_reduce(moved, s, key)

    leaves = [t.requires_grad_() for t in (x, s)]
    key = batch.key.at(0)
    with on_backend("reference"):
        assert torch.autograd.gradcheck(chain, leaves)
        want = torch.autograd.grad(chain(*leaves).sum(), leaves)
        again = checkpoint(chain, *leaves, use_reentrant=False)
        for g, w in zip(torch.autograd.grad(again.sum(), leaves), want, strict=True):
            assert torch.equal(g, w)


def test_keys_are_copied_and_pickled() -> None:
    key = Batch(5, 4).key
    for other in (pickle.loads(pickle.dumps(key)), copy.deepcopy(key)):
        assert torch.equal(ops.normal((5, 4), other), ops.normal((5, 4), key))
    assert repr(KEY.rows(torch.tensor([1, 2]))).endswith(".rows(<2 addresses>)")
    # Other draws and purposes keep the rows; a range of samples has none.
    assert key.at(3).addresses is key.addresses is key.for_purpose(9).addresses
    assert key.for_samples(4).addresses is None


IDS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: KEY.rows(torch.tensor([-1, 0])), ValueError, "samples: got -1, expected 0 <="),
        (lambda: KEY.rows(torch.tensor([0, 2**56])), ValueError, "samples: got 7205759403792793"),
        (lambda: KEY.rows(IDS, draws=IDS - 1), ValueError, "draws: got -1"),
        (lambda: KEY.rows(IDS, draws=IDS << 32), ValueError, "draws: got 4294967296"),
        (lambda: KEY.rows(IDS, pieces=IDS - 1), ValueError, "pieces: got -1"),
        (lambda: KEY.rows(IDS.int()), TypeError, "samples: got a tensor .* int64 tensor"),
        (lambda: KEY.rows(IDS[None]), TypeError, "samples: got a tensor"),
        (lambda: KEY.rows([0, 1]), TypeError, "samples: got list"),
        (lambda: KEY.rows(IDS, draws=3), TypeError, "draws: got int 3"),
        (lambda: KEY.rows(IDS, draws=IDS[:1]), ValueError, "draws: got 1 on cpu, expected .* 2"),
        (lambda: KEY.rows(IDS, pieces=IDS.to("meta")), ValueError, "pieces: got 2 on meta"),
        (lambda: ops.normal((3, 4), KEY.rows(IDS)), ValueError, "addresses of 2 rows .* 3 on cpu"),
        (lambda: ops.perturb(torch.zeros(3, 4), torch.ones(3), KEY.rows(IDS)), ValueError, "2 row"),
        (lambda: ops.langevin_step_(torch.zeros(1, 4), torch.zeros(1, 4), 0.1, KEY.rows(IDS)),
         ValueError, "addresses of 2 rows"),
        (lambda: ops.normal((2, 4), KEY.rows(IDS, draws=IDS * (2**32 - 1))), ValueError, "draw"),
        (lambda: ops.normal((2, 4), KEY.rows(IDS, draws=IDS).at(2**32 - 1)), ValueError, "draw"),
        (lambda: ops.normal((2, 8), KEY.rows(IDS, pieces=IDS << 31)), ValueError, "piece"),
        (lambda: sk.dsm_loss(score, torch.zeros(2, 4), [1.0], noise=KEY.rows(IDS), samples=IDS),
         ValueError, "samples: got samples beside a noise with addresses"),
        (lambda: sampler((2, 4), first_sample=1, samples=IDS), ValueError, "beside first_sample"),
        (lambda: sampler((3, 4), samples=IDS), ValueError, "addresses of 2 rows .* 3 on cpu"),
        (lambda: sampler(torch.zeros(3, 4), samples=IDS), ValueError, "addresses of 2 rows"),
        (lambda: sk.dsm_loss(score, torch.zeros(2, 4), [1.0], segments=IDS[:1]), ValueError,
         "segments: got 1 on cpu, expected one a row, 2 on cpu"),
        (lambda: sk.dsm_loss(score, torch.zeros(2, 4), [1.0], segments=IDS - 1), ValueError,
         "segments: got values from -1 to 0"),
        (lambda: sk.sliced_score_loss(score, torch.zeros(2, 4), 1.0, segments=IDS + 1), ValueError,
         "segments: got values from 1 to 2"),
        (lambda: sk.dsm_loss(score, torch.zeros(2, 4), [2.0, 1.0], segments=IDS * 0, labels=IDS),
         ValueError, "labels: got several levels in a segment"),
        (lambda: corrected((3, 4), segments=IDS), ValueError, "segments: got 2 on cpu, .* 3 on"),
        (lambda: corrected((2, 4), segments=IDS, corrector="ald"), ValueError, "corrector 'ald'"),
        (lambda: norm_ratio(reference.backend, torch.ones(4, 3), KEY.rows(IDS), False), ValueError,
         "addresses of 2 rows"),
    ],
)  # fmt: skip
def test_what_is_refused(
    backend: str, call: Callable[[], Any], kind: type[Exception], words: str
) -> None:
    if backend == "fibers" and words in ("draw", "piece"):
        assert bool(call()[1].isnan().all())
        return
    with pytest.raises(kind, match=words):
        call()


def score(x: Tensor, sigma: Tensor) -> Tensor:
    """Elementwise: no batch can change its bits."""
    level = sigma.view(-1, *[1] * (x.dim() - 1))
    return (0.7 - x) / (0.36 + level.square()) + 0.1 * torch.sin(x)


SIGMAS = [2.0, 1.0, 0.5]
DDPM = sk.DDPMSchedule.linear(steps=40)
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "langevin": partial(sk.langevin, score, step_size=0.1, steps=9, sigma=1.0),
    "annealed": partial(
        sk.annealed_langevin, score, sigmas=SIGMAS, steps_per_level=3, step_size=0.1
    ),
    "consistent": partial(
        sk.consistent_annealed, score, sigmas=[2.0, 1.9, 1.8], step_size=3.24 * 0.2
    ),
    "euler": partial(sk.euler_maruyama, score, sde=sk.VP(), steps=9),
    "predictor": partial(
        sk.predictor_corrector, score, sde=sk.VE(sigma_max=5.0), steps=9, corrector="langevin"
    ),
    "ald": partial(
        sk.predictor_corrector, score, sde=sk.VP(beta_max=8.0), steps=9, corrector="ald"
    ),
    "ddpm": partial(sk.ddpm, score, schedule=DDPM),
    "ddim": partial(sk.ddim, score, schedule=DDPM, steps=9, eta=0.7),
    "heun": partial(sk.probability_flow, score, sigmas=SIGMAS),
    "churn": partial(sk.probability_flow, score, sigmas=SIGMAS, churn=2.0, churn_range=(0.0, 9.0)),
}
sampler = SAMPLERS["annealed"]
corrected = partial(sk.predictor_corrector, score, sde=sk.VE(), steps=3, corrector="langevin")


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_those_of_their_ids(name: str) -> None:
    sampler = partial(SAMPLERS[name], seed=11)
    whole = sampler((9, 5))
    ids = torch.tensor([7, 2, 2, 8, 0])
    got = sampler((5, 5), samples=ids)
    assert torch.equal(got, whole[ids])
    # Known parts start from noise of their own.
    known, mask = torch.randn(9, 5), torch.rand(9, 5) < 0.5
    inpainted = sampler((9, 5), known=known, mask=mask)
    part = sampler((5, 5), samples=ids, known=known[ids], mask=mask[ids])
    assert torch.equal(part, inpainted[ids])
    # Resumed, in another order.
    states: list[Tensor] = []
    auxiliary: list[dict[str, Tensor]] = []

    def keep(progress: sk.sampling.Progress) -> None:
        states.append(progress.x.clone())
        auxiliary.append({k: v.clone() for k, v in progress.aux.items()})

    sampler((5, 5), samples=ids, callback=keep)
    at, order = len(states) // 2, torch.tensor([4, 0, 3])
    aux = {k: v[order] for k, v in auxiliary[at].items()}
    more = {"aux": aux} if aux else {}
    resumed = sampler(states[at][order], samples=ids[order], first_step=at + 1, **more)
    assert torch.equal(resumed, whole[ids[order]])


def test_pieces_of_samples_make_the_samples() -> None:
    for name in ("annealed", "euler", "ald", "ddim", "churn"):
        sampler = partial(SAMPLERS[name], seed=12)
        whole = sampler((4, 3 * 8))
        ids, pieces = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
        order = torch.randperm(12)
        got = sampler((12, 8), samples=ids[order], pieces=pieces[order])
        assert torch.equal(got, whole.view(12, 8)[order]), name
        # Without samples the rows' own: row r is sample r.
        apart = sampler((4, 8), pieces=torch.tensor([2, 0, 1, 2]))
        assert torch.equal(apart, whole.view(4, 3, 8)[torch.arange(4), [2, 0, 1, 2]]), name


def test_draws_move_a_chain_s_noise_on() -> None:
    run = partial(sk.langevin, score, step_size=0.1, sigma=1.0, seed=13)
    x = torch.randn(3, 5)
    moved = run(x, steps=6, draws=torch.tensor([0, 4, 9]))
    for row, draw in enumerate((0, 4, 9)):
        alone = run(x[row : row + 1], steps=draw + 6, first_step=draw, first_sample=row)
        assert torch.equal(moved[row], alone[0])


def test_likelihoods_have_the_probes_of_their_ids() -> None:
    x = torch.randn(5, 4)
    run = partial(sk.log_likelihood, score, sigmas=SIGMAS, seed=3, probe="gaussian")
    whole, ids = run(x), torch.tensor([3, 1])
    assert torch.equal(run(x[ids], samples=ids), whole[ids])
    assert not torch.equal(run(x[ids]), whole[ids])


@pytest.mark.parametrize("segmented", [False, True])
def test_losses_of_packed_rows(segmented: bool) -> None:
    """Graphs of unequal sizes, packed in any order: each has the loss that it has alone."""
    sizes, ids = [3, 1, 5, 2], torch.tensor([70, 3, 2**40, 3**9])
    graph = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    place = torch.cat([torch.arange(size) for size in sizes])
    order = torch.randperm(len(graph))
    graph, place = graph[order], place[order]
    x = torch.randn(len(graph), 4)
    more = {"segments": graph} if segmented else {}

    def losses(rows: Tensor, **more: Any) -> list[Tensor]:
        chosen = {"samples": ids[graph[rows]], "pieces": place[rows], "seed": 4, **more}
        level = (graph[rows] + 1.0) / 3
        found = [sk.dsm_loss(score, x[rows], SIGMAS, reduction="none", **chosen)]
        for method in ("double_backward", "jvp", "finite_difference"):
            sliced = partial(sk.sliced_score_loss, score, x[rows], level, method=method, **chosen)
            found += [
                sliced(reduction="none", variance_reduced=reduced) for reduced in (True, False)
            ]
        return found

    together = losses(torch.arange(len(graph)), **more)
    for g, size in enumerate(sizes):
        rows = (graph == g).nonzero()[:, 0]
        for packed, alone in zip(together, losses(rows), strict=True):
            assert len(alone) == size
            got = packed[g] if segmented else packed[rows]
            want = alone.sum() if segmented else alone
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["draws", "pieces"])
def test_losses_take_the_numbers_of_their_rows(name: str) -> None:
    """0 is the row without one; other numbers have other noise."""
    x, numbers = torch.randn(3, 4), torch.tensor([0, 5, 2])
    label, level = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    for loss in (
        partial(sk.dsm_loss, score, x, SIGMAS, labels=label),
        partial(sk.sliced_score_loss, score, x, level, probe="gaussian"),
    ):
        given = {"samples": torch.arange(3), "seed": 4, "reduction": "none"}
        same = loss(**given, **{name: numbers}) == loss(**given)
        assert same.tolist() == [True, False, False]


def test_losses_at_draws_of_their_own() -> None:
    x, draws = torch.randn(3, 4), torch.tensor([0, 5, 2])
    for loss in (
        partial(sk.dsm_loss, score, sigmas=SIGMAS, reduction="none"),
        partial(sk.sliced_score_loss, score, sigma=0.5, reduction="none"),
    ):
        got = loss(x=x, seed=4, draws=draws)
        for row, draw in enumerate(draws.tolist()):
            key = NoiseKey(4, draw=draw, first_sample=row)
            assert torch.equal(got[row], loss(x=x[row : row + 1], noise=key)[0])


def test_a_graph_s_levels_and_reductions() -> None:
    """One level for all rows of a graph, which one sample of [3, 4] would have too."""
    graph, place = torch.arange(6).repeat_interleave(3), torch.arange(3).repeat(6)
    x = torch.randn(18, 4)
    packed = partial(sk.dsm_loss, score, x, SIGMAS, seed=5, segments=graph)
    addressed = partial(packed, samples=graph, pieces=place)
    whole = partial(sk.dsm_loss, score, x.view(6, 3, 4), SIGMAS, seed=5)
    for reduction in ("none", "mean", "sum"):
        got, want = addressed(reduction=reduction), whole(reduction=reduction)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    loss, table = addressed(return_per_level=True)
    expected, levels = whole(return_per_level=True)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(table, levels, rtol=1e-6, atol=0, equal_nan=True)
    # Without ids a segment is a sample, and its rows still have one level.
    seen: list[Tensor] = []
    sk.dsm_loss(lambda y, s: seen.append(s) or score(y, s), x, SIGMAS, seed=5, segments=graph)
    by_graph = seen[0].view(6, 3)
    assert torch.equal(by_graph, by_graph[:, :1].expand(6, 3)) and len(by_graph.unique()) > 1
    sliced = partial(sk.sliced_score_loss, score, x, 0.5, seed=5, segments=graph)
    each = sliced(reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(sliced(reduction="sum"), each.sum())
    torch.testing.assert_close(sliced(), each.mean())


def test_segments_without_rows_do_not_count() -> None:
    """A graph without atoms, or numbers left out by a filter."""
    x, graph = torch.randn(5, 4), torch.tensor([0, 0, 3, 1, 3])
    full = torch.tensor([0, 0, 2, 1, 2])
    for loss in (
        partial(sk.dsm_loss, score, x, SIGMAS, labels=torch.ones(5, dtype=torch.int64), seed=1),
        partial(sk.sliced_score_loss, score, x, 0.5, seed=1),
    ):
        assert torch.equal(loss(segments=graph), loss(segments=full))
        each = loss(segments=graph, reduction="none")
        assert len(each) == 4 and each[2] == 0
    _, gaps = sk.dsm_loss(score, x, SIGMAS, seed=1, segments=graph, return_per_level=True)
    _, table = sk.dsm_loss(score, x, SIGMAS, seed=1, segments=full, return_per_level=True)
    torch.testing.assert_close(gaps, table, equal_nan=True)


def test_rows_of_a_segment_have_one_level() -> None:
    """Whatever their ids: that of the first of them."""
    graph = torch.tensor([1, 0, 1, 1, 0, 2])
    seen: list[Tensor] = []

    def net(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return score(x, sigma)

    many = sk.geometric_sigmas(10.0, 0.1, 50)
    for more in ({}, {"samples": torch.arange(6)}, {"pieces": torch.arange(6)}):
        sk.dsm_loss(net, torch.randn(6, 3), many, seed=3, segments=graph, **more)
        sk.dsm_loss(net, torch.randn(6, 3), many, seed=3, **more)
        packed, rows = seen[-2:]
        assert torch.equal(packed, rows[torch.tensor([0, 1, 0, 0, 1, 5])])


def test_keys_are_compared_by_their_addresses_themselves() -> None:
    one, other = (KEY.rows(torch.tensor([1, 2])) for _ in range(2))
    assert one == one.at(one.draw) and one != other and one != KEY and KEY == KEY.at(KEY.draw)
    assert hash(one) == hash(one.at(one.draw)) and len({one, other, KEY, KEY.at(17)}) == 3


def test_compiled_addresses_out_of_range_are_errors() -> None:
    """Nothing is read where they are packed; the kernel finds them."""
    torch._dynamo.reset()

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def noise(samples: Tensor, draws: Tensor, pieces: Tensor) -> Tensor:
        return ops.normal((2, 6), KEY.rows(samples, draws=draws, pieces=pieces))

    assert noise(IDS, IDS, IDS).isfinite().all()
    for bad in (-1, 2**32, 2**57):
        for place in range(3):
            values = [IDS.clone() for _ in range(3)]
            values[place][1] = bad
            if (place, bad) == (0, 2**32):
                continue
            with pytest.raises(ValueError, match="out of range|passes"):
                noise(*values)


def test_segments_have_gradients_and_are_sums_in_order() -> None:
    weight = torch.tensor(1.3, requires_grad=True)
    graph = torch.tensor([1, 0, 1, 2, 0])
    x = torch.randn(5, 4)

    def loss(rows: Tensor, **more: Any) -> Tensor:
        def net(y: Tensor, sigma: Tensor) -> Tensor:
            return weight * score(y, sigma)

        given = {"labels": torch.zeros(len(rows), dtype=torch.int64), "samples": rows}
        return sk.dsm_loss(net, x[rows], [1.0], seed=1, **given, **more)

    (grad,) = torch.autograd.grad(loss(torch.arange(5), segments=graph), weight)
    parts = [loss((graph == g).nonzero()[:, 0], reduction="sum") for g in range(3)]
    (want,) = torch.autograd.grad(sum(parts) / 3, weight)
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_mean", [False, True])
def test_correctors_take_the_norm_of_a_graph(batch_mean: bool) -> None:
    """Packed rows move as the dense batch does, whose sums round differently."""
    graph, place = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    order = torch.randperm(12)
    run = partial(
        sk.predictor_corrector, score, sde=sk.VE(sigma_max=5.0), steps=7, seed=6, snr=0.3,
        corrector="langevin", batch_mean=batch_mean,
    )  # fmt: skip
    dense = run((4, 3 * 8)).view(12, 8)[order]
    ids = {"samples": graph[order], "pieces": place[order]}
    packed = run((12, 8), segments=graph[order], **ids)
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)
    assert (run((12, 8), **ids) - dense).abs().max() > 0.01


def test_divergence_names_the_sample_s_own_id() -> None:
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x))[:, None] == 1, torch.nan, score(x, sigma))

    run = partial(sk.langevin, broken, step_size=0.1, steps=3, sigma=1.0, seed=1)
    with pytest.raises(FloatingPointError, match=rf"sample {2**50} \(row 1\) is not finite after"):
        run((3, 2), samples=torch.tensor([5, 2**50, 6]))
