"""diagonal: all signs give it exactly, XDiag equals its definition, errors are as large as they are said to be."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from losslab.random import make_generator, rademacher
from losslab.solvers.diagonal import diagonal
from losslab.solvers.estimator import Moments
from losslab.status import Status
from matrices import Counted, rotated, sign_vectors
from matrices import diagonal as diagonal_matrix


def naive_sample(matrix: Tensor, vector: Tensor, others: Tensor) -> Tensor:
    """diag(QQᵀA) + ω ∘ (I − QQᵀ)Aω, Q a basis of what A makes of the others."""
    left, sizes, _ = torch.linalg.svd(matrix @ others.mT, full_matrices=False)
    q = left[:, sizes > 1e-12 * sizes.max()]
    image = matrix @ vector
    return (q @ (q.mT @ matrix)).diagonal() + vector * (image - q @ (q.mT @ image))


def naive_samples(matrix: Tensor, vectors: Tensor) -> Tensor:
    rows = range(len(vectors))
    return torch.stack([naive_sample(matrix, vectors[i], vectors[[j for j in rows if j != i]]) for i in rows])


SPECTRA = {
    "flat": np.linspace(0.5, 1.5, 60),
    "indefinite": np.linspace(-1, 1.5, 60),
    "decaying": 0.85 ** np.arange(60),
    "rank 30": np.append(np.linspace(-1, 3, 30), np.zeros(30)),
    "outliers": np.append([20.0, 10.0, 5.0], np.linspace(-0.2, 0.4, 57)),
}


def test_all_sign_vectors_give_the_diagonal():
    operator = rotated(np.linspace(-1, 2, 6))
    result = diagonal(operator, vectors=sign_vectors(6))
    torch.testing.assert_close(result.values, operator.matrix.diagonal(), rtol=0, atol=1e-14)
    samples = sign_vectors(6) * (sign_vectors(6) @ operator.matrix)
    torch.testing.assert_close(result.standard_error, samples.std(dim=0) / 8)
    assert (result.num_samples, result.matvecs, result.seed) == (64, 64, None)


def test_xdiag_over_all_pairs_of_signs_gives_the_diagonal():
    """Pairs of equal signs among them, whose images span one direction only."""
    operator = rotated([2.0, -1.0, 0.7])
    signs = sign_vectors(3)
    pairs = [torch.stack([a, b]) for a in signs for b in signs]
    mean = torch.stack([diagonal(operator, method="xdiag", vectors=pair).values for pair in pairs]).mean(dim=0)
    torch.testing.assert_close(mean, operator.matrix.diagonal(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num", [2, 3, 9, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_xdiag_equals_the_naive_version(name, num):
    operator = rotated(SPECTRA[name])
    vectors = rademacher((num, 60), make_generator(num), dtype=torch.float64)
    result = diagonal(operator, method="xdiag", vectors=vectors)
    samples = naive_samples(operator.matrix, vectors)
    torch.testing.assert_close(result.values, samples.mean(dim=0), rtol=1e-10, atol=1e-10)
    assert (result.num_samples, result.matvecs) == (num, 2 * num)
    # One factor for all entries; at least 1.
    widening = result.standard_error / (samples.std(dim=0) / math.sqrt(num))
    torch.testing.assert_close(widening, widening[0].expand(60), rtol=1e-7, atol=0)
    assert 1 - 1e-9 <= widening[0] <= 2


def test_xdiag_widens_its_errors_by_what_leaving_out_two_tells():
    """On a matrix so small that all entries are looked at."""
    operator, num = rotated(SPECTRA["decaying"][:8]), 4
    vectors = rademacher((num, 8), make_generator(3), dtype=torch.float64)
    samples, changes = naive_samples(operator.matrix, vectors), torch.zeros(num, num, 8, dtype=torch.float64)
    for i in range(num):
        for j in set(range(num)) - {i}:
            others = vectors[[k for k in range(num) if k not in (i, j)]]
            changes[i, j] = samples[i] - naive_sample(operator.matrix, vectors[i], others)
    covariance = (changes * changes.transpose(0, 1)).sum() / (num * (num - 1))
    variance = samples.var(dim=0) / num
    assert covariance > 0.1 * variance.sum()  # else this would be tested by nothing
    result = diagonal(operator, method="xdiag", vectors=vectors)
    torch.testing.assert_close(result.standard_error**2, variance * (1 + covariance / variance.sum()))


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
@pytest.mark.parametrize("name", SPECTRA)
def test_standard_errors_are_calibrated_at_a_fixed_number_of_samples(name, method):
    operator, runs = rotated(SPECTRA[name]), 60
    results = [
        diagonal(operator, method=method, vectors=rademacher((16, 60), make_generator(seed))) for seed in range(runs)
    ]
    errors = torch.stack([result.values for result in results]) - operator.matrix.diagonal()
    claimed = torch.stack([result.standard_error for result in results])
    bias = errors.mean(dim=0) / errors.std(dim=0) * math.sqrt(runs)
    assert bias.abs().max() < 5  # 60 of them
    assert 0.9 < (errors**2).mean() / (claimed**2).mean() < 1.1
    # Entry by entry: a mean square of 60 is known to 18 %.
    ratios = (errors**2).mean(dim=0) / (claimed**2).mean(dim=0)
    assert 0.3 < ratios.min() <= ratios.max() < 2.2


def test_a_diagonal_matrix_needs_one_product_of_hutchinson():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=30))
    operator = diagonal_matrix(values)
    one = diagonal(operator, vectors=rademacher((1, 30), make_generator(1)))
    torch.testing.assert_close(one.values, values, rtol=0, atol=0)
    assert torch.isinf(one.standard_error).all()
    assert one.status is Status.budget_reached
    several = diagonal(operator, tol=1e-12)
    torch.testing.assert_close(several.values, values, rtol=1e-15, atol=0)
    assert several.relative_error < 1e-15
    assert (several.matvecs, several.status) == (8, Status.converged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_xdiag_is_exact_on_low_rank(dtype):
    """One dimension less than test vectors."""
    operator = rotated(np.append([5.0, 3.0, 2.0, -1.0, 0.5, 4.0, -2.0], np.zeros(93)), dtype)
    result = diagonal(operator, method="xdiag", tol=1e-4)
    tolerance = 200 * torch.finfo(dtype).eps  # of ‖A‖ = 5
    torch.testing.assert_close(result.values, operator.matrix.diagonal().double(), rtol=0, atol=tolerance)
    assert result.standard_error.max() < tolerance
    assert (result.matvecs, result.status) == (16, Status.converged)
    assert diagonal(operator, tol=1e-4).relative_error > 0.1


def test_xdiag_grown_block_by_block_equals_all_at_once():
    operator = Counted(rotated(np.linspace(-1, 2, 60) ** 3))
    grown = diagonal(operator, method="xdiag", max_matvecs=43, tol=1e-9, seed=4)
    assert grown.matvecs == operator.count == 42
    generator = make_generator(4)
    torch.randint(60, (64,), generator=generator)  # the entries looked at come first
    vectors = torch.cat([rademacher((size, 60), generator) for size in (8, 8, 5)])
    at_once = diagonal(operator, method="xdiag", vectors=vectors, seed=4)
    torch.testing.assert_close(grown.values, at_once.values, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grown.standard_error, at_once.standard_error, rtol=1e-8, atol=0)


def test_xdiag_pays_where_few_eigenvalues_dominate():
    operator, truth = rotated(SPECTRA["outliers"]), rotated(SPECTRA["outliers"]).matrix.diagonal()
    errors = {
        method: float(np.mean([
            (diagonal(operator, method=method, max_matvecs=32, tol=1e-9, seed=seed).values - truth).norm()
            for seed in range(10)
        ]))
        for method in ("hutchinson", "xdiag")
    }  # fmt: skip
    assert errors["xdiag"] < 0.2 * errors["hutchinson"]


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_stops_on_the_relative_error_of_the_whole(method):
    operator = rotated(np.linspace(1, 3, 200))
    result = diagonal(operator, method=method, tol=0.1)
    assert result.status is Status.converged
    assert result.relative_error == pytest.approx(float(result.standard_error.norm() / result.values.norm()))
    assert 0.03 < result.relative_error <= 0.1
    assert float((result.values - operator.matrix.diagonal()).norm() / operator.matrix.diagonal().norm()) < 0.15
    strict = diagonal(operator, method=method, tol=1e-4, max_matvecs=40)
    assert (strict.status, strict.matvecs) == (Status.budget_reached, 40)
    assert str(strict) == f"200 entries ± {strict.relative_error:.2g} ({strict.num_samples} samples, budget_reached)"


def test_values_have_the_precision_of_float64_sums():
    result = diagonal(rotated(np.linspace(-1, 2, 20), torch.bfloat16))
    assert result.values.dtype == result.standard_error.dtype == torch.float64


def test_moments_are_those_of_all_samples_together():
    samples = 1e6 + torch.randn(23, 4, generator=make_generator(0), dtype=torch.float64)
    moments = Moments()
    for block in samples.split([1, 7, 8, 2, 5]):
        moments.add(block)
    torch.testing.assert_close(moments.mean, samples.mean(dim=0), rtol=1e-15, atol=0)
    torch.testing.assert_close(moments.standard_error(), samples.std(dim=0) / math.sqrt(23), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "xtrace"}, "method: expected one of hutchinson, xdiag; got 'xtrace'"),
        ({"tol": -1.0}, "tol: expected a number > 0, got -1.0"),
        ({"max_matvecs": 8}, "max_matvecs: expected at least 16, got 8"),
        ({"vectors": torch.ones(2, 9)}, r"vectors: expected shape \(s, 8\), got \(2, 9\)"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagonal(diagonal_matrix(np.arange(8.0)), **arguments)
