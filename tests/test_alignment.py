"""align: a permuted copy has no barrier and comes back; REPAIR sets the channels' statistics; stops and refusals."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from alignment_nets import NETS, net_risk, other
from cases import classes, normal, paired, seeded
from losslab.probes.alignment import align, permuted
from losslab.probes.interpolation import interpolate
from losslab.probes.permutations.full_state import full_state
from losslab.probes.permutations.repair import Repair
from losslab.probes.permutations.tracing import permutation_spec
from losslab.records import to_record
from losslab.report import matplotlib_backend
from losslab.report.charts.alignment import alignment
from losslab.report.contents import Contents, Pair
from losslab.status import Status, StopRequested
from test_tracing import Strange
from untouched import assert_untouched


def shuffled(risk, solution=None):
    spec, state = permutation_spec(risk), full_state(risk, risk.model, "b") | (solution or {})
    return spec.apply(state, spec.random(np.random.default_rng(3)))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["weights", "activations"])
def test_a_permuted_copy_has_no_barrier(name, method):
    risk = net_risk(name)
    copy, original = shuffled(risk), full_state(risk, risk.model, "a")
    result = align(risk, risk.model, copy, method=method, alphas=[0.25, 0.5], repair=True, starts=2)
    assert abs(result.barrier_after) <= 1e-10
    assert abs(result.barrier_repaired) <= 1e-10
    assert np.ptp(result.losses_after) <= 1e-10
    assert result.distance_after == 0 < result.distance_before
    assert np.ptp(result.losses_before) > 1e-6
    assert result.alphas.tolist() == [0, 0.25, 0.5, 1]
    assert result.status is Status.complete
    assert result.recalibrated == any(isinstance(m, nn.BatchNorm2d) for m in risk.model.modules())
    back = permuted(risk, copy, result)
    assert back.keys() == risk.model.state_dict().keys()
    assert all(torch.equal(back[key], original[key]) for key in original)
    assert sum(result.moved) > 0


def test_other_solution_gets_nearer_and_keeps_its_function():
    risk = net_risk("residual")
    b = shuffled(risk, other(risk))
    result = align(risk, risk.model, b, alphas=[0.5], seed=1)
    aligned = permuted(risk, b, result)
    assert result.distance_after < result.distance_before
    vectors = [risk.space.vector_of(x) for x in (risk.model, b, aligned)]
    assert result.distance_before == pytest.approx(float((vectors[0] - vectors[1]).norm()))
    assert result.distance_after == pytest.approx(float((vectors[0] - vectors[2]).norm()))
    same = [interpolate(risk, x, x, alphas=[0.0]).loss_a for x in (full_state(risk, b, "b"), aligned)]
    assert same[0] == pytest.approx(same[1], rel=1e-12)
    line = interpolate(risk, risk.model, aligned, alphas=[0.5], recalibrate=True)
    np.testing.assert_array_equal(result.losses_after, line.losses)
    assert result.barrier_after == line.barrier
    norms = [float(v.square().sum()) for v in vectors]
    nearer = norms[0] + norms[1] - 2 * result.similarity[0]
    assert nearer == pytest.approx([result.distance_before**2, result.distance_after**2])


def test_vectors_modules_and_state_dicts_agree():
    risk = net_risk("conv and BatchNorm")
    vector = risk.space.vector_of(shuffled(risk))
    as_state = full_state(risk, vector, "b")
    results = [align(risk, risk.model, b, alphas=[0.5]) for b in (vector, as_state)]
    np.testing.assert_array_equal(results[0].losses_after, results[1].losses_after)
    assert permuted(risk, vector, results[0])["1.running_mean"].ne(as_state["1.running_mean"]).any()


def test_tied_weights_move_together():
    risk = net_risk("attention")
    aligned = permuted(risk, shuffled(risk), align(risk, risk.model, shuffled(risk), alphas=[0.5], starts=2))
    assert torch.equal(aligned["head.weight"], aligned["embedding.weight"])


def test_touches_nothing():
    risk = net_risk("residual")
    with assert_untouched(risk.model):
        permuted(risk, risk.model, align(risk, risk.model, other(risk), alphas=[0.5], repair=True))


# -- REPAIR ---------------------------------------------------------------------------------------------------------


def test_repair_sets_means_and_deviations_to_the_mix():
    risk = net_risk("flatten")
    states = [full_state(risk, x, "x") for x in (risk.model, other(risk, 1.0))]
    repair = Repair(risk, permutation_spec(risk), *states)
    assert list(repair.layers) == ["0", "4"], "the class outputs stay"
    x = torch.cat([x for x, _ in risk.batches])

    def first_layer(state):
        output = nn.functional.conv2d(x, state["0.weight"], state["0.bias"]).movedim(1, 0).flatten(1)
        return output.mean(1), output.std(1, correction=0)

    alpha = 0.3
    repaired = risk.space.named_views(repair.point(alpha))
    for got, a, b in zip(first_layer(repaired), *map(first_layer, states), strict=True):
        torch.testing.assert_close(got, (1 - alpha) * a + alpha * b)
    plain = {key: torch.lerp(states[0][key], states[1][key], alpha) for key in states[0]}
    assert (first_layer(plain)[1] - first_layer(repaired)[1]).abs().max() > 1e-3
    assert torch.equal(repaired["6.weight"], plain["6.weight"])


def test_repair_undoes_a_collapse_and_leaves_the_ends():
    """Half-way from w to −w the weights are tiny; repaired, the first layer's units vary as the two networks' do."""
    risk = net_risk("MLP")
    a = full_state(risk, risk.model, "a")
    b = a | {"0.weight": -0.9 * a["0.weight"]}
    repair = Repair(risk, permutation_spec(risk), a, b)
    for end, state in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(repair.point(end), risk.space.vector_of(state))
    weight = risk.space.named_views(repair.point(0.5))["0.weight"]
    torch.testing.assert_close(weight, 0.95 * a["0.weight"])


# -- stops and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 14])
@pytest.mark.parametrize("method", ["weights", "activations"])
def test_stopped(after, method):
    risk, calls = net_risk("MLP"), 0

    def stop(done, total, note):
        nonlocal calls
        calls += 1
        if calls == after:
            raise StopRequested

    result = align(risk, risk.model, other(risk), method=method, progress=stop, starts=3, repair=True)
    assert result.status is Status.stopped
    assert calls == after
    assert 9 <= len(result.alphas) < 25
    assert {0.0, 1.0} <= set(result.alphas)
    assert np.isfinite([result.losses_before, result.losses_after, result.losses_repaired]).all()


def test_nan_solutions():
    risk = net_risk("MLP")
    broken = full_state(risk, risk.model, "b")
    broken["0.weight"] = torch.full_like(broken["0.weight"], math.nan)
    result = align(risk, risk.model, broken, alphas=[0.5])
    assert result.status is Status.nonfinite
    assert math.isnan(result.barrier_after)
    assert result.moved == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "weight"}, "method: expected 'weights' or 'activations', got 'weight'"),
        ({"alphas": [-0.1]}, r"alphas: expected a list of numbers in \[0, 1\]"),
        ({"alphas": [math.nan]}, r"alphas: expected a list of numbers in \[0, 1\]"),
        ({"alphas": []}, r"alphas: expected a list of numbers in \[0, 1\]"),
        ({"starts": 0}, "starts: expected a number >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    risk = net_risk("MLP")
    with pytest.raises(ValueError, match=message):
        align(risk, risk.model, risk.model, **arguments)


def test_nothing_left_to_permute_names_the_module():
    layers = [nn.Linear(4, 5), Strange(), nn.Linear(5, 3)]
    model = seeded(lambda: nn.Sequential(*layers))
    risk = paired(model, nn.CrossEntropyLoss(), normal(6, 4), classes(6), [4, 2]).risk()
    with pytest.raises(ValueError, match="units to permute, got an unknown operation in 1: aten::as_strided"):
        align(risk, model, model)


def test_result_of_another_network():
    result = align(net_risk("MLP"), net_risk("MLP").model, net_risk("MLP").model, alphas=[0.5])
    risk = net_risk("flatten")
    with pytest.raises(ValueError, match="result: expected one of a network with 2 groups"):
        permuted(risk, risk.model, result)
    with pytest.raises(ValueError, match=r"b: expected '0.weight' of shape"):
        align(risk, risk.model, net_risk("MLP").model)


# -- the figure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [False, True])
def test_figure_shows_the_record(repair, tmp_path):
    matplotlib.use("Agg")
    risk = net_risk("MLP")
    result = align(risk, risk.model, other(risk), alphas=[0.25, 0.5], repair=repair)
    values, arrays = to_record(result)
    (chart,) = alignment(Contents("study", [], [Pair("one", "two", {"alignment": values | arrays})], True), {})
    (panel,) = chart.panels
    assert [line.dashed for line in panel.series] == [True, False] + [False] * repair
    np.testing.assert_array_equal(panel.series[0].y, result.losses_before)
    np.testing.assert_array_equal(panel.series[1].y, result.losses_after)
    assert f"barrier {result.barrier_after:.3g}" in panel.series[1].name
    assert ". " not in chart.caption
    matplotlib_backend.save(chart, tmp_path / "alignment.png")
    assert (tmp_path / "alignment.png").stat().st_size > 5000


def test_no_figure_without_a_record():
    assert alignment(Contents("study", [], [Pair("one", "two", {})], True), {}) == []


def test_the_method_asked_for_is_the_one_that_runs():
    """Weight matching has a row for each start, activation matching one; here they end at different orders."""
    risk = net_risk(next(iter(NETS)))
    found = [align(risk, risk.model, other(risk), method=m, alphas=[0.5], starts=3) for m in ("weights", "activations")]
    by_weights, by_activations = found
    assert (by_weights.similarity.shape, by_activations.similarity.shape) == ((3, 2), (1, 2))
    assert by_weights.similarity[:, 1].max() >= by_activations.similarity[0, 1]
