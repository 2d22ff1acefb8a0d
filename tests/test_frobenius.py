"""frobenius_norm: the square is exact over all signs, the error calibrated, the first-order step right."""

import math

import numpy as np
import pytest
import torch

from losslab.operators.dense import DenseOperator
from losslab.random import gaussian, make_generator, rademacher
from losslab.solvers.frobenius import frobenius_norm
from losslab.status import Status
from matrices import Broken, Counted, diagonal, rotated, sign_vectors


def test_all_sign_vectors_give_the_norm():
    operator = rotated(np.linspace(-1, 2, 6))
    result = frobenius_norm(operator, vectors=sign_vectors(6))
    assert result.value == pytest.approx(float(operator.matrix.norm()), rel=1e-14)
    squares = (sign_vectors(6) @ operator.matrix).square().sum(dim=1)
    error_of_square = float(squares.std()) / 8
    assert result.standard_error == pytest.approx(error_of_square / (2 * result.value), rel=1e-12)
    assert (result.num_samples, result.matvecs, result.seed) == (64, 64, None)


def test_orthogonal_vectors_of_length_root_n_give_the_norm():
    """E[zzᵀ] = I is all that is asked of vectors of one's own."""
    operator = rotated(np.linspace(-1, 2, 9))
    result = frobenius_norm(operator, vectors=3 * torch.eye(9, dtype=torch.float64))
    assert result.value == pytest.approx(float(operator.matrix.norm()), rel=1e-14)


@pytest.mark.parametrize("draw", [rademacher, gaussian])
@pytest.mark.parametrize("name", ["flat", "outliers"])
def test_standard_error_is_calibrated_at_a_fixed_number_of_samples(name, draw):
    values = {"flat": np.linspace(-1, 1.5, 60), "outliers": np.append([3.0, 2.0], np.linspace(-0.2, 0.4, 58))}[name]
    operator, truth, runs = rotated(values), np.linalg.norm(values), 200
    results = [frobenius_norm(operator, vectors=draw((40, 60), make_generator(seed))) for seed in range(runs)]
    squares = np.array([result.value**2 for result in results])
    assert abs(squares.mean() - truth**2) < 4 * squares.std(ddof=1) / math.sqrt(runs)  # the square has no bias
    errors, claimed = (np.array(x) for x in ([r.value - truth for r in results], [r.standard_error for r in results]))
    assert 0.85 < np.sqrt((errors**2).mean() / (claimed**2).mean()) < 1.2


def test_a_diagonal_matrix_needs_one_block():
    result = frobenius_norm(diagonal([3.0, 4.0, 12.0]), tol=1e-12)
    assert (result.value, result.standard_error, result.matvecs, result.status) == (13.0, 0.0, 8, Status.converged)


def test_zero_is_known_and_nan_is_not():
    zero = frobenius_norm(DenseOperator(torch.zeros(5, 5)))
    assert (zero.value, zero.standard_error, zero.status) == (0.0, 0.0, Status.converged)
    nothing = frobenius_norm(Broken(20))
    assert math.isnan(nothing.value)
    assert nothing.status is Status.nonfinite
    one = frobenius_norm(DenseOperator(torch.zeros(5, 5)), vectors=torch.ones(1, 5))
    assert (one.value, one.standard_error, one.status) == (0.0, math.inf, Status.budget_reached)


def test_stops_at_the_tolerance():
    operator = Counted(rotated(np.linspace(-1, 1.5, 400)))
    result = frobenius_norm(operator, tol=0.01)
    assert result.status is Status.converged
    assert result.standard_error <= 0.01 * result.value
    assert result.matvecs == operator.count < 96
    assert frobenius_norm(operator, tol=1e-5).status is Status.budget_reached


def test_squares_of_float32_do_not_overflow():
    """‖A‖_F² here is 10⁴¹."""
    assert frobenius_norm(diagonal(np.full(10, 1e20), torch.float32)).value == pytest.approx(1e20 * math.sqrt(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": 0.0}, "tol: expected a number > 0"),
        ({"max_matvecs": 8}, "max_matvecs: expected at least 16, got 8"),
        ({"vectors": torch.ones(8)}, r"vectors: expected shape \(s, 8\), got \(8,\)"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        frobenius_norm(diagonal(np.arange(8.0)), **arguments)
