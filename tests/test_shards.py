"""`score-kernels sample` at scale: ranks, batches, resuming and kills change no bit of a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_samples import digests, write_checkpoint
from PIL import Image
from torch import Tensor, nn

import score_kernels
from score_kernels.cli import data, sample, trained
from score_kernels.cli import main as cli
from score_kernels.cli.trained import network, read_about

HERE = Path(__file__).parent
# 37 samples, in shards of 16, 16 and 5.
SMALL = {"--num-samples": 37, "--shard-size": 16, "--batch-size": 8, "--seed": 3, "--first": 100}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes of torchrun have: torch's own sums may depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c.pt")


def arguments(path: Path, out: Path, **changed: Any) -> list[str]:
    names = {name: f"--{name.replace('_', '-')}" for name in changed} | {"num": "--num-samples"}
    options = SMALL | {names[name]: value for name, value in changed.items()}
    named = [str(part) for pair in options.items() for part in pair]
    return ["sample", str(path), "--out", str(out), *named]


def run(path: Path, out: Path, *more: str, **changed: Any) -> int:
    return cli.main([*arguments(path, out, **changed), *more])


def torchrun(ranks: int, path: Path, out: Path, **changed: Any) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("torchrun")
    command = [program, "--standalone", "--nproc-per-node", str(ranks), "-m", "score_kernels.cli"]
    return subprocess.run(
        [*command, *arguments(path, out, **changed)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def the_error(capsys: pytest.CaptureFixture) -> str:
    """The one line that is no progress bar."""
    text = capsys.readouterr().err
    lines = [s for s in text.splitlines() if not s.startswith(("checking: ", "sampling: ", "\r"))]
    lines = [line for line in lines if line]
    assert len(lines) == 1 and lines[0].startswith("score-kernels sample: "), text
    return lines[0]


def ages(folder: Path) -> dict[str, int]:
    """When each shard was written."""
    return {p.name: p.stat().st_mtime_ns for p in (folder / "shards").iterdir()}


def entries(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "manifest.json").read_text())["shards"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_change_no_bit(tmp_path: Path, path: Path, ranks: int) -> None:
    assert run(path, tmp_path / "alone", shard_size=8) == 0
    done = torchrun(ranks, path, tmp_path / "ranks", shard_size=8)
    assert done.returncode == 0, done.stderr
    expected = digests(tmp_path / "alone")
    names = {f"shards/shard-{k:06d}.npz" for k in range(5)}
    assert expected.keys() == names | {"manifest.json", "samples.png", ".lock"}
    assert digests(tmp_path / "ranks") == expected
    assert done.stdout.count("37 samples of the ema weights in 5 shards") == 1
    assert ("by" in done.stdout) == (ranks > 1)


def test_ranks_share_a_folder_of_pngs_and_go_on(tmp_path: Path, path: Path) -> None:
    assert run(path, tmp_path / "alone", format="png") == 0
    out = tmp_path / "ranks"
    shutil.copytree(tmp_path / "alone", out)
    (out / "shards/shard-000000/000000000103.png").unlink()
    shutil.rmtree(out / "shards/shard-000001")
    done = torchrun(2, path, out, format="png")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "missing or damaged, made again: shard-000000, shard-000001"
    assert "1 were there, 2 made by 2 processes" in lines[1]
    assert digests(out) == digests(tmp_path / "alone")


def test_a_rank_that_fails_ends_the_job_in_a_line(tmp_path: Path, path: Path) -> None:
    """A folder stands where the second process is to put its shard."""
    out = tmp_path / "out"
    assert run(path, out, num=16) == 0
    (out / "shards" / "shard-000002.npz" / "mine").mkdir(parents=True)
    done = torchrun(2, path, out)
    assert done.returncode != 0
    ours = [s for s in done.stderr.splitlines() if "score-kernels sample: " in s]
    assert any("shard-000002.npz" in line for line in ours), done.stderr
    assert len(ours) <= 2 and "cli.py" not in done.stderr
    assert "complete" not in done.stdout
    assert json.loads((out / "manifest.json").read_text())["complete"] is False
    assert (out / "shards" / "shard-000002.npz" / "mine").is_dir()


def test_shards_hold_the_chains_of_their_ids(tmp_path: Path, path: Path) -> None:
    """Against the sampler itself, and every checksum against hashlib."""
    out = tmp_path / "out"
    assert run(path, out, weights="raw") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    about = read_about(path)
    net = network(about)
    score_kernels.training.checkpoint.load_weights(path, net, which="raw")
    assert [(s["first"], s["count"]) for s in manifest["shards"]] == [
        (100, 16),
        (116, 16),
        (132, 5),
    ]
    for shard in manifest["shards"]:
        file = out / "shards" / shard["name"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == shard["sha256"]
        with np.load(file) as arrays:
            assert sorted(arrays) == ["ids", "samples", "settings"]
            ids, samples = arrays["ids"], arrays["samples"]
            assert str(arrays["settings"]) == manifest["settings_sha256"]
        assert ids.dtype == np.int64
        assert ids.tolist() == list(range(shard["first"], shard["first"] + shard["count"]))
        parts = []
        for at in range(0, len(ids), 8):
            parts.append(
                score_kernels.annealed_langevin(
                    net,
                    (len(ids[at : at + 8]), 1, 6, 7),
                    [1.0, 0.4, 0.1],
                    steps_per_level=2,
                    step_size=0.004,
                    seed=3,
                    first_sample=int(ids[at]),
                )
            )
        wanted = (torch.cat(parts) * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
        assert samples.dtype == np.uint8 and samples.std() > 5
        assert np.array_equal(samples, wanted.numpy())
    about_file = hashlib.sha256(path.read_bytes()).hexdigest()
    given = {
        "format_version": 2,
        "score_kernels": score_kernels.__version__,
        "torch": torch.__version__,
        "checkpoint_sha256": about_file,
        "weights": "raw",
        "seed": 3,
        "first": 100,
        "num": 37,
        "shard_size": 16,
        "batch_size": 8,
        "format": "npz",
        "device": "cpu",
        "sampler": {
            "name": "annealed_langevin",
            "calls": 7,
            "levels": 3,
            "steps_per_level": 2,
            "step_size": 0.004,
        },
        "clamp": True,
        "data": {"shape": [1, 6, 7], "dtype": "uint8", "low": 0.0, "high": 255.0},
        "complete": True,
    }
    rest = {key: manifest[key] for key in ("settings_sha256", "shards")}
    assert manifest == given | rest


class Elementwise(nn.Module):
    """A score whose rounding no batch size can change: sums, products and quotients by element."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return -x / (sigma * sigma + self.weight).view(-1, 1, 1, 1)


