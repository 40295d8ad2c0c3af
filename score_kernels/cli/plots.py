"""Sheets of images and loss curves; needs Pillow and Matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "draw_losses",
    "figure",
    "logarithmic",
    "require",
    "save_animation",
    "save_sheet",
    "sheet",
]

BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#718096"
# Smaller sheets are enlarged by a whole factor to about this size.
_SMALLEST_SHEET = 600


def require() -> None:
    """Raise an ImportError that names the package's extra, without Pillow or Matplotlib."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        need = f"pictures need Pillow and Matplotlib ({error})"
        raise ImportError(f"{need}: pip install score-kernels[images]") from error


def sheet(images: Tensor, columns: int | None = None) -> Tensor:
    """Images on one sheet with thin lines between them.

    Args:
        images: ``[N, C, H, W]``, clamped to [-1, 1]; unless C is 3 the first channel is shown.
        columns: images a row; by default as square as it gets.

    Returns:
        ``[rows (H + 1) + 1, columns (W + 1) + 1, C]`` float32 in [0, 1], C 1 or 3.
    """
    images = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
    images = images if images.shape[1] == 3 else images[:, :1]
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    out = torch.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 0.2)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        out[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return out


def save_sheet(path: str | os.PathLike[str], images: Tensor, columns: int | None = None) -> None:
    """Write :func:`sheet` as a PNG, small images enlarged by a whole factor."""
    require()
    _picture(images, columns).save(path, format="PNG")


def save_animation(path: str | os.PathLike[str], frames: Sequence[Tensor]) -> None:
    """Write sheets, images ``[N, C, H, W]`` each, as a GIF of five seconds and a still end."""
    require()
    first, *rest = [_picture(images) for images in frames]
    # In hundredths of a second, the unit of a GIF.
    each = max(2, 500 // len(frames))
    times = [10 * each] * len(rest) + [3000]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=times, loop=0)


def _picture(images: Tensor, columns: int | None = None) -> Any:
    from PIL import Image

    pixels = (sheet(images, columns) * 255).round().to(torch.uint8)
    times = max(1, round(_SMALLEST_SHEET / max(pixels.shape[:2])))
    pixels = pixels.repeat_interleave(times, 0).repeat_interleave(times, 1).squeeze(2)
    return Image.fromarray(pixels.numpy())


def draw_losses(
    path: str | os.PathLike[str],
    losses: Sequence[float] | Tensor,
    *,
    zero_network: float | None = None,
    held_out: tuple[Sequence[int], Sequence[float]] | None = None,
) -> None:
    """The losses and their running mean, logarithmic where all are above 0.

    A line shows the loss of a network that always answers 0, and dots show held_out, the (steps,
    losses) on data that training does not see.
    """
    require()
    plot = figure(8, 4.5)
    axes = plot.add_subplot()
    loss = torch.as_tensor(losses)
    steps = torch.arange(1, len(loss) + 1)
    window = max(1, len(loss) // 40)
    mean = loss.unfold(0, window, 1).mean(1)
    # Some tens of thousands of points are more than a picture shows.
    every = max(1, len(loss) // 5000)
    axes.plot(steps[::every], loss[::every], color=BLUE, alpha=0.25, linewidth=0.7)
    axes.plot(steps[window - 1 :: every], mean[::every], color=BLUE, label="training, running mean")
    if held_out is not None:
        axes.plot(*held_out, "o-", color=ORANGE, label="held out, averaged weights")
    if zero_network is not None:
        name = f"a network that always answers 0: {zero_network:g}"
        axes.axhline(zero_network, color=GREY, linestyle="--", linewidth=1, label=name)
    if float(loss.min()) > 0:
        highest = max(float(loss.max()), zero_network or 0.0)
        logarithmic(axes, 0.7 * float(mean.min()), 1.3 * highest)
    axes.set(xlabel="training step", ylabel="loss per sample")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.85), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plot.savefig(path, format="png")


def figure(width: float, height: float) -> Figure:
    """A figure without pyplot, which leaves the caller's plots alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def logarithmic(axes: Any, low: float, high: float) -> None:
    """A logarithmic vertical axis from low to high, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(low, high)
