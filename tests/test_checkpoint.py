"""Checkpoints: whole or not at all, read without running them, and damage named."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from score_kernels.training import checkpoint

HERE = Path(__file__).parent


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    state = {"weights": torch.randn(5, 3), "deep": {"list": [1, 2.5, "text", None, True]}}
    checkpoint.write(path, state)
    got = checkpoint.read(path)
    assert torch.equal(got["weights"], state["weights"]) and got["deep"] == state["deep"]
    assert os.listdir(tmp_path) == ["c.pt"]


def test_bytes_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "c.pt", []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_size), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    checkpoint.write(path, {"step": 1})
    assert done == [path.stat().st_size, "renamed"]


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"step": 1})
    with checkpoint.opened(path) as file:
        checkpoint.write(path, {"step": 2})
        assert checkpoint.parse(path, file)["step"] == 1
    assert checkpoint.read(path)["step"] == 2


def test_a_part_that_is_called_a_folder_is_damaged(tmp_path: Path) -> None:
    """torch would read no bytes of it, and give what the memory held."""
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"weights": torch.randn(4)})
    whole = bytearray(path.read_bytes())
    # Entries of the archive's directory: the external attributes are at byte 38.
    entry = whole.index(b"PK\x01\x02")
    whole[entry + 38] ^= 0x10
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read(path)


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"step": 1})
    with pytest.raises((pickle.PicklingError, AttributeError)):
        checkpoint.write(path, {"step": 2, "bad": lambda: None})
    assert checkpoint.read(path)["step"] == 1
    with pytest.raises(FileNotFoundError):
        checkpoint.write(tmp_path / "no" / "c.pt", {"step": 1})


def test_every_cut_and_damaged_bytes_are_named(tmp_path: Path) -> None:
    """Cut at every length; and every byte of the weights changed, which checksums find."""
    path = tmp_path / "c.pt"
    weights = torch.randn(4)
    checkpoint.write(path, {"weights": weights})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"checkpoint {path}"):
            checkpoint.read(path)
    start = whole.index(weights.numpy().tobytes())
    for place in range(start, start + 16):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"checkpoint {path}: .*its part .* is damaged"):
            checkpoint.read(path)


def test_other_files_are_refused_and_nothing_in_them_runs(tmp_path: Path) -> None:
    path, proof = tmp_path / "c.pt", tmp_path / "proof"

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(proof),)

    torch.save({"format": 1, "evil": Evil()}, path)
    with pytest.raises(ValueError, match=f"checkpoint {path}"):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        ValueError, match=f"checkpoint {path}: cut short, damaged, or no checkpoint"
    ):
        checkpoint.read(path)
    assert not proof.exists()
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="a file of another kind, it has no 'format'"):
        checkpoint.read(path)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="got format 99, expected 1"):
        checkpoint.read(path)
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a file"):
            checkpoint.read(missing)


def test_weights_of_another_network_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    net = nn.Linear(3, 2)
    checkpoint.write(path, {"net": net.state_dict(), "ema": {"weight": torch.zeros(2, 3)}})
    other = nn.Linear(3, 2)
    checkpoint.load_weights(path, other, which="raw")
    assert torch.equal(other.weight, net.weight)
    with pytest.raises(
        ValueError,
        match=r"network: bias is missing in the file and \(2,\) in the network$",
    ):
        checkpoint.load_weights(path, other)
    assert torch.equal(other.weight, net.weight)
    for count, words in (
        (3, r"a is .*; b is .*; c is missing in the file and \(1,\) in the network$"),
        (4, r"c is missing in the file and \(1,\) in the network \(and 1 more\)$"),
        (5, r"c is missing in the file and \(1,\) in the network \(and 2 more\)$"),
    ):
        bare = nn.Module()
        for name in "abcde"[:count]:
            bare.register_parameter(name, nn.Parameter(torch.zeros(1)))
        checkpoint.write(path, {"net": {}})
        with pytest.raises(ValueError, match=words):
            checkpoint.load_weights(path, bare, which="raw")
    checkpoint.write(path, {"net": {**net.state_dict(), "extra": torch.zeros(4)}})
    with pytest.raises(ValueError, match=r"extra is \(4,\) in the file and missing in the network"):
        checkpoint.load_weights(path, other, which="raw")
    checkpoint.write(path, {"net": net.state_dict()})
    with pytest.raises(ValueError, match=r"weight is \(2, 3\) in the file and \(2, 4\) in"):
        checkpoint.load_weights(path, nn.Linear(4, 2), which="raw")
    with pytest.raises(ValueError, match="weights: got 'best', expected one of 'ema', 'raw'"):
        checkpoint.load_weights(path, other, which="best")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the attempts")
def test_killed_at_five_random_moments(tmp_path: Path) -> None:
    """kill -9 five times: every restart goes on, and the end has the bits of an undisturbed run."""
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", tmp_path, "5"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"killed at steps {report['steps']}; entries that differ: {report['differ']}")
    assert len(report["steps"]) == 5 and report["differ"] == []
    # At most the temporary file of a write that was killed, replaced by the next one's.
    assert report["files"] == ["alone.pt", "killed.pt"]
