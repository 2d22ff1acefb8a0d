"""log_density: exact where the quadrature is, a band that holds, and a resolution that says where neither is known."""

import math

import numpy as np
import pytest
import torch

from losslab.operators.dense import DenseOperator
from losslab.solvers.density import spectral_density
from losslab.solvers.log_density import LogDensity, log_density
from losslab.status import Status
from matrices import Broken, rotated

SPREAD = np.append(10.0 ** np.linspace(-3, 2, 70), -(10.0 ** np.linspace(-2, 0, 30)))


def integral(result: LogDensity, curve: np.ndarray) -> float:
    return float(np.trapezoid(curve, result.grid))


def cumulative(result: LogDensity, exponent: float) -> float:
    """The fraction with |λ| below 10^exponent."""
    both = np.where(result.grid < exponent, result.positive + result.negative, 0.0)
    return integral(result, both) + result.below_floor


def kernel(logarithms: np.ndarray, grid: np.ndarray, width: float, size: int) -> np.ndarray:
    gaussians = np.exp(-0.5 * ((grid[:, None] - logarithms) / width) ** 2)
    return gaussians.sum(axis=1) / (size * width * math.sqrt(2 * math.pi))


SPECTRA = {
    "spread": SPREAD,
    "uniform": np.linspace(0, 10, 80),
    "identity": np.ones(30),
    "zero": np.zeros(30),
    "one outlier": np.append(np.zeros(99), 1000.0),
    "negative": -np.linspace(1, 2, 10),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [None, 1e-9, 0.1, 1e6])
@pytest.mark.parametrize("name", SPECTRA)
def test_everything_is_counted_once(name, floor, dtype):
    result = log_density(spectral_density(rotated(SPECTRA[name], dtype)), len(SPECTRA[name]), floor=floor)
    total = integral(result, result.positive) + integral(result, result.negative) + result.below_floor
    assert total == pytest.approx(1, abs=1e-6)
    assert min(result.positive.min(), result.negative.min()) >= 0
    for array in (result.positive, result.positive_error, result.negative, result.negative_error):
        assert array.shape == result.grid.shape
        assert np.isfinite(array).all()


@pytest.mark.parametrize("width", [0.03, 0.1, 0.4])
def test_equals_the_eigenvalues_own(width):
    """One probe a coordinate and as many nodes as eigenvalues: no sampling and no quadrature error is left."""
    values = SPREAD[::3]
    size = len(values)
    density = spectral_density(rotated(values), vectors=torch.eye(size), num_nodes=size)
    result = log_density(density, size, width=width, floor=1e-4)
    positive, negative = np.log10(values[values > 0]), np.log10(-values[values < 0])
    np.testing.assert_allclose(result.positive, kernel(positive, result.grid, width, size), atol=1e-9)
    np.testing.assert_allclose(result.negative, kernel(negative, result.grid, width, size), atol=1e-9)
    assert result.below_floor == pytest.approx(0, abs=1e-9)
    higher = log_density(density, size, width=width, floor=0.1)
    assert higher.below_floor == pytest.approx((np.abs(values) <= 0.1).mean(), abs=1e-9)


def test_band_is_calibrated():
    """z = (curve − truth)/band over 60 seeds, one probe each: variance at most 1, and near it for a rotated matrix."""
    size, operator = len(SPREAD), rotated(SPREAD)
    scores = []
    for seed in range(60):
        result = log_density(spectral_density(operator, num_probes=1, num_nodes=size, seed=seed), size, width=0.3)
        at = [int(np.searchsorted(result.grid, where)) for where in (-1.0, 0.0, 1.0)]
        truth = kernel(np.log10(SPREAD[SPREAD > 0]), result.grid[at], 0.3, size)
        scores.append((result.positive[at] - truth) / result.positive_error[at])
    squares = (np.array(scores) ** 2).mean(axis=0)
    assert (np.abs(np.mean(scores, axis=0)) < 4 / math.sqrt(60)).all()
    assert (squares > 0.5).all()
    assert (squares < 1.7).all()  # 1 and four standard deviations of 60 squared normal scores


