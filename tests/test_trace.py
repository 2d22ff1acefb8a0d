"""trace by its four methods: exact identities without a seed, naive versions, z-tests at a fixed number of samples."""

import math

import numpy as np
import pytest
import torch

from cases import CASES
from losslab.operators.base import LinearOperator
from losslab.operators.dense import DenseOperator
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.random import gaussian, make_generator, rademacher
from losslab.solvers import krylov as krylov_module
from losslab.solvers.budget import Budget
from losslab.solvers.deflated import Deflated, complete
from losslab.solvers.density import extend
from losslab.solvers.krylov import Krylov
from losslab.solvers.trace import trace
from losslab.status import Status, StopRequested
from matrices import Counted, diagonal, rotated, sign_vectors


def random_symmetric(n: int = 6) -> torch.Tensor:
    matrix = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return matrix + matrix.mT


def test_all_sign_vectors_give_the_trace():
    matrix = random_symmetric()
    result = trace(DenseOperator(matrix), method="hutchinson", vectors=sign_vectors(6))
    assert result.value == pytest.approx(float(matrix.trace()), abs=1e-12)
    assert (result.num_samples, result.matvecs, result.seed) == (64, 64, None)
    samples = torch.einsum("si,ij,sj->s", sign_vectors(6), matrix, sign_vectors(6))
    assert result.standard_error == pytest.approx(float(samples.std()) / 8, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_deflated_samples_and_the_basis_add_up(steps):
    matrix = random_symmetric()
    krylov = Krylov(DenseOperator(matrix), torch.arange(1.0, 7.0), 6)
    extend(krylov, steps, Budget(10))
    deflated = Deflated(krylov, 0.01, Budget(64), make_generator(0))
    result = deflated.add(sign_vectors(6))
    assert result.value == pytest.approx(float(matrix.trace()), abs=1e-12)
    assert result.matvecs == steps + 64
    assert abs(deflated.known - float(matrix.trace())) > 1e-3  # else the samples would be tested by nothing


def test_diagonal_matrix_needs_one_probe():
    """Hutchinson with signs has no variance on the diagonal."""
    values = np.random.default_rng(0).normal(size=30)
    operator = diagonal(values)
    for seed in range(5):
        one = trace(operator, method="hutchinson", vectors=rademacher((1, 30), make_generator(seed)))
        assert one.value == pytest.approx(values.sum(), abs=1e-13)
        assert (one.standard_error, one.status) == (math.inf, Status.budget_reached)
    several = trace(operator, method="hutchinson", vectors=rademacher((5, 30), make_generator(0)))
    assert several.standard_error < 1e-13
    assert several.status is Status.converged


def test_whole_space_is_exact():
    for values in (1.0 / np.arange(1, 41), np.repeat([1.0, 5.0], 15), np.ones(30), np.zeros(20)):
        operator = Counted(rotated(values))
        result = trace(operator)
        assert result.value == pytest.approx(values.sum(), abs=1e-12)
        assert (result.standard_error, result.num_samples, result.status) == (0.0, 0, Status.breakdown)
        assert result.matvecs == operator.count == len(values)


def naive_hutch_pp(matrix: torch.Tensor, sketch: torch.Tensor, samples: torch.Tensor) -> tuple[float, float]:
    q = torch.linalg.qr(matrix @ sketch.mT)[0]
    outside = samples.mT - q @ (q.mT @ samples.mT)
    forms = (outside * (matrix @ outside)).sum(dim=0)
    return float((q.mT @ matrix @ q).trace() + forms.mean()), float(forms.std()) / math.sqrt(len(samples))


def test_hutch_pp_equals_the_naive_version():
    operator = rotated(np.linspace(-1, 2, 40) ** 3)
    vectors = rademacher((20, 40), make_generator(0), dtype=torch.float64)
    result = trace(operator, method="hutch++", vectors=vectors)
    value, error = naive_hutch_pp(operator.matrix, vectors[:10], vectors[10:])
    assert result.value == pytest.approx(value, abs=1e-11)
    assert result.standard_error == pytest.approx(error, rel=1e-9)
    assert (result.num_samples, result.matvecs) == (10, 30)


def test_hutch_pp_grown_block_by_block_equals_the_naive_version_at_once():
    operator = Counted(rotated(np.linspace(-1, 2, 60) ** 3))
    result = trace(operator, method="hutch++", max_matvecs=65, tol=1e-9, seed=4)
    assert result.matvecs == operator.count == 63
    generator = make_generator(4)
    blocks = [(gaussian((k, 60), generator), rademacher((k, 60), generator)) for k in (8, 8, 5)]
    sketch, samples = (torch.cat(halves).double() for halves in zip(*blocks, strict=True))
    value, error = naive_hutch_pp(operator.inner.matrix, sketch, samples)
    assert result.value == pytest.approx(value, abs=1e-11)
    assert result.standard_error == pytest.approx(error, rel=1e-9)


def test_hutch_pp_over_all_signs_gives_the_trace():
    """For any sketch: here two vectors, with all 64 signs as samples, two at a time."""
    operator = DenseOperator(random_symmetric())
    sketch = rademacher((2, 6), make_generator(1), dtype=torch.float64)
    runs = [trace(operator, method="hutch++", vectors=torch.cat([sketch, pair])) for pair in sign_vectors(6).split(2)]
    assert np.mean([run.value for run in runs]) == pytest.approx(float(operator.matrix.trace()), abs=1e-12)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize("shape", [diagonal, rotated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_is_exact_from_the_first_block(method, shape, dtype):
    values = np.append([5.0, 3.0, 2.0, -1.0, 0.5], np.zeros(195))
    for seed in range(5):
        result = trace(shape(values, dtype), method=method, seed=seed, tol=1e-4)
        assert result.value == pytest.approx(9.5, rel=200 * torch.finfo(dtype).eps)
        assert result.standard_error < 200 * torch.finfo(dtype).eps
        assert result.matvecs == {"hutch++": 24, "xtrace": 16}[method]


SPECTRA = {
    "flat": np.linspace(0.5, 1.5, 60),
    "indefinite": np.linspace(-1, 1.5, 60),
    "decaying": 0.85 ** np.arange(60),
    "rank 30": np.append(np.linspace(-1, 3, 30), np.zeros(30)),
    "outliers": np.append([20.0, 10.0, 5.0], np.linspace(-0.2, 0.4, 57)),
}


def at_a_fixed_number(method: str, operator: DenseOperator, seed: int):
    """24 products with test vectors of the method's own kind."""
    generator = make_generator(seed)
    if method == "krylov":
        krylov = Krylov(operator, rademacher((operator.size,), generator), 8)
        extend(krylov, 8, Budget(8))
        return complete(krylov, 1e-12, generator, Budget(16))[0]
    draw, rows = {"hutchinson": (rademacher, 24), "hutch++": (rademacher, 32), "xtrace": (gaussian, 12)}[method]
    return trace(operator, method=method, vectors=draw((rows, operator.size), generator))


@pytest.mark.parametrize("method", ["krylov", "hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("name", SPECTRA)
def test_standard_errors_are_calibrated_at_a_fixed_number_of_samples(name, method):
    """No bias, errors as large as they are said to be.

    The root mean square of 100 errors is known to 7 % where they are Gaussian; skewed ones vary more.
    """
    operator, truth, runs = rotated(SPECTRA[name]), SPECTRA[name].sum(), 100
    results = [at_a_fixed_number(method, operator, seed) for seed in range(runs)]
    errors = np.array([result.value - truth for result in results])
    claimed = np.array([result.standard_error for result in results])
    assert abs(errors.mean()) < 4 * errors.std(ddof=1) / math.sqrt(runs)
    assert 0.8 < np.sqrt((errors**2).mean() / (claimed**2).mean()) < 1.25


@pytest.mark.parametrize("method", ["krylov", "hutch++", "xtrace"])
def test_deflation_pays(method):
    """Where few eigenvalues dominate, all others beat plain sampling by far at the same number of products."""
    values = np.concatenate([[300.0, 200.0, 100.0], np.linspace(-1, 2, 297)])
    operator, rms = rotated(values), {}
    for name in ("hutchinson", method):
        runs = [trace(operator, method=name, max_matvecs=48, tol=1e-9, seed=seed) for seed in range(20)]
        assert all(result.matvecs == 48 for result in runs)
        rms[name] = np.sqrt(np.mean([(result.value - values.sum()) ** 2 for result in runs]))
    assert rms[method] < 0.2 * rms["hutchinson"]


def test_growing_methods_stop_as_soon_as_the_tolerance_allows():
    operator = rotated(np.append([50.0, 40.0, 30.0], np.full(97, 1.0)))
    for method in ("hutch++", "xtrace"):
        few, many = (trace(operator, method=method, tol=tol, max_matvecs=300) for tol in (0.05, 1e-12))
        assert few.status is Status.converged
        assert few.standard_error <= 0.05 * few.value
        assert few.matvecs < many.matvecs
        assert many.value == pytest.approx(217, rel=1e-10)


def test_fewer_than_eight_samples_are_not_believed():
    operator = rotated(np.linspace(1, 2, 100))
    few, enough = (trace(operator, method="hutch++", tol=0.5, max_matvecs=budget) for budget in (16, 24))
    assert few.standard_error < 0.5 * few.value
    assert (few.num_samples, few.status) == (5, Status.budget_reached)
    assert (enough.num_samples, enough.status) == (8, Status.converged)


def test_a_budget_that_is_spent_already_gives_nothing():
    operator, budget = Counted(rotated(np.linspace(1, 2, 100))), Budget(8)
    krylov = Krylov(operator, torch.ones(100), 20)
    extend(krylov, 20, budget)
    result = complete(krylov, 0.1, make_generator(0), budget)[0]
    assert math.isnan(result.value)
    assert (result.standard_error, result.num_samples, result.status) == (math.inf, 0, Status.budget_reached)
    assert operator.count == 8


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_told_to_stop_it_returns_what_it_has(method):
    def stop(done, total, note):
        raise StopRequested

    result = trace(rotated(np.linspace(-1, 2, 300) ** 3), method=method, tol=1e-9, progress=stop)
    assert result.status is Status.stopped
    assert np.isfinite([result.value, result.standard_error]).all()
    assert result.num_samples == 8


def test_progress_tells_the_estimate_so_far():
    operator, notes = rotated(np.linspace(-1, 2, 100)), []
    result = trace(operator, method="xtrace", tol=1e-9, progress=lambda done, total, note: notes.append(note))
    first = trace(operator, method="xtrace", tol=1e-9, max_matvecs=16)
    assert notes[:2] == ["", ""]
    assert notes[2] == f"{first.value:.6g} ± {first.standard_error:.2g}"
    assert len(notes) == result.matvecs / 8


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_too_little_memory_is_said_beforehand(method, monkeypatch):
    operator = Counted(rotated(np.linspace(-1, 2, 100)))
    monkeypatch.setattr(krylov_module, "free_bytes", lambda device: 95 * 100 * 8)
    with pytest.raises(MemoryError, match="95 vectors would fit"):
        trace(operator, method=method, max_matvecs=96)
    assert operator.count == 0
    assert trace(operator, method=method, max_matvecs=94).matvecs <= 94


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
        ({"max_matvecs": 15}, "max_matvecs: expected at least 16, got 15"),
        ({"tol": 0.0}, "tol: expected a number > 0"),
        ({"method": "xtrace", "tol": 0.0}, "tol: expected a number > 0"),
        ({"method": "xtrace", "max_matvecs": 15}, "max_matvecs: expected at least 16, got 15"),
        ({"method": "hutchinson", "vectors": torch.ones(8)}, r"vectors: expected shape \(s, 8\), got \(8,\)"),
        ({"method": "hutchinson", "vectors": torch.ones(0, 8)}, "vectors: expected shape"),
        ({"method": "xtrace", "vectors": torch.ones(2, 9)}, "vectors: expected shape"),
        ({"method": "hutch++", "vectors": torch.ones(3, 8)}, r"vectors: expected shape \(2s, 8\), got \(3, 8\)"),
        ({"vectors": torch.ones(2, 8)}, "vectors: expected None with method='krylov', .*; use method='hutchinson'"),
        ({"method": "hutch"}, r"method: expected one of krylov, hutchinson, hutch\+\+, xtrace; got 'hutch'"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        trace(diagonal(np.arange(8.0)), **arguments)


def test_prints_value_error_and_status():
    assert str(trace(diagonal([1.0, 2.0]))) == "3 ± 0 (0 samples, breakdown)"


@pytest.mark.parametrize("method", ["krylov", "hutch++", "xtrace"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_matrices_are_exact_for_every_seed(size, dtype, method):
    """A new block must not be the old Rademacher vector again: 2 of 4 sign vectors of [[2, 1], [1, 2]] break down."""
    matrix = torch.eye(size, dtype=dtype) + 1
    for seed in range(20):
        result = trace(DenseOperator(matrix), method=method, seed=seed)
        assert result.value == pytest.approx(2 * size, rel=1e-5), seed
        assert result.standard_error == 0


def test_frobenius_norm_beside_the_trace():
    """All sign vectors: the space's own squares and the complement's add up to ‖A‖_F²."""
    matrix = random_symmetric()
    for steps in (1, 2, 4):
        krylov = Krylov(DenseOperator(matrix), torch.arange(1.0, 7.0), 6)
        extend(krylov, steps, Budget(10))
        deflated = Deflated(krylov, 1e-12, Budget(64), make_generator(0))
        deflated.add(deflated.part(sign_vectors(6)))
        assert deflated.frobenius_norm().value == pytest.approx(float(matrix.norm()), rel=1e-12)


def test_batches_with_vectors_of_their_own_scatter_less():
    """Same mean, and for equal batches a variance divided by their number: here by four, seen as more than two."""
    case = CASES["ragged cross-entropy"]()
    x, y = case.batches[1]
    risk = EmpiricalRisk(case.model, case.loss_fn, [(x, y)] * 4)
    hessian, generator = Hessian(risk), make_generator(0)
    truth = float(hessian.to_dense().trace())

    def blocks():
        while True:
            yield rademacher((400, hessian.size), generator, dtype=torch.float64)

    own, shared = hessian.forms(blocks()), LinearOperator.forms(hessian, blocks())
    for samples in (own, shared):
        assert abs(float(samples.mean()) - truth) < 4 * float(samples.std()) / 20
    assert 2 < float(shared.var() / own.var()) < 8


def test_a_centred_covariance_is_no_sum_over_batches():
    operator = GradientCovariance(CASES["ragged MSE"]().risk())
    signs = rademacher((400, operator.size), make_generator(0), dtype=torch.float64)
    expected = (signs * (operator @ signs.mT).mT).sum(dim=1)
    torch.testing.assert_close(operator.forms(iter([signs])), expected)
