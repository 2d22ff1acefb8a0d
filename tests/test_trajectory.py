"""trajectory: stability bounds of real optimizers, closed forms, snapshots that survive, the walk behind every PCA."""

import copy
import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import report_folders as folders
from cases import Tied, classes, conv_batchnorm, mlp, normal, paired, seeded
from losslab.operators.dense import DenseOperator
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.update_rule import UpdateRule, update_rule
from losslab.params import ParameterSpace
from losslab.probes.trajectories import waypoint as module
from losslab.probes.trajectories.path_pca import path_of, random_walk_variances
from losslab.probes.trajectories.snapshots import Snapshot, Snapshots
from losslab.probes.trajectories.waypoint import TrajectoryOptions
from losslab.probes.trajectory import trajectory
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.charts.trajectory import trajectory as figure
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from losslab.studies.config import make_config
from losslab.studies.probing import find_probe, measure
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.train import train
from untouched import assert_untouched

EXACT = TrajectoryOptions(tol=1e-10, sharpness_samples=0)


class Power(nn.Module):
    """L(θ) = Σ cᵢ θᵢᵖ."""

    def __init__(self, start, power=2):
        super().__init__()
        self.weight, self.power = nn.Parameter(torch.tensor(start, dtype=torch.float64)), power

    def forward(self, x):
        return x @ self.weight**self.power


def power_risk(model, coefficients):
    batch = (torch.tensor([coefficients], dtype=torch.float64), torch.zeros(1))
    return EmpiricalRisk(model, lambda output, target: output.mean(), [batch])


def same(first, second):
    (values, arrays), (others, more) = first.to_record(), second.to_record()
    assert repr(values) == repr(others)
    assert arrays.keys() == more.keys()
    return all(arrays[name].tobytes() == more[name].tobytes() for name in arrays)


# -- the optimizers' bounds -----------------------------------------------------------------------------------------

FROZEN = 1 - 1e-13  # a second moment that does not change while the test looks

OPTIMIZERS = {
    "gradient descent": lambda p: torch.optim.SGD(p, lr=0.1),
    "weight decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=3.0),
    "heavy ball": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.6, dampening=0.6),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, FROZEN)),
    "Adam, decay": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, FROZEN), weight_decay=2.0),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, FROZEN), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, FROZEN), weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=FROZEN),
    "RMSprop, momentum": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=FROZEN, momentum=0.7, centered=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("ratio", [0.97, 1.03])
def test_optimizers_shrink_below_their_bound_and_grow_above_it(make, ratio):
    """Run on L = ½ Σ hᵢθᵢ² with h such that P^(−1/2)(H + W)P^(−1/2) has a largest eigenvalue of ratio × bound."""
    model = nn.ParameterList([torch.zeros(3, dtype=torch.float64)])
    (theta,) = model
    optimizer = make(model.parameters())
    theta.grad = torch.zeros_like(theta)
    optimizer.step()  # makes the state
    state = optimizer.state[theta]
    for name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg"):
        if name in state:
            state[name] = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    if "exp_avg_sq" in state:
        state["step"] = torch.tensor(1e13)  # bias corrections that do not change either
    rule = update_rule(model, optimizer)
    weights = rule.preconditioner["0"].double().expand(3)
    h = torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64) * ratio * rule.bound * weights - rule.decay["0"]
    matrix = rule.matrix(DenseOperator(torch.diag(h)), ParameterSpace(model)).to_dense()
    assert float(torch.linalg.eigvalsh(matrix)[-1]) == pytest.approx(ratio * rule.bound, rel=1e-12)
    with torch.no_grad():
        theta.fill_(1e-3)
    for _ in range(400):
        theta.grad = h * theta.detach()
        optimizer.step()
        if theta.detach().norm() > 1:  # before it changes the frozen moment
            break
    grown = float(theta.detach().norm() / 1e-3)
    assert grown < 0.1 if ratio < 1 else grown > 10


