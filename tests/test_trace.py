"""trace: exact identities that need no seed, and a z-test at a fixed number of samples."""

import math

import numpy as np
import pytest
import torch

from losslab.operators.dense import DenseOperator
from losslab.random import make_generator, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.density import extend
from losslab.solvers.krylov import Krylov
from losslab.solvers.trace import complete, deflated_samples, trace
from losslab.status import Status
from matrices import Counted, diagonal, rotated, sign_vectors


def random_symmetric(n: int = 6) -> torch.Tensor:
    matrix = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return matrix + matrix.mT


def test_all_sign_vectors_give_the_trace():
    matrix = random_symmetric()
    result = trace(DenseOperator(matrix), vectors=sign_vectors(6))
    assert result.value == pytest.approx(float(matrix.trace()), abs=1e-12)
    assert (result.num_samples, result.matvecs, result.seed) == (64, 64, None)
    samples = torch.einsum("si,ij,sj->s", sign_vectors(6), matrix, sign_vectors(6))
    assert result.standard_error == pytest.approx(float(samples.std()) / 8, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_deflated_samples_and_the_basis_add_up(steps):
    matrix = random_symmetric()
    krylov = Krylov(DenseOperator(matrix), torch.arange(1.0, 7.0), 6)
    extend(krylov, steps, Budget(10))
    known = krylov.projected.diagonal()[:steps].sum()
    samples = deflated_samples(krylov.operator, sign_vectors(6), krylov)
    assert known + float(samples.mean()) == pytest.approx(float(matrix.trace()), abs=1e-12)
    assert abs(known - float(matrix.trace())) > 1e-3  # else the samples would be tested by nothing


def test_diagonal_matrix_needs_one_probe():
    """Hutchinson with signs has no variance on the diagonal."""
    values = np.random.default_rng(0).normal(size=30)
    operator = diagonal(values)
    for seed in range(5):
        one = trace(operator, vectors=rademacher((1, 30), make_generator(seed)))
        assert one.value == pytest.approx(values.sum(), abs=1e-13)
        assert (one.standard_error, one.status) == (math.inf, Status.budget_reached)
    several = trace(operator, vectors=rademacher((5, 30), make_generator(0)))
    assert several.standard_error < 1e-13
    assert several.status is Status.converged


def test_whole_space_is_exact():
    for values in (1.0 / np.arange(1, 41), np.repeat([1.0, 5.0], 15), np.ones(30), np.zeros(20)):
        operator = Counted(rotated(values))
        result = trace(operator)
        assert result.value == pytest.approx(values.sum(), abs=1e-12)
        assert (result.standard_error, result.num_samples, result.status) == (0.0, 0, Status.breakdown)
        assert result.matvecs == operator.count == len(values)


def test_standard_error_is_calibrated_at_a_fixed_number_of_samples():
    """Without deflation and with it: bias within 4 standard errors, z-scores of variance near 1."""
    values = np.concatenate([[4.0, 4.0, 4.0], np.linspace(-1, 2, 97)])
    operator, truth, runs, num = rotated(values), values.sum(), 200, 30
    scores = np.empty((2, runs))
    for seed in range(runs):
        generator = make_generator(seed)
        plain = trace(operator, vectors=rademacher((num, 100), generator))
        krylov = Krylov(operator, rademacher((100,), generator), 10)
        extend(krylov, 10, Budget(10))
        deflated = complete(krylov, 1e-12, generator, Budget(num))
        assert deflated.num_samples == num
        for row, result in enumerate((plain, deflated)):
            scores[row, seed] = (result.value - truth) / result.standard_error
    # t with 29 degrees of freedom: variance 1.07, and 0.11 its standard error over 200 runs.
    assert (np.abs(scores.mean(axis=1)) < 4 * 1.04 / np.sqrt(runs)).all()
    assert ((scores**2).mean(axis=1) > 0.7).all()
    assert ((scores**2).mean(axis=1) < 1.6).all()


def test_deflation_pays():
    """Where few eigenvalues dominate, deflation beats plain sampling at the same number of products."""
    values = np.concatenate([[300.0, 200.0, 100.0], np.linspace(-1, 2, 297)])
    operator, plain, deflated = rotated(values), [], []
    for seed in range(20):
        plain.append(trace(operator, vectors=rademacher((32, 300), make_generator(seed))).value)
        result = trace(operator, max_matvecs=32, tol=1e-9, seed=seed)
        assert result.matvecs == 32
        deflated.append(result.value)
    rms = [np.sqrt(np.mean((np.array(v) - values.sum()) ** 2)) for v in (plain, deflated)]
    assert rms[1] < 0.3 * rms[0]


@pytest.mark.parametrize("tol", [0.1, 0.01])
def test_tolerance_is_honest(tol):
    values = np.linspace(0, 2, 300)
    scores, converged = [], 0
    for seed in range(40):
        result = trace(rotated(values), tol=tol, max_matvecs=60, seed=seed)
        assert (result.status is Status.converged) == (result.standard_error <= tol * abs(result.value))
        assert result.num_samples >= 8 or result.status is Status.breakdown
        assert result.matvecs <= 60
        converged += result.status is Status.converged
        scores.append((result.value - values.sum()) / result.standard_error)
    assert (converged > 35) == (tol == 0.1)
    # Stopping at the first small standard error makes it a little too small: t with 7 degrees of freedom has 1.4.
    assert np.mean(np.square(scores)) < 2.5


def test_trace_of_zero_against_a_large_matrix_is_not_called_converged():
    values = np.linspace(-1, 1, 400)
    result = trace(rotated(values), max_matvecs=40)
    assert result.status is Status.budget_reached
    assert abs(result.value) < 5 * result.standard_error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": 0.0}, "tol: expected a number > 0"),
        ({"max_matvecs": 15}, "max_matvecs: expected at least 16, got 15"),
        ({"vectors": torch.ones(8)}, r"vectors: expected shape \(s, 8\), got \(8,\)"),
        ({"vectors": torch.ones(0, 8)}, "vectors: expected shape"),
        ({"vectors": torch.ones(2, 9)}, "vectors: expected shape"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        trace(diagonal(np.arange(8.0)), **arguments)


def test_prints_value_error_and_status():
    assert str(trace(diagonal([1.0, 2.0]))) == "3 ± 0 (0 samples, breakdown)"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_matrices_are_exact_for_every_seed(size, dtype):
    """A new block must not be the old Rademacher vector again: 2 of 4 sign vectors of [[2, 1], [1, 2]] break down."""
    matrix = torch.eye(size, dtype=dtype) + 1
    for seed in range(20):
        result = trace(DenseOperator(matrix), seed=seed)
        assert result.value == pytest.approx(2 * size, rel=1e-5), seed
        assert result.standard_error == 0
