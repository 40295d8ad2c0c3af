"""How far a set of samples is from a set of real data: Frechet distance, neighbours, classes.

Everything here takes samples as `[N, ...]` tensors, flattens them to `[N, D]` and computes in
float64 on the CPU. Only :func:`fit_classifier` needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "PCA",
    "class_histogram",
    "fit_classifier",
    "fit_pca",
    "frechet_distance",
    "gaussian_frechet",
    "nearest_distance",
]


class Classifier(Protocol):
    """What :func:`class_histogram` asks of a classifier; scikit-learn's have it."""

    def predict(self, x: Any) -> Any: ...


@dataclass(frozen=True)
class PCA:
    """Projection on the leading principal axes: `mean` `[D]`, orthonormal `axes` `[D, K]`."""

    mean: Tensor
    axes: Tensor

    @property
    def dims(self) -> int:
        """Number of axes K."""
        return self.axes.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """Coordinates `(x - mean) axes` of `x` `[N, ...]`: `[N, K]`, float64, in `x`'s units."""
        return (_rows("x", x) - self.mean) @ self.axes


def fit_pca(data: Tensor, variance: float = 0.95) -> PCA:
    """The fewest principal axes of `data` `[N, ...]` that carry the share `variance` of it.

    Raises:
        ValueError: for fewer than two samples, or `variance` outside (0, 1].
    """
    if not 0 < variance <= 1:
        raise ValueError(f"variance: got {variance}, expected a share in (0, 1]")
    rows = _rows("data", data, at_least=2)
    mean = rows.mean(0)
    _, singular, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    share = singular.square().cumsum(0) / singular.square().sum()
    dims = min(int((share < variance).sum()) + 1, len(share))
    return PCA(mean, axes[:dims].T.contiguous())


def gaussian_frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance (2-Wasserstein) of the Gaussians `N(mean_a, cov_a)` and `b`'s.

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a^1/2 cov_b cov_a^1/2)^1/2)

    Means are `[K]`, covariances `[K, K]` symmetric positive semi-definite; singular ones are fine.
    The result is in the data's units squared, never below 0.

    Source: Dowson and Landau, "The Frechet distance between multivariate normal distributions"
    (1982); as a score of generated images, Heusel et al. 2017, arXiv 1706.08500.
    """
    root = _sqrtm(cov_a.double())
    middle = root @ cov_b.double() @ root
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0).sqrt().sum()
    means = (mean_a.double() - mean_b.double()).square().sum()
    # Rounding can leave a few 1e-16 below zero when the two are equal.
    return max(0.0, float(means + cov_a.double().trace() + cov_b.double().trace() - 2 * cross))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to samples `a` `[N, ...]`, `b` `[M, ...]`.

    See :func:`gaussian_frechet` for the formula. Only means and covariances enter, so two sets
    that share those are at distance 0 however else they differ; and the estimate grows as the sets
    shrink (noise in the covariances), so compare only figures from sets of equal sizes.

    Raises:
        ValueError: for fewer than two samples, or samples of different sizes.
    """
    rows_a, rows_b = _pair(("a", "b"), a, b, at_least=2)
    return gaussian_frechet(rows_a.mean(0), rows_a.T.cov(), rows_b.mean(0), rows_b.T.cov())


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance from each sample of `x` `[N, ...]` to the nearest in `reference`: `[N]`.

    Small against what unseen real data have means copies; large means unlike the data.

    Raises:
        ValueError: for an empty set, or samples of different sizes.
    """
    rows, others = _pair(("x", "reference"), x, reference, at_least=1)
    return torch.cdist(rows, others).min(dim=1).values


def fit_classifier(x: Tensor, labels: Sequence[int] | Tensor) -> Classifier:
    """A support vector machine (Gaussian kernel) trained on `x` `[N, ...]` and `labels` `[N]`.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            "the classifier needs scikit-learn: pip install score-kernels[demo]"
        ) from error
    return SVC(C=10.0, gamma="scale").fit(_rows("x", x).numpy(), torch.as_tensor(labels).numpy())


def class_histogram(classifier: Classifier, x: Tensor, classes: int) -> list[int]:
    """How many samples of `x` `[N, ...]` the classifier puts in each class `0 .. classes - 1`."""
    predicted = torch.as_tensor(classifier.predict(_rows("x", x).numpy())).long()
    return torch.bincount(predicted, minlength=classes).tolist()


def _sqrtm(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _rows(name: str, x: Tensor, at_least: int = 1) -> Tensor:
    if x.ndim < 2 or x.shape[0] < at_least:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected [N, ...] with N at least {at_least}"
        )
    return x.detach().flatten(1).double().cpu()


def _pair(names: tuple[str, str], a: Tensor, b: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"{names[0]}: got samples of shape {tuple(a.shape[1:])}, expected that of "
            f"{names[1]}'s, {tuple(b.shape[1:])}"
        )
    return _rows(names[0], a, at_least), _rows(names[1], b, at_least)
