"""Random matrices whose limit spectrum is known in closed form, at the size of Papyan's (2019, figure 15a)."""

import numpy as np
import pytest
import torch

from losslab.operators.dense import DenseOperator
from losslab.solvers.density import spectral_density
from losslab.solvers.lanczos import eigenpairs

SIZE = 2000
SPIKES = np.array([5.0, 4.0, 3.0])
# ZZᵀ/n has the density √((4 − x)/x)/2π on [0, 4] (Marchenko & Pastur 1967). Adding a spike s > 2 puts an eigenvalue to
# s²/(s − 1), where the Stieltjes transform (1 − √(1 − 4/x))/2 is 1/s (Benaych-Georges & Nadakuditi 2011).
OUTLIERS = SPIKES**2 / (SPIKES - 1)


def mass_below(x: float) -> float:
    """∫₀ˣ of the bulk's density, with t = √(x/4) = sin φ."""
    phi = np.arcsin(np.sqrt(np.minimum(x, 4.0) / 4))
    return float((2 * phi + np.sin(2 * phi)) / np.pi)


@pytest.fixture(scope="module")
def operator() -> DenseOperator:
    """diag(5, 4, 3, 0, …) + ZZᵀ/n."""
    z = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    matrix = z @ z.mT / SIZE
    matrix.diagonal()[:3] += torch.from_numpy(SPIKES).float()
    return DenseOperator(matrix)


def test_mass_is_the_integral_of_the_density():
    grid = np.linspace(1e-9, 4, 2_000_001)
    for x in (0.5, 2.0, 4.0):
        part = grid[grid <= x]
        curve = np.sqrt((4 - part) / part) / (2 * np.pi)
        assert mass_below(x) == pytest.approx(np.trapezoid(curve[100:], part[100:]) + mass_below(part[100]), abs=1e-6)


def test_three_outliers_and_no_fourth(operator):
    result = eigenpairs(operator, 4, which="largest", tol=1e-3)
    np.testing.assert_allclose(result.values[:3], OUTLIERS, atol=4 * np.sqrt(2 / SIZE) * 3)
    assert result.values[3] < 4.1  # the bulk's edge, which fluctuates by n^(−2/3)
    assert result.status.ok
    block = eigenpairs(operator, 3, which="largest", block_size=3)
    np.testing.assert_allclose(block.values, result.values[:3], rtol=1e-5)


def test_density_has_the_bulk_and_the_outliers(operator):
    density = spectral_density(operator, num_probes=4, num_nodes=128)
    outliers = eigenpairs(operator, 3, which="largest").values
    for outlier in outliers:  # a node of each probe's quadrature
        assert (np.abs(density.nodes - outlier) < 1e-4).sum() == 4
    assert density.mass(4.15, np.inf) * SIZE == pytest.approx(3, abs=4 * np.sqrt(2 * 3 / 4))
    assert density.mass(-np.inf, -1e-4) == 0
    for x in (0.1, 0.5, 1.0, 2.0, 3.0, 4.1):  # the bound for random signs, and half of a node's weight
        assert density.mass(-1e-4, x) == pytest.approx(mass_below(x), abs=4 * np.sqrt(2 / (4 * SIZE)) + 0.01)
    inside = (density.grid > 0.7) & (density.grid < 3.7)
    limit = np.sqrt((4 - density.grid[inside]) / density.grid[inside]) / (2 * np.pi)
    assert (np.abs(density.density[inside] - limit) < 5 * density.standard_error[inside] + 0.01).all()
    between = np.abs(density.grid - (4.05 + outliers[2]) / 2) < 0.03
    assert between.any()
    assert (density.density[between] < 0.1 * density.density[inside].min()).all()
