"""perturbation: curvatures known in closed form, and the quadratic model ending where it does."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from cases import conv_batchnorm, normal, seeded
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.parabola import fit, valid_to
from losslab.probes.perturbation import perturbation
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.charts.perturbation import perturbation as figure
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from matrices import rotated
from report_folders import start_run

ONE = [(torch.zeros(1), torch.zeros(1))]


class Point(nn.Module):
    def __init__(self, values, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(values, dtype=dtype))

    def forward(self, x):
        return self.weight + 0 * x.to(self.weight.dtype)


def function(loss, point, dtype=torch.float64) -> EmpiricalRisk:
    """L(θ) = loss(θ) at a point."""
    return EmpiricalRisk(Point(point, dtype), lambda output, _: loss(output), ONE)


def test_a_quadratic_on_a_slope():
    matrix = rotated(np.array([-1.0, 0.2, 0.5, 2.0, 3.0])).matrix
    point = torch.tensor([1.0, 0.0, -2.0, 0.5, 1.0], dtype=torch.float64)
    result = perturbation(function(lambda w: 0.5 * w @ matrix @ w, point), k=3, distance=0.4)
    assert result.directions == ("eigenvector 1", "eigenvector 2", "eigenvector 3", "random 1", "random 2")
    np.testing.assert_allclose(result.curvatures[:3], [3, 2, 0.5], rtol=1e-6)
    assert (np.abs(result.curvatures[:3] - [3, 2, 0.5]) <= result.curvature_errors[:3]).all()
    assert ((result.curvatures[3:] >= -1) & (result.curvatures[3:] <= 3)).all()
    assert np.abs(result.slopes).min() > 0.01
    expected = result.slopes[:, None] * result.epsilons + 0.5 * result.curvatures[:, None] * result.epsilons**2
    np.testing.assert_allclose(result.losses - result.loss, expected, atol=1e-6)
    np.testing.assert_allclose(result.fitted, result.curvatures, rtol=1e-5)
    assert result.distance == pytest.approx(0.4 * 2.5, rel=1e-15)
    assert result.relative_distance == pytest.approx(0.4, rel=1e-15)
    np.testing.assert_array_equal(result.valid_to, np.full(5, result.distance))
    assert all(remark.endswith("they agree") for remark in result.remarks)
    assert str(result).splitlines() == list(result.remarks)
    assert (result.loss, result.epsilons[10]) == (result.losses[0, 10], 0.0)
    np.testing.assert_array_equal(result.epsilons, -result.epsilons[::-1])


def test_directions_have_length_one():
    """For L = ‖w‖²/2 all rises along unit directions are ½ε²."""
    result = perturbation(function(lambda w: 0.5 * w @ w, [0.0] * 4), distance=0.3, relative=False, k=1, num_random=3)
    np.testing.assert_allclose(result.losses, np.tile(0.5 * result.epsilons**2, (4, 1)), rtol=1e-6)


def test_random_directions_have_the_mean_curvature_of_the_trace():
    h = torch.linspace(-1, 6, 6, dtype=torch.float64)
    result = perturbation(
        function(lambda w: 0.5 * (h * w) @ w, [0.0] * 6), k=1, num_random=100, resolution=5, distance=1, relative=False
    )
    curvatures = result.curvatures[1:]
    error = curvatures.std() / 10
    assert abs(curvatures.mean() - float(h.mean())) < 4 * error < 2


def test_the_quadratic_model_ends_where_it_does():
    """1 − cos ε falls short of ½ε² by a tenth of it near ε = 1.1."""
    end = brentq(lambda e: (0.5 * e**2 - (1 - math.cos(e))) - 0.05 * e**2, 0.5, 2)
    risk = function(lambda w: -torch.cos(w).sum(), [0.0])
    result = perturbation(risk, k=1, num_random=0, distance=2.0, relative=False, resolution=201)
    assert 0 <= end - result.valid_to[0] < 0.02
    assert result.curvatures[0] == pytest.approx(1)
    assert result.fitted[0] < 0.8
    assert result.remarks[0].endswith(f"they differ; the quadratic model ends at |ε| = {result.valid_to[0]:.3g}")
    near = perturbation(risk, k=1, num_random=0, distance=0.05, relative=False)
    assert near.remarks[0].endswith("they agree")


def test_the_shorter_side_counts():
    """½ε² + ε³ for ε < 0, exactly ½ε² for ε > 0."""
    risk = function(lambda w: (0.5 * w**2 + torch.where(w < 0, w**3, 0 * w)).sum(), [0.0])
    result = perturbation(risk, k=1, num_random=0, distance=0.1, relative=False, resolution=101)
    assert result.valid_to[0] == pytest.approx(0.05, abs=0.0021)


def test_a_lopsided_valley_does_not_pass_for_another_curvature():
    risk = function(lambda w: (0.5 * 3 * w**2 + 4 * w**3 - 0.7 * w).sum(), [0.0])
    result = perturbation(risk, k=1, num_random=0, distance=0.5, relative=False)
    assert result.fitted[0] == pytest.approx(3, rel=1e-9)
    assert abs(result.slopes[0]) == pytest.approx(0.7, rel=1e-9)
    assert result.valid_to[0] < 0.05  # 4ε³ reaches a tenth of 1.5ε² at ε = 0.0375


def test_a_kink_is_before_the_first_point():
    risk = function(lambda w: (0.5 * w**2 + 10 * w.abs()).sum(), [0.0])
    result = perturbation(risk, k=1, num_random=0, distance=0.1, relative=False)
    assert result.valid_to[0] == 0
    assert "they differ; the quadratic model ends before the first point" in result.remarks[0]


def test_rounding_is_no_deviation():
    """A curvature of 10⁻³ on a loss of 100 in float32: ½ε² of it is below the last digit."""
    risk = function(lambda w: 100 + 0.5e-3 * (w @ w), [0.1, 0.2], torch.float32)
    result = perturbation(risk, k=1, num_random=1, distance=0.01, relative=False)
    np.testing.assert_array_equal(result.valid_to, np.full(2, result.distance))
    assert (np.abs(result.fitted - 1e-3) < 3 * result.fitted_errors).all()
    assert all("not measurable in float32; take a larger distance" in remark for remark in result.remarks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_claim_to_agree(dtype):
    """Curvatures 1 and 3 on a loss near 1: what is fitted to rounded losses says nothing of either."""
    risk = function(lambda w: 1 + 0.5 * w[0] ** 2 + 1.5 * w[1] ** 2, [0.1, 0.2], dtype)
    result = perturbation(risk, k=1, num_random=1, distance=0.01, relative=False)
    name = str(dtype).removeprefix("torch.")
    assert all(f"not measurable in {name}" in remark and "agree" not in remark for remark in result.remarks)
    far = perturbation(risk, k=1, num_random=0, distance=2.0, relative=False)
    assert "not measurable" not in far.remarks[0]  # λ = 3 on a loss that rises by 6


def test_the_error_of_a_fit_is_the_scatter_over_noise():
    epsilons, generator = np.linspace(-0.3, 0.3, 21), np.random.default_rng(0)
    truth = 1 + 0.5 * epsilons + 2.0 * epsilons**2 - 3 * epsilons**3
    fits = [fit(epsilons, truth + 0.01 * generator.standard_normal(21), 0.0) for _ in range(400)]
    curvatures, errors = (np.array([getattr(f, name) for f in fits]) for name in ("curvature", "error"))
    assert abs(curvatures.mean() - 4) < 4 * curvatures.std() / 20
    assert np.sqrt((errors**2).mean()) == pytest.approx(curvatures.std(), rel=0.12)
    assert math.isnan(fit(epsilons[:4], truth[:4], 0.0).curvature)
    assert valid_to(epsilons, truth, 0.5, 4.0, 0.0) == pytest.approx(0.06, rel=1e-9)  # 3ε³ ≤ 0.2ε²


def test_nan_stays_and_ends_the_model():
    risk = function(lambda w: (0.5 * w**2 + 0 * torch.log(w + 1.05)).sum(), [0.0])
    result = perturbation(risk, k=1, num_random=0, distance=1.5, relative=False, resolution=31)
    assert result.status is Status.nonfinite
    assert np.isnan(result.losses).sum() == 5  # below −1.05, on one side
    assert result.valid_to[0] == pytest.approx(1.0)


def test_stopped_with_what_is_known():
    calls = 0

    def stop(done, total, note):
        nonlocal calls
        calls += 1
        if calls > 8 and note.startswith("ε"):
            raise StopRequested

    risk = function(lambda w: 0.5 * w @ w, [0.0, 0.0])
    result = perturbation(risk, k=1, num_random=0, distance=1, relative=False, progress=stop)
    known = np.isfinite(result.losses[0])
    assert result.status is Status.stopped
    assert 5 <= known.sum() < 21
    assert known[10]
    assert np.abs(np.flatnonzero(known) - 10).max() <= known.sum() // 2
    np.testing.assert_allclose(result.losses[0][known], 0.5 * result.epsilons[known] ** 2, atol=1e-12)


def test_stopped_before_the_fit():
    def stop(done, total, note):
        raise StopRequested

    result = perturbation(function(lambda w: w @ w, [0.0, 0.0]), distance=1, relative=False, progress=stop, k=1)
    assert result.status is Status.stopped
    assert "too few finite losses" in result.remarks[0]


def test_of_a_network():
    """Curvatures are those of the exact Hessian; near enough, the fits are."""
    model = seeded(conv_batchnorm).double()
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(normal(6, 1, 4, 4), torch.arange(6) % 3)], params="5.*")
    result = perturbation(risk, distance=1e-3)
    exact = torch.linalg.eigvalsh(Hessian(risk).to_dense()).flip(0)
    np.testing.assert_allclose(result.curvatures[:2], exact[:2], rtol=1e-4)
    np.testing.assert_allclose(result.fitted, result.curvatures, rtol=1e-3)
    assert (result.valid_to > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected a number >= 1, got 0"),
        ({"k": 4}, "k: expected 1 <= k <= 3"),
        ({"num_random": -1}, "num_random: expected a number >= 0, got -1"),
        ({"resolution": 4}, "resolution: expected an odd number >= 5"),
        ({"resolution": 3}, "resolution: expected an odd number >= 5"),
        ({"distance": 0.0}, "distance: expected a number > 0, got 0.0"),
        ({"relative": True}, "distance: a relative one needs parameters that are not all zero"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        perturbation(function(lambda w: w @ w, [0.0] * 3), **({"relative": False} | arguments))


def test_figure_shows_losses_and_models(tmp_path):
    result = perturbation(function(lambda w: -torch.cos(w).sum(), [0.2, 0.4]), distance=2.0, relative=False)
    start_run(tmp_path / "a").write_probe("perturbation", "1", *result.to_record())
    (chart,) = figure(read(tmp_path), {"a": "#000000"})
    panel, random = chart.panels
    assert [len(panel.series), len(random.series)] == [4, 4]
    np.testing.assert_array_equal(random.series[2].y, result.losses[3])
    np.testing.assert_array_equal(panel.series[0].y, result.losses[0])
    model = panel.series[1]
    assert np.nanmax(model.y) <= result.losses.max() + 0.081 * np.ptp(result.losses)
    assert np.isnan(model.y).any()
    assert model.dashed
    middle = len(model.x) // 2
    assert model.y[middle] == pytest.approx(result.loss)
    second = (model.y[middle + 1] - 2 * model.y[middle] + model.y[middle - 1]) / (model.x[1] - model.x[0]) ** 2
    assert second == pytest.approx(result.curvatures[0], rel=1e-6)
    matplotlib_backend.save(chart, tmp_path / "picture.png")
    assert len(plotly_backend.figure(chart).data) == 8
