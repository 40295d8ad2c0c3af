"""How far a set of samples is from a set of real data: Frechet distance, neighbours, classes.

Samples are `[N, ...]` tensors; everything is computed on `[N, D]` in float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.svm import SVC
from torch import Tensor


@dataclass(frozen=True)
class PCA:
    """Projection on the leading principal axes: `mean` `[D]`, orthonormal `axes` `[D, K]`."""

    mean: Tensor
    axes: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Coordinates `(x - mean) axes` of `x` `[N, ...]`: `[N, K]`, in `x`'s units."""
        return (rows(x) - self.mean) @ self.axes


def fit_pca(data: Tensor, variance: float = 0.95) -> PCA:
    """The fewest principal axes of `data` that carry the share `variance` in (0, 1] of it."""
    points = rows(data)
    mean = points.mean(0)
    _, singular, axes = torch.linalg.svd(points - mean, full_matrices=False)
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
    mean_a, cov_a, mean_b, cov_b = (t.double() for t in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    middle = root @ cov_b @ root
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0).sqrt().sum()
    means = (mean_a - mean_b).square().sum()
    # Rounding can leave a few 1e-16 below zero when the two are equal.
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * cross))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to samples `a` `[N, ...]`, `b` `[M, ...]`.

    See :func:`gaussian_frechet`. Only means and covariances enter, so two sets that share those are
    at distance 0 however else they differ; and the estimate grows as the sets shrink (noise in the
    covariances), so compare only figures from sets of equal sizes.
    """
    a, b = rows(a), rows(b)
    # The covariance of one number has no dimensions.
    of_a, of_b = (torch.atleast_2d(x.T.cov()) for x in (a, b))
    return gaussian_frechet(a.mean(0), of_a, b.mean(0), of_b)


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance from each sample of `x` `[N, ...]` to the nearest in `reference`: `[N]`.

    Small against what unseen real data have means copies; large means unlike the data.
    """
    return torch.cdist(rows(x), rows(reference)).min(dim=1).values


def fit_classifier(x: Tensor, labels: Tensor) -> SVC:
    """A support vector machine (Gaussian kernel) trained on `x` `[N, ...]` and `labels` `[N]`."""
    return SVC(C=10.0, gamma="scale").fit(rows(x).numpy(), labels.numpy())


def classify(classifier: SVC, x: Tensor) -> Tensor:
    """The class `[N]` of each sample of `x` `[N, ...]`."""
    return torch.as_tensor(classifier.predict(rows(x).numpy()))


def rows(x: Tensor) -> Tensor:
    """`x` `[N, ...]` as `[N, D]`, float64 on the CPU."""
    return x.detach().flatten(1).double().cpu()
