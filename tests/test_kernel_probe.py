"""kernel: Θ against the dense Jacobian, its numbers in closed form, and the training that it predicts."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from cases import classes, conv_batchnorm, mlp, normal, paired, seeded
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.kernel import kernel
from losslab.probes.kernel_training import SquaredError
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.charts.kernel import kernel as charts
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from report_folders import start_run
from untouched import assert_untouched


def linear(x: torch.Tensor, y: torch.Tensor, sizes: list[int]) -> EmpiricalRisk:
    model = seeded(lambda: nn.Linear(x.shape[1], y.shape[1] if y.ndim > 1 else 1, bias=False))
    return paired(model, nn.MSELoss(), x, y.reshape(len(y), -1), sizes).risk()


def classifier() -> EmpiricalRisk:
    return paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()


def dense(risk: EmpiricalRisk) -> np.ndarray:
    x = torch.cat([batch[0] for batch in risk.batches])

    def outputs(vector):
        return functional_call(risk.model, risk.space.named_views(vector), (x,)).reshape(-1)

    jacobian = jacrev(outputs)(risk.space.vector())
    return (jacobian @ jacobian.mT).numpy()


def one_hot(risk: EmpiricalRisk) -> np.ndarray:
    return np.eye(3)[torch.cat([batch[1] for batch in risk.batches]).numpy()]


def test_numbers_against_the_dense_kernel():
    risk = classifier()
    result = kernel(risk, num_steps=3)
    theta, labels = dense(risk), one_hot(risk)
    values = np.linalg.eigvalsh(theta)[::-1]
    np.testing.assert_allclose(result.eigenvalues, values, rtol=1e-9, atol=1e-12)
    assert result.effective_rank == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert (result.num_examples, result.num_outputs, result.status) == (7, 21, Status.complete)
    # 43 parameters, 21 outputs: of full rank.
    assert result.rank == 21
    assert result.condition_number == pytest.approx(values[0] / values[-1], rel=1e-6)
    y = labels.reshape(-1)
    assert result.label_quotient == pytest.approx(y @ theta @ y / (y @ y * values[0]))
    between = sum(theta[c::3, c::3] for c in range(3))
    centring = np.eye(7) - 1 / 7
    centred, ideal = (centring @ m @ centring for m in (between, labels @ labels.T))
    expected = (centred * ideal).sum() / np.linalg.norm(centred) / np.linalg.norm(ideal)
    assert result.alignment == pytest.approx(expected)
    assert 0 < expected < 1


def test_weights_are_the_residuals_share_of_each_eigenvector():
    risk = classifier()
    result = kernel(risk, num_steps=1)
    _, vectors = np.linalg.eigh(dense(risk))
    x = torch.cat([batch[0] for batch in risk.batches])
    residual = risk.model(x).detach().numpy().reshape(-1) - one_hot(risk).reshape(-1)
    shares = (vectors.T @ residual) ** 2 / (residual @ residual)
    np.testing.assert_allclose(result.residual_weights, shares[::-1], rtol=1e-6, atol=1e-12)
    assert result.predicted[0] == pytest.approx(residual @ residual / 14)


def test_a_linear_network_is_predicted_to_the_last_digit():
    """XXᵀ; network, linearisation and prediction are then the same, also beyond the stable step."""
    x, y = normal(6, 3), normal(6, 2, seed=2)
    risk = linear(x, y, [4, 2])
    for eta in (None, 0.1, 3.0):
        result = kernel(risk, learning_rate=eta, num_steps=12)
        w = risk.model.weight.detach().clone()
        for t in range(13):
            residual = x @ w.T - y
            assert result.network[t] == pytest.approx(float(residual.square().sum()) / 12, rel=1e-9)
            w -= result.learning_rate / 6 * residual.T @ x
        np.testing.assert_allclose(result.predicted, result.network, rtol=1e-8)
        np.testing.assert_allclose(result.linearised, result.network, rtol=1e-8)
        assert result.departs_at is None
        top = float(torch.linalg.eigvalsh(x @ x.T)[-1])
        assert result.learning_rate == pytest.approx(6 / top if eta is None else eta)
        assert result.stable == (result.learning_rate < 12 / top)
        assert (result.rank, result.condition_number) == (6, math.inf)  # 3 directions for each of 2 outputs, of 12


def test_training_sees_what_it_says():
    """The linearisation's errors come from products, the network's from its own gradients."""
    risk = classifier()
    result = kernel(risk, num_steps=40)
    np.testing.assert_allclose(result.linearised, result.predicted, rtol=1e-9)
    model, x = copy.deepcopy(risk.model), torch.cat([batch[0] for batch in risk.batches])
    y = torch.from_numpy(one_hot(risk))
    for t in range(41):
        error = (model(x) - y).square().sum() / 14
        assert result.network[t] == pytest.approx(error.item(), rel=1e-9)
        model.zero_grad()
        error.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(result.learning_rate * p.grad)
    small = kernel(risk, learning_rate=1e-3, num_steps=3)
    changes = small.network[1:] - small.network[0]
    np.testing.assert_allclose(small.predicted[1:] - small.predicted[0], changes, rtol=2e-3)
    assert small.departs_at is None


def test_drift_and_rotation():
    risk = classifier()
    other = copy.deepcopy(risk.model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * normal(*p.shape, seed=p.numel()))
    there = EmpiricalRisk(other, risk.loss_fn, risk.batches)
    now, before = dense(risk), dense(there)
    for reference in (other, other.state_dict(), there.space.vector()):
        with assert_untouched(risk.model):
            result = kernel(risk, reference=reference, num_steps=1)
        assert result.drift == pytest.approx(np.linalg.norm(now - before) / np.linalg.norm(before))
        cosine = (now * before).sum() / np.linalg.norm(now) / np.linalg.norm(before)
        assert result.rotation == pytest.approx(1 - cosine)
    same = kernel(risk, reference=risk.model, num_steps=1)
    assert (same.drift, same.rotation) == pytest.approx((0, 0), abs=1e-12)
    assert math.isnan(kernel(risk, num_steps=1).drift)


def test_a_change_of_scale_is_drift_and_no_rotation():
    """A two-layer linear network with both weights doubled: Θ is four times as large."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))).double()
    risk = paired(model, nn.MSELoss(), normal(5, 3), normal(5, 2, seed=3), [5]).risk()
    result = kernel(risk, reference=risk.space.vector() / 2, num_steps=1)
    assert result.drift == pytest.approx(3)
    assert result.rotation == pytest.approx(0, abs=1e-12)


