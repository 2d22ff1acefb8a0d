"""spectral_density: exact moments, mass where the eigenvalues are, calibrated errors."""

import numpy as np
import pytest
import torch

from losslab.operators.dense import DenseOperator
from losslab.solvers.density import density_from, spectral_density
from losslab.status import Status
from matrices import diagonal, rotated, sign_vectors


def integral(density) -> float:
    return float(np.trapezoid(density.density, density.grid))


SPECTRA = {
    "clusters": np.repeat([1.0, 5.0], 30),
    "uniform": np.linspace(0, 10, 200),
    "identity": np.ones(50),
    "zero": np.zeros(50),
    "one outlier": np.append(np.zeros(99), 1000.0),
    "negative": -np.ones(10),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [None, 0.05, 30.0])
@pytest.mark.parametrize("name", SPECTRA)
def test_integral_is_one(name, width, dtype):
    if name == "one outlier" and width == 0.05:
        pytest.skip("refused: see test_width_that_no_grid_can_show")
    density = spectral_density(rotated(SPECTRA[name], dtype), width=width)
    assert integral(density) == pytest.approx(1, abs=1e-6)
    assert density.weights.sum() == pytest.approx(1, abs=1e-6)
    assert density.density.min() >= 0
    assert (np.diff(density.grid) > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_half_the_mass_at_each_cluster(seed):
    """Fixed number of probes, z-test with the standard error that 200 independent probes show."""
    operator = rotated(SPECTRA["clusters"], seed=seed)
    shares = [spectral_density(operator, num_probes=1, seed=100 * seed + s).mass(4.9, 5.1) for s in range(200)]
    error = np.std(shares, ddof=1) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - 0.5) < 4 * error < 0.03
    density = spectral_density(operator, seed=seed)
    assert density.mass(0.99, 1.01) + density.mass(4.99, 5.01) == pytest.approx(1, abs=1e-12)
    assert density.mass(1.01, 4.99) == 0


def test_uniform_spectrum_is_flat():
    density = spectral_density(rotated(SPECTRA["uniform"]), num_probes=50, num_nodes=60, width=0.7)
    inside = density.density[(density.grid > 2) & (density.grid < 8)]
    np.testing.assert_allclose(inside, 0.1, rtol=0.1)


def test_all_sign_vectors_give_exact_moments():
    """E[zzᵀ] = I over the 2⁶ sign vectors, so the mean measure has tr(Aᵖ)/n as its moments, without a seed."""
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.mT
    density = spectral_density(DenseOperator(matrix), vectors=sign_vectors(6), num_nodes=6)
    for power in range(12):  # 6 nodes integrate polynomials up to degree 11 exactly
        expected = float(torch.linalg.matrix_power(matrix, power).trace()) / 6
        assert density.weights @ density.nodes**power == pytest.approx(expected, rel=1e-11, abs=1e-11)
    assert density.num_probes == 64
    assert density.seed is None


def test_standard_error_is_calibrated():
    """z = (mean − truth)/error over 60 runs: variance near 1, and below it where the bound is above the variance."""
    operator = rotated(np.linspace(0, 1, 60) ** 2)
    width = 0.1
    values = np.linspace(0, 1, 60) ** 2
    scores = []
    for seed in range(60):
        density = spectral_density(operator, num_probes=8, num_nodes=15, width=width, seed=seed)
        at = [np.searchsorted(density.grid, where) for where in (0.05, 0.4, 0.8)]
        truth = np.exp(-0.5 * ((density.grid[at, None] - values) / width) ** 2).mean(1) / (width * np.sqrt(2 * np.pi))
        scores.append((density.density[at] - truth) / density.standard_error[at])
    scores = np.array(scores)
    assert (np.abs(scores.mean(axis=0)) < 4 / np.sqrt(60) * 1.1).all()
    # The mean of 60 squared normal scores has standard deviation 0.18.
    assert ((scores**2).mean(axis=0) > 0.5).all()
    assert ((scores**2).mean(axis=0) < 2.0).all()


