"""Chains by tables and step counters, as a CUDA graph replays them, on the CUDA kernels' fibers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import FIBERS, on_backend
from torch import Tensor

import score_kernels
from score_kernels import NoiseKey, ops
from score_kernels.backends import choose
from score_kernels.diffusion.sde import VP
from score_kernels.networks import MLPScore
from score_kernels.sampling import graph

KEY = NoiseKey(11, purpose=2, draw=5)
SIGMAS = [2.0, 1.0, 0.3]
WHOLE = torch.ones(3, 4, dtype=torch.bool)
FIVE = {"table": torch.ones(3, 5), "known": torch.ones(3, 4), "mask": WHOLE}
TABLE = torch.tensor([[1.0, 0.5, 0.7], [0.9, 0.1, 0.2], [0.8, 0.3, 0.0]])


def test_a_table_s_steps_are_affine_steps(backend: str) -> None:
    x, step = torch.randn(3, 13), torch.zeros((), dtype=torch.int64)
    want = x.clone()
    for t in range(3):
        score = torch.randn(3, 13)
        assert ops.table_step_(x, score, TABLE, step, KEY) is x
        ops.affine_step_(want, score, *TABLE[t].tolist(), KEY.at(5 + t))
        assert torch.equal(x, want)
        step += 1
    with pytest.raises(ValueError, match="step: got 3, expected 0 <= step < 3"):
        ops.table_step_(x, x, TABLE, step, KEY)
    # The last step may have the last draw that there is.
    ops.table_step_(x, x, TABLE, step.zero_(), KEY.at(2**32 - 3))
    with pytest.raises(ValueError, match="noise: got draw 4294967294 with a table of 3 steps"):
        ops.table_step_(x, x, TABLE, step, KEY.at(2**32 - 2))


@pytest.mark.skipif(not FIBERS, reason="needs a C++ compiler")
def test_past_the_table_a_kernel_s_state_is_nan() -> None:
    x, step = torch.randn(2, 5), torch.full((), 3)
    with on_backend("fibers"):
        choose(x.device, x.dtype).table_step(x, x, x.clone(), TABLE, step, KEY)
    assert x.isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": torch.ones(3, 2)}, r"table: got shape \(3, 2\).*expected \[steps, 3\]"),
        ({"table": torch.ones(())}, r"table: got shape \(\).*expected \[steps, 3\]"),
        ({"table": torch.ones(2, 3), "step": None}, r"table: .*expected \[B, 3\] or \[1, 3\]"),
        ({"known": torch.ones(3, 4)}, "mask: got none, expected it beside"),
        ({"mask": WHOLE}, "known: got none, expected it beside"),
        ({"known": torch.ones(3, 4), "mask": WHOLE}, r"table: .* expected \[steps, 5\]"),
        ({**FIVE, "known": torch.ones(3, 5)}, r"known: got shape \(3, 5\).*expected that of x"),
        ({**FIVE, "known": WHOLE}, "known: got torch.bool on cpu, expected torch.float32"),
        ({**FIVE, "mask": torch.ones(3, 4)}, "mask: got torch.float32 on cpu, expected torch.bool"),
        (
            {"x": torch.randn(3, 4, requires_grad=True)},
            "x: got requires_grad=True, expected a tensor w",
        ),
        ({"table": TABLE.double()}, "table: got torch.float64 on cpu, expected torch.float32"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, r"step: got shape \(1,\).*no dimensions"),
        ({"step": torch.zeros(())}, "step: got torch.float32 on cpu, expected torch.int64"),
        ({"step": 0}, "step: got int 0, expected a tensor"),
        ({"x": torch.randn(4, 3).t()}, "x: got strides .* expected a contiguous tensor"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str) -> None:
    zero = torch.zeros((), dtype=torch.int64)
    good = {"x": torch.randn(3, 4), "score": torch.randn(3, 4), "table": TABLE, "step": zero}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.table_step_(**{**good, **change}, noise=KEY)


def eagerly(step: Callable[[], None], x: Tensor, counter: Tensor) -> Callable[[], None]:
    return step


@pytest.mark.skipif(not FIBERS, reason="needs a C++ compiler")
@pytest.mark.parametrize("record", [None, 2])
def test_a_replayed_chain_is_the_chain(monkeypatch: pytest.MonkeyPatch, record: int | None) -> None:
    monkeypatch.setattr("score_kernels.sampling.graph.captured", eagerly)
    torch.manual_seed(0)
    net = MLPScore(2)
    settings: dict[str, Any] = {
        "steps_per_level": 3,
        "step_size": 0.01,
        "seed": 4,
        "record_every": record,
    }
    with on_backend("fibers"):
        seen: list[tuple[int, int, float]] = []

        def see(p: score_kernels.Progress) -> None:
            seen.append((p.step, p.level, p.sigma))

        want = score_kernels.annealed_langevin(net, (5, 2), SIGMAS, callback=see, **settings)
        plain, seen = seen, []
        got = score_kernels.annealed_langevin(
            net, (5, 2), SIGMAS, callback=see, cuda_graph=True, **settings
        )
        assert torch.equal(got, want)
        assert seen == plain
        settings.update(record_every=None, denoise=False)
        half = score_kernels.annealed_langevin(net, (5, 2), SIGMAS, **settings)
        frames = score_kernels.annealed_langevin(
            net, (5, 2), SIGMAS, **{**settings, "record_every": 4}
        )
        resumed = score_kernels.annealed_langevin(
            net, frames[0], SIGMAS, first_step=4, cuda_graph=True, **settings
        )
        assert torch.equal(resumed, half)
        flat = score_kernels.langevin(lambda x: -x, (4, 3), step_size=0.1, steps=5, seed=1)
        graph = score_kernels.langevin(
            lambda x: -x, (4, 3), step_size=0.1, steps=5, seed=1, cuda_graph=True
        )
        assert torch.equal(graph, flat)


@pytest.mark.skipif(not FIBERS, reason="needs a C++ compiler")
def test_replayed_chains_keep_what_is_known_and_scale_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("score_kernels.sampling.graph.captured", eagerly)
    known, mask = torch.randn(5, 2), torch.tensor([True, False])
    settings: dict[str, Any] = {"seed": 4, "known": known, "mask": mask}
    with on_backend("fibers"):
        want, got = (
            score_kernels.euler_maruyama(
                lambda x, _: -x, (5, 2), VP(), steps=7, cuda_graph=graph, **settings
            )
            for graph in (False, True)
        )
        assert torch.equal(got, want)
        assert torch.equal(got[:, 0], known[:, 0])
        with pytest.raises(ValueError, match="cuda_graph: got True, expected steps of one call"):
            score_kernels.probability_flow(lambda x, _: -x, (5, 2), SIGMAS, cuda_graph=True)


@pytest.mark.skipif(not FIBERS, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "options",
    [
        {"clamp": (-0.5, 1.0), "clip_score": 0.3},
        {"wrap": 0.7, "known_noise": False},
        {"precondition": torch.tensor([[0.5, 2.0]]), "temperature": 0.3},
    ],
)
def test_replayed_chains_end_as_others(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("score_kernels.sampling.graph.captured", eagerly)
    settings: dict[str, Any] = {"steps_per_level": 3, "step_size": 0.05, "seed": 4, **options}
    settings |= {"known": torch.randn(5, 2), "mask": torch.tensor([True, False])}
    with on_backend("fibers"):
        want, got = (
            score_kernels.annealed_langevin(
                lambda x, _: -x, (5, 2), SIGMAS, cuda_graph=graph, **settings
            )
            for graph in (False, True)
        )
        assert torch.equal(got, want)
        settings = {"steps_per_level": 1, "step_size": 0.05, "cuda_graph": True}
        for name, value in (
            ("project", lambda x, sigma: None),
            ("noise_first", True),
            ("precondition", lambda sigma: torch.ones(2)),
        ):
            with pytest.raises(ValueError, match="cuda_graph: got True beside project"):
                score_kernels.annealed_langevin(
                    lambda x, _: -x, (5, 2), SIGMAS, **{**settings, name: value}
                )


def test_a_graph_needs_a_device_with_kernels() -> None:
    message = "cuda_graph: got True with a state of torch.float32 on cpu, which the backend"
    with pytest.raises(ValueError, match=message):
        score_kernels.langevin(lambda x: -x, (4, 3), step_size=0.1, steps=5, cuda_graph=True)


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


class Graph:
    """What torch.cuda does, less the GPU: inside `graph` work is recorded, not done."""

    tensors: tuple[Tensor, ...] = ()

    @classmethod
    @contextlib.contextmanager
    def recording(cls, graph: Any) -> Iterator[None]:
        before = [t.clone() for t in cls.tensors]
        yield
        for tensor, value in zip(cls.tensors, before, strict=True):
            tensor.copy_(value)

    def replay(self) -> None:
        for tensor in self.tensors:
            tensor.add_(1)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.recording)


def test_warming_up_and_capturing_leave_the_chain_where_it_was(no_gpu: None) -> None:
    x, counter, calls = torch.zeros(3), torch.full((), 7), []

    def step() -> None:
        calls.append(int(counter))
        x.add_(1)
        counter.add_(1)

    Graph.tensors = (x, counter)
    replay = graph.captured(step, x, counter)
    assert calls == [7, 7, 7, 7]
    assert torch.equal(x, torch.zeros(3)) and int(counter) == 7
    replay()
    assert torch.equal(x, torch.ones(3)) and int(counter) == 8


def test_a_score_that_cannot_be_captured_is_named(no_gpu: None) -> None:
    x, counter, calls = torch.zeros(3), torch.zeros(()), []

    def step() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    Graph.tensors = ()
    with pytest.raises(RuntimeError, match="cuda_graph: the score cannot be captured .operation"):
        graph.captured(step, x, counter)
