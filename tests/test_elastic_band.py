"""elastic_band on networks: agrees with the readable loop, shares data, keeps buffers out, resumes to the bit."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cases import Tokens, classes, conv_batchnorm, mlp, normal, paired, seeded
from losslab.operators.batch_statistics import batch_statistics, own_batch_statistics
from losslab.operators.minibatches import minibatch_loss, minibatches
from losslab.operators.risk import EmpiricalRisk
from losslab.probes import PROBES
from losslab.probes.elastic_band import elastic_band
from losslab.probes.paths.band_schedule import SCHEDULES, Cycle, ElasticBandOptions, Schedule, schedule_of
from losslab.probes.paths.potential import NetworkPotential
from losslab.status import Status, StopRequested
from losslab.studies.probing import keyword_arguments
from potentials import trained_pair

CASES = {
    "MLP": lambda: paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]),
    "summed loss": lambda: paired(
        mlp(), nn.CrossEntropyLoss(reduction="sum"), normal(7, 4), classes(7), [3, 4], scale=1 / 7
    ),
    "CNN with BatchNorm": lambda: paired(
        seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2]
    ),
    "attention": lambda: paired(seeded(Tokens), nn.CrossEntropyLoss(), classes(5, 3, num=6), classes(5), [2, 3]),
}
SMALL = ElasticBandOptions(subdivisions=1)


def ends(risk: EmpiricalRisk, size: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    step = size * normal(risk.space.size, seed=5).to(risk.dtype)
    return risk.space.vector() - step, risk.space.vector() + step


@pytest.mark.parametrize("whole", [False, True], ids=["one batch a step", "all data"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_pivot_after_another(load, name, whole):
    risk = CASES[name]().risk()
    a, b = ends(risk)
    result = elastic_band(
        risk, a, b, steps=5, options=ElasticBandOptions(subdivisions=1, whole=whole), schedule=[[1, 0.05]]
    )
    data = [(batch, count) for batch, count in risk.read()]
    steps = [data] * 5 if whole else [[item] for item in first_batches(risk, 5)]

    def evaluate(step, point):
        leaves = risk.leaves(point.clone())
        with risk.evaluating(), own_batch_statistics(risk.model):
            shares = [minibatch_loss(risk, leaves, batch, count) * count for batch, count in steps[step]]
        loss = sum(shares) / sum(count for _, count in steps[step])
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return loss.item(), risk.space.flatten(found)

    path = [torch.lerp(a, b, i / 4) for i in range(5)]
    expected = torch.stack(load("band_reference").relax_one_by_one(evaluate, path, steps=5, lr=0.05)).numpy()
    assert result.best_cycle == 1
    np.testing.assert_allclose(result.pivots, expected, rtol=1e-9, atol=1e-9)
    assert np.linalg.norm(expected - torch.stack(path).numpy()) > 1e-3
    assert (result.num_gradients, result.num_losses) == (3 * 5, 2 * 9)


def first_batches(risk, steps):
    """The batches of the first cycle: it begins with one that the seed decides."""
    first = int(torch.randint(risk.num_batches, (), generator=torch.Generator().manual_seed(1_000_003)))
    batches = minibatches(risk, 1_000_003, first)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_stacked_and_one_by_one_are_the_same(whole):
    risk = CASES["MLP"]().risk()
    points = torch.stack([risk.space.vector() + normal(risk.space.size, seed=i) for i in range(6)])
    stacked, single = NetworkPotential(risk, whole=whole), NetworkPotential(risk, whole=whole)
    assert stacked._stacked
    single._stacked = False
    torch.testing.assert_close(stacked.losses(points), single.losses(points), rtol=1e-13, atol=0)
    for potential in (stacked, single):
        slopes = potential.slopes(3, 0)
        found = [next(slopes)(points) for _ in range(3)]
        slopes.close()
        if potential is stacked:
            expected = found
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    expected_losses = torch.tensor([risk.loss_at(point) for point in points], dtype=torch.float64)
    torch.testing.assert_close(stacked.losses(points), expected_losses, rtol=1e-13, atol=0)
    assert stacked._stacked, "the stack was never tried"


def test_only_linear_layers_are_stacked():
    assert [NetworkPotential(make().risk())._stacked for make in CASES.values()] == [True, True, False, False]


class Branching(nn.Module):
    """Linear layers, but a forward pass that looks at the numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x)
        return h if float(h.detach().sum()) > 0 else 2 * h


