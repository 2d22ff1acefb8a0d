"""spectrum against the dense spectrum of a small network and of matrices that break Lanczos down."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cases import classes, mlp, normal, paired
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.spectrum import SpectrumOptions, SpectrumResult, spectrum, spectrum_of
from losslab.status import Status
from matrices import Broken, Counted, diagonal, rotated


def network(width: int = 12) -> EmpiricalRisk:
    """A tanh network after a few steps of gradient descent: large, small and negative eigenvalues."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    case = paired(model, nn.CrossEntropyLoss(), normal(60, 6), classes(60), [25, 35])
    risk = case.risk()
    for _ in range(60):
        risk.space.assign(risk.space.vector() - 0.5 * risk.gradient())
    return risk


@pytest.fixture(scope="module")
def risk() -> EmpiricalRisk:
    return network()


@pytest.fixture(scope="module")
def exact(risk) -> np.ndarray:
    return torch.linalg.eigvalsh(Hessian(risk).to_dense()).numpy()


@pytest.fixture(scope="module")
def result(risk) -> SpectrumResult:
    return spectrum(risk)


def of(operator, k: int = 3, seed: int = 0, **options) -> SpectrumResult:
    return spectrum_of(operator, k, 1, SpectrumOptions(**options), seed, None)[0]


def test_ends_are_within_their_errors(result, exact):
    for got, errors, expected in [
        (result.top, result.top_errors, exact[::-1][:5]),
        (result.smallest, result.smallest_errors, exact[:5]),
    ]:
        assert got.shape == errors.shape == (5,)
        assert (np.abs(got - expected) <= errors).all()
        assert (errors <= 2e-3 * np.abs(expected)).all()
    assert exact[0] < -1e-3 < 0.1 < exact[-1]  # a matrix with something to find at both ends


def test_trace_is_within_its_error(result, exact):
    assert abs(result.trace.value - exact.sum()) < 4 * result.trace.standard_error
    assert result.trace.standard_error < 0.1 * exact.sum()


@pytest.mark.parametrize("seed", range(2))
def test_trace_z_test(seed):
    """The basis that deflates was made for eigenvalues, restarts included; its complement is sampled without bias."""
    values = np.append(np.linspace(-0.2, 1, 115) ** 3, [5.0, 4.0, 3.0, 2.5, 2.0])
    scores = []
    for run in range(16):
        got = of(rotated(values), seed=100 * seed + run, trace_tol=1e-12, num_nodes=40).trace
        assert got.num_samples == 48
        scores.append((got.value - values.sum()) / got.standard_error)
    assert abs(np.mean(scores)) < 4 * 1.04 / 4
    assert 0.25 < np.var(scores) < 2.7


def test_derived_numbers(result, exact):
    assert result.condition_number == pytest.approx(abs(exact[-1] / exact[0]), rel=1e-3)
    relative = result.top_errors[0] / result.top[0] + result.smallest_errors[0] / abs(result.smallest[0])
    assert result.condition_number_error == pytest.approx(result.condition_number * relative)
    assert result.spectral_gap == pytest.approx(exact[-1] - exact[-2], abs=result.top_errors[:2].sum())
    assert 5 <= result.num_negative <= (exact < 0).sum()
    assert result.negative_mass == pytest.approx((exact < -1e-4 * exact[-1]).mean(), abs=0.1)
    assert (result.num_parameters, result.num_examples) == (len(exact), 60)


def test_density(result, exact):
    assert np.trapezoid(result.density.density, result.density.grid) == pytest.approx(1, abs=1e-6)
    assert (result.density.num_probes, result.density.matvecs) == (1, 100)
    assert result.density.grid[0] < exact[0]
    assert result.density.grid[-1] > exact[-1]
    first = result.density.weights @ result.density.nodes
    assert first == pytest.approx(exact.mean(), abs=0.2 * exact.mean() + 0.02)


def test_default_cost(result):
    assert result.matvecs <= 150
    assert result.status in (Status.converged, Status.budget_reached)


@pytest.mark.parametrize("options", [{}, {"num_nodes": 5}, {"num_probes": 1}, {"tol": 1e-8}, {"trace_samples": 3}])
@pytest.mark.parametrize(
    "values",
    [np.linspace(-1, 2, 150) ** 3, np.linspace(1, 2, 12), [3.0, 1.0] + [0.0] * 60],
    ids=["wide", "small", "rank 2"],
)
def test_matvecs_is_the_true_number_of_products(values, options):
    operator = Counted(rotated(values))
    assert of(operator, **options).matvecs == operator.count