def test_bounds_of_the_papers():
    parameters = [nn.Parameter(torch.ones(1))]

    def bound(optimizer):
        return update_rule(nn.ParameterList(parameters), optimizer).bound

    assert bound(torch.optim.SGD(parameters, lr=0.5)) == 4.0
    assert bound(torch.optim.SGD(parameters, lr=0.5, momentum=0.9)) == pytest.approx(7.6)
    assert bound(torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True)) == pytest.approx(3.8 / 1.4)
    assert bound(torch.optim.Adam(parameters, lr=0.5)) == pytest.approx(38 / 0.5)
    assert bound(torch.optim.RMSprop(parameters, lr=0.5)) == 4.0


@pytest.mark.parametrize("name", ["Adam", "Adam, amsgrad", "RMSprop"])
def test_preconditioner_is_what_the_optimizer_divided_by(name):
    """θ_{t+1} − θ_t = −η P⁻¹m exactly, in the first steps, where the bias corrections matter."""
    model = nn.Linear(3, 2).double()
    kind = torch.optim.RMSprop if name == "RMSprop" else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=0.01, **({"amsgrad": True} if "amsgrad" in name else {}))
    for step in range(3):
        model.weight.grad = normal(2, 3, seed=step) * 0.5**step
        model.bias.grad = None  # never moved
        before = model.weight.detach().clone()
        optimizer.step()
        rule = update_rule(model, optimizer)
        moved = optimizer.state[model.weight].get("exp_avg", model.weight.grad)
        expected = -0.01 * moved / rule.preconditioner["weight"]
        torch.testing.assert_close(model.weight.detach() - before, expected, rtol=1e-12, atol=1e-15)
    assert rule.preconditioner["bias"].item() == math.inf
    space = ParameterSpace(model)
    ones = rule.matrix(DenseOperator(torch.ones(8, 8, dtype=torch.float64)), space).to_dense()
    assert (ones[6:] == 0).all()
    assert (ones[:6, :6] > 0).all()