def test_what_vmap_cannot_trace_goes_one_by_one():
    risk = paired(seeded(Branching), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()
    result = elastic_band(risk, *ends(risk), steps=2, options=SMALL)
    for pivot, loss in zip(result.pivots, result.pivot_losses, strict=True):
        assert loss == pytest.approx(risk.loss_at(torch.from_numpy(pivot)), rel=1e-12)


def test_what_does_not_fit_goes_one_by_one(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    risk = CASES["MLP"]().risk()
    expected = elastic_band(risk, *ends(risk), steps=3, options=SMALL)
    monkeypatch.setattr(NetworkPotential, "_stacked_gradients", full)
    found = elastic_band(risk, *ends(risk), steps=3, options=SMALL)
    np.testing.assert_allclose(found.pivots, expected.pivots, rtol=1e-12)


class Counting(list):
    """Batches that count how often they are handed out."""

    handed_out = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch


@pytest.mark.parametrize("name", ["MLP", "CNN with BatchNorm"])
def test_all_pivots_share_one_read_of_a_batch(name):
    def batches_read(num_nodes: int, steps: int) -> int:
        case = CASES[name]()
        case.batches = Counting(case.batches * 5)
        risk = case.risk(check=False)
        slopes = NetworkPotential(risk).slopes(0, 0)
        before = case.batches.handed_out
        points = torch.stack([risk.space.vector()] * num_nodes)
        for _ in range(steps):
            next(slopes)(points)
        slopes.close()
        return case.batches.handed_out - before

    few = [batches_read(3, steps) for steps in (1, 4)]
    assert [batches_read(9, steps) for steps in (1, 4)] == few
    assert few[1] - few[0] == 3


def test_running_statistics_are_no_coordinates_and_are_recomputed():
    case = CASES["CNN with BatchNorm"]()
    risk = case.risk()
    a, b = ends(risk, 0.2)
    result = elastic_band(risk, a, b, steps=3, options=SMALL)
    assert result.pivots.shape == (5, risk.space.size)
    for pivot, loss in zip(result.pivots, result.pivot_losses, strict=True):
        point = torch.from_numpy(pivot)
        assert loss == pytest.approx(risk.loss_at(point, batch_statistics(risk, point)), rel=1e-12)
    other = copy.deepcopy(case)
    other.model[1].running_mean += 50
    other.model[1].running_var *= 9
    again = elastic_band(other.risk(), a, b, steps=3, options=SMALL)
    np.testing.assert_array_equal(again.losses, result.losses)
    np.testing.assert_array_equal(again.pivots, result.pivots)


def test_what_the_numbers_mean():
    risk = CASES["MLP"]().risk()
    a, b = ends(risk)
    result = elastic_band(risk, a, b, steps=4, num_nodes=4, options=ElasticBandOptions(subdivisions=3))
    assert result.positions.shape == result.losses.shape == (13,)
    np.testing.assert_array_equal(result.pivot_positions, result.positions[::4])
    np.testing.assert_array_equal(result.pivot_losses, result.losses[::4])
    np.testing.assert_array_equal(result.pivots[[0, -1]], torch.stack([a, b]).numpy())
    gaps = np.linalg.norm(np.diff(result.pivots, axis=0), axis=1)
    np.testing.assert_allclose(np.diff(result.pivot_positions), gaps, rtol=1e-12)
    middle = torch.lerp(*torch.from_numpy(result.pivots[1:3]), 0.5)
    assert result.losses[6] == pytest.approx(risk.loss_at(middle), rel=1e-12)
    assert (result.loss_a, result.loss_b) == pytest.approx((risk.loss_at(a), risk.loss_at(b)), rel=1e-12)
    assert result.saddle == result.losses.max()
    assert result.barrier == result.saddle - max(result.loss_a, result.loss_b)
    line = [risk.loss_at(torch.lerp(a, b, i / 12)) for i in range(13)]
    assert result.straight_saddle == pytest.approx(max(line), rel=1e-12)
    assert result.straight_barrier == pytest.approx(max(line) - max(line[0], line[-1]), abs=1e-12)
    assert result.path_loss == pytest.approx(np.trapezoid(result.losses, result.positions) / gaps.sum(), rel=1e-12)
    assert (result.length, result.distance) == pytest.approx((gaps.sum(), float((b - a).norm())))
    assert result.length >= result.distance
    assert result.saddles.tolist()[0] == result.straight_saddle
    assert (result.status, result.num_examples, result.subdivisions) == (Status.complete, 7, 3)


def test_the_hill_between_two_trained_networks_is_passed_by():
    """AutoNEB with two minima only: hardly any barrier, and no spike in the first or the last gap."""
    risk, (a, b) = trained_pair()
    result = elastic_band(risk, a, b, schedule=[[60, 0.2], [60, 0.2, 2], [60, 0.05, 2]])
    assert result.straight_barrier > 0.1
    assert result.barrier < 0.1 * result.straight_barrier
    assert result.path_loss < result.saddle
    parts = result.subdivisions + 1
    for gap in (result.losses[: parts + 1], result.losses[-parts - 1 :]):
        assert gap.max() - max(gap[0], gap[-1]) < 0.1 * result.straight_barrier
    assert result.saddles[-1] < result.saddles[1]


def test_a_band_that_explodes_gives_back_the_straight_line():
    risk, (a, b) = trained_pair()
    result = elastic_band(risk, a, b, schedule=[[30, 1e4]])
    assert result.best_cycle == 0
    assert result.barrier == result.straight_barrier
    assert result.saddles[1] > result.saddles[0] or math.isnan(result.saddles[1])


def shuffled(risk: EmpiricalRisk) -> EmpiricalRisk:
    data = TensorDataset(normal(12, 4), classes(12))
    loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    return EmpiricalRisk(risk.model, nn.CrossEntropyLoss(), loader)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopRequested])
