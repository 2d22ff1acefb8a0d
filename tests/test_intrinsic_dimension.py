"""Training in random subspaces: known dimensions, the plain training it must equal, interruptions, refusals."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import report_folders as folders
from cases import CASES, classes, conv_batchnorm, gen, mlp, normal, paired, seeded
from losslab.operators.accuracy import score_at
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.intrinsic_dimension import IntrinsicDimensionOptions, intrinsic_dimension
from losslab.probes.subspaces.dimension_search import Goal, bootstrap_interval, dimensions_up_to, smallest_dimension
from losslab.probes.subspaces.initialization import initial_point
from losslab.probes.subspaces.subspaces import random_subspace
from losslab.records import to_record
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.charts import charts
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from untouched import assert_untouched

KINDS = ["fastfood", "sparse", "dense"]


class Sums(nn.Module):
    """1,000 parameters, ten sums of 100 of them (the toy problem of C. Li et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight.view(10, 100).sum(1)


def toy() -> EmpiricalRisk:
    """½ of nothing: the mean of (sum − 1)² over the ten sums; a solution is a point of a 990-dimensional plane."""
    return EmpiricalRisk(Sums(), nn.MSELoss(), [(torch.eye(10).double(), torch.ones(10).double())])


def lbfgs(parameters):
    exact = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-12, "tolerance_change": 0.0}
    return torch.optim.LBFGS(parameters, max_iter=60, history_size=20, **exact)


@pytest.mark.parametrize("kind", KINDS)
def test_the_toy_problem_has_dimension_ten(kind):
    options = IntrinsicDimensionOptions(projection=kind, start="present", steps=3, max_dimension=20)
    result = intrinsic_dimension(
        toy(), baseline=0.0, target=1 - 1e-9, num_seeds=2, optimizer=lbfgs, options=options, seed=5
    )
    assert (result.value, result.low, result.high) == (10.0, 10.0, 10.0)
    assert (result.status, result.measure, result.start_score) == (Status.complete, "loss", 1.0)
    losses = dict(zip(result.trials.dimensions.tolist(), result.trials.train_losses.tolist(), strict=True))
    assert losses[9] > 1e-6
    assert losses[10] < 1e-12


