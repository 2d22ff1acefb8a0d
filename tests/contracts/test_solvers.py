"""What every solver must satisfy. A new solver is one row of SOLVERS."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from losslab.operators.base import LinearOperator
from losslab.solvers.conjugate_gradients import conjugate_gradients
from losslab.solvers.density import spectral_density
from losslab.solvers.diagonal import diagonal as diagonal_of
from losslab.solvers.frobenius import frobenius_norm
from losslab.solvers.lanczos import eigenpairs
from losslab.solvers.power import power_iteration
from losslab.solvers.trace import trace
from losslab.status import Status
from matrices import Broken, Counted, diagonal, rotated


@dataclass
class Solver:
    """`run(operator, seed=…)`, its numbers as an array, the truth from all eigenvalues (ascending), and its budget."""

    run: Callable[..., Any]
    numbers: Callable[[Any], np.ndarray]
    truth: Callable[[np.ndarray], np.ndarray]
    small_budget: dict[str, Any] | None
    random: bool = True  # whether another seed shows in the numbers
    cost: int = 1  # products for each dimension that it comes to know exactly
    errors: Callable[[Any], np.ndarray] | None = None  # of numbers that are samples: right within 5 standard errors
    known: Callable[[LinearOperator, np.ndarray], np.ndarray] = lambda operator, eigenvalues: eigenvalues  # for `truth`


def by_magnitude(values: np.ndarray) -> np.ndarray:
    return values[np.argsort(-np.abs(values), kind="stable")]


def pairs(which: str, truth: Callable[[np.ndarray], np.ndarray], **settings: Any) -> Solver:
    def run(operator, seed=0, **kwargs):
        return eigenpairs(operator, 3, which=which, **({"tol": 1e-6} | settings | kwargs), seed=seed)

    return Solver(run, lambda result: result.values, truth, {"max_matvecs": 7, "tol": 1e-10})


def sampled(solve: Callable[..., Any], truth: Callable[[np.ndarray], np.ndarray], **settings: Any) -> Solver:
    """`solve(operator, …)`, exact as soon as its basis is the whole space, or never (`errors`)."""
    kinds = {key: settings.pop(key) for key in ("cost", "errors", "known", "numbers") if key in settings}

    def run(operator, seed=0, **kwargs):
        return solve(operator, **({"max_matvecs": 10_000, "tol": 1e-9} | settings | kwargs), seed=seed)

    numbers = kinds.pop("numbers", lambda result: np.array([result.value]))
    return Solver(run, numbers, truth, {"max_matvecs": 16, "tol": 1e-6}, **kinds)


def standard_error(result) -> np.ndarray:
    return np.atleast_1d(result.standard_error)


def entries(result) -> np.ndarray:
    return result.values.numpy()


def own_diagonal(operator: LinearOperator, eigenvalues: np.ndarray) -> np.ndarray:
    return operator.matrix.diagonal().double().numpy()


def total(eigenvalues: np.ndarray) -> np.ndarray:
    return eigenvalues.sum(keepdims=True)


def itself(known: np.ndarray) -> np.ndarray:
    return known


def moments(result) -> np.ndarray:
    return np.array([result.weights @ result.nodes**p for p in range(3)])


SOLVERS = {
    "largest_magnitude": pairs("largest_magnitude", lambda v: by_magnitude(v)[:3]),
    "largest": pairs("largest", lambda v: v[::-1][:3]),
    "smallest": pairs("smallest", lambda v: v[:3]),
    "both_ends": pairs("both_ends", lambda v: np.append(v[::-1][:3], v[:3])),
    "largest, blocks": pairs("largest", lambda v: v[::-1][:3], block_size=2),
    "both_ends, blocks": pairs("both_ends", lambda v: np.append(v[::-1][:3], v[:3]), block_size=4),
    "power_iteration": sampled(power_iteration, lambda v: by_magnitude(v)[:1], tol=1e-6, cost=3),
    # 10,000 products at most: the Krylov space takes half and is the whole space for every matrix here.
    "trace": Solver(
        lambda operator, seed=0, **kwargs: trace(
            operator, **({"max_matvecs": 10_000, "tol": 1e-3} | kwargs), seed=seed
        ),
        lambda result: np.array([result.value]),
        lambda v: v.sum(keepdims=True),
        {"max_matvecs": 16, "tol": 1e-6},
    ),
    "trace, hutchinson": sampled(trace, total, method="hutchinson", tol=0.1, errors=standard_error),
    "trace, hutch++": sampled(trace, total, method="hutch++", cost=3),
    "trace, xtrace": sampled(trace, total, method="xtrace", cost=2),
    "diagonal, hutchinson": sampled(
        diagonal_of, itself, method="hutchinson", tol=0.1, errors=standard_error, known=own_diagonal, numbers=entries
    ),
    "diagonal, xdiag": sampled(diagonal_of, itself, method="xdiag", cost=2, known=own_diagonal, numbers=entries),
    "frobenius_norm": sampled(frobenius_norm, lambda v: np.array([np.linalg.norm(v)]), tol=0.01, errors=standard_error),
    # One start vector a coordinate, e_i: together they have the whole spectrum's moments exactly.
    "spectral_density": Solver(
        lambda operator, seed=0, **_: spectral_density(operator, vectors=torch.eye(operator.size), num_nodes=60),
        moments,
        lambda v: np.array([1.0, v.mean(), (v**2).mean()]),
        None,
        random=False,
    ),
}

MATRICES = {
    "indefinite": np.linspace(-3.0, 5.0, 30) ** 3,
    "clustered": np.repeat([1.0, 5.0], 15),
    "rank 2": np.array([4.0, -3.0] + [0.0] * 28),
    "zero": np.zeros(30),
    "identity": np.ones(30),
    "decaying": 1.0 / np.arange(1, 31),
    "huge": 1e12 * np.linspace(-1.0, 2.0, 30),
    "tiny": 1e-12 * np.linspace(-1.0, 2.0, 30),
    "six": np.array([-2.0, -1.0, 0.5, 1.0, 2.0, 4.0]),
}


@pytest.fixture(params=SOLVERS, ids=str)
def solver(request) -> Solver:
    return SOLVERS[request.param]


@pytest.mark.parametrize("shape", [diagonal, rotated])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", MATRICES)
def test_exact_on_small_matrices(solver, name, dtype, tolerance, shape):
    values = np.sort(MATRICES[name])
    operator = shape(values, dtype)
    result = solver.run(operator)
    expected, got = solver.truth(solver.known(operator, values)), solver.numbers(result)
    scale = max(np.abs(values).max(), np.abs(expected).max())
    allowed = 2 * tolerance * scale + (0 if solver.errors is None else 5 * solver.errors(result))
    if _name(solver) == "largest_magnitude":  # equal magnitudes have no order
        expected, got = np.abs(expected), np.abs(got)
    assert (np.abs(got - expected) <= allowed).all(), (got, expected)
    if getattr(result, "vectors", None) is not None:  # equal values, but never the same pair twice
        gram = result.vectors.mT @ result.vectors
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=dtype), rtol=0, atol=tolerance)
    assert result.status.ok


@pytest.mark.parametrize("name", ["zero", "rank 2", "identity"])
def test_breakdown_is_a_success_and_cheap(solver, name):
    result = solver.run(rotated(MATRICES[name]))
    assert result.status in (Status.breakdown, Status.converged)
    assert np.isfinite(solver.numbers(result)).all()
    if solver.random and solver.errors is None:
        assert result.matvecs <= 30 * solver.cost


def test_bfloat16_operator(solver):
    """Products in half precision: right to its 8 bits, and not claimed to be better."""
    values = np.linspace(-3.0, 5.0, 24)
    operator = diagonal(values, torch.bfloat16)
    exact = np.sort(operator.matrix.diagonal().double().numpy())
    result = solver.run(operator, tol=1e-2)
    got, expected = solver.numbers(result), solver.truth(solver.known(operator, exact))
    np.testing.assert_allclose(got, expected, atol=0.03 * max(5.0, np.abs(expected).max()))
    if hasattr(result, "errors"):
        assert (result.errors >= np.abs(got - expected)).all()


def test_matvecs_are_the_products_used(solver):
    operator = Counted(rotated(MATRICES["indefinite"]))
    assert solver.run(operator).matvecs == operator.count > 0


def test_seed(solver):
    operator = rotated(np.linspace(-1.0, 2.0, 50))
    cheap = {"max_matvecs": 30, "tol": 1e-9}
    first, again, other = (solver.run(operator, seed=s, **cheap) for s in (3, 3, 4))
    assert solver.numbers(first).tobytes() == solver.numbers(again).tobytes()
    assert (solver.numbers(first) != solver.numbers(other)).any() == solver.random


def test_generator_is_advanced_and_global_state_is_not(solver):
    operator, generator = rotated(np.linspace(-1.0, 2.0, 50)), torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    cheap = {"max_matvecs": 30, "tol": 1e-9}
    first, second = (solver.run(operator, seed=generator, **cheap) for _ in range(2))
    assert first.seed is None
    assert (solver.numbers(first) != solver.numbers(second)).any() == solver.random
    assert torch.equal(torch.get_rng_state(), state)


def test_small_budget_is_reported(solver):
    if solver.small_budget is None:
        pytest.skip("has no budget")
    operator = Counted(rotated(np.linspace(-1.0, 2.0, 300) ** 3))
    result = solver.run(operator, **solver.small_budget)
    assert result.status is Status.budget_reached
    assert not result.status.ok
    assert operator.count <= solver.small_budget["max_matvecs"]


def test_time_that_is_over_is_reported(solver):
    """One block of products is always made; what it does not tell is NaN with an infinite error."""
    operator = Counted(rotated(np.linspace(-1.0, 2.0, 300) ** 3))
    if _name(solver) == "spectral_density":
        result = spectral_density(operator, time_budget=1e-9)
    else:
        result = solver.run(operator, time_budget=1e-9, tol=1e-9)
    assert result.status is Status.time_reached
    assert 1 <= operator.count == result.matvecs <= 8 * solver.cost
    unknown = ~np.isfinite(solver.numbers(result))
    if unknown.any():
        assert np.isinf(result.errors if hasattr(result, "errors") else standard_error(result))[unknown].all()


@pytest.mark.parametrize("good", [0, 1, 5])
def test_nonfinite_is_reported(solver, good):
    result = solver.run(Broken(60, good))
    assert result.status is Status.nonfinite
    if good == 0 and solver.random:
        assert not np.isfinite(solver.numbers(result)).any()


@pytest.mark.parametrize(
    "solve",
    [
        eigenpairs,
        power_iteration,
        trace,
        partial(trace, method="xtrace"),
        diagonal_of,
        frobenius_norm,
        spectral_density,
        partial(conjugate_gradients, b=torch.ones(3)),
    ],
)
def test_a_matrix_is_no_operator(solve):
    with pytest.raises(TypeError, match="operator: expected a LinearOperator, got Tensor; try DenseOperator"):
        solve(torch.eye(3))


def test_interruption_goes_through(solver):
    def stop(done, total, note):
        raise KeyboardInterrupt

    operator = rotated(MATRICES["indefinite"])
    calls = {"spectral_density": lambda: spectral_density(operator, progress=stop)}
    with pytest.raises(KeyboardInterrupt):
        calls.get(_name(solver), lambda: solver.run(operator, progress=stop))()


def test_progress_counts_up_to_the_total(solver):
    seen: list[tuple[float, float]] = []
    operator = rotated(np.linspace(-1.0, 2.0, 60))

    def note(done, total, text):
        assert isinstance(text, str)
        seen.append((done, total))

    if _name(solver) == "spectral_density":
        spectral_density(operator, progress=note)
    else:
        solver.run(operator, progress=note)
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert len(set(done)) == len(done) > 0
    assert all(0 < d <= t for d, t in seen)


def _name(solver: Solver) -> str:
    return next(name for name, row in SOLVERS.items() if row is solver)