@pytest.mark.parametrize("after", [2, 5, 7])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, after, stop):
    """Also where the loader shuffles: a step's batch depends on its number only."""
    settings = {"schedule": [[4, 0.1], [4, 0.1, 1]], "options": SMALL}
    risk = shuffled(CASES["MLP"]().risk())
    a, b = ends(risk)
    whole = elastic_band(risk, a, b, **settings)
    file, calls = tmp_path / "folder" / "band.npz", []

    def interrupt(*call):
        calls.append(call)
        if len(calls) == after:
            raise stop

    def first():
        return elastic_band(risk, a, b, resume=file, progress=interrupt, **settings)

    if stop is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            first()
    else:
        stopped = first()
        assert stopped.status is Status.stopped
        assert stopped.saddle <= stopped.straight_saddle
    assert file.is_file()
    resumed = elastic_band(risk, a, b, resume=file, progress=lambda *call: calls.append(call), **settings)
    assert len(calls) == 4 + 4 + 3, "steps were taken twice"
    for field in dataclasses.fields(whole):
        expected, found = getattr(whole, field.name), getattr(resumed, field.name)
        assert np.array_equal(expected, found), field.name
    assert not file.exists()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"num_nodes": 4}, {"steps": 3}, {"options": ElasticBandOptions(subdivisions=1, spring=1.0)}],
    ids=str,
)
def test_a_file_of_other_settings_is_not_continued(tmp_path, change):
    risk = CASES["MLP"]().risk()
    a, b = ends(risk)
    file = tmp_path / "band.npz"
    settings = {"steps": 4, "options": SMALL}

    def interrupt(done, total, note):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        elastic_band(risk, a, b, resume=file, progress=interrupt, **settings)
    expected = elastic_band(risk, a, b, **settings | change)
    found = elastic_band(risk, a, b, resume=file, **settings | change)
    np.testing.assert_array_equal(found.pivots, expected.pivots)


