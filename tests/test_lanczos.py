"""eigenpairs: the right values as often as they occur, honest residuals and errors, clear refusals."""

import numpy as np
import pytest
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.dense import DenseOperator
from losslab.ranks import Split
from losslab.solvers.krylov import Krylov, basis_bytes
from losslab.solvers.lanczos import eigenpairs
from losslab.status import Status
from matrices import Broken, Counted, diagonal, rotated

# A trained MLP's top five and smallest eigenvalues (n = 1229), on which another library returned [1.4507] * 5.
TRAINED = np.concatenate([[1.4507, 1.3603, 1.1749, 1.0124, 0.8327, -0.0787], np.linspace(-0.05, 0.4, 394) ** 3])


def fresh_residuals(operator: DenseOperator, result) -> np.ndarray:
    matrix, vectors = operator.matrix.double(), result.vectors.double()
    return (matrix @ vectors - vectors * torch.from_numpy(result.values)).norm(dim=0).numpy()


def test_full_space_reproduces_the_spectrum():
    values = np.sort(np.random.default_rng(0).normal(size=40))
    result = eigenpairs(rotated(values), 40, which="smallest")
    np.testing.assert_allclose(result.values, values, atol=1e-13)
    assert (result.matvecs, result.status) == (40, Status.breakdown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_basis", [100, 200, 300])
def test_no_ghosts(max_basis, dtype):
    """Beyond 50 steps, and far beyond convergence, no eigenvalue comes twice."""
    operator = rotated(TRAINED, dtype)
    # tol below rounding: the basis fills up and goes on.
    result = eigenpairs(operator, 5, max_basis=max_basis, tol=1e-12, max_matvecs=max_basis - 1)
    np.testing.assert_allclose(result.values, TRAINED[:5], rtol=1e-5)
    both = eigenpairs(operator, 5, which="both_ends", max_basis=max_basis, tol=1e-4)
    np.testing.assert_allclose(both.values[:5], TRAINED[:5], rtol=1e-5)
    np.testing.assert_allclose(both.values[5:], np.sort(TRAINED)[:5], atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [100, 300])
def test_basis_stays_orthonormal_and_projects(steps, dtype):
    operator = rotated(TRAINED, dtype)
    krylov = Krylov(operator, torch.randn(operator.size, generator=torch.Generator().manual_seed(1)), steps)
    while not krylov.full:
        krylov.step()
    basis = krylov.basis.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(basis @ basis.mT, torch.eye(steps, dtype=torch.float64), rtol=0, atol=20 * eps)
    projected = (basis @ operator.matrix.double() @ basis.mT).numpy()
    np.testing.assert_allclose(projected, krylov.projected, atol=20 * eps * 1.45)


class Long(LinearOperator):
    """A diagonal matrix too long to be held as a whole: eigenvectors of one entry each among a million others."""

    device = torch.device("cpu")

    def __init__(self, diagonal: Tensor):
        self.diagonal, self.size, self.dtype = diagonal, len(diagonal), diagonal.dtype

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.diagonal.unsqueeze(1) * matrix


def test_long_float32_vectors_stay_orthogonal():
    """Where one float32 sum over all entries drops what is small beside its largest: 5e-4 between rows, here."""
    entries = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    entries[:30] = torch.logspace(1, -2, 30)
    krylov = Krylov(Long(entries), torch.randn(len(entries), generator=torch.Generator().manual_seed(1)), 20)
    while not krylov.full:
        krylov.step()
    basis = krylov.basis.double()
    torch.testing.assert_close(basis @ basis.mT, torch.eye(20, dtype=torch.float64), rtol=0, atol=3e-5)
    np.testing.assert_allclose(np.sort(krylov.ritz()[0])[-5:], entries[:5].flip(0), rtol=3e-6)


def test_second_pass_where_the_first_takes_more_than_it_leaves():
    """Products wrong by 1e-8, into a space that is invariant to within 1e-12: one pass leaves 1e-11 of it."""
    generator = torch.Generator().manual_seed(0)
    tail = torch.rand(97, generator=generator, dtype=torch.float64)
    matrix = torch.diag(torch.cat([torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 1e-12 * tail]))
    matrix[0, 3:] += 1e-8 * tail
    krylov = Krylov(DenseOperator(matrix), torch.cat([torch.ones(3, dtype=torch.float64), 0.1 * tail]), 8)
    while not krylov.full and not krylov.broken:
        krylov.step()
    basis = krylov.basis[: krylov.size]
    assert krylov.size > 4
    torch.testing.assert_close(basis @ basis.mT, torch.eye(krylov.size, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [diagonal, rotated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_clusters_as_often_as_they_occur(dtype, shape):
    operator = shape(np.repeat([1.0, 5.0], 30), dtype)
    for k, expected in [(2, [5.0] * 2), (7, [5.0] * 7), (31, [5.0] * 30 + [1.0]), (60, [5.0] * 30 + [1.0] * 30)]:
        result = eigenpairs(operator, k, which="largest")
        np.testing.assert_allclose(result.values, expected, atol=1e-5)
        assert result.status.ok
    both = eigenpairs(operator, 3, which="both_ends")
    np.testing.assert_allclose(both.values, [5.0] * 3 + [1.0] * 3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nonzero", [[5, 5, 1], [5, 5, 1, 1], [5, 5, 5, 2, 2, 1], [3, 3, -4, -4, 1]], ids=str)
def test_multiplicities_in_low_rank(nonzero, dtype):
    """Near a null space rounding hides the breakdown; the second copy must be found all the same, restarts included."""
    for seed in range(4):
        for n in (30, 200):
            values = np.array(nonzero + [0] * (n - len(nonzero)), dtype=float)
            for operator in (rotated(values, dtype, seed), diagonal(values, dtype)):
                for max_basis in (None, 8):
                    got = eigenpairs(operator, 2, which="largest", max_basis=max_basis, seed=seed)
                    np.testing.assert_allclose(got.values, np.sort(values)[::-1][:2], atol=1e-4)
                    got = eigenpairs(operator, 2, which="both_ends", max_basis=max_basis, seed=seed)
                    expected = np.append(np.sort(values)[::-1][:2], np.sort(values)[:2])
                    np.testing.assert_allclose(got.values, expected, atol=1e-4)


def test_copies_in_a_third_block():
    """The third block has the third 5 to tol before it breaks down: a copy, so that a fourth may be left."""
    for seed in range(60, 80):
        result = eigenpairs(rotated([2.0] * 5 + [5.0] * 4 + [0.0] * 3, seed=seed), 4, seed=seed)
        np.testing.assert_allclose(result.values, [5.0] * 4, atol=1e-4)


def test_decaying_spectrum():
    values = 1.0 / np.arange(1, 81)
    result = eigenpairs(rotated(values), 80, which="largest")
    np.testing.assert_allclose(result.values, values, atol=1e-14)
    assert result.values.sum() == pytest.approx(4.965, abs=5e-4)


@pytest.mark.parametrize("which", ["largest_magnitude", "largest", "smallest", "both_ends"])
@pytest.mark.parametrize("k", [1, 3])
def test_thick_restart_equals_the_unrestarted_answer(which, k):
    operator = rotated(np.linspace(-3.0, 7.0, 150) ** 3)
    whole = eigenpairs(operator, k, which=which, max_basis=150, tol=1e-9)
    wanted = len(whole.values)
    tiny = eigenpairs(operator, k, which=which, max_basis=wanted + 2, tol=1e-6, max_matvecs=3000)
    small = eigenpairs(operator, k, which=which, max_basis=wanted + 10, tol=1e-6, max_matvecs=3000)
    assert tiny.status is small.status is Status.converged
    np.testing.assert_allclose(tiny.values, whole.values, rtol=1e-9)
    np.testing.assert_allclose(small.values, whole.values, rtol=1e-9)
    assert tiny.basis_bytes == (wanted + 2) * 150 * 8
    assert small.matvecs > wanted + 10  # else nothing was restarted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_errors_and_vectors_are_what_they_say(dtype):
    """Many matrices, with clusters closer than the residuals: there the r²/gap of Kato and Temple is no bound."""
    rng = np.random.default_rng(0)
    eps = torch.finfo(dtype).eps
    for trial in range(7):
        n = int(rng.integers(10, 60))
        normal = rng.normal(size=n)
        spectra = [
            normal,
            np.repeat(normal, 2)[:n] + 1e-4 * rng.normal(size=n),
            np.append(normal[: n // 2], 1 + 1e-3 * rng.normal(size=n - n // 2)),
            np.append(0.1 * normal[: n // 2], 5 + 1e-6 * rng.normal(size=n - n // 2)),
            1.0 / np.arange(1, n + 1),
        ]
        for spectrum in spectra:
            operator = rotated(spectrum, dtype, trial)
            exact = np.linalg.eigvalsh(operator.matrix.double().numpy())
            rounding = 20 * eps * np.abs(exact).max()
            for which, tol in [("largest", 1e-1), ("smallest", 1e-2), ("largest_magnitude", 1e-3), ("both_ends", 1e-6)]:
                result = eigenpairs(operator, 2, which=which, tol=tol, seed=trial)
                np.testing.assert_allclose(
                    result.residuals, fresh_residuals(operator, result), rtol=1e-3, atol=rounding
                )
                distance = np.abs(result.values[:, None] - exact).min(axis=1)
                assert (distance <= result.errors + rounding).all()
                assert (result.errors >= result.residuals).all()
                gram = result.vectors.double().mT @ result.vectors.double()
                torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=20 * eps)
                assert result.converged.all()
                assert result.status.ok


def test_converged_is_per_pair():
    result = eigenpairs(rotated(np.append([100.0], np.linspace(0, 1, 300))), 3, max_matvecs=12, tol=1e-6)
    assert result.status is Status.budget_reached
    assert result.converged[0]
    assert not result.converged[1:].any()
    assert (result.residuals[~result.converged] > 1e-6 * np.abs(result.values[~result.converged])).all()


def test_budget_too_small_to_meet_the_pairs_at_all():
    result = eigenpairs(rotated(np.linspace(1, 2, 50)), 5, which="both_ends", max_matvecs=7)
    assert result.values.shape == result.errors.shape == result.converged.shape == (10,)
    assert result.vectors.shape == (50, 10)
    assert np.isnan(result.values).tolist() == [False] * 7 + [True] * 3
    assert np.isinf(result.errors[7:]).all()
    assert result.status is Status.budget_reached


def test_nan_right_after_a_restart():
    """The pairs known by then keep their true residuals."""
    result = eigenpairs(Broken(60, good=8), 2, max_basis=8, tol=1e-12)
    assert (result.status, result.matvecs) == (Status.nonfinite, 9)
    expected = fresh_residuals(diagonal(np.arange(1.0, 61.0)), result)
    np.testing.assert_allclose(result.residuals, expected, rtol=1e-10)
    assert expected.min() > 1e-3


def test_orders():
    values = np.array([-9.0, -2.0, 0.5, 1.0, 4.0, 8.0])
    operator = rotated(values)
    for which, expected in {
        "largest_magnitude": [-9, 8, 4],
        "largest": [8, 4, 1],
        "smallest": [-9, -2, 0.5],
        "both_ends": [8, 4, 1, -9, -2, 0.5],
    }.items():
        np.testing.assert_allclose(eigenpairs(operator, 3, which=which, tol=1e-9).values, expected, atol=1e-8)


def test_repeated_top_of_a_diagonal_matrix():
    result = eigenpairs(diagonal([5, 5, 1] + [0] * 27), 2)
    np.testing.assert_allclose(result.values, [5, 5], atol=1e-12)
    torch.testing.assert_close(result.vectors[2:].abs().max().item(), 0.0, atol=1e-7, rtol=0)


def test_start_vector_saves_products_and_decides():
    operator = Counted(rotated(TRAINED))
    first = eigenpairs(operator, 1, tol=1e-8)
    nearby = first.vectors[:, 0] + 1e-3 * torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    again = eigenpairs(operator, 1, tol=1e-4, start=nearby)
    assert again.matvecs < eigenpairs(operator, 1, tol=1e-4).matvecs
    assert eigenpairs(operator, 1, vectors=False).vectors is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-10])
def test_start_at_the_top_eigenvector_is_no_detour(tol, dtype):
    """The invariant subspace that it spans is left for a random vector, and the rest is found like from any start."""
    operator = rotated(TRAINED, dtype)
    start = eigenpairs(operator, 1, tol=tol).vectors[:, 0]
    cold, warm = eigenpairs(operator, 3, which="largest"), eigenpairs(operator, 3, which="largest", start=start)
    assert warm.status is Status.converged
    assert warm.matvecs <= 2 * cold.matvecs
    np.testing.assert_allclose(warm.values, TRAINED[:3], rtol=1e-5)


def test_start_vector_inside_an_invariant_subspace():
    """e₃ never leaves its own span; the larger eigenvalues outside must still be found."""
    start = torch.zeros(10)
    start[3] = 1.0
    result = eigenpairs(diagonal(np.arange(10.0)), 2, which="largest", start=start)
    np.testing.assert_allclose(result.values, [9, 8], atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected 1 <= k <= 8"),
        ({"k": 9}, "k: expected 1 <= k <= 8.*got 9"),
        ({"k": 5, "which": "both_ends"}, "k: expected 1 <= k <= 4"),
        ({"k": 2.0}, "k: expected"),
        ({"k": -1}, "k: expected 1 <= k <= 8.*got -1"),
        ({"k": True}, "k: expected 1 <= k <= 8.*got True"),
        ({"tol": 0}, "tol: expected a number > 0, got 0"),
        ({"tol": -1e-3}, "tol: expected a number > 0, got -0.001"),
        ({"tol": float("nan")}, "tol: expected"),
        ({"tol": "small"}, "tol: expected a number > 0, got 'small'"),
        ({"which": "LM"}, "which: expected one of largest_magnitude, .*got 'LM'"),
        ({"k": 2, "max_basis": 3}, "max_basis: expected at least k . 2 = 4"),
        ({"max_basis": 0}, "max_basis: expected"),
        ({"max_matvecs": 0}, "max_matvecs: expected at least 1"),
        ({"start": torch.zeros(8)}, "start: expected a finite vector that is not zero"),
        ({"start": torch.full((8,), torch.nan)}, "start: expected a finite vector"),
        ({"start": torch.full((8,), torch.inf)}, "start: expected a finite vector"),
        ({"time_budget": 0.0}, "time_budget: expected seconds > 0"),
        ({"start": torch.ones(7)}, r"start: expected shape \(8,\), got \(7,\)"),
        ({"start": torch.ones(8, 1)}, r"start: expected shape \(8,\), got \(8, 1\)"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        eigenpairs(diagonal(np.arange(8.0)), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": torch.eye(8)}, "operator: expected a LinearOperator, got Tensor; try DenseOperator"),
        ({"start": np.ones(8)}, r"start: expected a real tensor of shape \(8,\), got ndarray"),
        ({"start": torch.ones(8, dtype=torch.complex64)}, "start: expected a real tensor .* got torch.complex64"),
    ],
    ids=str,
)
def test_what_is_not_an_operator_or_a_vector(arguments, message):
    with pytest.raises(TypeError, match=message):
        eigenpairs(**({"operator": diagonal(np.arange(8.0))} | arguments))


def test_start_of_another_dtype_is_taken():
    for start in (torch.arange(1, 9), torch.ones(8, dtype=torch.float16)):
        assert eigenpairs(diagonal(np.arange(8.0)), start=start).values[0] == pytest.approx(7)


def test_memory_is_told_before_and_refused_before_the_first_product(monkeypatch):
    operator = Counted(diagonal(np.arange(1000.0), torch.float32))
    assert basis_bytes(operator, 40) == eigenpairs(operator, 3).basis_bytes == 40 * 1000 * 4
    assert basis_bytes(diagonal(np.arange(1000.0), torch.bfloat16), 1) == 4000  # kept in float32
    operator.count = 0
    monkeypatch.setattr("losslab.solvers.krylov.free_bytes", lambda device: 39 * 4000)
    with pytest.raises(MemoryError, match="max_basis: 40 vectors of 1,000 numbers take"):
        eigenpairs(operator, 3)
    assert operator.count == 0
    assert eigenpairs(operator, 3, max_basis=39).status.ok


def test_seed_must_be_a_number_or_generator():
    with pytest.raises(TypeError, match="seed: expected an int"):
        eigenpairs(diagonal(np.arange(8.0)), seed="0")


def test_smallest_basis_that_covers_the_matrix():
    result = eigenpairs(diagonal([1.0, 2.0]), 2, which="largest", max_basis=2)
    np.testing.assert_allclose(result.values, [2, 1])
    assert eigenpairs(diagonal([3.0])).values.tolist() == [3.0]


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("size", [1, 4096, 9001, 3_000_000])
def test_norms_are_right_to_rounding(size, scale):
    """torch's float32 norm of three million entries is off by 1e-5 and more; squares of 1e±30 are not to be had."""
    vector = scale * torch.rand(size, generator=torch.Generator().manual_seed(0))
    assert Split(size).norm(vector) == pytest.approx(float(vector.double().norm()), rel=3e-7)


def test_new_block_refuses_a_vector_of_the_old_space(monkeypatch):
    """Its remainder would be rounding, and pass for a new direction."""
    eye = diagonal([2.0, 2.0, 2.0, 2.0], dtype=torch.float32)
    first = torch.tensor([1.0, -1.0, 1.0, 1.0])
    space = Krylov(eye, first, 4)
    space.step()
    assert space.broken
    draws = iter([first * (1 + 1e-7), torch.tensor([1.0, 0.0, 0.0, 0.0])])
    monkeypatch.setattr("losslab.solvers.krylov.gaussian", lambda *_: next(draws))
    assert space.new_block(torch.Generator())
    space.step()
    rows = space.basis[:2].double()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert next(draws, None) is None
