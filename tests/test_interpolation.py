"""interpolate: known barriers, exact ends whatever form the solutions come in, refusals."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from cases import Unused, classes, conv_batchnorm, mlp, normal, paired, seeded
from losslab.operators.batch_statistics import batch_statistics
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.interpolation import interpolate
from losslab.report import charts as figures
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from losslab.studies.record import RunFolder
from untouched import assert_untouched


class Wells(nn.Module):
    """(w² − 1)² + t·w: wells near ±1, the barrier between them 1 at w = 0 for t = 0."""

    def __init__(self, w: float = 0.3):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x):
        return (self.w**2 - 1) ** 2 + x * self.w


def wells(tilt: float = 0.0) -> EmpiricalRisk:
    batch = (torch.full((2, 1), tilt, dtype=torch.float64), torch.zeros(2))
    return EmpiricalRisk(Wells(), lambda output, target: output.mean(), [batch])


MINUS, PLUS = torch.tensor([-1.0]), torch.tensor([1.0])


def test_two_wells():
    result = interpolate(wells(), MINUS, PLUS)
    w = 2 * result.alphas - 1
    np.testing.assert_allclose(result.losses, (w**2 - 1) ** 2, atol=1e-14)
    assert (result.barrier, result.loss_a, result.loss_b, result.distance) == (1.0, 0.0, 0.0, 2.0)
    assert (result.alphas[0], result.alphas[-1], len(result.alphas)) == (-0.5, 1.5, 41)
    assert result.best_alpha in (0.0, 1.0)
    assert (result.num_examples, result.status) == (2, Status.complete)


@pytest.mark.parametrize("tilt", [0.3, -0.3])
def test_barrier_is_above_the_worse_end(tilt):
    result = interpolate(wells(tilt), MINUS, PLUS, alphas=np.linspace(0, 1, 501))
    inside = np.linspace(-1, 1, 200_001)
    height = ((inside**2 - 1) ** 2 + tilt * inside).max()
    assert result.barrier == pytest.approx(height - abs(tilt), abs=1e-4)
    assert {result.loss_a, result.loss_b} == {tilt, -tilt}
    assert result.best_alpha == pytest.approx(float(result.alphas[result.losses.argmin()]))


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_barrier_over_the_line_of_the_ends(tilt):
    """(w² − 1)² + t·w over −t·(1 − 2α): the tilt drops out, and the height is 1 at w = 0."""
    result = interpolate(wells(tilt), MINUS, PLUS)
    assert result.barrier_over_line == pytest.approx(1.0, abs=1e-12)
    assert result.barrier == pytest.approx(result.losses[10:31].max() - tilt)
    assert result.connectivity == pytest.approx(1 / (1 + result.barrier))
    assert result.best_loss == result.losses.min()


def test_steps_are_points_from_minus_a_half_to_one_and_a_half():
    assert interpolate(wells(), MINUS, PLUS, steps=9).alphas.tolist() == np.linspace(-0.5, 1.5, 9).tolist()
    assert interpolate(wells(), MINUS, PLUS, steps=2).alphas.tolist() == [-0.5, 0.0, 1.0, 1.5]
    for steps in (1, 9.0):
        with pytest.raises(ValueError, match=f"steps: expected a number >= 2, got {steps}"):
            interpolate(wells(), MINUS, PLUS, steps=steps)


def test_accuracy_is_that_of_each_network():
    case, a, b = batchnorm_pair()
    result = interpolate(case.risk(), a, b, alphas=[0.5])
    for alpha, model in ((0.0, a), (1.0, b)):
        right = sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in case.batches)
        assert result.accuracies[result.alphas == alpha][0] == right / 6
    assert np.isnan(interpolate(wells(), MINUS, PLUS).accuracies).all()


def test_extrapolation_does_not_count_as_a_barrier():
    """From −1 to −0.9 the loss rises outside only (and at the end itself)."""
    result = interpolate(wells(), MINUS, torch.tensor([-0.9]), alphas=[-3.0, 5.0])
    assert result.barrier == 0.0
    assert result.losses.max() > 0.2
    assert result.alphas.tolist() == [-3.0, 0.0, 1.0, 5.0]


@pytest.mark.parametrize("alphas", [[0.3], [-2.0, 2.0], [1.0, 0.0, 1.0], [0.999_995], np.linspace(-0.5, 1.5, 41)])
def test_ends_are_always_there_and_given_points_stay(alphas):
    result = interpolate(wells(), MINUS, PLUS, alphas=alphas)
    assert {0.0, 1.0} <= set(result.alphas)
    assert (np.diff(result.alphas) > 1e-9).all()
    for alpha in np.asarray(alphas):
        assert np.abs(result.alphas - alpha).min() < 1e-12
    assert result.barrier >= 0


def batchnorm_pair():
    """Two trained-apart networks whose running statistics differ, and the data."""
    case = paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2])
    a, b = case.model, copy.deepcopy(case.model)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.3 * normal(*p.shape, seed=p.numel()))
        b[1].running_mean += 0.7
        b[1].running_var *= 3
    other = copy.deepcopy(case.model)
    other[1].running_mean += 50  # the risk's own model is neither
    case.model = other
    return case, a, b


def plain_loss(case, model) -> float:
    with torch.no_grad():
        parts = [nn.functional.cross_entropy(model.eval()(x), y, reduction="sum") for x, y in case.batches]
    return float(sum(parts)) / 6


@pytest.mark.parametrize("form", ["module", "state dict", "mixed"])
def test_ends_are_each_models_own_loss_with_batchnorm(form):
    case, a, b = batchnorm_pair()
    expected = plain_loss(case, a), plain_loss(case, b)
    first = a if form != "state dict" else a.state_dict()
    second = b if form == "module" else b.state_dict()
    with assert_untouched(case.model):
        risk = case.risk()
        before = risk.space.vector()
        result = interpolate(risk, first, second)
        assert torch.equal(risk.space.vector(), before)
    assert (result.loss_a, result.loss_b) == pytest.approx(expected, rel=1e-13)
    assert abs(expected[0] - expected[1]) > 1e-2
    # The middle has the mean statistics.
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for (_, m), (_, n) in zip(middle.state_dict().items(), b.state_dict().items(), strict=True):
            if m.is_floating_point():
                m.copy_((m + n) / 2)
    assert result.losses[result.alphas == 0.5][0] == pytest.approx(plain_loss(case, middle), rel=1e-12)


def test_recalibrated_batchnorm_does_not_see_the_stored_statistics():
    """Statistics of all points are those of the data at that point, the ends' too."""
    case, a, b = batchnorm_pair()
    risk = case.risk()
    with assert_untouched(case.model):
        result = interpolate(risk, a, b, alphas=[-0.5, 0.5], recalibrate=True)
    start, end = (risk.space.vector_of(model) for model in (a, b))
    for alpha, loss in zip(result.alphas, result.losses, strict=True):
        point = (1 - alpha) * start + alpha * end
        assert loss == pytest.approx(risk.loss_at(point, batch_statistics(risk, point)), rel=1e-12)
    bare = interpolate(risk, start, end, alphas=[-0.5, 0.5], recalibrate=True)
    np.testing.assert_array_equal(bare.losses, result.losses)
    plain = interpolate(risk, a, b, alphas=[-0.5, 0.5])
    assert (np.abs(plain.losses - result.losses) > 1e-3).all()
    assert (plain.recalibrated, result.recalibrated) == (False, True)


