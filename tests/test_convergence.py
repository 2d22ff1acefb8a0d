"""convergence: gradient descent on quadratics to the last digit, singular and indefinite ones too; and its refusals."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cases import classes, gen, mlp, normal, paired
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.convergence import convergence, decrease
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.charts.convergence import convergence as charts
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from report_folders import start_run
from untouched import assert_untouched


class Quadratic(nn.Module):
    """½ (θ − θ*)ᵀH(θ − θ*), H with the given eigenvalues in random directions."""

    def __init__(self, eigenvalues: list[float]):
        super().__init__()
        size = len(eigenvalues)
        basis = torch.linalg.qr(torch.randn(size, size, generator=gen(1), dtype=torch.float64))[0]
        self.register_buffer("hessian", basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT)
        self.register_buffer("minimum", normal(size, seed=4))
        self.theta = nn.Parameter(normal(size, seed=3))

    def forward(self, x):
        d = self.theta - self.minimum
        return x * (0.5 * d @ self.hessian @ d)


def quadratic(eigenvalues: list[float]) -> EmpiricalRisk:
    batches = [(torch.ones(n, dtype=torch.float64), torch.zeros(n)) for n in (2, 1)]
    return EmpiricalRisk(Quadratic(eigenvalues), lambda output, target: output.mean(), batches)


def descended(risk: EmpiricalRisk, eta: float, num_steps: int) -> np.ndarray:
    """Plain gradient descent with the matrix itself, in NumPy."""
    h, theta = risk.model.hessian.numpy(), risk.model.theta.detach().numpy() - risk.model.minimum.numpy()
    losses = []
    for _ in range(num_steps + 1):
        losses.append(0.5 * theta @ h @ theta)
        theta = theta - eta * h @ theta
    return np.array(losses)


KINDS = {
    "definite": [0.5, 1.0, 2.0, 5.0, 10.0],
    "singular": [0.0, 0.0, 1.0, 2.0, 5.0, 10.0],
    "indefinite": [-0.2, 0.0, 1.0, 4.0, 10.0],
    "one eigenvalue": [3.0, 3.0, 3.0],
}


@pytest.mark.parametrize("eta", [None, 0.03, 0.19, 0.21], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_gradient_descent_on_a_quadratic(kind, eta):
    risk = quadratic(KINDS[kind])
    result = convergence(risk, learning_rate=eta, num_steps=30)
    rate = 1 / max(KINDS[kind]) if eta is None else eta
    expected = descended(risk, rate, 30)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result.losses, expected, rtol=1e-9, atol=1e-10 * scale)
    np.testing.assert_allclose(result.predicted, expected, rtol=1e-7, atol=1e-10 * scale)
    assert result.learning_rate == pytest.approx(rate, rel=1e-12)
    assert result.stable == (rate < 2 / max(KINDS[kind]))
    assert result.departs_at is None
    assert result.status is Status.complete


def test_textbook_numbers():
    result = convergence(quadratic(KINDS["definite"]), num_steps=40)
    found = [result.top, result.smallest_positive, result.smallest, result.condition_number, result.rate]
    np.testing.assert_allclose(found, [10, 0.5, 0.5, 20, 1 - 0.5 / 10], rtol=1e-9)
    assert result.top_error < 1e-10
    assert result.exact_steps == 40
    # ρ^2t of the whole excess, the minimum being zero: never below the truth, and met in the slowest direction.
    np.testing.assert_allclose(result.linear, result.losses[0] * 0.95 ** (2 * np.arange(41)), rtol=1e-9)
    assert (result.linear >= result.losses * (1 - 1e-9)).all()
    late = convergence(quadratic(KINDS["definite"]), num_steps=150).losses
    assert late[-1] / late[-2] == pytest.approx(0.95**2, rel=1e-3)
    assert result.minimum == pytest.approx(0, abs=1e-12)
    other = convergence(quadratic(KINDS["definite"]), learning_rate=0.19, num_steps=3)
    assert other.rate == pytest.approx(max(abs(1 - 0.19 * 0.5), abs(1 - 0.19 * 10)))


@pytest.mark.parametrize("nodes", [3, 5])
def test_so_many_nodes_predict_so_many_steps(nodes):
    """Gauss quadrature is exact to degree 2m − 1, and no further: H has 12 eigenvalues, m are seen."""
    risk = quadratic(list(np.linspace(0.1, 4, 12)))
    result = convergence(risk, learning_rate=0.45, num_steps=2 * nodes + 6, num_nodes=nodes)
    error = np.abs(result.predicted - result.losses) / result.losses[0]
    assert result.exact_steps == nodes == result.matvecs
    assert error[: nodes + 1].max() < 1e-13
    assert error[nodes + 1] > 1e-9
    assert result.smallest_positive > 0.1
    assert result.rate < 1 - 0.45 * 0.1


def test_stationary_point():
    risk = quadratic(KINDS["definite"])
    with torch.no_grad():
        risk.model.theta.copy_(risk.model.minimum)
    result = convergence(risk, num_steps=4)
    assert result.gradient_norm == 0
    np.testing.assert_array_equal(result.losses, np.zeros(5))
    np.testing.assert_array_equal(result.predicted, np.zeros(5))
    assert result.condition_number == pytest.approx(20)
    assert result.departs_at is None


def test_decrease_is_continuous_at_zero_and_exact_at_one():
    steps, one = np.arange(60), np.ones(1)
    for small in (1e-300, 1e-12, -1e-12):
        np.testing.assert_allclose(decrease(np.array([small]), one, 0.1, steps), 0.1 * steps, rtol=1e-9)
    np.testing.assert_array_equal(decrease(np.array([4.0]), one, 0.25, steps), np.where(steps > 0, 1 / 8, 0))
    np.testing.assert_allclose(decrease(np.array([9.0]), one, 0.2, steps[:4]), (1 - 0.8 ** (2 * steps[:4])) / 18)


def network() -> EmpiricalRisk:
    return paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()


def test_on_a_network_the_first_step_is_near_and_the_sharpest_rate_breaks_away():
    risk = network()
    small = convergence(risk, learning_rate=1e-3, num_steps=5)
    changes = small.losses - small.losses[0]
    np.testing.assert_allclose(small.predicted - small.losses[0], changes, rtol=1e-3)
    assert changes[-1] < 0
    assert small.departs_at is None
    far = convergence(risk, num_steps=100)
    assert far.departs_at is not None
    t = far.departs_at
    change = np.abs(far.predicted[: t + 1] - far.losses[0]).max()
    assert abs(far.losses[t] - far.predicted[t]) > 0.1 * change
    assert abs(far.losses[t - 1] - far.predicted[t - 1]) <= 0.1 * np.abs(far.predicted[:t] - far.losses[0]).max()


def test_the_quadratic_models_error_is_of_third_order():
    def error(eta: float) -> float:
        result = convergence(network(), learning_rate=eta, num_steps=1)
        return abs(float(result.losses[1] - result.predicted[1]))

    assert error(0.02) / error(0.01) == pytest.approx(8, rel=0.1)


def test_divergence_is_said_and_kept():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))

        def forward(self, x):
            return x * self.w**4

    risk = EmpiricalRisk(Steep(), lambda o, t: o.mean(), [(torch.ones(2, dtype=torch.float64), torch.zeros(2))])
    result = convergence(risk, learning_rate=1.0, num_steps=20)
    assert result.status is Status.nonfinite
    assert not result.stable
    assert np.isfinite(result.losses[:3]).all()
    assert np.isnan(result.losses[-1])
    assert result.departs_at == 1


def test_a_hessian_that_is_nan_is_said():
    class Kink(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))

        def forward(self, x):
            return x * (self.w.abs() ** 1.5).sum()

    risk = EmpiricalRisk(Kink(), lambda o, t: o.mean(), [(torch.ones(2, dtype=torch.float64), torch.zeros(2))])
    result = convergence(risk, num_steps=3)
    assert (result.status, result.losses[0]) == (Status.nonfinite, 1.0)
    assert np.isnan([result.top, result.rate, result.learning_rate, *result.predicted[1:]]).all()
    assert result.departs_at is None


def stop_after(calls: int):
    seen = 0

    def tick(done, total, note):
        nonlocal seen
        seen += 1
        if seen == calls:
            raise StopRequested

    return tick


def test_stop_key_keeps_what_is_known():
    risk = network()
    whole = convergence(risk, num_steps=6, num_nodes=4)
    steps = convergence(risk, num_steps=6, num_nodes=4, progress=stop_after(7))
    assert steps.status is Status.stopped
    np.testing.assert_array_equal(steps.losses[:4], whole.losses[:4])
    assert np.isnan(steps.losses[4:]).all()
    np.testing.assert_array_equal(steps.predicted, whole.predicted)
    lanczos = convergence(risk, num_steps=6, num_nodes=4, progress=stop_after(2))
    assert (lanczos.status, lanczos.matvecs, lanczos.exact_steps) == (Status.stopped, 2, 2)
    assert lanczos.losses[0] == whole.losses[0]
    assert np.isfinite(lanczos.predicted).all()


def test_model_stays():
    risk = network()
    with assert_untouched(risk.model):
        convergence(risk, learning_rate=1.0, num_steps=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number > 0 or None, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate: expected"),
        ({"num_steps": 0}, "num_steps: expected a number >= 1, got 0"),
        ({"num_nodes": 2.5}, "num_nodes: expected a number >= 1, got 2.5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        convergence(quadratic([1.0, 2.0]), **arguments)


def test_no_upward_curvature_needs_a_learning_rate():
    risk = quadratic([-1.0, -2.0])
    with pytest.raises(ValueError, match="learning_rate: the loss curves nowhere upwards"):
        convergence(risk)
    result = convergence(risk, learning_rate=0.1, num_steps=5)
    np.testing.assert_allclose(result.predicted, descended(risk, 0.1, 5), rtol=1e-9)
    assert math.isnan(result.rate)


def test_chart_shows_the_record(tmp_path):
    result = convergence(network(), num_steps=12)
    start_run(tmp_path / "run").write_probe("convergence", "1", *result.to_record())
    (chart,) = charts(read(tmp_path / "run"), {"run": "#000000"})
    seen, predicted, parted = chart.panels[0].series
    np.testing.assert_array_equal(seen.y, result.losses)
    np.testing.assert_array_equal(predicted.y, result.predicted)
    assert predicted.dashed
    assert parted.x.tolist() == [result.departs_at]
    assert chart.caption.endswith(".")
    matplotlib_backend.save(chart, tmp_path / "picture.png")
    assert len(plotly_backend.figure(chart).data) >= 3
