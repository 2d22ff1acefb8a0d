"""conjugate_gradients: the solution, its true residual, and what stands in the way where there is none."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import CASES
from losslab.operators.base import LinearOperator
from losslab.operators.dense import DenseOperator
from losslab.operators.hessian import Hessian
from losslab.solvers.conjugate_gradients import conjugate_gradients
from losslab.status import Status, StopRequested
from matrices import Broken, Counted, diagonal, rotated

POSITIVE = np.linspace(0.1, 4.0, 50) ** 2


def right(n: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def true_residuals(operator: DenseOperator, b: Tensor, x: Tensor, shift: float = 0.0) -> np.ndarray:
    b, x = (t.double().reshape(len(t), -1) for t in (b, x))
    rest = b - operator.matrix.double() @ x - shift * x
    return (rest.norm(dim=0) / b.norm(dim=0)).numpy()


class Passes(Counted):
    """Counts the passes too."""

    passes = 0

    def _matmat(self, matrix: Tensor) -> Tensor:
        self.passes += 1
        return super()._matmat(matrix)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shift", [0.0, 0.7, -0.005])
@pytest.mark.parametrize("shape", [(), (1,), (4,)])
def test_solves(shape, shift, dtype, tol):
    operator, b = rotated(POSITIVE, dtype), right(50, *shape, dtype=dtype)
    result = conjugate_gradients(operator, b, shift=shift, tol=tol)
    assert result.status is Status.converged
    assert result.x.shape == b.shape
    assert result.x.dtype == dtype
    exact = torch.linalg.solve(operator.matrix.double() + shift * torch.eye(50, dtype=torch.float64), b.double())
    assert float((result.x - exact).norm()) <= float(tol * b.double().norm() / (0.01 + shift))
    assert (result.residuals <= tol).all()
    assert result.converged.all()
    true = true_residuals(operator, b, result.x, shift)
    np.testing.assert_allclose(result.residuals, true, rtol=1e-3, atol=100 * torch.finfo(dtype).eps)
    assert POSITIVE[0] - 1e-6 <= result.curvature <= POSITIVE[-1]


def test_as_many_iterations_as_distinct_eigenvalues():
    operator = Counted(rotated(np.repeat([1.0, 2.0, 5.0], 20)))
    result = conjugate_gradients(operator, right(60), tol=1e-10)
    assert (result.matvecs, operator.count) == (2 + 3 + 1, 6)  # the check, the iterations, the residual


def test_right_hand_sides_share_passes_and_leave_when_done():
    operator, b = Passes(rotated(POSITIVE)), right(50, 3)
    b[:, 1] = operator.inner.matrix @ b[:, 0]  # from the second on, one exact answer is given
    alone = [conjugate_gradients(operator, column, tol=1e-8) for column in b.mT]
    operator.count = operator.passes = 0
    together = conjugate_gradients(operator, b, tol=1e-8)
    for i, single in enumerate(alone):
        torch.testing.assert_close(together.x[:, i], single.x, rtol=1e-6, atol=1e-7)
    assert together.matvecs == operator.count == sum(single.matvecs for single in alone) - 2 * 2
    assert operator.passes == max(single.matvecs for single in alone) - 1  # the check is one pass
    easy = b.clone()
    easy[:, 2] = torch.linalg.eigh(operator.inner.matrix).eigenvectors[:, 0]  # one iteration
    assert conjugate_gradients(operator, easy, tol=1e-8).matvecs < together.matvecs - 20


def test_start():
    operator, b = Counted(rotated(POSITIVE)), right(50, 2)
    first = conjugate_gradients(operator, b, tol=1e-6)
    again = conjugate_gradients(operator, b, tol=1e-6, start=first.x)
    assert (again.matvecs, again.status) == (2 + 2, Status.converged)
    torch.testing.assert_close(again.x, first.x)
    further = conjugate_gradients(operator, b, tol=1e-9, start=first.x)
    assert 4 < further.matvecs < conjugate_gradients(operator, b, tol=1e-9).matvecs


@pytest.mark.parametrize("kind", ["operator", "function"])
def test_preconditioner(kind):
    values = 10.0 ** np.linspace(-4, 2, 60)
    mixing = rotated(np.linspace(0.9, 1.1, 60)).matrix
    scale = torch.from_numpy(values**0.5)
    operator = DenseOperator(scale.unsqueeze(1) * mixing * scale)
    inverse = diagonal(1 / values)
    plain = conjugate_gradients(operator, right(60), tol=1e-8, max_matvecs=2000)
    helped = conjugate_gradients(
        operator, right(60), tol=1e-8, preconditioner=inverse if kind == "operator" else lambda r: inverse @ r
    )
    assert helped.status is Status.converged
    assert helped.matvecs < 25 < plain.matvecs / 2
    exact = torch.linalg.solve(operator.matrix, right(60))
    torch.testing.assert_close(helped.x, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [diagonal, rotated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [-2.0, -1e-3, 0.0])
def test_indefinite_is_said_with_the_shift_that_is_missing(low, dtype, shape):
    """Negative or no curvature is met at the latest in the last iteration, and −curvature is needed at least."""
    operator = shape(np.append(np.linspace(1, 2, 30), low), dtype)
    result = conjugate_gradients(operator, right(31, 2), tol=1e-12, shift=0.0)
    assert result.status is Status.indefinite
    assert not result.status.ok
    assert low - 1e-6 <= result.curvature <= 1e-6
    assert f"shift must be above {-result.curvature:.3g}" in str(result)
    assert conjugate_gradients(operator, right(31, 2), tol=1e-4, shift=0.5 - low).status is Status.converged
    np.testing.assert_allclose(result.residuals, true_residuals(operator, right(31, 2), result.x), rtol=1e-3)
    assert not result.converged.any()


def test_one_right_hand_side_that_fails_leaves_the_others_alone():
    b = torch.zeros(6, 3, dtype=torch.float64)
    b[0, 0], b[5, 1], b[1:3, 2] = 1, 1, 1
    result = conjugate_gradients(diagonal([1.0, 2, 3, 4, 5, -1]), b)
    assert result.converged.tolist() == [True, False, True]
    assert (result.status, result.curvature) == (Status.indefinite, -1)
    torch.testing.assert_close(result.x[:, [0, 2]], b[:, [0, 2]] / torch.tensor([1.0, 2, 3, 4, 5, -1]).unsqueeze(1))
    assert (result.x[:, 1] == 0).all()


def test_curvature_is_that_of_a_without_the_shift():
    operator = rotated(POSITIVE)
    b = torch.linalg.eigh(operator.matrix).eigenvectors[:, [7, 3]]
    for shift in (0.0, 2.5):
        assert conjugate_gradients(operator, b, shift=shift).curvature == pytest.approx(POSITIVE[3], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvature_within_rounding_is_none(dtype):
    """In a null space pᵀAp is rounding of ‖A‖, of either sign: no direction to go on in."""
    assert conjugate_gradients(diagonal([1.0, 1e-17], dtype), torch.ones(2)).status is Status.indefinite
    for seed in range(12):
        operator = rotated(np.append(np.linspace(1, 2, 20), np.zeros(3)), dtype, seed)
        result = conjugate_gradients(operator, right(23, seed=seed), tol=1e-12)
        assert result.status is Status.indefinite
        assert result.matvecs <= 25


def test_singular_but_consistent():
    values = np.append(np.zeros(20), np.linspace(1, 3, 10))
    operator = rotated(values)
    b = operator.matrix @ right(30)
    result = conjugate_gradients(operator, b, tol=1e-9)
    assert result.status is Status.converged
    torch.testing.assert_close(operator.matrix @ result.x, b, rtol=0, atol=1e-8)


def test_rounding_stops_it_and_it_says_so():
    """A tolerance below what float32 can reach: no endless repetition, and the residual is the true one."""
    operator = rotated(10.0 ** np.linspace(-4, 0, 80), torch.float32)
    result = conjugate_gradients(operator, right(80), tol=1e-9, max_matvecs=5000)
    assert result.status is Status.stagnated
    assert result.matvecs < 3000
    assert 1e-9 < result.residuals[0] < 1e-2
    assert result.residuals[0] == pytest.approx(true_residuals(operator, right(80), result.x)[0], rel=0.3)


def test_claims_of_the_recurrence_are_checked():
    """In float32 the recurrence says 7e-6 where the truth is 1.1e-5; a second sweep from the truth makes 1e-5 true."""
    operator, notes = rotated(10.0 ** np.linspace(-2.5, 0, 80), torch.float32), []
    result = conjugate_gradients(operator, right(80), tol=1e-5, progress=lambda done, total, note: notes.append(note))
    assert result.status is Status.converged
    claimed = [float(note.split()[-1]) for note in notes[1:]]
    first = next(i for i, residual in enumerate(claimed) if residual <= 1e-5)
    assert claimed[first + 1] > 1e-5 >= result.residuals[0]
    assert true_residuals(operator, right(80), result.x)[0] == pytest.approx(result.residuals[0], rel=0.2)


@pytest.mark.parametrize("budget", [4, 5, 9, 30])
def test_small_budget(budget):
    operator = Counted(rotated(10.0 ** np.linspace(-3, 3, 100)))
    result = conjugate_gradients(operator, right(100), max_matvecs=budget, tol=1e-10)
    assert result.status is Status.budget_reached
    assert result.matvecs == operator.count == budget
    np.testing.assert_allclose(result.residuals, true_residuals(operator.inner, right(100), result.x), rtol=1e-9)
    several = conjugate_gradients(operator, right(100, 3), max_matvecs=3 * budget, tol=1e-10)
    assert several.matvecs <= 3 * budget


@pytest.mark.parametrize("good", [0, 2, 5])
def test_nonfinite(good):
    result = conjugate_gradients(Broken(40, good), right(40), tol=1e-12)
    assert result.status is Status.nonfinite
    assert torch.isfinite(result.x).all()
    assert not result.converged.any()


@pytest.mark.parametrize("values", [np.ones(20), np.full(20, 1e12), np.full(20, 1e-12), [3.0]])
def test_multiples_of_the_identity(values):
    b = right(len(values))
    result = conjugate_gradients(rotated(values), b)
    assert (result.matvecs, result.status) == (4, Status.converged)
    torch.testing.assert_close(result.x * values[0], b)


def test_nothing_on_the_right():
    for start in (None, right(10)):
        result = conjugate_gradients(rotated(POSITIVE[:10]), torch.zeros(10), start=start)
        assert (result.x == 0).all()
        assert (result.residuals.tolist(), result.status) == ([0.0], Status.converged)


def test_zero_operator_needs_a_shift():
    assert conjugate_gradients(diagonal(np.zeros(8)), right(8)).status is Status.indefinite
    result = conjugate_gradients(diagonal(np.zeros(8)), right(8), shift=2.0)
    torch.testing.assert_close(result.x, right(8) / 2)


def test_half_precision_products():
    operator = diagonal(np.linspace(1.0, 3.0, 20), torch.bfloat16)
    result = conjugate_gradients(operator, right(20), tol=2e-2)
    assert result.status is Status.converged
    assert result.x.dtype == torch.float32
    assert true_residuals(operator, right(20), result.x)[0] < 4e-2


def test_damped_newton_step_of_a_network():
    risk = CASES["ragged cross-entropy"]().risk()
    hessian, gradient = Hessian(risk), risk.gradient()
    result = conjugate_gradients(hessian, -gradient, shift=1.0, tol=1e-10)
    dense = hessian.to_dense() + torch.eye(hessian.size, dtype=torch.float64)
    torch.testing.assert_close(result.x, torch.linalg.solve(dense, -gradient), rtol=1e-7, atol=1e-10)


def test_progress_stop_and_time():
    seen: list[tuple[float, float]] = []
    operator, b = rotated(10.0 ** np.linspace(-3, 3, 100)), right(100)
    conjugate_gradients(operator, b, progress=lambda done, total, note: seen.append((done, total)), tol=1e-10)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert all(0 < done <= total for done, total in seen)

    def stop(done, total, note):
        if done >= 9:
            raise StopRequested

    stopped = conjugate_gradients(operator, b, tol=1e-10, progress=stop)
    assert (stopped.status, stopped.matvecs) == (Status.stopped, 10)
    hurried = conjugate_gradients(operator, b, tol=1e-10, time_budget=1e-9)
    assert (hurried.status, hurried.residuals.tolist()) == (Status.time_reached, [1.0])
    assert math.isinf(hurried.curvature)

    def interrupt(done, total, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conjugate_gradients(operator, b, progress=interrupt)


def wrong_shape(r: Tensor) -> Tensor:
    return r[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": 0.0}, "expected tol > 0 and a finite shift, got 0.0 and 0.0"),
        ({"shift": float("inf")}, "expected tol > 0 and a finite shift"),
        ({"max_matvecs": 3}, "max_matvecs: expected at least 4, for one iteration and its check, got 3"),
        ({"b": torch.ones(7)}, r"b: expected a tensor of shape \(8,\) or \(8, k\), got \(7,\)"),
        ({"b": torch.ones(8, 0)}, r"b: expected a tensor of shape .*, got \(8, 0\)"),
        ({"b": np.ones(8)}, "b: expected a tensor .* got ndarray"),
        ({"b": torch.full((8,), torch.nan)}, "b: expected finite numbers, got NaN or Inf"),
        ({"start": torch.ones(8, 1)}, r"start: expected a tensor of shape \(8,\) as b, got \(8, 1\)"),
        ({"start": torch.full((8,), torch.inf)}, "start: expected finite numbers"),
        ({"preconditioner": lambda r: -r}, "preconditioner: expected a positive definite one, got rᵀMr <= 0"),
        ({"preconditioner": wrong_shape}, r"preconditioner: expected a result of shape \(8, 1\), got \(3, 1\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        conjugate_gradients(diagonal(np.arange(1.0, 9.0)), **({"b": torch.ones(8)} | arguments))


def test_a_preconditioner_must_be_an_operator_or_a_function():
    with pytest.raises(TypeError, match="preconditioner: expected an operator or a function, got float"):
        conjugate_gradients(diagonal(np.arange(1.0, 9.0)), torch.ones(8), preconditioner=2.0)


def test_operators_are_taken_as_they_are():
    assert isinstance(2 * diagonal([1.0, 2.0]), LinearOperator)
    result = conjugate_gradients(2 * diagonal([1.0, 2.0]) + diagonal([1.0, 1.0]), torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(result.x, torch.ones(2, dtype=torch.float64))
