"""power_iteration: one product tells value, residual and the next start; it never claims what it does not know."""

import math

import numpy as np
import pytest
import torch

from losslab.operators.base import LinearOperator
from losslab.operators.dense import DenseOperator
from losslab.solvers.power import power_iteration
from losslab.status import Status, StopRequested
from matrices import Broken, Counted, diagonal, rotated

VALUES = np.append(np.linspace(-1.0, 2.0, 60), 3.0)


def unit(n: int, seed: int = 0) -> torch.Tensor:
    vector = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_finds_the_dominant_pair(sign, dtype):
    operator = rotated(sign * VALUES, dtype)
    result = power_iteration(operator, tol=1e-5)
    assert result.status is Status.converged
    assert result.value == pytest.approx(3.0 * sign, rel=1e-6)
    exact = torch.linalg.eigh(operator.matrix.double()).eigenvectors[:, -1 if sign > 0 else 0]
    assert float(abs(exact @ result.vector.double())) == pytest.approx(1, abs=1e-7)
    assert result.residual <= 1e-5 * abs(result.value)


def test_one_product_gives_quotient_residual_and_next_start():
    operator, v = Counted(rotated(VALUES)), 7.0 * unit(61)
    result = power_iteration(operator, start=v, max_matvecs=1, tol=1e-12)
    product, v = operator.inner @ v / 7.0, v / 7.0
    assert operator.count == result.matvecs == 1
    assert result.value == pytest.approx(float(v @ product), rel=1e-14)
    assert result.residual == pytest.approx(float((product - (v @ product) * v).norm()), rel=1e-12)
    torch.testing.assert_close(result.vector, product / product.norm())
    assert result.status is Status.budget_reached
    assert result.error >= result.residual


def test_single_products_in_a_row_are_the_iteration():
    operator, vector = rotated(VALUES), None
    for _ in range(25):
        step = power_iteration(operator, start=vector, max_matvecs=1, tol=1e-9, seed=3)
        vector = step.vector
    whole = power_iteration(operator, max_matvecs=25, tol=1e-9, seed=3)
    assert (step.value, step.residual) == pytest.approx((whole.value, whole.residual), rel=1e-12)
    torch.testing.assert_close(step.vector, whole.vector)


def test_follows_a_matrix_that_changes():
    """The warm start pays: a product a step keeps the residual small while the matrix drifts."""
    base, drift = rotated(VALUES, seed=1).matrix, rotated(VALUES, seed=2).matrix
    vector = power_iteration(DenseOperator(base), tol=1e-6).vector
    for step in range(1, 21):
        operator = DenseOperator(base + 1e-3 * step * drift)
        result = power_iteration(operator, start=vector, max_matvecs=1)
        vector = result.vector
        exact = float(torch.linalg.eigvalsh(operator.matrix)[-1])
        assert abs(result.value - exact) <= result.error
        assert result.error < 0.02


def test_sign_of_the_vector_is_kept():
    """With a negative eigenvalue v would turn over at each product; the next start should not."""
    start = power_iteration(rotated(-VALUES), tol=1e-6).vector
    again = power_iteration(rotated(-VALUES), start=start, max_matvecs=1)
    assert float(start @ again.vector) > 0.99


def test_plus_minus_tie_does_not_converge_and_says_so():
    for seed in range(5):
        result = power_iteration(rotated(np.append(np.linspace(-1, 1, 30), [3.0, -3.0])), max_matvecs=300, seed=seed)
        assert result.status is Status.budget_reached
        assert not result.status.ok
        assert result.matvecs == 300
        assert result.residual > 1e-2 * abs(result.value)
        assert min(abs(result.value - 3), abs(result.value + 3)) <= result.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eigenvalue_is_within_the_error(dtype):
    for seed in range(40):
        values = np.random.default_rng(seed).normal(size=30)
        operator = rotated(values, dtype, seed)
        exact = torch.linalg.eigvalsh(operator.matrix.double()).numpy()
        for budget in (1, 2, 5, 40):
            result = power_iteration(operator, max_matvecs=budget, tol=1e-2, seed=seed)
            assert np.abs(exact - result.value).min() <= result.error
            assert result.error >= result.residual + torch.finfo(dtype).eps * abs(result.value)