def test_batch_sizes_change_no_bit_beyond_the_networks_own(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that treats elements alone: equal files. One with matrix products: a grey level."""
    for size in (1, 7, 16):
        assert run(path, tmp_path / f"mlp{size}", batch_size=size) == 0
    samples = [everything(tmp_path / f"mlp{size}").astype(int) for size in (1, 7, 16)]
    assert all(abs(s - samples[0]).max() <= 1 for s in samples)
    checkpoint = {"about": read_about(path), "ema": Elementwise().state_dict()}
    score_kernels.training.checkpoint.write(path, checkpoint)
    monkeypatch.setattr(trained, "network", lambda about: Elementwise())
    for size in (1, 7, 16, 1000):
        assert run(path, tmp_path / f"e{size}", batch_size=size) == 0
        for name in ("shards/shard-000000.npz", "shards/shard-000002.npz", "samples.png"):
            assert (tmp_path / f"e{size}" / name).read_bytes() == (
                tmp_path / "e1" / name
            ).read_bytes()


def everything(out: Path) -> np.ndarray:
    return np.concatenate(
        [np.load(out / "shards" / shard["name"])["samples"] for shard in entries(out)]
    )


def delete(shard: Path) -> None:
    shutil.rmtree(shard) if shard.is_dir() else shard.unlink()


def truncate(shard: Path) -> None:
    file = a_file(shard)
    file.write_bytes(file.read_bytes()[: np.random.default_rng().integers(file.stat().st_size)])


def flip(shard: Path) -> None:
    """One bit anywhere."""
    file, chance = a_file(shard), np.random.default_rng()
    content = bytearray(file.read_bytes())
    content[chance.integers(len(content))] ^= 1 << int(chance.integers(8))
    file.write_bytes(content)


def lengthen(shard: Path) -> None:
    file = a_file(shard)
    file.write_bytes(file.read_bytes() + b"\0")


def a_file(shard: Path) -> Path:
    return np.random.default_rng().choice(sorted(shard.iterdir())) if shard.is_dir() else shard


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_damaged_shards_are_made_again_and_good_ones_stay(
    tmp_path: Path, path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    out, suffix = tmp_path / "out", ".npz" if kind == "npz" else ""
    assert run(path, out, format=kind) == 0
    expected = digests(out)
    damages: list[Callable[[Path], None]] = [delete, truncate, flip, flip, lengthen]
    for damage in damages:
        before = ages(out)
        damage(out / "shards" / f"shard-000001{suffix}")
        for name in ("shards/.shard-000001.npz.tmp", ".manifest.json.tmp", ".samples.png.tmp"):
            (out / name).write_bytes(b"left")
        (out / "shards" / ".shard-000002.tmp").mkdir()
        (out / "shards" / ".shard-000002.tmp" / "1.png").write_bytes(b"left")
        capsys.readouterr()
        assert run(path, out, format=kind) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"missing or damaged, made again: shard-000001{suffix}"
        assert "2 were there, 1 made, " in lines[1]
        assert digests(out) == expected
        now = ages(out)
        assert [n for n in before if now[n] != before[n]] == [f"shard-000001{suffix}"]
    assert run(path, out, format=kind) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("3 were there, 0 made, 0 samples/s")
    assert ages(out) == now


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_stopped_run_makes_no_shard_twice(
    tmp_path: Path, path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third shard: the first two are in the manifest and stay."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        draw = sample.draw_samples

        def stop(*arguments: Any, first_sample: int, **options: Any) -> Tensor:
            if first_sample == 132:
                raise KeyboardInterrupt
            return draw(*arguments, first_sample=first_sample, **options)

        patch.setattr(sample, "draw_samples", stop)
        assert run(path, out, format=kind) == 130
    manifest = json.loads((out / "manifest.json").read_text())
    assert [s["sha256"] is None for s in manifest["shards"]] == [False, False, True]
    assert not manifest["complete"]
    before = ages(out)
    assert len(before) == 2
    assert run(path, out, format=kind) == 0
    assert {name: ages(out)[name] for name in before} == before
    assert run(path, tmp_path / "whole", format=kind) == 0
    assert digests(out) == digests(tmp_path / "whole")


def test_other_settings_are_refused(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(path, out) == 0
    before = digests(out)

    def refused(checkpoint: Path = path, **changed: Any) -> str:
        capsys.readouterr()
        assert run(checkpoint, out, **changed) == 1
        assert digests(out) == before
        return the_error(capsys)

    for words, changed in {
        "settings: seed was 3 and is 4; name": {"seed": 4},
        "settings: first was 100 and is 99; name": {"first": 99},
        "shard_size was 16 and is 8": {"shard_size": 8},
        "settings: batch_size was 8 and is 4; name": {"batch_size": 4},
        "settings: weights was ema and is raw; name": {"weights": "raw"},
        "settings: format was npz and is png; name": {"format": "png"},
        "num was 37 and is 36, expected no less": {"num": 36},
        "seed was 3 and is 4; num was 37 and is 2,": {"seed": 4, "num": 2},
    }.items():
        assert words in refused(**changed)
    other = write_checkpoint(tmp_path / "other.pt", seed=1)
    assert "settings: checkpoint_sha256 was " in refused(other)
    manifest = out / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(torch.__version__, "1.0"))
    before = digests(out)
    assert f"settings: torch was 1.0 and is {torch.__version__}" in refused()
    for damaged in ('{"x": 1}', "[]", '{"x":'):
        manifest.write_text(damaged)
        before = digests(out)
        assert "manifest.json: damaged, or of another program" in refused()
    manifest.unlink()
    before = digests(out)
    assert "shards: holds shards without a manifest" in refused()


def test_overwrite_starts_afresh(tmp_path: Path, path: Path) -> None:
    out = tmp_path / "out"
    assert run(path, out) == 0
    (out / "notes.txt").write_text("mine")
    first = ages(out)
    assert run(path, out, "--overwrite") == 0
    assert all(ages(out)[name] != first[name] for name in first)
    assert run(path, out, "--overwrite", num=20, format="png", seed=9) == 0
    assert run(path, tmp_path / "fresh", num=20, format="png", seed=9) == 0
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert digests(out) == digests(tmp_path / "fresh")


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_larger_number_keeps_the_shards_that_stay(
    tmp_path: Path, path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(path, out, format=kind) == 0
    before = ages(out)
    capsys.readouterr()
    assert run(path, out, format=kind, num=60) == 0
    assert "2 were there, 2 made" in capsys.readouterr().out
    now = ages(out)
    assert [n.split(".")[0] for n in sorted(before) if now[n] == before[n]] == [
        "shard-000000",
        "shard-000001",
    ]
    assert run(path, tmp_path / "fresh", format=kind, num=60) == 0
    assert digests(out) == digests(tmp_path / "fresh")


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 5, 4)], ids=["grey", "colour"])
def test_pngs_are_the_samples(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write_checkpoint(tmp_path / "c.pt", shape)
    assert run(path, tmp_path / "png", format="png") == 0
    assert run(path, tmp_path / "npz") == 0
    found = data.load(tmp_path / "png" / "shards")
    assert found.names is not None and found.names[0] == "shard-000000/000000000100.png"
    assert (found.low, found.high) == (0, 255)
    assert np.array_equal(found.values.numpy(), everything(tmp_path / "npz"))
    sheets = [(tmp_path / kind / "samples.png").read_bytes() for kind in ("png", "npz")]
    assert sheets[0] == sheets[1]
    checksum = json.loads((tmp_path / "png" / "manifest.json").read_text())["settings_sha256"]
    with Image.open(tmp_path / "png" / "shards" / "shard-000002" / "000000000133.png") as image:
        assert image.text == {"sample": "133", "settings": checksum}
    for shard in entries(tmp_path / "png"):
        files = sorted((tmp_path / "png" / "shards" / shard["name"]).iterdir())
        lines = "".join(
            f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files
        )
        assert hashlib.sha256(lines.encode()).hexdigest() == shard["sha256"]


def test_pngs_of_other_types(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """16-bit grey stays so, other ranges are black to white in 8 bits, and the rest is refused."""
    deep = write_checkpoint(tmp_path / "deep.pt", (1, 5, 4), "int32", (0.0, 65535.0))
    for kind in ("png", "npz"):
        assert run(deep, tmp_path / f"deep-{kind}", format=kind) == 0
    found = data.load(tmp_path / "deep-png" / "shards")
    assert found.high == 65535
    assert np.array_equal(found.values.numpy(), everything(tmp_path / "deep-npz"))
    assert int(found.values.max()) > 256
    real = write_checkpoint(tmp_path / "real.pt", (1, 5, 4), "float32", (-2.0, 6.0))
    for kind in ("png", "npz"):
        assert run(real, tmp_path / f"real-{kind}", format=kind) == 0
    pixels = data.load(tmp_path / "real-png" / "shards").values.numpy().astype(float)
    values = everything(tmp_path / "real-npz").astype(float)
    # Half a level of rounding, and the float32 sums before it.
    assert np.abs(pixels - (values + 2) / 8 * 255).max() <= 0.5 + 1e-4
    for shape in ((2, 5, 4), (7,), (4, 5, 4)):
        path = write_checkpoint(tmp_path / "odd.pt", shape, "float32")
        capsys.readouterr()
        assert run(path, tmp_path / "odd", format="png") == 1
        error = capsys.readouterr().err
        assert f"got png for samples of shape {shape}, expected images of 1 or 3" in error
        assert not (tmp_path / "odd").exists()


def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_checkpoint(tmp_path / "c.pt")
    nan = write_checkpoint(tmp_path / "nan.pt", bias=float("nan"))
    for words, where, changed in (
        ("count: got 0, expected at least 1", path, {"num": 0}),
        ("shard_size: got 0, expected at least 1", path, {"shard_size": 0}),
        ("seed: got -1, expected 0 <= seed", path, {"seed": -1}),
        ("first_sample: got ", path, {"first": 2**56 - 1}),
        ("device: got str 'abacus', expected a device", path, {"device": "abacus"}),
        ("device: got str 'cuda:63', expected a device", path, {"device": "cuda:63"}),
        ("none.pt", tmp_path / "none.pt", {}),
        ("sample 100 is not finite", nan, {}),
    ):
        assert run(where, tmp_path / "out", **changed) == 1
        assert words in the_error(capsys)
        assert not list((tmp_path / "out").rglob("shard-*"))


def test_the_manifest_is_returned(tmp_path: Path, path: Path) -> None:
    out = tmp_path / "out"
    got = sample.sample(path, out, count=3, progress=False)
    assert got == json.loads((out / "manifest.json").read_text())
    assert got["complete"] and [shard["count"] for shard in got["shards"]] == [3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the attempts")
@pytest.mark.parametrize("kind", ["npz", "png"])
def test_killed_at_twenty_random_moments(tmp_path: Path, kind: str) -> None:
    """kill -9 twenty times: shards are whole or not there, and the end has an undisturbed run's
    bits."""
    done = subprocess.run(
        [sys.executable, HERE / "killed_samples.py", tmp_path, kind, "20"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"shards at each kill {report['shards']}; {report['temporaries']} left temporaries")
    assert len(report["shards"]) == 20 and report["wrong"] == []
    assert report["same"] and report["files"] > 20


MEMORY = """
import resource, sys
from pathlib import Path
from score_kernels.cli import sample

def peak(count):
    sample.sample(Path(sys.argv[1]), Path(sys.argv[2]), count=count, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

first = peak(1024)
print(peak(20_480) - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_is_a_batch_and_a_shard(tmp_path: Path) -> None:
    """20,480 samples after 1,024, in one process: what grows is small beside the samples."""
    path = write_checkpoint(tmp_path / "c.pt", (3, 32, 32))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path, tmp_path / "out"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    more, samples = int(done.stdout.splitlines()[-1]), 20_480 * 3 * 32 * 32
    print(f"{more / 2**20:.1f} MiB more for {samples / 2**20:.0f} MiB of 8-bit samples")
    # Nothing but the manifest grows with the number. Checking the first shard holds it once more,
    # 3 MiB, and the allocator may keep as much again; the samples are 60 MiB, 240 as floats.
    assert more < 12 * 2**20
