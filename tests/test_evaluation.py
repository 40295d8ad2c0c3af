"""Frechet distance, principal axes, neighbours and class counts against closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from examples.digits import evaluation


def _covariance(size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, rank or size, generator=generator, dtype=torch.float64)
    return root @ root.T


def test_gaussian_frechet_of_scaled_identities():
    # |m|^2 + K (s - t)^2
    mean = torch.tensor([3.0, 0.0, 4.0])
    eye = torch.eye(3)
    got = evaluation.gaussian_frechet(torch.zeros(3), 4 * eye, mean, 0.25 * eye)
    assert got == pytest.approx(25 + 3 * (2 - 0.5) ** 2, rel=1e-12)


def test_gaussian_frechet_in_one_dimension():
    a, b = torch.tensor([[9.0]]), torch.tensor([[1.0]])
    got = evaluation.gaussian_frechet(torch.tensor([1.0]), a, torch.tensor([-1.0]), b)
    assert got == pytest.approx(2**2 + (3 - 1) ** 2, rel=1e-12)


def test_frechet_distance_of_single_numbers():
    a, b = torch.randn(50, 1, dtype=torch.float64), 3 * torch.randn(40, 1, dtype=torch.float64)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert evaluation.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_gaussian_frechet_agrees_with_a_general_matrix_square_root():
    a, b = _covariance(6, 1), _covariance(6, 2)
    zero = torch.zeros(6)
    cross = scipy.linalg.sqrtm((a @ b).numpy()).real
    expected = float(a.trace() + b.trace()) - 2 * np.trace(cross)
    assert evaluation.gaussian_frechet(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)


def test_gaussian_frechet_of_singular_covariances():
    a, zero = _covariance(6, 3, rank=2), torch.zeros(6)
    assert evaluation.gaussian_frechet(zero, a, zero, a) == pytest.approx(0, abs=1e-6)
    nothing = torch.zeros(6, 6)
    got = evaluation.gaussian_frechet(zero, a, zero, nothing)
    assert got == pytest.approx(a.trace().item(), rel=1e-12)


def test_frechet_distance_of_a_set_from_itself_is_zero():
    x = torch.randn(50, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert evaluation.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert evaluation.frechet_distance(x, x[torch.randperm(50)]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shifted_and_a_scaled_set():
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0, 0, 2], dtype=torch.float64)
    assert evaluation.frechet_distance(x, x + shift) == pytest.approx(9, rel=1e-9)
    centred = x - x.mean(0)
    expected = centred.T.cov().trace().item()
    assert evaluation.frechet_distance(centred, 2 * centred) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 4, generator=generator), 1 + torch.rand(40, 4, generator=generator)
    there, back = evaluation.frechet_distance(a, b), evaluation.frechet_distance(b, a)
    assert there == pytest.approx(back, rel=1e-9) and there > 0


def test_pca_finds_the_axes_that_carry_the_variance():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    std = torch.tensor([10.0, 3.0, 0.1, 0.01], dtype=torch.float64)
    noise = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    data = (noise * std) @ rotation.T + 5
    assert [evaluation.fit_pca(data, v).axes.shape[1] for v in (0.5, 0.95, 0.99999, 1.0)] == [
        1,
        2,
        3,
        4,
    ]
    pca = evaluation.fit_pca(data, 0.95)
    torch.testing.assert_close(pca.axes.T @ pca.axes, torch.eye(2, dtype=torch.float64))
    assert (pca.axes[:, 0] @ rotation[:, 0]).abs() > 0.999
    torch.testing.assert_close(pca(data).mean(0), torch.zeros(2).double(), atol=1e-9, rtol=0)


def test_all_axes_keep_the_frechet_distance():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 5, generator=generator), 1 + torch.rand(60, 5, generator=generator)
    pca = evaluation.fit_pca(a, 1.0)
    assert pca.axes.shape[1] == 5
    expected = evaluation.frechet_distance(a, b)
    assert evaluation.frechet_distance(pca(a), pca(b)) == pytest.approx(expected, rel=1e-9)


def test_nearest_distance():
    reference = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    x = torch.tensor([[3.0, 4.0], [10.0, 0.0], [9.0, 0.0]])
    got = evaluation.nearest_distance(x, reference)
    torch.testing.assert_close(got, torch.tensor([5.0, 0.0, 1.0]).double())


def test_classifier_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    angle = labels * 2 * math.pi / 3
    centres = 5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    x = centres + torch.randn(90, 2, generator=generator)
    classifier = evaluation.fit_classifier(x[:60], labels[:60])
    assert torch.equal(evaluation.classify(classifier, x[60:]), labels[60:])
