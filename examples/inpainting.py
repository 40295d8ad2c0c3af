"""Half of a digit is given; the other half is drawn, in several ways, by one unconditional
network.

    python examples/inpainting.py --out inpainting-output

Trains the demo's network (a minute on two cores) and completes eight digits that it never saw,
four times each, by annealed Langevin dynamics with the upper half known. Writes inpainting.png:
a row for each digit with the whole digit, what is given, and the completions. What is given
comes out exactly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import score_kernels as sk
from digits import demo
from score_kernels.cli import plots

COMPLETIONS, ROWS = 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("inpainting-output"))
    parser.add_argument("--steps", type=int, default=demo.Recipe.steps, help="of training")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    digits = demo.load_digits()
    recipe = demo.Recipe(steps=arguments.steps)
    net, _ = demo.train(recipe, digits, seed=0)

    whole = digits.held_out[:ROWS]
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    known = whole.repeat_interleave(COMPLETIONS, 0)
    x = sk.annealed_langevin(
        net,
        tuple(known.shape),
        recipe.sigmas,
        steps_per_level=4 * recipe.steps_per_level,
        step_size=recipe.step_size,
        known=known,
        mask=mask,
        seed=0,
        progress=True,
    )
    kept = bool((x == known)[mask.expand_as(x)].all())
    print(f"known pixels exact in all {len(x)} completions: {kept}")

    given = torch.where(mask, whole, -torch.ones(()))
    grid = torch.cat([whole[:, None], given[:, None], x.view(ROWS, COMPLETIONS, 1, 8, 8)], 1)
    plots.save_sheet(arguments.out / "inpainting.png", grid.flatten(0, 1), 2 + COMPLETIONS)
    print(f"Written to {arguments.out}: inpainting.png")


if __name__ == "__main__":
    main()