def test_labels_that_the_kernel_separates():
    """Two orthogonal inputs, one for each class: K is the ideal kernel up to a factor."""
    x = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    model, labels = seeded(lambda: nn.Linear(2, 2, bias=False)), torch.tensor([0, 0, 1, 1])
    result = kernel(paired(model, nn.CrossEntropyLoss(), x, labels, [4]).risk(), num_steps=1)
    assert result.alignment == pytest.approx(1)
    assert result.label_quotient == pytest.approx(1)


def test_subset_is_drawn_from_the_examples_and_by_the_seed():
    risk = classifier()
    first, other = (kernel(risk, num_examples=3, num_steps=1, seed=seed) for seed in (0, 1))
    assert (first.num_examples, first.num_outputs) == (3, 9)
    assert not np.array_equal(first.eigenvalues, other.eigenvalues)
    theta = dense(risk)
    chosen = torch.randperm(7, generator=torch.Generator().manual_seed(0))[:3].sort().values.numpy()
    rows = np.concatenate([3 * chosen[:, None] + np.arange(3)]).reshape(-1)
    np.testing.assert_allclose(first.eigenvalues, np.linalg.eigvalsh(theta[np.ix_(rows, rows)])[::-1], rtol=1e-9)
    assert risk.num_examples == 7


