"""Training on several processes against one: the same samples, noise, losses and checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from test_commands import SETTINGS

from score_kernels import Trainer
from score_kernels.cli import main as cli
from score_kernels.networks import MLPScore
from score_kernels.training import checkpoint, trainer
from score_kernels.training.distributed import Ranks

HERE = Path(__file__).parent
PROGRAM = HERE / "ranks.py"
# fp32 sums in another order, over a few steps.
ORDER = 1e-5


def launch(
    size: int, *arguments: Any, module: str | None = None, restarts: int = 0, ok: bool = True
) -> str:
    program = [str(PROGRAM)] if module is None else ["-m", module]
    by_torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    if restarts:
        by_torchrun.append(f"--max-restarts={restarts}")
    command = [sys.executable, *by_torchrun, *program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= ORDER * b.norm())


def weights(state: dict[str, Any], which: str) -> torch.Tensor:
    return torch.cat([v.flatten() for v in state[which].values()])


def train_alone(path: Path, steps: int, loss: str = "dsm", accumulate: int = 1) -> dict[str, Any]:
    ranks.train(path, steps, loss, accumulate, None)
    return checkpoint.read(path)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Twelve steps of two ranks that nothing disturbed."""
    path = tmp_path_factory.mktemp("ranks") / "c.pt"
    launch(2, path, 12, "dsm", 1)
    return checkpoint.read(path)


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return torch.equal(a["losses"], b["losses"]) and all(
        torch.equal(weights(a, which), weights(b, which)) for which in ("net", "ema")
    )


@pytest.mark.parametrize("size, loss, accumulate", [(2, "dsm", 2), (3, "dsm", 1), (2, "ssm", 1)])
def test_ranks_train_as_one_process(tmp_path: Path, size: int, loss: str, accumulate: int) -> None:
    alone = train_alone(tmp_path / "alone.pt", 7, loss, accumulate)
    path = tmp_path / "c.pt"
    assert f"{size} ranks, step 7, all equal: True" in launch(size, path, 7, loss, accumulate)
    state = checkpoint.read(path)
    assert close(state["losses"], alone["losses"])
    assert close(state["levels"], alone["levels"])
    # How many samples were drawn at each level is no sum of fractions.
    assert torch.equal(state["levels"][1], alone["levels"][1])
    assert all(
        torch.equal(a.isnan(), b.isnan()) and close(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(state["level_losses"], alone["level_losses"], strict=True)
    )
    for which in ("net", "ema"):
        assert close(weights(state, which), weights(alone, which))
    assert state["settings"] == alone["settings"]


def test_a_training_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    path, alone = tmp_path / "c.pt", train_alone(tmp_path / "alone.pt", 12)
    for size, steps in ((2, 3), (3, 6)):
        launch(size, path, steps, "dsm", 1)
        assert checkpoint.read(path)["step"] == steps
    found = train_alone(path, 12)
    assert close(found["losses"], alone["losses"])
    assert close(weights(found, "ema"), weights(alone, "ema"))


def test_a_rank_that_dies_ends_the_job_and_it_goes_on(
    tmp_path: Path, twelve: dict[str, Any]
) -> None:
    path = tmp_path / "c.pt"
    out = launch(2, path, 12, "dsm", 1, 10, ok=False)
    # torchrun's report names the rank.
    assert "rank      : 1" in out and "Signal 9" in out
    assert checkpoint.read(path)["step"] == 8
    launch(2, path, 12, "dsm", 1)
    assert same_bits(checkpoint.read(path), twelve)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_rank_that_dies_is_started_again_by_torchrun(
    tmp_path: Path, twelve: dict[str, Any]
) -> None:
    out = launch(2, tmp_path / "c.pt", 12, "dsm", 1, 10, restarts=1)
    assert "2 ranks, step 12, all equal: True" in out
    assert same_bits(checkpoint.read(tmp_path / "c.pt"), twelve)


def test_the_ranks_must_share_out_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "current", lambda: Ranks(0, 5))
    net = MLPScore(4, 16)
    message = "accumulate: got 1, expected accumulate x 5 ranks to divide batch_size = 24"
    with pytest.raises(ValueError, match=message):
        Trainer(net, [1.0], torch.optim.SGD(net.parameters()), batch_size=24)


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(SETTINGS)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (12, 6, 7)))
    common = ["--data", tmp_path / "images.npy", "--config", settings]
    assert cli.main(["train", *map(str, common), "--out", str(tmp_path / "one")]) == 0
    arguments = ["train", *common, "--out", tmp_path / "two"]
    out = launch(2, *arguments, module="score_kernels.cli")
    assert out.count("Trained to step 6") == 1
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    one, two = (checkpoint.read(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert close(two["losses"], one["losses"])
    out = launch(2, *arguments, module="score_kernels.cli", ok=False)
    assert "checkpoint.pt exists; go on from it with --resume" in out
