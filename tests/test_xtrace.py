"""XTrace against its definition: one basis for each test vector, made from all the others."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from losslab.operators.dense import DenseOperator
from losslab.random import gaussian, make_generator
from losslab.solvers.trace import trace
from losslab.status import Status
from matrices import Counted, diagonal, rotated


def naive_sample(matrix: Tensor, vector: Tensor, others: Tensor) -> float:
    """tr(QᵀAQ) + (n − rank) uᵀAu/‖u‖², Q a basis of what A makes of the others, u what is outside of it."""
    left, sizes, _ = torch.linalg.svd(matrix @ others.mT, full_matrices=False)
    q = left[:, sizes > 1e-12 * sizes.max()] if len(others) else left
    outside = vector - q @ (q.mT @ vector)
    share = (outside @ matrix @ outside) / (outside @ outside)
    return float((q.mT @ matrix @ q).trace() + (len(matrix) - q.shape[1]) * share)


def naive(matrix: Tensor, vectors: Tensor) -> tuple[float, float]:
    """The mean over test vectors, and its standard error from leaving out two."""
    num = len(vectors)
    samples = np.array([naive_sample(matrix, vectors[i], without(vectors, i)) for i in range(num)])
    changes = np.zeros((num, num))
    for i in range(num):
        for j in set(range(num)) - {i}:
            changes[i, j] = samples[i] - naive_sample(matrix, vectors[i], without(vectors, i, j))
    variance, covariance = samples.var(ddof=1) / num, (changes * changes.T).sum() / (num * (num - 1))
    return samples.mean(), math.sqrt(variance + min(max(covariance, 0), 3 * variance))


def without(vectors: Tensor, *rows: int) -> Tensor:
    return vectors[[i for i in range(len(vectors)) if i not in rows]]


SPECTRA = {
    "indefinite": np.linspace(-1, 2, 40) ** 3,
    "decaying": 0.7 ** np.arange(40),
    "identity": np.ones(40),
    "outliers": np.append([20.0, 10.0], np.linspace(-0.2, 0.4, 38)),
    "rank 12": np.append(np.linspace(1, 2, 12), np.zeros(28)),
}


@pytest.mark.parametrize("num", [2, 3, 9])
@pytest.mark.parametrize("name", SPECTRA)
def test_equals_the_naive_version(name, num):
    operator = rotated(SPECTRA[name])
    vectors = gaussian((num, 40), make_generator(num), dtype=torch.float64)
    result = trace(operator, method="xtrace", vectors=vectors)
    value, error = naive(operator.matrix, vectors)
    assert result.value == pytest.approx(value, rel=1e-10)
    assert result.standard_error == pytest.approx(error, rel=1e-7, abs=1e-10)
    assert (result.num_samples, result.matvecs, result.seed) == (num, 2 * num, None)


def test_equals_the_naive_version_for_vectors_of_any_length_and_kind():
    operator = rotated(SPECTRA["indefinite"])
    vectors = torch.rand(5, 40, generator=make_generator(0), dtype=torch.float64)
    vectors *= torch.tensor([1e-3, 1, 5, 1e4, 2]).unsqueeze(1)
    result = trace(operator, method="xtrace", vectors=vectors)
    assert result.value == pytest.approx(naive(operator.matrix, vectors)[0], rel=1e-8)


def test_a_test_vector_that_adds_nothing_to_the_basis():
    """Twice the same direction: leaving one out leaves the basis what it was."""
    operator = rotated(SPECTRA["indefinite"])
    vectors = gaussian((1, 40), make_generator(1), dtype=torch.float64) * torch.tensor([[1.0], [-2.0]])
    result = trace(operator, method="xtrace", vectors=vectors)
    value, error = naive(operator.matrix, vectors)
    assert result.value == pytest.approx(value, rel=1e-9)
    assert result.standard_error == pytest.approx(error, rel=0.01)  # the two directions left out differ by rounding


def test_grown_block_by_block_equals_all_at_once():
    operator = Counted(rotated(np.linspace(-1, 2, 60) ** 3))
    grown = trace(operator, method="xtrace", max_matvecs=43, tol=1e-9, seed=4)
    assert grown.matvecs == operator.count == 42
    generator = make_generator(4)
    vectors = torch.cat([gaussian((size, 60), generator) for size in (8, 8, 5)])
    at_once = trace(operator, method="xtrace", vectors=vectors)
    assert grown.value == pytest.approx(at_once.value, rel=1e-12)
    assert grown.standard_error == pytest.approx(at_once.standard_error, rel=1e-8)


def test_each_sample_is_without_bias():
    """The naive sample, over four directions of a circle around what the basis spans: the mean is the trace."""
    matrix = torch.tensor([[2.0, 1.0, 0.5], [1.0, -1.0, 0.3], [0.5, 0.3, 4.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    axis = torch.nn.functional.normalize(matrix @ other[0], dim=0)
    first, second = torch.linalg.svd(axis.unsqueeze(0))[2][1:]
    circle = [math.cos(a) * first + math.sin(a) * second + 0.7 * axis for a in np.arange(4) * math.pi / 2]
    assert np.mean([naive_sample(matrix, vector, other) for vector in circle]) == pytest.approx(5, abs=1e-12)


def test_identity_needs_no_luck():
    """The normalisation makes every sample of a multiple of the identity exact."""
    result = trace(rotated(np.full(500, 3.0)), method="xtrace", tol=1e-9)
    assert result.value == pytest.approx(1500, rel=1e-12)
    assert (result.matvecs, result.status) == (16, Status.converged)


@pytest.mark.parametrize("shape", [diagonal, rotated])
def test_spectra_that_fall_below_rounding_stay_finite_and_honest(shape):
    """Bases of vectors that lie in each other's span to the last digit."""
    for base in (0.1, 1e-3, 1e-6):
        values = np.array([base**k for k in range(50)])
        for seed in range(5):
            result = trace(shape(values), method="xtrace", seed=seed, tol=1e-10)
            assert abs(result.value - values.sum()) < max(5 * result.standard_error, 1e-13)


def test_more_vectors_than_dimensions_are_not_needed():
    operator = Counted(rotated([3.0, 2.0, -1.0]))
    result = trace(operator, method="xtrace", vectors=gaussian((7, 3), make_generator(0)))
    assert result.value == pytest.approx(4, abs=1e-12)
    assert (result.matvecs, operator.count, result.status) == (6, 6, Status.breakdown)


def test_one_vector_has_no_error():
    result = trace(DenseOperator(torch.eye(5)), method="xtrace", vectors=torch.ones(1, 5))
    assert (result.value, result.standard_error, result.status) == (pytest.approx(5), math.inf, Status.budget_reached)