def test_groups_with_other_rates_and_decays():
    """Two groups are one rule: the step of the second is η₂/η₁ as long."""
    model = nn.ParameterList([torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    groups = [{"params": [model[0]], "lr": 0.1, "weight_decay": 1.0}, {"params": [model[1]], "lr": 0.3}]
    rule = update_rule(model, torch.optim.SGD(groups))
    h = torch.tensor([4.0, 2.0, 5.0], dtype=torch.float64)
    matrix = rule.matrix(DenseOperator(torch.diag(h)), ParameterSpace(model)).to_dense()
    torch.testing.assert_close(matrix, torch.diag(torch.tensor([5.0, 3.0, 15.0], dtype=torch.float64)))
    assert (rule.learning_rate, rule.bound) == (0.1, 20.0)
    groups[1]["momentum"] = 0.9
    assert math.isnan(update_rule(model, torch.optim.SGD(groups, momentum=0.0)).bound)


def test_what_is_not_known_stays_unknown():
    model = nn.Linear(2, 1).double()
    assert update_rule(model, torch.optim.Adam(model.parameters())).preconditioner == {}  # before its first step
    rule = update_rule(model, torch.optim.Adagrad(model.parameters(), lr=0.2))
    assert (rule.learning_rate, rule.preconditioner) == (0.2, {})
    assert math.isnan(rule.bound)


def test_bias_before_batchnorm_is_no_edge():
    """No gradient in training, so P = ε, but curvature with fixed statistics: see docs/trajectory.md."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))).double()
    x, y = normal(30, 4), classes(30)
    optimizer, snapshots = torch.optim.Adam(model.parameters(), lr=0.01), Snapshots()
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    snapshots.take(5, model, optimizer)

    def preconditioned(**options) -> float:
        return float(
            trajectory(EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, y)], **options), snapshots).preconditioned[0]
        )

    assert preconditioned() > 1e5 * preconditioned(mode="train")
    assert preconditioned(params=["0.weight", "1.*", "3.*"]) < 10 * preconditioned(mode="train")


# -- trajectories ---------------------------------------------------------------------------------------------------


def descend(coefficients, lr, steps=6):
    model, snapshots = Power([1.0] * len(coefficients)), Snapshots()
    risk = power_risk(model, [c / 2 for c in coefficients])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        snapshots.take(step, model, optimizer)
        model.weight.grad = risk.gradient()
        optimizer.step()
    return risk, snapshots


@pytest.mark.parametrize(("lr", "beyond"), [(0.19, False), (0.21, True)])
def test_gradient_descent_beyond_the_edge_diverges_and_is_told_so(lr, beyond):
    risk, snapshots = descend([10.0, 1.0], lr)
    result = trajectory(risk, snapshots, options=EXACT)
    np.testing.assert_allclose(result.lambda_max, 10, rtol=1e-12)
    np.testing.assert_allclose(result.bounds, 2 / lr)
    assert (result.beyond_edge == beyond).all()
    assert ("(beyond the edge)" in str(result)) == beyond
    assert (result.losses_train[-1] > result.losses_train[0]) == beyond
    # To and fro along the sharp direction: θ₁ alternates.
    assert (result.path.cosines < -0.9).all()
    assert np.isnan(result.sharpness).all()


def test_adam_on_a_quadratic_has_the_dense_matrixs_eigenvalue():
    model, snapshots = Power([1.0, -2.0, 0.5]), Snapshots()
    risk = power_risk(model, [1.0, 3.0, 5.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(4):
        snapshots.take(step, model, optimizer)
        model.weight.grad = risk.gradient()
        optimizer.step()
    result = trajectory(risk, snapshots, options=EXACT)
    assert math.isnan(result.preconditioned[0])  # P is not known before the first step
    for index in (1, 2, 3):
        weights = snapshots[index].rule.preconditioner["weight"].numpy()
        expected = ((np.array([2.0, 6.0, 10.0]) + 0.5) / weights).max()
        assert result.preconditioned[index] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(result.bounds, 380)


def test_eigenvalue_that_overtakes_is_found():
    """H = diag(12x², 12y²): a search from the last eigenvector would stay at x."""
    model, snapshots = Power([1.0, 0.5], 4), Snapshots()
    for step, y in enumerate((0.5, 0.9, 1.2, 2.0)):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([1.0, y]))
        snapshots.take(step, model)
    result = trajectory(power_risk(model, [1.0, 1.0]), snapshots)
    np.testing.assert_allclose(result.lambda_max, [12, 12, 12 * 1.44, 48], rtol=1e-6)
    assert np.isnan(result.bounds).all()  # no optimizer was given
    assert "not known" in str(result)


def trained(build=mlp, inputs=(7, 4), steps=5, make=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)):
    """A network, its risk and test risk, and snapshots of a few steps of its training."""
    case = paired(seeded(build), nn.CrossEntropyLoss(), normal(*inputs), classes(inputs[0]), [3, inputs[0] - 3])
    test = EmpiricalRisk(case.model, case.loss_fn, [(normal(*inputs, seed=8), classes(inputs[0], seed=9))])
    model, snapshots = copy.deepcopy(case.model), Snapshots()
    optimizer = make(model.parameters())
    for step in range(steps):
        snapshots.take(10 * step, model, optimizer)
        optimizer.zero_grad()
        sum(case.loss_fn(model.train()(x), y) for x, y in case.batches).backward()
        optimizer.step()
    return case, case.risk(), test, snapshots


@pytest.mark.parametrize(("build", "inputs"), [(mlp, (7, 4)), (conv_batchnorm, (6, 1, 4, 4))])
def test_numbers_are_those_of_the_network_at_each_snapshot(build, inputs):
    case, risk, test, snapshots = trained(build, inputs)
    with assert_untouched(case.model):
        result = trajectory(risk, snapshots, test=test, options=TrajectoryOptions(tol=1e-8))
    for index, snapshot in enumerate(snapshots):
        model = copy.deepcopy(case.model)
        snapshot.put_into(model)
        here = EmpiricalRisk(model, case.loss_fn, case.batches)
        there = EmpiricalRisk(model, case.loss_fn, test.batches)
        hessian = torch.autograd.functional.hessian(
            lambda v, m=model, r=here: sum(
                F.cross_entropy(torch.func.functional_call(m, r.space.named_views(v), (x,)), y, reduction="sum")
                for x, y in case.batches
            ) / r.num_examples,
            here.space.vector(),
        )  # fmt: skip
        expected = [here.loss(), there.loss(), float(here.gradient().norm()), float(torch.linalg.eigvalsh(hessian)[-1])]
        arrays = (result.losses_train, result.losses_test, result.grad_norms, result.lambda_max)
        np.testing.assert_allclose([array[index] for array in arrays], expected, rtol=1e-7)
    assert result.steps.tolist() == [0, 10, 20, 30, 40]
    assert len(set(result.losses_test)) == 5
    assert result.status.ok


def test_restricted_risk_sees_all_weights_move():
    case, _, _, snapshots = trained()
    part, whole = case.risk(params="2.*"), case.risk()
    results = [trajectory(risk, snapshots) for risk in (part, whole)]
    np.testing.assert_array_equal(results[0].losses_train, results[1].losses_train)
    assert (results[0].grad_norms < results[1].grad_norms).all()
    assert (results[0].lambda_max <= results[1].lambda_max * 1.02).all()
    assert results[0].path.distances[-1] < results[1].path.distances[-1]


def test_diverged_snapshots_stay_nan():
    _, risk, test, snapshots = trained()
    kept = list(snapshots)
    for value, index in ((math.inf, 3), (math.nan, 4)):
        kept[index] = dataclasses.replace(
            kept[index], weights={name: torch.full_like(w, value) for name, w in kept[index].weights.items()}
        )
    result = trajectory(risk, kept, test=test)
    assert result.status is Status.nonfinite
    for array in (result.losses_train, result.lambda_max, result.grad_norms, result.path.distances):
        assert np.isfinite(array[:3]).all()
        assert not np.isfinite(array[3:]).any()
    assert np.isnan(result.path.explained).all()
    assert same(result, type(result).from_record(*result.to_record()))
    assert "nonfinite" in str(result)


def test_a_hessian_of_rounding_alone_costs_one_number_not_the_trajectory(monkeypatch):
    """Where a softmax is saturated float32's products are not symmetric, and the solver refuses them."""
    _, risk, _, snapshots = trained()
    real, calls = module.eigenpairs, []

    def refusing(matrix, **options):
        calls.append(matrix)
        if len(calls) == 2:
            raise ValueError("operator: expected a symmetric one")
        return real(matrix, **options)

    monkeypatch.setattr(module, "eigenpairs", refusing)
    result = trajectory(risk, snapshots)
    assert result.status is Status.stagnated
    assert np.isfinite(result.lambda_max).tolist() == [True, False, True, True, True]
    assert math.isinf(result.lambda_max_errors[1])
    assert np.isfinite(result.losses_train).all()


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    _, risk, test, snapshots = trained()
    whole, path, measured = trajectory(risk, snapshots, test=test), tmp_path / "done.npz", []
    real = module.waypoint
    monkeypatch.setattr(module, "waypoint", lambda *args: measured.append(args[2].step) or real(*args))

    def interrupt(done, total, note):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trajectory(risk, snapshots, test=test, resume=path, progress=interrupt)
    assert same(trajectory(risk, snapshots, test=test, resume=path), whole)
    assert measured == [0, 10, 20, 30, 40]
    assert not path.exists()


def test_a_stop_leaves_what_is_measured_and_later_snapshots_join_it(tmp_path, monkeypatch):
    _, risk, _, snapshots = trained()

    def stop(done, total, note):
        if done == 3:
            raise StopRequested

    path, measured = tmp_path / "done.npz", []
    part = trajectory(risk, snapshots, resume=path, progress=stop)
    assert part.status is Status.stopped
    assert part.steps.tolist() == [0, 10, 20]
    assert part.path.distances.shape == (3,)
    real = module.waypoint
    monkeypatch.setattr(module, "waypoint", lambda *args: measured.append(args[2].step) or real(*args))
    moved = [*list(snapshots)[:2], dataclasses.replace(snapshots[2], weights=snapshots[3].weights), snapshots[4]]
    result = trajectory(risk, moved, resume=path)
    assert measured == [20, 40]  # that step's weights are others now
    assert same(result, trajectory(risk, moved))
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        trajectory(risk, snapshots, resume=path, progress=raise_interrupt)
    trajectory(risk, snapshots, resume=path, seed=1)
    assert measured == [0, 0, 10, 20, 30, 40]  # another seed is another computation


def raise_interrupt(done, total, note):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("snapshots", "message"),
    [
        ([], "snapshots: expected at least one, got none; take some while training"),
        ([2, 1], r"snapshots: expected steps that rise, got \[2, 1\]"),
        ([1, 1], "snapshots: expected steps that rise"),
    ],
)
def test_snapshots_that_are_no_path(snapshots, message):
    _, risk, _, kept = trained(steps=1)
    with pytest.raises(ValueError, match=message):
        trajectory(risk, [dataclasses.replace(kept[0], step=step) for step in snapshots])


def test_bad_input():
    _, risk, _, _ = trained(steps=1)
    with pytest.raises(TypeError, match="snapshots: expected `Snapshots` or a list of them, got OrderedDict"):
        trajectory(risk, [risk.model.state_dict()])
    for other, expected in ((mlp(outputs=4), r"'2.weight' of shape \(3, 5\), got \(4, 5\)"), (Tied(), "'0.weight'")):
        with pytest.raises(ValueError, match=f"snapshots: expected {expected}.*; use the same architecture"):
            trajectory(risk, [Snapshot.of(0, other)])
    for bad in ({"tol": 0}, {"max_matvecs": 0}, {"sharpness_samples": -1}, {"sharpness_radius": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a number > 0"):
            TrajectoryOptions(**bad)
    for step in (-1, 1.0, True):
        with pytest.raises(ValueError, match="step: expected a number of steps >= 0"):
            Snapshots().take(step, mlp())


# -- the path -------------------------------------------------------------------------------------------------------


def path_through(points):
    snapshots = [Snapshot(i, {"w": torch.as_tensor(p, dtype=torch.float64)}) for i, p in enumerate(points)]
    return path_of(snapshots, ["w"])


@pytest.mark.parametrize("count", [2, 3, 12])
def test_a_walk_of_orthogonal_steps_shows_what_a_random_walk_shows(count):
    """In many dimensions random steps are orthogonal: with exactly orthogonal ones the fractions are exact."""
    walk = path_through(np.tri(count, count - 1, -1))
    np.testing.assert_allclose(walk.explained, random_walk_variances(count), atol=1e-12)
    np.testing.assert_allclose(walk.random_walk, walk.explained, atol=1e-12)
    np.testing.assert_allclose(walk.cosines, 0, atol=1e-15)
    np.testing.assert_allclose(walk.distances, np.sqrt(np.arange(count)))


def test_random_walk_tends_to_the_known_fractions():
    k = np.arange(1, 5)
    np.testing.assert_allclose(random_walk_variances(5000)[:4], 6 / (np.pi * k) ** 2, rtol=1e-3)
    steps = normal(60, 20_000)
    shown = path_through(torch.cat([torch.zeros(1, 20_000), steps]).cumsum(0)).explained
    np.testing.assert_allclose(shown[:3], random_walk_variances(61)[:3], atol=0.02)


def test_straight_line_and_circle():
    line = path_through(np.arange(5)[:, None] * np.array([3.0, 4.0]))
    np.testing.assert_allclose(line.explained, [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(line.cosines, 1)
    np.testing.assert_allclose(line.distances, 5 * np.arange(5))
    np.testing.assert_allclose(line.coordinates[:, 0], 5 * (np.arange(5) - 2), atol=1e-12)
    angles = 2 * np.pi * np.arange(8) / 8
    circle = path_through(np.stack([np.cos(angles), np.sin(angles)], 1))
    np.testing.assert_allclose(circle.explained[:2], 0.5)
    np.testing.assert_allclose(np.linalg.norm(circle.coordinates, axis=1), 1)
    np.testing.assert_allclose(circle.cosines, np.cos(np.pi / 4))


def test_paths_of_little():
    one, still = path_through([[1.0, 2.0]]), path_through([[1.0], [1.0], [1.0]])
    assert (one.explained.shape, one.cosines.shape, one.coordinates.tolist()) == ((0,), (0,), [[0.0, 0.0]])
    assert np.isnan(still.explained).all()
    assert np.isnan(still.cosines).all()
    assert still.distances.tolist() == [0, 0, 0]


def test_a_path_that_comes_back_has_no_distance():
    points = np.array([[0.1, 0.7], [0.3, -0.4], [1 / 3, 0.9], [0.1, 0.7]])
    back = path_through(points)
    np.testing.assert_allclose(back.distances, np.linalg.norm(points - points[0], axis=1), atol=1e-7)
    assert np.isfinite(back.distances).all()


def test_small_steps_far_from_the_start_keep_their_digits():
    """From products of the points themselves a step of 1e-6 at a distance of 1e3 would be lost."""
    points = np.array([0.0, 1e3, 1e3 + 1e-6, 1e3 + 3e-6])[:, None]
    np.testing.assert_allclose(path_through(points).step_lengths[1:], [1e-6, 2e-6], rtol=1e-6)


# -- snapshots ------------------------------------------------------------------------------------------------------


def test_folder_and_memory_give_the_same_bits(tmp_path):
    adam = lambda p: torch.optim.AdamW(p, lr=0.05)  # noqa: E731
    _, risk, _, kept = trained(conv_batchnorm, (6, 1, 4, 4), make=adam)
    stored = Snapshots(tmp_path / "snapshots")
    assert len(stored) == 0
    for snapshot in kept:
        model = seeded(conv_batchnorm).double()
        snapshot.put_into(model)
        stored.take(snapshot.step, model)
        (tmp_path / "snapshots" / "notes.txt").write_text("not a snapshot")
    assert stored.steps == kept.steps == [0, 10, 20, 30, 40]
    assert same(trajectory(risk, [dataclasses.replace(s, rule=None) for s in kept]), trajectory(risk, stored))
    assert [s.step for s in stored[1:3]] == [10, 20]
    assert repr(stored) == f"Snapshots(5 in {tmp_path / 'snapshots'})"


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)),
        lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
        lambda: nn.Linear(2, 2).bfloat16(),
        Tied,
    ],
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_round_trip(tmp_path, make, kind):
    model, other = make(), make()
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    snapshots, before = Snapshots(tmp_path), copy.deepcopy(model)
    snapshots.take(7, model, optimizer)
    optimizer.step()  # what was taken is a copy
    (found,) = snapshots
    found.put_into(other)
    state, expected = other.state_dict(), before.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    rule = update_rule(before, kind(before.parameters(), lr=0.1, weight_decay=0.01))
    assert (found.step, found.rule.learning_rate, found.rule.bound) == (7, 0.1, rule.bound)
    assert found.rule.decay == dict.fromkeys(dict(model.named_parameters()), 0.01)
    assert found.rule.preconditioner.keys() == dict(model.named_parameters()).keys()


def test_unknown_bounds_survive_the_file(tmp_path):
    model = nn.Linear(2, 1)
    Snapshots(tmp_path).take(0, model, torch.optim.Adagrad(model.parameters(), lr=0.2))
    rule = Snapshots(tmp_path)[0].rule
    assert isinstance(rule, UpdateRule)
    assert math.isnan(rule.bound)
    assert (rule.learning_rate, rule.preconditioner, rule.decay) == (0.2, {}, {})


@pytest.mark.parametrize("in_folder", [False, True])
def test_the_optimizer_of_another_model_is_refused(tmp_path, in_folder):
    """A deepcopy's, most often: its state would be kept as this model's."""
    model, other, snapshots = nn.Linear(2, 2), nn.Linear(2, 2), Snapshots(tmp_path / "s" if in_folder else None)
    with pytest.raises(ValueError, match="optimizer: expected one that moves the model's parameters, got one of other"):
        snapshots.take(1, model, torch.optim.SGD(other.parameters(), lr=0.1))
    assert len(snapshots) == 0
    part = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    snapshots.take(1, model, part)  # together with a second network's
    snapshots.take(2, model, torch.optim.SGD([model.bias], lr=0.1))  # or of a part
    assert snapshots.steps == [1, 2]


def test_a_crash_while_writing_leaves_the_other_snapshots_whole(tmp_path, monkeypatch):
    snapshots, model = Snapshots(tmp_path), nn.Linear(2, 2)
    snapshots.take(1, model)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for step in (1, 2):
            with pytest.raises(OSError, match="disk full"):
                snapshots.take(step, nn.Linear(2, 2))
    assert snapshots.steps == [1]
    assert torch.equal(snapshots[0].weights["weight"], model.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40], lambda b: b"{}" * 50])