def test_band_of_a_single_value():
    """Where f(A) = f·I the bound is f·√(2/n) for each probe."""
    result = log_density(spectral_density(rotated(np.full(50, 3.0)), num_probes=2), 50)
    np.testing.assert_allclose(result.positive_error, result.positive * math.sqrt(2 / 100), atol=1e-12)
    assert (result.below_floor, result.below_floor_error) == (0, 0)


def test_pareto_matrix():
    """ZZᵀ/1000 with Pareto(1) entries (Papyan 2019): seven decades, a spike at zero on a linear axis."""
    z = 1 / torch.rand(500, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    operator = DenseOperator(z @ z.mT / 1000)
    exact = np.log10(torch.linalg.eigvalsh(operator.matrix).numpy())
    assert exact.max() - exact.min() > 7
    resolutions = []
    for num_nodes in (40, 100, 160):
        result = log_density(spectral_density(operator, num_nodes=num_nodes), 500, floor=1.0, width=0.05)
        known = np.arange(math.log10(result.resolution) + 0.1, exact.max(), 0.25)
        assert len(known) > 10
        for exponent in known:
            truth = (exact < exponent).mean()
            assert cumulative(result, exponent) == pytest.approx(truth, abs=0.005 + 4 * math.sqrt(2 * truth / 2000))
        assert integral(result, result.negative) == 0
        resolutions.append(result.resolution)
    assert resolutions[0] > 10 * resolutions[1] > 20 * resolutions[2]
    # Below its resolution the quadrature of 40 nodes has the mass in the wrong places: that is what the number is for.
    coarse = log_density(spectral_density(operator, num_nodes=40), 500, floor=1.0, width=0.05)
    below = np.arange(exact.min(), math.log10(coarse.resolution), 0.1)
    assert max(abs(cumulative(coarse, e) - (exact < e).mean()) for e in below) > 0.1


def test_sign_and_scale():
    size = len(SPREAD)
    plain, flipped, scaled = (
        log_density(spectral_density(rotated(factor * SPREAD)), size) for factor in (1.0, -1.0, 1e5)
    )
    np.testing.assert_allclose(flipped.positive, plain.negative, atol=1e-7)
    np.testing.assert_allclose(flipped.negative_error, plain.positive_error, atol=1e-7)
    np.testing.assert_allclose(scaled.grid, plain.grid + 5, atol=1e-9)
    np.testing.assert_allclose(scaled.positive, plain.positive, atol=1e-7)
    assert scaled.resolution == pytest.approx(1e5 * plain.resolution, rel=1e-6)


def test_costs_nothing_and_says_what_the_density_says():
    density = spectral_density(rotated(SPREAD), num_nodes=10, seed=3)
    result = log_density(density, len(SPREAD))
    assert (result.matvecs, result.status, result.seed) == (40, Status.converged, 3)
    assert result.floor == pytest.approx(1e-6 * np.abs(density.nodes).max())


def test_null_space_is_below_the_floor():
    result = log_density(spectral_density(rotated(np.append(np.zeros(90), np.linspace(1, 2, 10))), num_probes=20), 100)
    assert abs(result.below_floor - 0.9) < 4 * result.below_floor_error < 0.15
    assert result.resolution > 0.5  # one node at zero, none between it and the rest


def test_nonfinite():
    result = log_density(spectral_density(Broken(30, good=0)), 30)
    assert result.status is Status.nonfinite
    assert np.isnan([*result.positive, *result.negative, result.below_floor, result.resolution]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size, floor, width: expected numbers > 0, got 0"),
        ({"floor": 0.0}, "size, floor, width: expected numbers > 0"),
        ({"floor": math.nan}, "size, floor, width: expected numbers > 0"),
        ({"width": 0.0}, "size, floor, width: expected numbers > 0"),
        ({"width": 1e-4}, "width: expected at least 0.0012 decades, got 0.0001"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    density = spectral_density(rotated(SPREAD))
    with pytest.raises(ValueError, match=message):
        log_density(density, **({"size": 100} | arguments))
