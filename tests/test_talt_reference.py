"""TALT's numbers are those of its equations: every combination of the fixes, each number of its rule, stacks."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from losslab.optim import FIXES, TALT, TALTOptions
from losslab.optim.talt_reference import TALTReference
from talt_twins import both, drawn, placed, step

EXACT = 1e-10
CHUNKS = 16
# Each of the fixes makes a difference: one side of four is truncated without fix 1, the fixed thresholds lie amid the
# eigenvalues, and with gradients that shrink a minimum is near from about half-way.
EVERYTHING = TALTOptions(
    base_memory=2, max_side=3, update_interval=7, near_fraction=0.3, thresholds=(0.3, 3.0), damping=0.7
)
COMBINATIONS = [
    EVERYTHING.with_fixes([fix for fix, on in zip(FIXES, switches, strict=True) if on])
    for switches in product((False, True), repeat=len(FIXES))
]
SHORT = drawn([(3, 2, 2)], 50)  # sides 3 and 4: the gradient's covariances have full rank


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("structure", ["kronecker", "lowrank"])
def test_every_combination_of_the_fixes(structure, chunk):
    paths = both(SHORT, structure, COMBINATIONS[chunk::CHUNKS], watch=["near"])
    assert max(paths.apart) < EXACT
    found = paths.fast.transpose(0, 1).flatten(1)
    assert torch.pdist(found).min() > 1e-3  # no two of them are alike
    assert 0.2 < paths.watched["near"].mean() < 0.8


MANY = drawn([(5, 4), (3, 2, 2)], 30)
BASE = TALTOptions(base_memory=3, update_interval=4, near_fraction=0.7).with_fixes(FIXES)
CHANGES = {
    "both sides truncated": {"adaptive_memory": False, "base_memory": 2, "max_side": 3},
    "one side truncated, batch covariance": {"base_memory": 2, "max_side": 4, "incremental_covariance": False},
    "ranks capped": {"max_memory": 2, "max_side": 2},
    "one-sided": {"one_sided": True},
    "quarter power": {"power": 0.25},
    "power zero": {"power": 0.0},
    "power one": {"power": 1.0},
    "damped": {"damping": 0.5},
    "clipped": {"clip": 1.5},
    "clipped at fixed thresholds": {"clip": 1.5, "statistical_thresholds": False, "thresholds": (0.3, 3.0)},
    "new bases as the average changes": {"trigger": "gradient_change", "trigger_bound": 0.05},
    "new bases as the covariance turns": {"trigger": "off_diagonal", "trigger_bound": 0.005, "blend": 0.8},
    "scaled": {"match_rms": 0.2},
    "singular values as they are": {"orthogonal": False},
    "bases from another thread": {"asynchronous": True},
    "truncated, from another thread": {"asynchronous": True, "base_memory": 2, "max_side": 4, "adaptive_memory": False},
    "batch covariance, from another thread": {"asynchronous": True, "max_side": 3, "incremental_covariance": False},
    "no Nesterov": {"nesterov": False},
    "sharp gate": {"gate_width": 0.3},
    "no valleys": {"valley_strength": 0.0},
    "other percentiles": {"percentiles": (40.0, 90.0), "damping": 0.5},
    "slow covariance": {"covariance_decay": 0.99},
    "half a new basis": {"blend": 0.5},
    "a minimum is never near": {"near_fraction": 0.0},
    "near a minimum, no valleys": {"near_factor": 0.0},
    "no new basis early at fixed intervals": {
        "dynamic_updates": False,
        "trigger": "gradient_change",
        "trigger_bound": 0.01,
    },
}


def test_every_number_of_the_rule():
    options = [BASE, *(replace(BASE, **change) for change in CHANGES.values())]
    paths = both(MANY, "kronecker", options, watch=["refreshes"])
    for name, apart in zip(["none", *CHANGES], paths.apart, strict=True):
        assert apart < EXACT, name
    assert torch.pdist(paths.fast.transpose(0, 1).flatten(1)).min() > 1e-3
    early = dict(zip(["none", *CHANGES], paths.watched["refreshes"][-1, :, 1].tolist(), strict=True))
    assert {name for name, count in early.items() if count} == {
        name for name in CHANGES if name.startswith("new bases")
    }


@pytest.mark.parametrize("structure", ["kronecker", "lowrank", "diagonal"])
@pytest.mark.parametrize("settings", [{"betas": (0.8, 0.99)}, {"eps": 0.3}, {"lr": 0.3, "weight_decay": 0.0}], ids=str)
def test_learning_rates_averages_and_floors(structure, settings):
    assert max(both(MANY, structure, [BASE], **settings).apart) < EXACT


def test_gradients_that_are_there_at_some_steps_only():
    """The stacks of equal shapes are made anew whenever others than before move."""
    gradients = drawn([(3, 4)] * 3, 20)
    fast = placed([(3, 4)] * 3)
    slow = [parameter.clone() for parameter in fast]
    optimizer = TALT(fast, lr=0.01, options=BASE)
    references = [TALTReference([parameter], lr=0.01, options=BASE) for parameter in slow]
    for t, now in enumerate(gradients):
        there = [t % (index + 2) != 0 for index in range(3)]
        step(optimizer, [g if present else None for g, present in zip(now, there, strict=True)])
        for reference, gradient, present in zip(references, now, there, strict=True):
            if present:
                reference.step([gradient])
    torch.testing.assert_close(fast, slow, rtol=0, atol=EXACT)
    assert len({float(optimizer.state[parameter]["step"]) for parameter in fast}) > 1