def test_damaged_snapshots_are_noticed(tmp_path, damage):
    Snapshots(tmp_path).take(3, nn.Linear(2, 2))
    path = tmp_path / "3.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"3.safetensors: damaged: expected a snapshot .*; remove it") as caught:
        Snapshots(tmp_path)[0]
    assert "\n" not in str(caught.value)


# -- run folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with snapshots, measured."""
    values = {
        "model": {"name": "mlp", "width": 4, "hidden": 1},
        "dataset": {"batch_size": 400},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "training": {"epochs": 2, "device": "cpu", "snapshots": {"every": 4}},
        "probes": {"examples": 40},
    }
    folder = RunFolder.create(tmp_path_factory.mktemp("study") / "adamw")
    train(make_config(values), folder)
    measure(find_probe("trajectory"), load_run(folder.path), settings={"sharpness_samples": 2, "tol": 0.1})
    return folder


def test_the_probe_of_a_run_reads_its_snapshots(run):
    values, arrays = run.read_record("trajectory")
    assert values["status"] == "converged"
    assert arrays["steps"].tolist() == [0, 4, 6]
    assert np.isfinite(arrays["losses_test"]).all()
    np.testing.assert_allclose(arrays["bounds"], 3800)
    assert np.isfinite(arrays["preconditioned"][1:]).all()
    assert (arrays["path.step_lengths"] > 0).all()


