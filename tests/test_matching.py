"""Matching of units: known permutations come back, one hidden layer is solved, correlations are Pearson's."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from alignment_nets import NETS, net_risk, other
from cases import classes, mlp, normal, paired
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.permutations import matching
from losslab.probes.permutations.activations import Moments, correlations, match_activations
from losslab.probes.permutations.matching import composed, match_weights
from losslab.probes.permutations.tracing import permutation_spec
from losslab.ranks import ALONE, Ranks
from processes import run_ranks

SEEDS = range(3)


def setting(name: str):
    risk = net_risk(name)
    state = {k: v.clone() for k, v in risk.model.state_dict().items()}
    return risk, permutation_spec(risk), state


def chosen(risk, state):
    return {name: state[name] for name in risk.space.names}


@pytest.mark.parametrize("name", NETS)
def test_weight_matching_recovers_a_permuted_copy_exactly(name):
    risk, spec, state = setting(name)
    for seed in SEEDS:
        shuffled = spec.apply(state, spec.random(np.random.default_rng(seed)))
        assert any(not torch.equal(shuffled[key], state[key]) for key in state)
        found = match_weights(spec, chosen(risk, state), chosen(risk, shuffled), seed=seed, starts=3)
        back = spec.apply(shuffled, found.permutations)
        assert all(torch.equal(back[key], state[key]) for key in state)
        norm = sum(float(t.square().sum()) for t in chosen(risk, state).values())
        assert found.similarity[:, 1].max() == pytest.approx(norm, rel=1e-12)
        assert found.converged


@pytest.mark.parametrize("name", NETS)
def test_activation_matching_recovers_a_permuted_copy_exactly(name):
    risk, spec, state = setting(name)
    shuffled = spec.apply(state, spec.random(np.random.default_rng(1)))
    permutations, converged = match_activations(risk, spec, state, shuffled)
    back = spec.apply(shuffled, permutations)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert converged


def test_one_hidden_layer_needs_one_assignment_and_is_the_best_of_all():
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(6, 4), classes(6), [4, 2]).risk()
    spec, a = permutation_spec(risk), {k: v.detach() for k, v in risk.model.named_parameters()}
    b = other(risk, scale=3.0)
    found = match_weights(spec, a, b)

    def similarity(order) -> float:
        moved = spec.apply(b, [np.array(order)])
        return sum(float((a[name] * moved[name]).sum()) for name in a)

    best = max(itertools.permutations(range(5)), key=similarity)
    assert found.permutations[0].tolist() == list(best) != list(range(5))
    assert found.similarity[0] == pytest.approx([similarity(range(5)), similarity(best)], rel=1e-12)
    again = match_weights(spec, a, b, first=[np.array(best)])
    assert again.similarity[0, 0] == again.similarity[0, 1], "nothing is left to gain after one assignment"


@pytest.mark.parametrize("name", ["attention", "grouped"])
def test_groups_within_others_gain_from_every_start(name):
    """Heads are assigned together with the order inside each: similarity never falls, and b's entries all stay."""
    risk, spec, state = setting(name)
    b = other(risk, scale=2.0)
    found = match_weights(spec, chosen(risk, state), chosen(risk, b), starts=4, seed=2)
    assert (found.similarity[:, 1] >= found.similarity[:, 0]).all()
    moved = spec.apply(b, found.permutations)
    assert all(torch.equal(moved[key].flatten().sort()[0], b[key].flatten().sort()[0]) for key in b)
    best = sum(float((state[key] * moved[key]).sum()) for key in risk.space.names)
    assert best == pytest.approx(found.similarity[:, 1].max(), rel=1e-12)


def test_heads_and_the_orders_inside_them_are_found_in_one_assignment(monkeypatch):
    """Between swapped heads whose coordinates are shuffled nothing fits, unless both are looked for together."""
    risk, spec, state = setting("attention")
    order = spec.identity()
    order[1] = np.array([1, 0])
    order[3:] = spec.random(np.random.default_rng(1))[3:]
    shuffled = spec.apply(state, order)
    monkeypatch.setattr(matching, "MAX_SWEEPS", 1)
    found = match_weights(spec, chosen(risk, state), chosen(risk, shuffled), groups=[1])
    assert not found.converged, "one sweep cannot know that nothing is left to gain"
    back = spec.apply(shuffled, found.permutations)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_two_permutations_in_a_row_are_the_composed_one():
    _, spec, state = setting("attention")
    first, second = (spec.random(np.random.default_rng(seed)) for seed in (4, 5))
    second[1] = np.array([1, 0])  # the heads
    twice, once = spec.apply(spec.apply(state, first), second), spec.apply(state, composed(spec, first, second))
    assert all(torch.equal(twice[key], once[key]) for key in state)


def test_correlations_are_pearsons():
    risk, spec, state = setting("MLP")
    b = other(risk)
    with torch.no_grad():
        state["0.weight"][2], state["0.bias"][2] = 0, 0.7  # a unit that never changes
    similarity = correlations(risk, spec, state, b)[0].units
    x = torch.cat([x for x, _ in risk.batches])
    layers = []
    for s in (state, b):
        hidden = nn.functional.linear(x, s["0.weight"], s["0.bias"])
        layers.append((hidden.T.numpy(), hidden.relu().T.numpy()))
    expected = np.zeros((6, 6))
    for i, j in np.ndindex(6, 6):
        for before, after in zip(*layers, strict=True):
            if before[i].std() > 1e-12 and after[j].std() > 1e-12:
                expected[i, j] += np.corrcoef(before[i], after[j])[0, 1]
    live = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(similarity[live], expected[live], atol=1e-12)
    assert (similarity[2] == 0).all()


def test_moments_do_not_lose_digits_to_a_large_mean():
    x, y = (normal(3, 40, seed=s) for s in (1, 2))
    moments = Moments(3, torch.finfo(torch.float64).eps)
    for part in range(4):
        piece = slice(10 * part, 10 * part + 10)
        moments.add(x[:, piece] + 1e6, y[:, piece] - 1e6)
    expected = np.corrcoef(x.numpy(), y.numpy())[:3, 3:]
    np.testing.assert_allclose(moments.correlation().numpy(), expected, atol=1e-8)


def test_nan_similarity_leaves_units_in_place():
    risk, spec, state = setting("MLP")
    broken = chosen(risk, state) | {"0.weight": torch.full((6, 4), torch.nan, dtype=torch.float64)}
    found = match_weights(spec, broken, chosen(risk, state), groups=[0])
    assert found.permutations[0].tolist() == list(range(6))


def _correlations_of(ranks: Ranks) -> torch.Tensor:
    """Ragged batches of samples far from zero, so that a wrong merge of means shows."""
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(9, 4), classes(9), [4, 3, 2])
    moments = Moments(3, 1e-16)
    for index in range(ranks.rank, 3, ranks.count):
        first, second = 50 + normal(3, 4 + index, seed=index), normal(3, 4 + index, seed=10 + index) - 30 * index
        moments.add(first, second)
    risk = EmpiricalRisk(case.model, case.loss_fn, case.batches[ranks.rank :: ranks.count], ranks=ranks)
    return moments.reduced(risk).correlation()


def test_correlations_over_several_processes(tmp_path):
    alone = _correlations_of(ALONE)
    for found in run_ranks(_correlations_of, 2, tmp_path):
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-12)
