"""The demo's pictures and its page."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from score_kernels.cli import plots


def draw_samples(path: Path, samples: Tensor, real: Tensor) -> None:
    """Up to 100 samples `[N, 1, 8, 8]` in [-1, 1] beside as many real digits."""
    figure = plots.figure(10, 5.2)
    count = min(100, len(samples), len(real))
    for position, images, title in (
        (1, samples, f"{count} samples of the network"),
        (2, real, f"{count} real digits, held out from training"),
    ):
        axes = figure.add_subplot(1, 2, position)
        sheet = plots.sheet(images[:count], columns=10)
        axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, bbox_inches="tight")


def draw_chain(path: Path, chain: list[tuple[float, Tensor]]) -> None:
    """Chains from noise to digits: one column a chain, one row a noise level.

    `chain` holds pairs of a level sigma and the states `[N, 1, 8, 8]` there; sigma 0 stands for the
    denoised end.
    """
    columns = len(chain[0][1])
    figure = plots.figure(1.0 * columns + 1, 1.05 * len(chain))
    grid = figure.subplots(len(chain), columns, squeeze=False)
    for row, (sigma, states) in enumerate(chain):
        # Each row has its own grey scale, or the first ones would be black and white only.
        limit = 1 + 2 * sigma
        for axes, state in zip(grid[row], states, strict=True):
            axes.imshow(
                state[0].numpy(), cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest"
            )
            axes.set_xticks([])
            axes.set_yticks([])
        grid[row][0].set_ylabel(
            f"sigma = {sigma:.2g}" if sigma else "denoised", rotation=0, ha="right", va="center"
        )
    figure.savefig(path)


def summary(report: dict[str, Any]) -> str:
    """The figures as plain text; the page explains them."""
    frechet, seconds = report["frechet"], report["seconds"]
    figures = "\n".join(f"{n:22}{d:>9}{near:>9}{share:>10}" for n, d, near, share in _rows(report))
    classes = "\n".join(
        f"{NAMES[key]:22}" + "".join(f"{n:>5}" for n in counts)
        for key, counts in report["classes"].items()
    )
    return f"""
{frechet["images"]} images of each kind against the {frechet["against"]} held-out digits

{"":22}{"Frechet":>9}{"nearest":>9}{"in reach":>10}
{figures}

Frechet:  squared Frechet distance; real sets of this size have {frechet["real_lowest"]:.2f} to \
{frechet["real_highest"]:.2f}
nearest:  median distance to the nearest training digit
in reach: share no farther from one than 95% of the held-out digits are

{"put in each class":22}{"".join(f"{digit:>5}" for digit in range(10))}
{classes}
The classifier is right on {report["classifier_accuracy"]:.1%} of the held-out digits.