def test_a_run_without_snapshots_says_what_to_do(run):
    empty = dataclasses.replace(load_run(run.path), folder=RunFolder(run.path.parent / "elsewhere"))
    with pytest.raises(ValueError, match=r"snapshots: expected at least one.*training\.snapshots\.every"):
        measure(find_probe("trajectory"), empty)
    with pytest.raises(ValueError, match="unknown setting 'snapshots'"):
        measure(find_probe("trajectory"), empty, settings={"snapshots": []})


def test_figure_shows_the_record(run):
    contents = read(run.path.parent)
    (chart,) = figure(contents, {"adamw": "#0072B2"})
    losses, curvature, path = chart.panels
    _, arrays = run.read_record("trajectory")
    np.testing.assert_array_equal(losses.series[0].y, arrays["losses_train"])
    np.testing.assert_array_equal(losses.series[1].y, arrays["losses_test"])
    shown = {series.name: series.y for series in curvature.series}
    np.testing.assert_array_equal(shown["λ, preconditioned"], arrays["preconditioned"])
    np.testing.assert_array_equal(shown["λ of the Hessian"], arrays["lambda_max"])
    np.testing.assert_array_equal(shown["bound"], arrays["bounds"])
    np.testing.assert_array_equal(np.stack([path.series[0].x, path.series[0].y], 1), arrays["path.coordinates"])
    assert path.x_label == f"first direction: {arrays['path.explained'][0]:.0%} (random walk 75%)"
    assert chart.caption.endswith(".")
    assert ". " not in chart.caption
    matplotlib_backend.figure(chart)
    plotly_backend.figure(chart)


def test_figure_of_what_is_not_known(tmp_path):
    folder = folders.start_run(tmp_path / "run")
    assert figure(read(tmp_path / "run"), {"run": "#0072B2"}) == []
    _, risk, _, snapshots = trained()
    kept = [dataclasses.replace(snapshot, rule=None) for snapshot in snapshots]
    bad = {name: torch.full_like(tensor, math.nan) for name, tensor in kept[4].weights.items()}
    kept[4] = dataclasses.replace(kept[4], weights=bad)
    folder.write_probe("trajectory", "40", *trajectory(risk, kept).to_record())
    (chart,) = figure(read(tmp_path / "run"), {"run": "#0072B2"})
    assert [series.name for series in chart.panels[1].series] == ["λ of the Hessian"]
    assert len(chart.panels) == 2  # a path through NaN has no plane
    matplotlib_backend.figure(chart)


def test_the_rate_is_that_of_a_group_that_has_parameters():
    """Rates of layers leave the group empty that their parameters were in."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": [], "lr": 30.0}, {"params": model.parameters(), "lr": 0.5}])
    found = update_rule(model, optimizer)
    assert (found.learning_rate, found.bound) == (0.5, 4.0)
    assert all(bool((P == 1).all()) for P in found.preconditioner.values())