def test_an_eigenvector_that_is_not_the_dominant_one():
    """No product says that there is a larger one: the value is an eigenvalue, and right as such."""
    result = power_iteration(diagonal([1.0, 2.0, 5.0]), start=torch.tensor([0.0, 1.0, 0.0]))
    assert (result.value, result.residual, result.matvecs, result.status) == (2.0, 0.0, 1, Status.converged)


@pytest.mark.parametrize("values", [np.zeros(20), np.ones(20), [0.0]])
def test_zero_and_identity(values):
    result = power_iteration(rotated(values))
    assert result.value == pytest.approx(values[0], abs=1e-14)
    assert (result.matvecs, result.status) == (1, Status.converged)
    assert float(result.vector.norm()) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_tolerance_below_rounding(dtype):
    result = power_iteration(diagonal(VALUES, dtype), tol=1e-30, max_matvecs=1000)
    assert result.status is Status.converged
    assert abs(result.value - 3) <= result.error <= 100 * torch.finfo(dtype).eps
    assert result.vector.dtype == torch.float32


@pytest.mark.parametrize("good", [0, 3])
def test_nonfinite(good):
    result = power_iteration(Broken(40, good), tol=1e-9)
    assert (result.status, result.matvecs) == (Status.nonfinite, good + 1)
    assert math.isnan(result.value)
    assert math.isinf(result.error)
    assert torch.isfinite(result.vector).all()  # the last good one: a start for another try


def test_seed_generator_and_stop():
    operator = rotated(VALUES)
    once, again = (power_iteration(operator, max_matvecs=3, seed=1) for _ in range(2))
    assert (once.value, once.seed) == (again.value, 1)
    generator = torch.Generator().manual_seed(1)
    first, second = (power_iteration(operator, max_matvecs=3, seed=generator) for _ in range(2))
    assert first.seed is None
    assert first.value != second.value
    assert power_iteration(operator, start=unit(61)).seed is None

    def stop(done, total, note):
        if done == 4:
            raise StopRequested

    stopped = power_iteration(operator, tol=1e-12, progress=stop)
    assert (stopped.status, stopped.matvecs) == (Status.stopped, 4)
    hurried = power_iteration(operator, tol=1e-12, time_budget=1e-9)
    assert (hurried.status, hurried.matvecs) == (Status.time_reached, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": 0}, "tol: expected a number > 0, got 0"),
        ({"tol": float("nan")}, "tol: expected"),
        ({"max_matvecs": 0}, "max_matvecs: expected at least 1, got 0"),
        ({"start": torch.ones(7)}, r"start: expected a tensor of shape \(8,\), got \(7,\)"),
        ({"start": torch.ones(8, 1)}, r"start: expected a tensor of shape \(8,\), got \(8, 1\)"),
        ({"start": np.ones(8)}, "start: expected a tensor of shape .* got ndarray"),
        ({"start": torch.zeros(8)}, "start: expected a finite vector that is not zero"),
        ({"start": torch.full((8,), torch.nan)}, "start: expected a finite vector .* got one of norm nan"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        power_iteration(diagonal(np.arange(8.0)), **arguments)


class Elementwise(LinearOperator):
    """A diagonal matrix whose products are no matmul, which autocast would round."""

    def __init__(self, entries: torch.Tensor) -> None:
        self.entries, self.size, self.dtype, self.device = entries, len(entries), entries.dtype, entries.device

    def _matmat(self, matrix: torch.Tensor) -> torch.Tensor:
        return self.entries[:, None] * matrix


def test_inside_of_an_autocast_it_is_as_precise_as_its_operator():
    operator = Elementwise(torch.tensor([9010.67, 100.0, 1.0]))
    with torch.autocast("cpu", torch.bfloat16):
        found = power_iteration(operator, start=torch.tensor([1.0, 1e-5, 0.0]), max_matvecs=1)
    assert found.value == pytest.approx(9010.67, rel=1e-6)