Training took {seconds["training"]:.0f} s, sampling {seconds["sampling"]:.0f} s; CPU \
threads: {report["threads"]}."""


def write_page(out: Path, report: dict[str, Any]) -> None:
    """`report.html` in `out`: one page, with the pictures of that folder inside it."""
    recipe, loss, frechet = report["recipe"], report["loss"], report["frechet"]
    near, data, seconds = report["nearest_training_digit"], report["data"], report["seconds"]
    quick = (
        "<p class='note'>This was a quick run of a tiny network, to check that everything works. "
        "Its samples are not meant to be digits.</p>"
    )
    counts = [(NAMES[key], *map(str, row)) for key, row in report["classes"].items()]
    settings = [(key.replace("_", " "), f"{value:g}") for key, value in recipe.items()]
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Digits from noise</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Digits from noise</h1>
{quick if report["quick"] else ""}
<p>A small neural network looked at {data["train"]} handwritten digits of 8 by 8 pixels and learned
one thing: given a digit with noise added, in which direction to change each pixel to make the
picture more likely. That direction is called the <em>score</em>. Starting from pure noise and
following the score, with a little fresh noise at every step (<em>Langevin dynamics</em>), new
digits appear. Another {data["held_out"]} real digits were kept away from the network; the samples
are judged against those.</p>

<h2>Samples</h2>
{_image(out, "samples.png", "Samples of the network beside real digits")}
<p>Left: samples, none picked by hand. Right: real digits that the network never saw. The real ones
are coarse too: 64 pixels in 17 shades of grey.</p>

<h2>How close to the real thing</h2>
{_table(["", "Fr&eacute;chet distance", "nearest training digit", "in reach"], _rows(report))}
<ul>
<li><b>Fr&eacute;chet distance</b> (squared) compares the mean and the covariance of two sets of
images, here {frechet["images"]} of each kind against the {frechet["against"]} held-out digits, in
the {frechet["pca_dims"]} principal axes that carry 95% of the training digits' variance; smaller is
closer. Real training digits do not get 0 either, because so few images leave something to chance:
their row is the average over {frechet["real_sets"]} random sets (from
{frechet["real_lowest"]:.2f} to {frechet["real_highest"]:.2f}), and samples cannot be expected to
get below it.</li>
<li><b>Nearest training digit</b> is the median distance from an image to the most similar training
digit. Samples far below the held-out digits would be copies. The closest pair of a sample and a
training digit is {near["samples"]["lowest"]:.2f} apart, of a held-out and a training digit
{near["held_out"]["lowest"]:.2f}.</li>
<li><b>In reach</b> is the share of images that are no farther from a training digit than 95% of the
held-out digits are.</li>
<li><b>Pixel noise</b> has the right mean and standard deviation at every pixel and no shapes;
<b>uniform noise</b> is every shade equally likely.</li>
</ul>

<h2>All ten digits</h2>
{_table(["put in each class", *map(str, range(10))], counts)}
<p>Each image is named by a classifier that was trained on the training digits alone and is right on
{report["classifier_accuracy"]:.1%} of the held-out ones. It has to name noise too, and its answers
for noise mean nothing; they show that a full row alone proves little.</p>

<h2>From noise to digit</h2>
{_image(out, "chain.png", "Eight chains at five noise levels")}
<p>Eight chains, one a column. Sampling goes down {recipe["levels"]} noise levels, from
sigma = {recipe["sigma_max"]:g} (nothing of a digit can be seen) to {recipe["sigma_min"]:g} (less
than one shade of grey), with {recipe["steps_per_level"]} steps at each. The rows show the state at
the end of five of them, each row with its own grey scale, and after a last step without new noise,
which removes what noise is left.</p>

<h2>Learning</h2>
{_image(out, "loss.png", "Loss against training step")}
<p>The loss says how badly the network guesses the noise that was added to a digit. One that always
answers 0 scores half the number of pixels, {loss["zero_network"]:g}; after {recipe["steps"]} steps
training digits are at {loss["train_last"]:.2f} and held-out ones, measured with the averaged
weights that draw the samples, at {loss["held_out_last"]:.2f}. It cannot reach 0, because noise
hides part of every digit.</p>

<h2>Settings</h2>
<p>Seed {report["seed"]}, {report["parameters"]:,} weights. Training took
{seconds["training"]:.0f} s and sampling {report["samples"]} digits {seconds["sampling"]:.0f} s; CPU
threads: {report["threads"]}. score_kernels {report["versions"]["score_kernels"]}, PyTorch
{report["versions"]["torch"]}. Black is &minus;1 and white is 1; distances and noise levels are in
those units.</p>
{_table(["setting", "value"], settings)}
</body>
</html>
"""
    (out / "report.html").write_text(page, encoding="utf-8")


NAMES = {
    "real": "training digits",
    "held_out": "held-out digits",
    "samples": "samples",
    "pixel_noise": "pixel noise",
    "uniform_noise": "uniform noise",
}
_STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c; background: #fff;
  font: 1rem/1.6 system-ui, sans-serif; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.2rem 0.9rem 0.2rem 0; text-align: right; border-bottom: 1px solid #e2e8f0; }
th:first-child, td:first-child { text-align: left; }
.note { padding: 0.5rem 1rem; background: #fefcbf; }
"""


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The figures table: name, Frechet distance, nearest training digit, share in reach."""
    frechet, near = report["frechet"], report["nearest_training_digit"]
    return [
        (
            name,
            f"{frechet[key]:.2f}" if key in frechet else "-",
            f"{near[key]['median']:.2f}" if key in near else "-",
            f"{near[key]['share_within_reach']:.0%}" if key in near else "-",
        )
        for key, name in NAMES.items()
    ]


def _table(head: list[str], rows: Iterable[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{top}</tr>\n{body}\n</table>"


def _image(out: Path, name: str, alt: str) -> str:
    data = base64.b64encode((out / name).read_bytes()).decode("ascii")
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'
