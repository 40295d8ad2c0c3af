"""Every example runs, at a small size, as its first lines say; and what the toy learns."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from score_kernels import annealed_langevin
from score_kernels.training import checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_toy(tmp_path: Path) -> None:
    out = run("toy.py", "--out", tmp_path / "o", "--steps", 5, "--chains", 1300)
    assert "mass of the mode at (5, 5)" in out
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"toy-scores.png", "toy-samples.png"}


def test_the_toy_s_learned_score_finds_the_weights_of_the_modes() -> None:
    """0.8 +- 0.05, of a training that is a sixteenth as long as the example's."""
    toy = module("toy")
    net, sigmas = toy.learn_levels(600, 0)
    start = torch.rand(2000, 2, generator=torch.Generator().manual_seed(1)) * 16 - 8
    x = annealed_langevin(
        net,
        start,
        sigmas,
        steps_per_level=100,
        step_size=0.1 * float(sigmas[-1]) ** 2,
        denoise=False,
        seed=2,
    )
    print(f"mode mass with learned scores: {toy.mass(x):.4f}")
    assert abs(toy.mass(x) - 0.8) < 0.05
    # Its samples are the data's: mean and deviation of the larger mode.
    mode = x[x.sum(1) > 0]
    assert (mode.mean(0) - 5).abs().max() < 0.2 and (mode.std(0) - 1).abs().max() < 0.2


def test_the_toy_s_exact_score_is_the_gradient_of_its_density() -> None:
    toy = module("toy")
    x = (torch.rand(50, 2, dtype=torch.float64) * 16 - 8).requires_grad_()
    std = torch.rand(50, dtype=torch.float64) * 3 + 1
    (gradient,) = torch.autograd.grad(toy.log_terms(x, std).logsumexp(1).sum(), x)
    torch.testing.assert_close(toy.exact_score(x, std), gradient)


def test_the_magnetisation_of_a_lattice() -> None:
    """Of a free field as it is known, and of phi^4 as Metropolis' algorithm finds it."""
    lattice = module("lattice")
    mean, error = lattice.langevin(0.2, 0.0, 400, 1500)
    # alpha = 1e-4 of a normal estimate, for both.
    assert abs(mean - lattice.free(0.2)) < 3.9 * error
    mean, error = lattice.langevin(0.22, 0.2, 400, 1500)
    other, its_error = lattice.metropolis(0.22, 0.2, 200, 150)
    assert abs(mean - other) < 3.9 * math.hypot(error, its_error)


def test_fashion_mnist(tmp_path: Path) -> None:
    values = np.random.default_rng().integers(0, 256, (30, 8, 8), dtype=np.uint8)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-images-idx3-ubyte").write_bytes(header + values.tobytes())
    small = ("--width", 8, "--samples", 4, "--out", tmp_path / "o")
    for steps in (3, 3):
        out = run("fashion_mnist.py", "--data", tmp_path / "data", "--steps", steps, *small)
        assert "technique 1" in out and "trained to a loss of" in out
    names = {p.name for p in (tmp_path / "o").iterdir()}
    assert names == {"samples.png", "consistent.png", "loss.png", "checkpoint.pt"}


def test_quality(tmp_path: Path) -> None:
    out = run("quality.py", "--out", tmp_path, "--steps", 2, "--budgets", 5)
    assert out.count("| ") > 10 and (tmp_path / "quality.png").stat().st_size > 5000


def test_inpainting(tmp_path: Path) -> None:
    out = run("inpainting.py", "--out", tmp_path, "--steps", 2)
    assert "known pixels exact in all 32 completions: True" in out
    assert (tmp_path / "inpainting.png").stat().st_size > 500


def test_the_posterior_of_a_logistic_regression(tmp_path: Path) -> None:
    out = run("bayesian_logistic_regression.py", "--out", tmp_path, "--chains", 300)
    assert (tmp_path / "posterior.png").stat().st_size > 5000
    found = [line.split() for line in out.splitlines() if line.count("+-") == 2]
    assert len(found) == 11
    for *_, mean, _, deviation, at, _, laplace in found:
        # The posterior is skewed, its Laplace approximation is not: near, not the same.
        assert abs(float(mean) - float(at)) < 0.6 * float(laplace) + 0.1
        assert 0.8 < float(deviation) / float(laplace) < 1.4
    right = float(out.split("held-out tumours: ")[1].split("%")[0])
    assert right > 90


def test_diffusers_network(tmp_path: Path) -> None:
    out = run("diffusers_network.py", "--out", tmp_path, "--steps", 2, "--calls", 10)
    assert out.count(": pixels from") == 5 and "nan" not in out
    assert (tmp_path / "diffusers.png").stat().st_size > 500


def test_torchrun(tmp_path: Path) -> None:
    out = run("torchrun.py", "--out", tmp_path / "one", "--steps", 3, "--samples", 5)
    assert "1 processes, 3 steps" in out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    example = [str(EXAMPLES / "torchrun.py"), "--out", str(tmp_path / "two"), "--steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *example, "--samples", "5"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes, 3 steps") == 1
    one, two = (
        checkpoint.read(tmp_path / name / "checkpoint.pt")["losses"] for name in ("one", "two")
    )
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)


def test_sharded_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two += [str(EXAMPLES / "sharded_image.py"), "--out", str(tmp_path / "two"), "--steps", "200"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(two, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "2 processes; error of y 0.498" in done.stdout, done.stderr
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path / "one"), "--steps", "200"])
    module("sharded_image").main()
    one, two_s = (torch.load(tmp_path / name / "sample.pt") for name in ("one", "two"))
    assert torch.equal(one, two_s)
    assert (tmp_path / "two" / "image.png").stat().st_size > 1000


@pytest.mark.parametrize("row", ["ncsnv2-cifar10 | 3072 | 50 | 232", "so from 50 to 0.01 L = 219"])
def test_published_settings(row: str) -> None:
    assert row in run("published_settings.py")
