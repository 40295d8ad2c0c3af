"""The demo end to end, in a few seconds: every file, and what the report says."""

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib import image

from examples.digits import demo

PICTURES = ("samples.png", "loss.png", "chain.png")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return out, demo.run(out, quick=True, seed=3)


def test_every_picture_can_be_read(ran):
    out, _ = ran
    for name in PICTURES:
        pixels = image.imread(out / name)
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05, name


def test_page_holds_the_pictures_and_links_to_nothing(ran):
    out, report = ran
    page = (out / "report.html").read_text(encoding="utf-8")
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data) for data in embedded] == [
        (out / name).read_bytes() for name in ("samples.png", "chain.png", "loss.png")
    ]
    assert len(re.findall("<img", page)) == 3 and page.count("src=") == 3
    assert not re.search(r"https?://|href=|@import|url\(|<script", page)
    assert f"{report['frechet']['samples']:.2f}" in page
    assert "quick run" in page


def test_report_file_is_what_run_returns(ran):
    out, report = ran
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report


def test_report_says_what_was_done_and_found(ran):
    _, report = ran
    assert report["seed"] == 3 and report["quick"] and report["samples"] == 40
    assert report["data"] == {"train": 1198, "held_out": 599, "range": [-1, 1]}
    assert report["loss"]["zero_network"] == 32
    frechet = report["frechet"]
    assert frechet["images"] == 40 and frechet["against"] == 599
    assert frechet["real_lowest"] <= frechet["real"] <= frechet["real_highest"]
    assert frechet["real"] < frechet["pixel_noise"] < frechet["uniform_noise"]
    near = report["nearest_training_digit"]
    assert near["held_out"]["share_within_reach"] == pytest.approx(0.95, abs=0.01)
    assert near["uniform_noise"]["share_within_reach"] == 0
    assert sum(report["classes"]["held_out"]) == 599
    assert sum(report["classes"]["samples"]) == 40
    assert report["classifier_accuracy"] > 0.95


def test_same_seed_same_figures_and_another_seed_others(ran, tmp_path, capsys):
    _, report = ran
    again = demo.run(tmp_path / "again", quick=True, seed=3)
    printed = capsys.readouterr().out
    # Equal but for the last bits, which the linear algebra underneath does not promise.
    assert again["frechet"] == pytest.approx(report["frechet"], rel=1e-4)
    assert again["loss"] == pytest.approx(report["loss"], rel=1e-4)
    assert f"{again['frechet']['samples']:.2f}" in printed and "held-out digits" in printed
    other = demo.run(tmp_path / "other", quick=True, seed=4)
    assert other["frechet"]["samples"] != report["frechet"]["samples"]


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "examples.digits", "--quick", "--seed", "5", "--threads", "1"]
    root = Path(__file__).parent.parent
    subprocess.run([*command, "--out", tmp_path], check=True, cwd=root, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["seed"] == 5 and report["threads"] == 1


def test_digits_are_split_the_same_way_every_time():
    first, second = demo.load_digits(), demo.load_digits()
    assert torch.equal(first.held_out, second.held_out)
    assert first.train.shape == (1198, 1, 8, 8) and first.held_out.shape == (599, 1, 8, 8)
    assert first.train.min() == -1 and first.train.max() == 1
    counts = torch.bincount(first.held_out_labels, minlength=10)
    assert counts.min() >= 57 and counts.max() <= 62


def test_training_lowers_the_loss():
    digits = demo.load_digits()
    recipe = replace(demo.Recipe(), width=8, resolutions=2, steps=150, levels=6)
    _, curves = demo.train(recipe, digits, seed=0)
    assert curves.held_out[-1] < 0.8 * curves.held_out[0] < 0.8 * 32