class Shifted(nn.Module):
    """A buffer of one's own before BatchNorm: its statistics depend on it."""

    def __init__(self, shift: float):
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))
        self.scale, self.norm, self.head = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.norm(torch.exp(self.scale(x) + self.shift)))


def test_other_buffers_are_interpolated_before_batchnorm_is_recalibrated():
    a, b = (seeded(lambda shift=shift: Shifted(shift)).double() for shift in (0.0, 2.0))
    case = paired(seeded(lambda: Shifted(9.0)), nn.CrossEntropyLoss(), normal(8, 4), classes(8), [8])
    result = interpolate(case.risk(), a, b, alphas=[0.5], recalibrate=True)
    middle = seeded(lambda: Shifted(1.0)).double().train()
    x, y = case.batches[0]
    with torch.no_grad():
        middle.norm.momentum = 1.0
        middle(x)  # leaves the batch's statistics behind
        expected = float(nn.functional.cross_entropy(middle.eval()(x), y))
    assert result.losses[1] == pytest.approx(expected, rel=1e-12)


def test_stopped_shows_what_is_known():
    def stop(done, total, note):
        assert total == 41
        if done == 12:
            raise StopRequested

    whole = interpolate(wells(0.3), MINUS, PLUS)
    result = interpolate(wells(0.3), MINUS, PLUS, progress=stop)
    assert (result.status, len(result.alphas)) == (Status.stopped, 12)
    assert (np.diff(result.alphas) > 0).all()
    np.testing.assert_array_equal(result.losses, whole.losses[np.isin(whole.alphas, result.alphas)])
    assert result.loss_b == whole.loss_b