def plain_training(model, batches, start, columns, steps, make_optimizer):
    """The same, written plainly: θ = θ₀ + P v with a dense P inside autograd's graph."""
    model = copy.deepcopy(model).train()
    v = torch.zeros(columns.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer([v])
    shapes = [p.shape for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def at(theta):
        pieces = theta.split([s.numel() for s in shapes])
        return {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}

    for x, y in itertools.islice(itertools.cycle(batches), steps):
        optimizer.zero_grad()
        F.cross_entropy(functional_call(model, at(start + columns @ v), (x,)), y).backward()
        optimizer.step()
    return v.detach(), at((start + columns @ v).detach())


def cnn_case():
    return paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(9, 1, 4, 4), classes(9), [5, 4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [cnn_case, CASES["ragged cross-entropy"]], ids=["CNN with BatchNorm", "MLP"])
def test_training_is_plain_training_in_the_subspace(build, kind):
    case = build()
    risk = case.risk()
    options = IntrinsicDimensionOptions(projection=kind, steps=7, start="present")
    sgd = lambda v: torch.optim.SGD(v, lr=0.2, momentum=0.9)  # noqa: E731
    result = intrinsic_dimension(risk, dimension=5, num_seeds=2, optimizer=sgd, baseline=1.0, options=options, seed=3)
    for row, seed in enumerate((3, 4)):
        subspace = random_subspace(kind, risk.space, 5, seed)
        columns = torch.stack([subspace.matvec(e) for e in torch.eye(5).double()], dim=1)
        v, parameters = plain_training(case.model, case.batches, risk.space.vector(), columns, 7, sgd)
        np.testing.assert_allclose(result.coordinates[row], v, rtol=1e-9)
        network = copy.deepcopy(case.model)
        # Evaluated in evaluation mode, with BatchNorm's statistics over the whole data.
        expected = plain_score(network, parameters, case.batches)
        found = result.trials.train_losses[row], result.trials.train_accuracies[row]
        assert found == pytest.approx(expected, rel=1e-9)
    assert result.score == pytest.approx(result.trials.train_accuracies.mean())


def plain_score(network, parameters, batches):
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    seen = []
    hooks = [m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for m in layers]
    network.load_state_dict(parameters, strict=False)
    network.train()
    with torch.no_grad():
        for x, _ in batches:
            network(x)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            total = sum(len(x) for x in seen)
            layer.running_mean.copy_(sum(len(x) * x.mean((0, 2, 3)) for x in seen) / total)
            layer.running_var.copy_(sum(len(x) * x.var((0, 2, 3)) for x in seen) / total)
        network.eval()
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return float(F.cross_entropy(network(x), y)), float((network(x).argmax(1) == y).double().mean())


def test_full_training_is_the_baseline():
    case = cnn_case()
    risk = case.risk()
    adam = lambda v: torch.optim.Adam(v, lr=0.01)  # noqa: E731
    options = IntrinsicDimensionOptions(steps=9, start="present", measure="loss")
    result = intrinsic_dimension(risk, dimension=3, num_seeds=1, optimizer=adam, options=options)
    eye = torch.eye(risk.space.size).double()
    _, parameters = plain_training(case.model, case.batches, risk.space.vector(), eye, 9, adam)
    expected, _ = plain_score(copy.deepcopy(case.model), parameters, case.batches)
    assert result.baseline == pytest.approx(expected, rel=1e-9)
    assert (result.baseline_kind, result.full.dimensions.tolist()) == ("full", [risk.space.size])
    start = result.start_score
    assert start == pytest.approx(plain_score(copy.deepcopy(case.model), {}, case.batches)[0])
    assert result.threshold == pytest.approx(start - 0.9 * (start - expected))


def separable() -> tuple[EmpiricalRisk, EmpiricalRisk]:
    """Three clusters that a straight line tells apart, and other examples of them."""
    x, y = normal(48, 4), classes(48)
    x = x + 4 * torch.eye(4).double()[y]
    model = mlp().double()
    loss = nn.CrossEntropyLoss()
    return EmpiricalRisk(model, loss, [(x[:16], y[:16]), (x[16:32], y[16:32])]), EmpiricalRisk(
        model, loss, [(x[32:], y[32:])]
    )


def test_search_on_a_real_network():
    risk, validation = separable()
    options = IntrinsicDimensionOptions(steps=30, learning_rate=0.03)
    with assert_untouched(risk.model):
        result = intrinsic_dimension(risk, validation=validation, options=options, num_seeds=2)
    assert (result.measure, result.split, result.status) == ("accuracy", "validation", Status.complete)
    assert result.threshold == pytest.approx(0.9 * result.baseline)
    assert result.baseline > 0.9
    assert result.score >= result.threshold > result.start_score
    trials = result.trials
    for seed, found in zip((0, 1), result.found, strict=True):
        mine = trials.seeds == seed
        reached = trials.validation_accuracies >= result.threshold
        assert found == trials.dimensions[mine & reached].min()
        assert not reached[mine & (trials.dimensions < found)].any()
    assert result.value == result.found.mean()
    assert 1 <= result.value < result.num_parameters / 2
    assert "intrinsic dimension" in str(result)
    assert f"{len(result.trials.seeds) + len(result.full.seeds)} × {result.steps} steps" in str(result)


def test_validation_is_measured_at_the_trained_point_also_of_a_restricted_risk():
    risk, validation = separable()
    risk = risk.restrict("2.*")
    options = IntrinsicDimensionOptions(steps=5, start="present")
    result = intrinsic_dimension(risk, dimension=4, num_seeds=1, validation=validation, baseline=1.0, options=options)
    v = torch.tensor(result.coordinates[0])
    theta = risk.space.vector() + random_subspace("fastfood", risk.space, 4).matvec(v)
    assert result.trials.validation_losses[0] == pytest.approx(validation.restrict("2.*").loss_at(theta), rel=1e-12)
    assert result.trials.train_losses[0] == pytest.approx(risk.loss_at(theta), rel=1e-12)


# -- the search ---------------------------------------------------------------------------------------------


def test_dimensions_leave_none_out_below_ten():
    grid = dimensions_up_to(5000, 0.1)
    assert grid[:12] == list(range(12))
    assert grid[-1] == 5000
    assert all(b <= max(a + 1, 1.1 * a) for a, b in itertools.pairwise(grid))
    assert dimensions_up_to(1, 0.1) == [0, 1]


@dataclasses.dataclass
class Staircase:
    """Trainings whose loss is 0 from `least` dimensions on."""

    least: float
    asked: list

    def trial(self, dimension, seed):
        self.asked.append(dimension)
        return dimension


def test_bisection_finds_every_dimension():
    grid = dimensions_up_to(3000, 0.1)
    for least in grid:
        staircase = Staircase(least, [])
        goal = Goal("loss", "train", 1.0)
        object.__setattr__(goal, "reached", lambda dimension, least=least: dimension >= least)
        assert smallest_dimension(staircase, goal, grid, 0) == least
        assert len(staircase.asked) <= len(grid).bit_length()
    object.__setattr__(goal, "reached", lambda dimension: False)
    assert smallest_dimension(staircase, goal, grid, 0) == math.inf


def test_never_reached_is_infinite_and_says_so():
    risk, _ = separable()
    result = intrinsic_dimension(risk, baseline=2.0, options=IntrinsicDimensionOptions(steps=2), num_seeds=2)
    assert (result.value, result.low, result.high) == (math.inf, math.inf, math.inf)
    assert result.trials.dimensions.max() == risk.space.size
    assert math.isnan(result.score)


def test_a_start_that_is_good_enough_has_dimension_zero():
    risk, _ = separable()
    options = IntrinsicDimensionOptions(steps=1, start="present", measure="loss")
    assert intrinsic_dimension(risk, baseline=100.0, options=options, num_seeds=1).value == 0.0


def test_bootstrap_is_that_of_all_resamples():
    values = [10.0, 12.0, 20.0]
    means = sorted(np.mean(chosen) for chosen in itertools.product(values, repeat=3))
    low, high = bootstrap_interval(values, 0)
    # 1/27 of the resamples is all three the smallest: more than 2.5 %.
    assert (low, high) == (means[0], means[-1]) == (10.0, 20.0)
    many = list(normal(200).numpy())
    low, high = bootstrap_interval(many, 0)
    assert high - low == pytest.approx(2 * 1.96 * np.std(many) / 200**0.5, rel=0.1)
    assert all(map(math.isnan, bootstrap_interval([3.0], 0)))
    assert bootstrap_interval([3.0] * 9 + [math.inf], 0) == (3.0, math.inf)


# -- where it starts ----------------------------------------------------------------------------------------


def test_the_start_is_a_fresh_initialisation():
    risk, _ = separable()
    first, again, other = initial_point(risk, 3), initial_point(risk, 3), initial_point(risk, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for view, layer in zip(risk.space.views(first)[::2], (risk.model[0], risk.model[2]), strict=True):
        assert float(view.abs().max()) <= layer.in_features**-0.5
        assert not torch.equal(view, layer.weight)


def test_attention_and_norms_are_initialised_too():
    layer = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    risk = EmpiricalRisk(layer, nn.MSELoss(), [(normal(2, 3, 8), normal(2, 3, 8))])
    assert float(initial_point(risk, 0).abs().max()) <= 1.0
    values = risk.space.named_views(initial_point(risk, 0))
    assert torch.equal(values["norm1.weight"], torch.ones(8).double())
    assert values["self_attn.in_proj_weight"].std() > 0.1


def test_only_chosen_parameters_are_initialised():
    risk, _ = separable()
    point = initial_point(risk.restrict("2.*"), 0)
    assert point.shape == (18,)


def test_modules_that_cannot_initialise_themselves_are_refused():
    with pytest.raises(ValueError, match=r"start: expected modules .* got Sums \('weight'\) .* use start='present'"):
        intrinsic_dimension(toy(), dimension=3)


def test_seeds_differ_and_the_first_is_the_seed_itself():
    risk, _ = separable()
    options = IntrinsicDimensionOptions(steps=3)
    result = intrinsic_dimension(risk, dimension=4, num_seeds=2, seed=1, options=options)
    scores = [score_at(risk, initial_point(risk, seed)).accuracy for seed in (1, 2)]
    assert result.start_score == np.mean(scores)
    both = result.coordinates
    (second,) = intrinsic_dimension(risk, dimension=4, num_seeds=1, seed=2, options=options).coordinates
    assert np.array_equal(both[1], second)
    assert not np.allclose(both[0], both[1])


# -- interruptions ------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.dropout(torch.relu(self.norm(self.first(x))), 0.3, self.training))


def random_risk() -> EmpiricalRisk:
    """Dropout and a shuffling loader: all that has a random state."""
    data = torch.utils.data.TensorDataset(normal(12, 4), classes(12))
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
    return EmpiricalRisk(seeded(Dropping).double(), nn.CrossEntropyLoss(), loader, check=False)


def test_trained_in_training_mode_and_evaluated_in_evaluation_mode_whatever_the_risks_mode():
    options = IntrinsicDimensionOptions(steps=3)
    found = []
    for mode in ("train", "eval"):
        risk = random_risk()
        risk.mode = mode
        found.append(intrinsic_dimension(risk, dimension=3, num_seeds=1, validation=risk, options=options))
        assert risk.mode == mode
    assert same(*found)
    assert found[0].trials.validation_losses == pytest.approx(found[0].trials.train_losses)


OPTIMIZERS = {
    "default": None,
    "momentum": lambda v: torch.optim.SGD(v, lr=0.3, momentum=0.9, nesterov=True),
    "lbfgs": lambda v: torch.optim.LBFGS(v, lr=0.3, max_iter=3),
    "amsgrad": lambda v: torch.optim.AdamW(v, lr=0.1, amsgrad=True),
}


def measured(optimizer, **arguments):
    settings = {"num_seeds": 2, "options": IntrinsicDimensionOptions(steps=5, max_dimension=7)}
    return intrinsic_dimension(random_risk(), optimizer=OPTIMIZERS[optimizer], **(settings | arguments))


def same(a, b) -> bool:
    (values, arrays), (others, more) = to_record(a), to_record(b)
    equal = all(np.array_equal(arrays[name], more[name], equal_nan=True) for name in arrays.keys() | more.keys())
    return repr(values) == repr(others) and equal


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dimension", [None, 4], ids=["search", "one"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(optimizer, dimension, tmp_path):
    file, whole = tmp_path / "partial.npz", measured(optimizer, dimension=dimension)
    total, seen = 0, []
    for stop in (3, 5, 9, 16):  # within trainings, at the end of one, and resumed more than once

        def interrupt(done, of, note, stop=stop):
            seen.append(done)
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measured(optimizer, dimension=dimension, resume=file, progress=interrupt)
        assert file.is_file()
        assert seen[-1] > total  # it went on, it did not begin anew
        total = seen[-1]
    steps = []
    result = measured(optimizer, dimension=dimension, resume=file, progress=lambda done, of, note: steps.append(done))
    assert steps[0] == total + 1
    assert same(result, whole)
    assert not file.exists()


def test_interrupted_inside_a_forward_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("losslab.probes.partial._SECONDS", -1.0)
    monkeypatch.setattr("losslab.probes.partial._SHARE", math.inf)
    file, whole = tmp_path / "partial.npz", measured("default", dimension=4)
    for calls in (9, 20, 31):
        risk, left = random_risk(), calls

        def stop(*_):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        risk.model.register_forward_hook(stop)
        options = IntrinsicDimensionOptions(steps=5, max_dimension=7)
        with assert_untouched(risk.model), pytest.raises(KeyboardInterrupt):
            intrinsic_dimension(risk, dimension=4, num_seeds=2, options=options, resume=file)
    assert same(measured("default", dimension=4, resume=file), whole)


@pytest.mark.parametrize(
    "other",
    [
        {"options": IntrinsicDimensionOptions(steps=5, max_dimension=7, learning_rate=0.1)},
        {"options": IntrinsicDimensionOptions(steps=5, max_dimension=7, projection="dense")},
        {"options": IntrinsicDimensionOptions(steps=5, max_dimension=7, start="present")},
        {"optimizer": "momentum"},
        {"validation": True},
    ],
    ids=str,
)
def test_a_file_of_other_settings_is_ignored(other, tmp_path):
    file, other = tmp_path / "partial.npz", dict(other)
    if "validation" in other:
        other["validation"] = random_risk()
    optimizer = other.pop("optimizer", "default")

    def stop(done, of, note):
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured("default", dimension=4, resume=file, progress=stop)
    assert same(measured(optimizer, dimension=4, resume=file, **other), measured(optimizer, dimension=4, **other))


def stop_at(step):
    def stop(done, of, note):
        if done >= step:
            raise StopRequested

    return stop


def test_told_to_stop_it_returns_the_trainings_that_are_complete(tmp_path):
    file = tmp_path / "partial.npz"
    result = measured("default", resume=file, progress=stop_at(22))  # two full trainings, two in subspaces
    assert result.status is Status.stopped
    assert (len(result.full.seeds), len(result.trials.seeds), len(result.found)) == (2, 2, 0)
    assert math.isnan(result.value)
    assert file.is_file()  # to go on from


def test_told_to_stop_before_there_is_anything_to_show():
    with pytest.raises(StopRequested):
        measured("default", progress=stop_at(3))
    with pytest.raises(StopRequested):
        measured("default", progress=stop_at(12))


# -- numbers that are none, and refusals --------------------------------------------------------------------


def test_a_training_that_diverges_has_no_score():
    risk, validation = separable()
    risk.loss_fn = lambda output, y: F.cross_entropy(output, y) + torch.log(1 - output.square().mean() / 1e3)
    result = intrinsic_dimension(
        risk, dimension=9, num_seeds=1, baseline=1.0, validation=validation, optimizer=lambda v: torch.optim.SGD(v, 1e4)
    )
    assert result.status is Status.nonfinite
    assert math.isnan(result.score)
    assert np.isnan(result.trials.train_accuracies).all()
    assert np.isnan(result.coordinates).all()
    result = intrinsic_dimension(
        risk, num_seeds=1, optimizer=lambda v: torch.optim.SGD(v, 1e4), options=IntrinsicDimensionOptions(steps=5)
    )
    assert (result.status, len(result.trials.seeds)) == (Status.nonfinite, 0)
    assert math.isnan(result.value)


def test_regression_is_measured_by_its_loss():
    case = CASES["ragged MSE"]()
    result = intrinsic_dimension(case.risk(), dimension=3, num_seeds=1, options=IntrinsicDimensionOptions(steps=2))
    assert result.measure == "loss"
    with pytest.raises(ValueError, match=r"measure: expected class scores .* use 'loss'"):
        intrinsic_dimension(case.risk(), options=IntrinsicDimensionOptions(steps=2, measure="accuracy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, "dimension: expected 1 to 43, the number of parameters, or None; got 0"),
        ({"dimension": 44}, "dimension: expected 1 to 43"),
        ({"dimension": 3.0}, "dimension: expected 1 to 43"),
        ({"target": 0.0}, "target: expected a share"),
        ({"target": 90}, "target: expected a share"),
        ({"baseline": "best"}, "baseline: expected 'full' or a number, got 'best'"),
        ({"baseline": math.nan}, "baseline: expected 'full' or a number, got nan"),
        ({"num_seeds": 0}, "num_seeds: expected a number >= 1, got 0"),
        ({"options": IntrinsicDimensionOptions(max_dimension=99)}, "max_dimension: expected 1 to 43"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        intrinsic_dimension(separable()[0], **({"baseline": 1.0} | arguments))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection": "gauss"}, "projection: expected one of fastfood, sparse, dense, got 'gauss'"),
        ({"start": "trained"}, "start: expected one of initial, present, got 'trained'"),
        ({"measure": "error"}, "measure: expected one of auto, accuracy, loss, got 'error'"),
        ({"steps": 0}, "steps: expected a number >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number > 0"),
        ({"resolution": math.nan}, "resolution: expected a number > 0"),
    ],
    ids=str,
)
def test_bad_options(settings, message):
    with pytest.raises(ValueError, match=message):
        IntrinsicDimensionOptions(**settings)


@pytest.mark.parametrize(
    ("optimizer", "message"), [("sgd", "got 'sgd'"), (lambda v: v, "got list")], ids=["name", "list"]
)
def test_an_optimizer_that_is_none(optimizer, message):
    with pytest.raises(TypeError, match=f"optimizer: expected a function .*{message}"):
        intrinsic_dimension(separable()[0], dimension=3, optimizer=optimizer)


# -- the picture --------------------------------------------------------------------------------------------


def test_the_chart_shows_the_trainings_and_the_threshold(tmp_path):
    risk, validation = separable()
    options = IntrinsicDimensionOptions(steps=5, learning_rate=0.02, max_dimension=30)
    searched = intrinsic_dimension(risk, validation=validation, num_seeds=1, options=options)
    single = intrinsic_dimension(risk, dimension=4, num_seeds=1, options=dataclasses.replace(options, measure="loss"))
    for name, result in (("a", searched), ("b", single)):
        folders.start_run(tmp_path / name).write_probe("intrinsic_dimension", "7", *result.to_record())
    (chart,) = [chart for chart in charts(read(tmp_path)) if chart.name == "intrinsic-dimension"]
    accuracy, loss = chart.panels
    points, line = accuracy.series
    dimensions = np.append(searched.trials.dimensions, searched.num_parameters)
    accuracies = np.append(searched.trials.validation_accuracies, searched.baseline)
    order = np.argsort(dimensions, kind="stable")
    np.testing.assert_allclose(10**points.x, dimensions[order])
    np.testing.assert_allclose(points.y, 100 * accuracies[order])
    np.testing.assert_allclose(line.y, 100 * searched.threshold)
    assert points.name == f"a: d = {searched.value:.4g}"
    np.testing.assert_array_equal(loss.series[0].y, [*single.trials.train_losses, single.baseline])
    assert loss.series[0].name == "b"
    assert ". " not in chart.caption
    matplotlib_backend.save(chart, tmp_path / "picture.png")
    plotly_backend.figure(chart)


def test_nothing_measured_nothing_drawn(tmp_path):
    folders.start_run(tmp_path / "a")
    assert not [chart for chart in charts(read(tmp_path / "a")) if chart.name == "intrinsic-dimension"]


def test_generators_are_not_shared():
    """A generator is used as it is: two subspaces from one differ."""
    generator, space = gen(), separable()[0].space
    first, second = (random_subspace("fastfood", space, 2, generator).matvec(torch.ones(2).double()) for _ in range(2))
    assert not torch.allclose(first, second)
