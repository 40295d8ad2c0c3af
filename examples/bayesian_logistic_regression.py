"""The posterior of a logistic regression, by Langevin dynamics: no network, many small chains.

    python examples/bayesian_logistic_regression.py --out posterior-output

Real data: scikit-learn's breast cancer set, ten of its features, standardised. The posterior of
the weights under a normal prior is sampled with 4000 chains, whose score is one matrix product.
Beside it stands the Laplace approximation: the normal distribution at the posterior's mode.
Prints means and deviations of both, and how the classes of held-out tumours are predicted;
draws posterior.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn import datasets
from torch import Tensor

import score_kernels as sk
from score_kernels.cli import plots

PRIOR = 1.0


class Posterior:
    """p(w | data), up to a constant: logistic likelihood and a normal prior, deviation PRIOR."""

    def __init__(self, features: Tensor, classes: Tensor) -> None:
        self.features = features
        self.classes = classes

    def score(self, w: Tensor) -> Tensor:
        """grad log p at each row of w, [chains, weights]."""
        away = self.classes - torch.sigmoid(w @ self.features.T)
        return away @ self.features - w / PRIOR**2

    def precision(self, w: Tensor) -> Tensor:
        """Minus the second derivative of log p at one w."""
        p = torch.sigmoid(self.features @ w)
        weighted = self.features * (p * (1 - p))[:, None]
        return weighted.T @ self.features + torch.eye(len(w), dtype=w.dtype) / PRIOR**2

    def mode(self) -> Tensor:
        """By Newton's method."""
        w = self.features.new_zeros(self.features.shape[1])
        for _ in range(50):
            w = w + torch.linalg.solve(self.precision(w), self.score(w[None])[0])
        return w


def load() -> tuple[Posterior, Tensor, Tensor, list[str]]:
    source = datasets.load_breast_cancer()
    values = torch.tensor(source.data[:, :10], dtype=torch.float64)
    values = (values - values.mean(0)) / values.std(0)
    features = torch.cat([torch.ones(len(values), 1, dtype=values.dtype), values], 1)
    classes = torch.tensor(source.target, dtype=torch.float64)
    train, held_out = torch.arange(len(features)).split([400, len(features) - 400])
    names = ["constant", *source.feature_names[:10]]
    return Posterior(features[train], classes[train]), features[held_out], classes[held_out], names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("posterior-output"))
    parser.add_argument("--chains", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    posterior, features, classes, names = load()
    mode = posterior.mode()
    covariance = torch.linalg.inv(posterior.precision(mode))

    # In coordinates in which the Laplace approximation is standard, one step size suits all.
    root = torch.linalg.cholesky(covariance).float()
    single = Posterior(posterior.features.float(), posterior.classes.float())
    shift = mode.float()

    def score(u: Tensor) -> Tensor:
        return single.score(shift + u @ root.T) @ root

    u = sk.langevin(
        score,
        (arguments.chains, len(mode)),
        step_size=0.05,
        steps=arguments.steps,
        seed=0,
        progress=True,
    )
    w = (shift + u @ root.T).double()

    print(f"{'weight':24} {'posterior':>17} {'Laplace':>17}")
    for i, name in enumerate(names):
        exact = f"{w[:, i].mean():8.3f} +- {w[:, i].std():.3f}"
        print(f"{name:24} {exact:>17} {mode[i]:8.3f} +- {covariance[i, i].sqrt():.3f}")
    chance = torch.sigmoid(w @ features.T).mean(0)
    right = float(((chance > 0.5).double() == classes).double().mean())
    surprise = -float(torch.where(classes > 0, chance, 1 - chance).log().mean())
    print(f"held-out tumours: {right:.1%} right, mean surprise {surprise:.3f} nats")

    figure = plots.figure(9, 3.2)
    for axes, i in zip(figure.subplots(1, 3), (1, 3, 8), strict=True):
        low, high = (float(w[:, i].quantile(q)) for q in (0.002, 0.998))
        grid = torch.linspace(low, high, 200, dtype=torch.float64)
        axes.hist(w[:, i].numpy(), bins=40, range=(low, high), density=True, alpha=0.5,
                  label="Langevin")  # fmt: skip
        normal = torch.distributions.Normal(mode[i], covariance[i, i].sqrt())
        axes.plot(grid, normal.log_prob(grid).exp(), label="Laplace")
        axes.set(title=names[i], yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(arguments.out / "posterior.png")
    print(f"Written to {arguments.out}: posterior.png")


if __name__ == "__main__":
    main()