def test_outliers_and_bulk():
    """diag(5, 4, 3, 0, …) + ZZᵀ/n of Papyan 2020, figure 15a: bulk in [0, 4] and what the spikes become beyond it."""
    n = 500
    z = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spikes = torch.zeros(n, dtype=torch.float64)
    spikes[:3] = torch.tensor([8.0, 7.0, 6.0])
    operator = DenseOperator(torch.diag(spikes) + z @ z.mT / n)
    exact = torch.linalg.eigvalsh(operator.matrix).numpy()
    assert (exact > 4.2).sum() == 3
    density = spectral_density(operator, num_probes=10, num_nodes=60)
    for outlier in exact[-3:]:  # each is a node of every probe's quadrature
        assert (np.abs(density.nodes - outlier) < 1e-6).sum() == 10
    assert density.mass(4.2, np.inf) == pytest.approx(3 / n, rel=0.5)
    assert density.mass(-1e-9, 4.2) == pytest.approx(1, abs=0.01)
    assert density.mass(-np.inf, -1e-6) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_stops_early(dtype):
    """In the null space a product is rounding of ‖A‖, and no direction to go on in."""
    for seed in range(3):
        density = spectral_density(rotated([4.0, -3.0] + [0.0] * 198, dtype, seed), seed=seed)
        assert density.matvecs <= 4 * 6
        assert density.mass(-1e-4, 1e-4) == pytest.approx(0.99, abs=0.02)


def test_one_probe_has_an_error_band_that_is_the_scatter_between_probes():
    """Where the kernel is narrow beside the spectrum, so that Σᵢ f(A)ᵢᵢ² is small, the bound is the variance itself."""
    operator = rotated(SPECTRA["uniform"])
    one = [spectral_density(operator, num_probes=1, num_nodes=90, width=0.3, seed=seed) for seed in range(60)]
    grid = np.linspace(1, 9, 9)
    curves = np.array([np.interp(grid, density.grid, density.density) for density in one])
    bands = np.array([np.interp(grid, density.grid, density.standard_error) for density in one])
    ratio = curves.std(axis=0, ddof=1) / bands.mean(axis=0)
    assert (np.abs(ratio - 1) < 4 * 0.092).all()  # a standard deviation from 60 is known to 1/√118
    assert np.abs(ratio.mean() - 1) < 0.2


def test_vectors_of_ones_own_have_the_scatter_between_them():
    operator = rotated(SPECTRA["uniform"])
    vectors = torch.randn(3, operator.size, generator=torch.Generator().manual_seed(0))
    assert np.isnan(spectral_density(operator, vectors=vectors[:1]).standard_error).all()
    assert np.isfinite(spectral_density(operator, vectors=vectors).standard_error).all()


def test_width_is_visible_where_the_spectrum_is_rounding():
    density = spectral_density(rotated(np.full(40, 7.0), torch.float32))
    assert density.width == pytest.approx(0.07, rel=1e-4)
    assert density.status is Status.converged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_probes": 0}, "expected at least 1 of each, got 0 and 40"),
        ({"num_nodes": 0}, "expected at least 1 of each, got 4 and 0"),
        ({"width": 0.0}, "width: expected a number > 0"),
        ({"width": -1.0}, "width: expected a number > 0"),
        ({"vectors": torch.ones(8)}, "vectors: expected shape"),
        ({"vectors": torch.ones(2, 7)}, r"vectors: expected shape \(num_probes, 8\), got \(2, 7\)"),
        ({"vectors": torch.zeros(1, 8)}, "finite vector that is not zero"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(diagonal(np.arange(8.0)), **arguments)


def test_width_that_no_grid_can_show():
    with pytest.raises(ValueError, match=r"width: expected at least 0\.2"):
        spectral_density(rotated(SPECTRA["one outlier"]), width=0.05)


def test_rounding_does_not_decide_the_number_of_points():
    """A width of a hundredth of the range asks for 448 intervals: one more or less would be another grid elsewhere."""
    weights, lengths = np.array([0.5, 0.5]), set()
    for high in np.nextafter(1.7, [0, 1.7, 3]).tolist() + np.linspace(0.3, 3.0, 200).tolist():
        lengths.add(len(density_from([(np.array([-1.1, high]), weights)], 2, Status.converged).grid))
    assert lengths == {450}