def test_stopped_at_once_still_has_both_ends_and_a_coarse_line():
    def stop(done, total, note):
        raise StopRequested

    result = interpolate(wells(), MINUS, PLUS, progress=stop)
    assert result.status is Status.stopped
    assert len(result.alphas) == 9
    assert {0.0, 1.0} < set(result.alphas)
    assert result.barrier > 0.5


def test_vectors_keep_the_models_own_buffers():
    case, a, b = batchnorm_pair()
    risk = case.risk()
    vectors = [risk.space.vector_of(model) for model in (a, b)]
    result = interpolate(risk, *vectors)
    assert (result.loss_a, result.loss_b) == tuple(risk.loss_at(v) for v in vectors)


def test_module_state_dict_and_vector_agree():
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4])
    risk = case.risk()
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        other[0].weight += 1
    vector = risk.space.vector_of(other)
    results = [interpolate(risk, case.model, b).losses for b in (other, other.state_dict(), vector, vector.float())]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_allclose(results[0], results[3], rtol=1e-6)
    assert np.ptp(results[0]) > 1e-2


def test_solution_that_requires_gradients():
    a = MINUS.clone().requires_grad_()
    assert interpolate(wells(), a, PLUS).barrier == 1.0
    assert a.grad is None


def test_to_itself():
    result = interpolate(wells(), PLUS, PLUS)
    assert (result.barrier, result.distance) == (0.0, 0.0)


def test_nonfinite_inside():
    class Root(Wells):
        def forward(self, x):
            return torch.sqrt(self.w**2 - 0.25) + x

    risk = wells()
    risk = EmpiricalRisk(Root(1.0), lambda output, target: output.mean(), risk.batches)
    result = interpolate(risk, MINUS, PLUS)
    assert result.status is Status.nonfinite
    assert math.isnan(result.barrier)
    assert result.best_alpha in result.alphas[np.isfinite(result.losses)]


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        (torch.ones(42), r"b: expected a tensor of shape \(43,\).* got \(42,\)"),
        (seeded(Unused).double(), "b: expected '0.weight' of shape"),
        (mlp(outputs=4).double(), r"b: expected '2.weight' of shape \(3, 5\), got \(4, 5\); use the same architecture"),
        ({"0.weight": torch.ones(5, 4)}, "b: expected '0.bias' of shape .* got nothing of that name"),
    ],
    ids=["vector", "module", "wider", "incomplete"],
)
def test_other_architectures_are_refused(solution, message):
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()
    with pytest.raises(ValueError, match=message):
        interpolate(risk, risk.model, solution)
    with pytest.raises(ValueError, match=message.replace("b:", "a:", 1)):
        interpolate(risk, solution, risk.model)


@pytest.mark.parametrize("alphas", [[], [math.nan], [0.0, math.inf], [[0.0, 1.0]]], ids=str)
def test_alphas_that_are_no_list_of_numbers(alphas):
    with pytest.raises(ValueError, match="alphas: expected a list of finite numbers"):
        interpolate(wells(), MINUS, PLUS, alphas=alphas)


def test_figure_has_an_accuracy_panel_where_it_is_known(tmp_path):
    case, a, b = batchnorm_pair()
    result = interpolate(case.risk(), a, b, steps=5)
    for name in ("left", "right"):
        RunFolder.create(tmp_path / name).write_config({})
    RunFolder(tmp_path).write_probe("interpolation", "left--right", *result.to_record())
    (chart,) = figures.charts(read(tmp_path))
    loss, accuracy = chart.panels
    np.testing.assert_array_equal(loss.series[0].y, result.losses)
    np.testing.assert_array_equal(accuracy.series[0].x, result.alphas)
    np.testing.assert_array_equal(accuracy.series[0].y, 100 * result.accuracies)
    matplotlib_backend.save(chart, tmp_path / "picture.png")
    plotly_backend.figure(chart)