@pytest.mark.parametrize("shape", [diagonal, rotated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values",
    [[5, 5, 3, 2, 1] + [0] * 55, [0] * 60, [1] * 60, [4, -3] + [0] * 58, [1] * 30 + [5] * 30, [7] * 59 + [-1]],
    ids=["rank 5", "zero", "identity", "rank 2", "clusters", "one apart"],
)
def test_breakdown_inside_the_shared_run(values, dtype, shape):
    """The density stops at an invariant subspace; the eigenvalues must go on beside it, not inside it again."""
    values = np.sort(np.array(values, dtype=float))
    result = of(shape(values, dtype))
    scale = max(np.abs(values).max(), 1e-30)
    np.testing.assert_allclose(result.top, values[::-1][:3], atol=1e-5 * scale)
    np.testing.assert_allclose(result.smallest, values[:3], atol=1e-5 * scale)
    assert abs(result.trace.value - values.sum()) <= 5 * result.trace.standard_error + 1e-4 * scale
    assert result.num_negative <= (values < 0).sum()
    assert result.negative_mass <= (values < 0).mean() + 0.1
    assert np.trapezoid(result.density.density, result.density.grid) == pytest.approx(1, abs=1e-6)
    assert result.status is not Status.nonfinite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_num_negative_is_a_lower_bound(dtype):
    for seed in range(15):
        values = np.random.default_rng(seed).normal(size=80) + seed / 7
        got = of(rotated(values, dtype, seed), seed=seed, num_probes=1)
        assert got.num_negative <= (values < 0).sum()
        if values.min() < -0.5:
            assert got.num_negative > 0
    # Positive semidefinite with a null space: rounding is not negative.
    assert of(rotated(np.append(np.zeros(70), np.linspace(1, 2, 10)), dtype)).num_negative == 0


@pytest.mark.parametrize("good", [0, 1, 30, 60, 125])
def test_nonfinite_products_are_reported(good):
    """NaN at the first product, within the shared run, within the density's, within the trace's."""
    result = of(Broken(100, good), num_nodes=40, num_probes=3, tol=0.5, k=1)
    assert result.status is Status.nonfinite
    assert result.top.shape == result.smallest.shape == (1,)
    if good == 0:
        assert np.isnan([result.top[0], result.smallest[0], result.condition_number, result.negative_mass]).all()
        assert math.isinf(result.top_errors[0])
        assert np.isnan(result.density.density).all()


def test_budget_reached():
    """The status is that of the weakest part: here the eigenvalues, beside a good trace and density."""
    result = of(rotated(np.linspace(1, 2, 400)), k=5, tol=1e-12, max_matvecs=45)
    assert result.trace.status is result.density.status is Status.converged
    assert result.status is Status.budget_reached
    assert (result.top_errors > 0).all()
    few = of(rotated(np.linspace(-1, 1, 400)), k=5, num_nodes=7, max_matvecs=7)
    assert few.status is Status.budget_reached
    assert np.isfinite(few.top).all()
    assert np.isnan(few.smallest).tolist() == [False, False, True, True, True]


def test_one_parameter_has_no_two_ends():
    risk = EmpiricalRisk(nn.Linear(1, 1, bias=False), nn.MSELoss(), [(torch.ones(2, 1), torch.ones(2, 1))])
    with pytest.raises(ValueError, match=r"at least 2 parameters .* use eigenpairs"):
        spectrum(risk, 1)


def test_norm_of_a_flat_loss_is_known():
    risk = EmpiricalRisk(nn.Linear(3, 4), lambda output, _: output.mean(), [(torch.ones(2, 3), torch.ones(2))])
    found = spectrum(risk, 1).frobenius_norm
    assert (found.value, found.standard_error, found.status) == (0.0, 0.0, Status.converged)


def test_smallest_problem():
    result = of(diagonal([2.0, -1.0]), k=1)
    np.testing.assert_allclose([result.top[0], result.smallest[0]], [2, -1], rtol=1e-14)
    assert math.isnan(result.spectral_gap)
    assert result.num_negative == 1


@pytest.mark.parametrize("k", [0, 22, -1, 2.0, "5"])
def test_k_out_of_range(k):
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()
    with pytest.raises(ValueError, match="k: expected 1 <= k <= 21 for 43 parameters, got"):
        spectrum(risk, k)


@pytest.mark.parametrize("name", ["tol", "max_matvecs", "num_nodes", "num_probes", "trace_tol", "trace_samples"])
def test_options_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name}: expected a number > 0, got 0"):
        SpectrumOptions(**{name: 0})


def test_prints_a_summary(result):
    text = str(result)
    assert f"{result.top[0]:.3g}" in text
    assert f"{result.matvecs} products" in text