def test_batchnorm_and_images():
    case = paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2])
    risk = case.risk()
    result = kernel(risk, num_steps=5)
    np.testing.assert_allclose(result.eigenvalues, np.linalg.eigvalsh(dense(risk))[::-1], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(result.linearised, result.predicted, rtol=1e-8)


def test_targets_that_are_no_labels_leave_the_spectrum():
    model = mlp().double()
    batches = [(normal(4, 4), torch.tensor([0, 1]).repeat(4, 1))]
    risk = EmpiricalRisk(model, lambda output, target: output.square().mean(), batches)
    result = kernel(risk, num_steps=2)
    assert np.isfinite(result.eigenvalues).all()
    assert np.isnan([result.alignment, result.label_quotient, *result.predicted, *result.network]).all()
    assert result.status is Status.complete


def test_integer_targets_of_a_single_output_are_numbers():
    """Not the one-hot labels of one class, which are 1 where the target is 0."""
    risk = EmpiricalRisk(
        seeded(lambda: nn.Linear(4, 1)).double(), None, [(normal(6, 4), classes(6, num=2))], check=False
    )
    assert SquaredError(risk).labels.tolist() == classes(6, num=2).tolist()


def test_nan_is_said():
    risk = linear(normal(4, 3), normal(4, seed=2), [4])
    risk.batches[0][0][1, 1] = math.nan
    result = kernel(risk, num_steps=2)
    assert result.status is Status.nonfinite
    assert np.isnan(result.eigenvalues).all()


def test_diverging_network_is_said():
    result = kernel(classifier(), learning_rate=1e80, num_steps=30)
    assert not result.stable
    assert result.status is Status.nonfinite


@pytest.mark.parametrize(("calls", "linearised", "network"), [(3, 3, 0), (8, 6, 3)])
def test_stop_key_keeps_the_steps_made(calls, linearised, network):
    seen = 0

    def stop(done, total, note):
        nonlocal seen
        seen += 1
        if seen == calls:
            raise StopRequested

    whole, result = kernel(classifier(), num_steps=5), kernel(classifier(), num_steps=5, progress=stop)
    assert result.status is Status.stopped
    np.testing.assert_array_equal(result.linearised[:linearised], whole.linearised[:linearised])
    assert np.isfinite(result.linearised).sum() == linearised
    assert np.isfinite(result.network).sum() == network
    assert result.alignment == whole.alignment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "num_examples: expected a number >= 1, got 0"),
        ({"num_steps": 1.5}, "num_steps: expected a number >= 1, got 1.5"),
        ({"learning_rate": -1.0}, "learning_rate: expected a finite number > 0 or None, got -1.0"),
        ({"reference": torch.ones(3)}, r"reference: expected a tensor of shape \(43,\)"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel(classifier(), **arguments)


def test_a_kernel_too_large_says_how_many_fit():
    risk = linear(normal(50, 2), normal(50, 100, seed=2), [50])
    with pytest.raises(ValueError, match=r"num_examples: expected at most 40 .* got 60"):
        kernel(risk, num_examples=60)


def test_chart_shows_the_record(tmp_path):
    result = kernel(classifier(), num_steps=12)
    start_run(tmp_path / "run").write_probe("kernel", "1", *result.to_record())
    (chart,) = charts(read(tmp_path / "run"), {"run": "#000000"})
    spectrum, training = chart.panels
    np.testing.assert_array_equal(spectrum.series[0].y, result.eigenvalues)
    curves = {series.name: series.y for series in training.series}
    np.testing.assert_array_equal(curves["run"], result.network)
    np.testing.assert_array_equal(curves["run, predicted"], result.predicted)
    matplotlib_backend.save(chart, tmp_path / "picture.png")
    assert len(plotly_backend.figure(chart).data) >= 3


def test_the_step_at_which_the_network_leaves_the_prediction_is_found():
    """By the definition: more than a tenth of the largest change predicted up to there."""
    result = kernel(classifier(), learning_rate=2.0, num_steps=40)
    change = np.maximum.accumulate(np.abs(result.predicted - result.predicted[0]))
    apart = np.abs(result.network - result.predicted) > 0.1 * change + 1e-10
    assert apart.any()
    assert result.departs_at == int(apart.argmax()) > 0
