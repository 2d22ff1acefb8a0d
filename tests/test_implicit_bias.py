"""implicit_bias: closed forms on quadratics, and SGD's mean path follows the modified loss, not the plain one."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from cases import classes, conv_batchnorm, gen, mlp, normal, paired, seeded
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.implicit_bias import implicit_bias
from losslab.probes.trajectories.snapshots import Snapshots
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.charts.implicit_bias import implicit_bias as charts
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from report_folders import start_run
from untouched import assert_untouched

ETA = 0.05


class Bowls(nn.Module):
    """Batch b is the quadratic ½(θ − c_b)ᵀA_b(θ − c_b); an example only says which."""

    def __init__(self, num: int = 3, size: int = 4):
        super().__init__()
        roots = torch.randn(num, size, size, generator=gen(2), dtype=torch.float64)
        self.register_buffer("curvatures", roots @ roots.mT / size)
        self.register_buffer("centres", torch.randn(num, size, generator=gen(3), dtype=torch.float64))
        self.theta = nn.Parameter(normal(size, seed=5))

    def forward(self, x):
        d = self.theta - self.centres[x]
        return 0.5 * torch.einsum("ni,nij,nj->n", d, self.curvatures[x], d)


def bowls(sizes: tuple[int, ...] = (2, 2, 2), reduction: str = "mean") -> EmpiricalRisk:
    batches = [(torch.full((n,), b), torch.zeros(n)) for b, n in enumerate(sizes)]

    def loss(output, target):
        return output.mean() if reduction == "mean" else output.sum()

    loss.reduction = reduction
    return EmpiricalRisk(Bowls(len(sizes)), loss, batches)


def closed_form(model: Bowls, theta: np.ndarray) -> dict[str, np.ndarray]:
    a, c = model.curvatures.numpy(), model.centres.numpy()
    d = theta - c
    gradients = np.einsum("bij,bj->bi", a, d)
    return {
        "losses": 0.5 * np.einsum("bi,bi->b", d, gradients),
        "gradients": gradients,
        "penalty": np.einsum("bij,bj->bi", a, gradients).mean(0),
        "hessian": a.mean(0),
    }


@pytest.mark.parametrize("sizes", [(2, 2, 2), (5, 1, 3)], ids=["equal", "ragged"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_closed_form_on_quadratics(sizes, reduction):
    risk = bowls(sizes, reduction)
    result = implicit_bias(risk, learning_rate=ETA)
    known = closed_form(risk.model, risk.model.theta.detach().numpy())
    g = known["gradients"]
    mean, hg = g.mean(0), known["hessian"] @ g.mean(0)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(g, 2)]
    expected = {
        "losses": known["losses"].mean(),
        "modified": known["losses"].mean() + ETA / 4 * (g**2).sum(1).mean(),
        "gd_penalties": ETA / 4 * mean @ mean,
        "noise_penalties": ETA / 4 * ((g - mean) ** 2).sum(1).mean(),
        "gradient_steps": ETA * np.linalg.norm(mean),
        "sgd_corrections": ETA**2 / 2 * np.linalg.norm(known["penalty"]),
        "gd_corrections": ETA**2 / 2 * np.linalg.norm(hg),
        "quoted_corrections": ETA**2 * np.linalg.norm(hg),
        "batch_cosines": np.mean(cosines),
        "penalty_cosines": mean @ known["penalty"] / np.linalg.norm(mean) / np.linalg.norm(known["penalty"]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(result, name), [value], rtol=1e-10, err_msg=name)
    assert (result.num_batches, result.num_examples, result.status) == (3, sum(sizes), Status.complete)
    assert f"modified loss         {result.modified[0]:.4g}" in str(result)


def mean_epoch(losses, theta: torch.Tensor, eta: float) -> np.ndarray:
    """SGD's end after one epoch, averaged over every order of the batches."""
    ends = []
    for order in itertools.permutations(losses):
        point = theta.clone()
        for loss in order:
            point = point - eta * grad(loss)(point)
        ends.append(point)
    return torch.stack(ends).mean(0).numpy()


def flow(field, theta: torch.Tensor, time: float, num_steps: int = 6) -> np.ndarray:
    """Gradient flow for so long, by Runge and Kutta's method of fourth order."""
    h, y = time / num_steps, theta
    for _ in range(num_steps):
        a = field(y)
        b = field(y - h / 2 * a)
        c = field(y - h / 2 * b)
        y = y - h / 6 * (a + 2 * b + 2 * c + field(y - h * c))
    return y.numpy()


