"""Quality against network calls: all samplers on one small network, the digits' of `make demo`.

    python examples/quality.py --out quality-output

Trains the demo's network (a minute on two cores) and draws 599 digits with each sampler at several
budgets (five minutes). Quality is the squared Frechet distance to the held-out digits in the
principal axes that carry 95% of the training digits' variance; equally many training digits are at
0.27. Prints a table and draws quality.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm

import score_kernels as sk
from digits import demo, evaluation
from score_kernels.cli import plots
from score_kernels.diffusion.sde import VE, DDPMSchedule

HIGH, LOW, LEVELS = demo.Recipe.sigma_max, demo.Recipe.sigma_min, demo.Recipe.levels
BUDGETS = (13, 26, 52, 104, 208)
SHAPE = (599, 1, 8, 8)


SDE = VE(LOW, HIGH)


def chain(calls: int) -> DDPMSchedule:
    """A chain of DDPM whose levels are the network's."""
    sigmas = sk.geometric_sigmas(HIGH, LOW, calls).flip(0).double()
    return DDPMSchedule(1 / (1 + sigmas.square()))


def annealed(net: sk.sampling.Score, calls: int) -> Tensor:
    sigmas = sk.geometric_sigmas(HIGH, LOW, LEVELS)
    steps = max(1, calls // LEVELS)
    size = sk.best_step_size((HIGH / LOW) ** (1 / (LEVELS - 1)), LOW, steps)
    return sk.annealed_langevin(net, SHAPE, sigmas, steps_per_level=steps, step_size=size, seed=1)


def consistent(net: sk.sampling.Score, calls: int) -> Tensor:
    sigmas = sk.geometric_sigmas(HIGH, LOW, calls)
    eta = min(1.0, 1.5 * (1 - float(sigmas[1] / sigmas[0])))
    return sk.consistent_annealed(net, SHAPE, sigmas, step_size=2 * eta * LOW**2, seed=1)


SAMPLERS: dict[str, Callable[[sk.sampling.Score, int], Tensor]] = {
    "annealed Langevin": annealed,
    "consistent annealed": consistent,
    "Euler-Maruyama VE": lambda net, calls: sk.euler_maruyama(
        net, SHAPE, SDE, steps=calls, end=0.0, seed=1
    ),
    "ancestral VE": lambda net, calls: sk.predictor_corrector(
        net, SHAPE, SDE, steps=calls, end=0.0, predictor="ancestral", corrector=None, seed=1
    ),
    "predictor-corrector VE": lambda net, calls: sk.predictor_corrector(
        net, SHAPE, SDE, steps=calls // 2, end=0.0, corrector="langevin", snr=0.1, seed=1
    ),
    "DDPM": lambda net, calls: sk.ddpm(net, SHAPE, chain(calls), seed=1),
    "DDIM": lambda net, calls: sk.ddim(net, SHAPE, chain(calls), steps=calls, seed=1),
    "flow, Euler": lambda net, calls: sk.probability_flow(
        net, SHAPE, sk.edm_sigmas(HIGH, LOW, calls), method="euler", seed=1
    ),
    "flow, Heun": lambda net, calls: sk.probability_flow(
        net, SHAPE, sk.edm_sigmas(HIGH, LOW, (calls + 1) // 2), seed=1
    ),
}


def draw(path: Path, budgets: Sequence[int], distances: dict[str, list[float]]) -> None:
    plot = plots.figure(8, 5)
    axes = plot.add_subplot()
    for name, row in distances.items():
        axes.plot(budgets, row, marker="o", markersize=4, label=name)
    axes.axhline(0.27, color=plots.GREY, linestyle="--", linewidth=1, label="training digits")
    axes.set(xscale="log", xlabel="network calls", ylabel="squared Frechet distance")
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.xaxis.minorticks_off()
    plots.logarithmic(axes, 0.25, 1.1 * max(map(max, distances.values())))
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    plot.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("quality-output"))
    parser.add_argument("--steps", type=int, default=demo.Recipe.steps, help="of training")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="network calls")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    digits = demo.load_digits()
    recipe = demo.Recipe(steps=arguments.steps)
    net, _ = demo.train(recipe, digits, seed=0)
    pca = evaluation.fit_pca(digits.train, variance=0.95)
    target = pca(digits.held_out)
    distances: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    pairs = [(name, calls) for calls in arguments.budgets for name in SAMPLERS]
    for name, calls in tqdm(pairs, desc="sampling"):
        x = SAMPLERS[name](net, calls).clamp(-1, 1)
        distances[name].append(evaluation.frechet_distance(pca(x), target))

    print(f"| Frechet distance at calls: | {' | '.join(map(str, arguments.budgets))} |")
    print("|---" * (1 + len(arguments.budgets)) + "|")
    for name, row in distances.items():
        print(f"| {name} | {' | '.join(f'{d:.2f}' for d in row)} |")
    draw(arguments.out / "quality.png", arguments.budgets, distances)
    print(f"Written to {arguments.out}: quality.png")


if __name__ == "__main__":
    main()