def test_nonfinite_loss():
    case = CASES["MLP"]()
    risk = case.risk()
    a, b = ends(risk)
    risk.loss_fn = lambda output, target: nn.functional.cross_entropy(output, target) * torch.sqrt(output[0, 0] + 0.2)
    result = elastic_band(risk, a, b, steps=3, options=SMALL)
    losses = [risk.loss_at(torch.lerp(a, b, i / 8)) for i in range(9)]
    assert np.isnan(losses).any()
    assert result.status is Status.nonfinite
    assert math.isnan(result.saddle)
    assert math.isnan(result.barrier)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-12)


def test_float32_keeps_the_given_ends():
    risk = EmpiricalRisk(mlp(), nn.CrossEntropyLoss(), [(normal(7, 4).float(), classes(7))])
    a, b = ends(risk)
    result = elastic_band(risk, a, b, steps=3, options=SMALL)
    assert result.pivots.dtype == np.float32
    np.testing.assert_array_equal(result.pivots[[0, -1]], torch.stack([a, b]).numpy())


def test_module_state_dict_and_vector_agree():
    risk, (a, b) = trained_pair()
    forms = [(a, b), (a.state_dict(), b.state_dict()), tuple(risk.space.vector_of(m) for m in (a, b))]
    found = [elastic_band(risk, *form, steps=2, options=SMALL).pivots for form in forms]
    for pivots in found[1:]:
        np.testing.assert_array_equal(pivots, found[0])


def test_schedules():
    assert SCHEDULES["quick"].cycles == (Cycle(20, 0.1),)
    paper = SCHEDULES["paper"]
    assert [cycle.steps for cycle in paper.cycles] == [1000] * 4 + [2000] * 2 + [1000] * 8
    assert [cycle.lr for cycle in paper.cycles] == [0.1] * 6 + [0.01] * 4 + [0.001] * 4
    assert 3 + sum(cycle.insert for cycle in paper.cycles) == 29
    assert (paper.weight_decay, len(paper.cycles), paper.steps) == (1e-4, 14, 16_000)
    assert schedule_of("paper", steps=7).steps == 14 * 7
    assert schedule_of([[3, 0.1], Cycle(4, 0.2, 1, True)]) == Schedule((Cycle(3, 0.1), Cycle(4, 0.2, 1, True)))


def test_settings_of_the_command_line():
    settings = {"schedule": "paper", "num_nodes": 6, "spring": 2.0, "steps": 3}
    found = keyword_arguments(PROBES["elastic_band"], settings)
    assert found == {"schedule": "paper", "num_nodes": 6, "steps": 3, "options": ElasticBandOptions(spring=2.0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_nodes": 2}, "num_nodes: expected at least 3, .* got 2"),
        ({"schedule": "long"}, "schedule: expected one of quick, paper or a list of cycles, got 'long'"),
        ({"schedule": []}, "schedule: expected at least one cycle"),
        ({"schedule": [7]}, r"schedule: expected cycles \[steps, lr, insert, climb\], .* got 7"),
        ({"schedule": [[0, 0.1]]}, "steps: expected a number >= 1 in each cycle, got 0"),
        ({"steps": 0}, "steps: expected a number >= 1 in each cycle, got 0"),
        ({"schedule": [[3, -0.1]]}, "lr: expected a number > 0 in each cycle, got -0.1"),
        ({"schedule": [[3, 0.1, -1]]}, "insert: expected a number >= 0 in each cycle, got -1"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    risk = CASES["MLP"]().risk()
    with pytest.raises(ValueError, match=message):
        elastic_band(risk, *ends(risk), **arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"momentum": 1.0}, "momentum: expected 0 <= momentum < 1, got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number >= 0, got -1.0"),
        ({"threshold": math.nan}, "threshold: expected a number >= 0, got nan"),
        ({"spring": 0.0}, "spring: expected a number > 0, or None"),
        ({"subdivisions": 0}, "subdivisions: expected a number >= 1, got 0"),
    ],
    ids=str,
)
def test_options_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        ElasticBandOptions(**option)