@pytest.mark.parametrize("kind", ["quadratics", "network"])
def test_sgds_mean_path_follows_the_modified_loss(kind):
    """One epoch, all orders enumerated: off the modified flow by η³, off the plain flow by η² (Smith et al. 2021)."""
    if kind == "quadratics":
        risk = bowls()
    else:
        risk = paired(mlp(), nn.CrossEntropyLoss(), normal(6, 4), classes(6), [2, 2, 2]).risk()
    theta = risk.space.vector()

    def batch_loss(batch):
        x, y = batch
        return lambda v: risk.loss_fn(functional_call(risk.model, risk.space.named_views(v), (x,)), y)

    losses = [batch_loss(batch) for batch in risk.batches]
    gradient = lambda v: sum(grad(loss)(v) for loss in losses) / 3  # noqa: E731

    correction = grad(lambda v: sum(grad(loss)(v).square().sum() for loss in losses) / 12)  # of (1/4) E‖g_B‖²

    errors = {}
    for eta in (0.02, 0.04):
        end = mean_epoch(losses, theta, eta)
        plain = np.linalg.norm(end - flow(gradient, theta, 3 * eta))
        modified = np.linalg.norm(end - flow(lambda v, eta=eta: gradient(v) + eta * correction(v), theta, 3 * eta))
        errors[eta] = plain, modified
        assert modified < 0.2 * plain
    assert errors[0.04][0] / errors[0.02][0] == pytest.approx(4, rel=0.2)
    assert errors[0.04][1] / errors[0.02][1] == pytest.approx(8, rel=0.25)
    # And the probe's correction is that field's.
    found = implicit_bias(risk, learning_rate=ETA).sgd_corrections[0]
    assert found == pytest.approx(ETA**2 * float(correction(theta).norm()), rel=1e-9)


def test_one_batch_is_gradient_descent():
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [7]).risk()
    result = implicit_bias(risk, learning_rate=ETA)
    g = risk.gradient()
    assert result.gd_penalties[0] == pytest.approx(ETA / 4 * float(g @ g), rel=1e-12)
    assert result.noise_penalties[0] == pytest.approx(0, abs=1e-15)
    assert result.sgd_corrections[0] == pytest.approx(result.gd_corrections[0], rel=1e-12)
    assert result.quoted_corrections[0] == pytest.approx(2 * result.gd_corrections[0], rel=1e-12)
    assert np.isnan(result.batch_cosines).all()


def test_splitting_the_noise_does_not_depend_on_the_graphs_kept():
    case = paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [2, 2, 2])
    kept, streamed = (implicit_bias(case.risk(graph_memory=m), learning_rate=ETA) for m in (2**30, 0))
    np.testing.assert_allclose(kept.modified, streamed.modified, rtol=1e-13)
    np.testing.assert_allclose(kept.gd_corrections, streamed.gd_corrections, rtol=1e-12)


def test_points_in_any_form_give_each_points_own_values():
    case = paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2])
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.2 * normal(*p.shape, seed=p.numel()))
        other[1].running_mean += 0.5
    risk = case.risk()
    snapshots = Snapshots()
    snapshots.take(0, case.model)
    snapshots.take(7, other)
    own = [implicit_bias(EmpiricalRisk(m, risk.loss_fn, risk.batches), learning_rate=ETA) for m in (case.model, other)]
    with assert_untouched(case.model):
        forms = [
            implicit_bias(risk, learning_rate=ETA, points=points)
            for points in ([case.model, other], [case.model.state_dict(), other.state_dict()], snapshots)
        ]
    for result in forms:
        for name in ("losses", "modified", "sgd_corrections", "batch_cosines", "penalty_cosines"):
            expected = [getattr(o, name)[0] for o in own]
            np.testing.assert_allclose(getattr(result, name), expected, rtol=1e-12, err_msg=name)
    assert own[0].losses[0] != own[1].losses[0]
    # A bare vector keeps the risk's own buffers.
    vector = implicit_bias(risk, learning_rate=ETA, points=[risk.space.vector_of(other)])
    assert abs(vector.losses[0] - own[1].losses[0]) > 1e-6


def test_nan_is_kept_and_said():
    risk = bowls()
    points = [risk.space.vector(), torch.full((4,), math.nan), risk.space.vector()]
    result = implicit_bias(risk, learning_rate=ETA, points=points)
    assert result.status is Status.nonfinite
    assert np.isnan(result.modified).tolist() == [False, True, False]


def test_stop_key_keeps_whole_points():
    risk = bowls()
    seen = 0

    def stop(done, total, note):
        nonlocal seen
        seen += 1
        if seen == 8:
            raise StopRequested

    point = risk.space.vector()
    result = implicit_bias(risk, learning_rate=ETA, points=[point, point + 1, point], progress=stop)
    assert (result.status, len(result.modified)) == (Status.stopped, 1)
    seen = 7
    with pytest.raises(StopRequested):
        implicit_bias(risk, learning_rate=ETA, progress=stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "learning_rate: expected a finite number > 0, got 0"),
        ({"learning_rate": math.inf}, "learning_rate: expected a finite number > 0, got inf"),
        ({"learning_rate": 0.1, "points": []}, "points: expected at least one solution"),
        ({"learning_rate": 0.1, "points": [torch.ones(5)]}, r"points\[0\]: expected a tensor of shape \(4,\)"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        implicit_bias(bowls(), **arguments)


@pytest.mark.parametrize("num", [1, 3])
def test_chart_shows_the_record(tmp_path, num):
    risk = bowls()
    points = [risk.space.vector() * s for s in np.linspace(1, 0.2, num)]
    result = implicit_bias(risk, learning_rate=ETA, points=points)
    start_run(tmp_path / "run").write_probe("implicit_bias", "1", *result.to_record())
    (chart,) = charts(read(tmp_path / "run"), {"run": "#000000"})
    drawn = np.concatenate([series.y for series in chart.panels[0].series])
    for name in ("losses", "gd_penalties", "noise_penalties"):
        assert set(getattr(result, name)) <= set(drawn)
    matplotlib_backend.save(chart, tmp_path / "picture.png")
    assert len(plotly_backend.figure(chart).data) >= 2
