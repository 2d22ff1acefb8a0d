"""TALT where gradients vanish or nearly overflow, where others write into its state, and with impossible arguments."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from cases import gen
from losslab.optim import TALT, ImprovedTALTOptimizer, TALTOptions, attach_talt, phase, talt_param_groups
from talt_twins import drawn, placed, step

SHAPES = [(4, 5), (4, 5), (3, 2, 2), (6,), (), (5, 1)]
STRUCTURES = {
    "auto": TALTOptions(),
    "kronecker": TALTOptions(max_side=4, adaptive_memory=False, base_memory=2),
    "lowrank": TALTOptions(incremental_covariance=False, base_memory=3),
    "polar": TALTOptions(),
    "diagonal": TALTOptions(),
}


@pytest.mark.parametrize("settings", [{}, {"match_rms": 0.2}, {"match_rms": 0.2, "orthogonal": False}])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_that_vanish_move_less_and_less(structure, settings):
    """An average's squares vanish in float32 long before it does: what is divided by its length must not be."""
    ours = [nn.Parameter(p.float()) for p in placed(SHAPES)]
    optimizer = TALT(ours, lr=0.01, structure=structure, options=replace(STRUCTURES[structure], **settings))
    for now in drawn(SHAPES, 3):
        step(optimizer, [g.float() for g in now])
    with torch.no_grad():  # as 500 steps of zero would
        for state in optimizer.state.values():
            for name in {"exp_avg", "exp_avg_sq", "covariance_left", "covariance_right"} & set(state):
                state[name] *= 1e-30
    before = [p.detach().clone() for p in ours]
    for _ in range(5):
        step(optimizer, [torch.zeros_like(p) for p in ours])
    # Muon's direction has one length down to 1e-15, and what asks for one length of that gets it.
    most = 0.1 if structure == "polar" and settings else 1e-6
    assert all((p - b).abs().max() < most for p, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-31, 1e-20, 1e37, 3e38])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_gradients_at_the_ends_of_float32(size, eps):
    """Below ε next to nothing moves, without it all sizes are alike; the largest have a unit that is finite."""
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = TALT([weight], lr=1.0, eps=eps)
    for seed in range(3):
        weight.grad = (size * torch.randn(8, 8, generator=gen(seed)).clamp(-1, 1)).contiguous()
        optimizer.step()
    moved = weight.detach().abs().max().item()
    assert 1 < moved < 20 if eps == 0 or size > 1 else moved < 1e-9
    assert math.isfinite(optimizer.state[weight]["scale"].item())


# -- what others do to it, and what it is given by mistake ----------------------------------------------------


def test_hooks_after_loading_see_the_state_that_stays():
    weight = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    optimizer = TALT([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    loading = TALT([weight], lr=0.1)

    def forget(of):
        of.state[weight]["exp_avg"].zero_()
        of.state[weight]["exp_avg_sq"] = torch.full((4, 3), 7.0)

    loading.register_load_state_dict_post_hook(forget)
    loading.load_state_dict(optimizer.state_dict())
    assert loading.state[weight]["exp_avg"].dtype == torch.float32
    assert loading.state[weight]["exp_avg"].abs().max() == 0
    assert loading.state[weight]["exp_avg_sq"].unique().tolist() == [7.0]


def test_entries_of_ones_own_in_the_state():
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = TALT([weight], lr=0.1)
    optimizer.state[weight]["seen"] = torch.zeros(2)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    optimizer.state[weight]["count"] = 3
    loading = TALT([weight], lr=0.1)
    loading.load_state_dict(optimizer.state_dict())
    assert loading.state[weight]["count"] == 3
    loading.step()
    assert loading.state[weight]["step"] == 3


def test_a_group_that_became_impossible_moves_nothing():
    one, other = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = TALT([{"params": [one]}, {"params": [other]}], lr=0.1)
    for weight in (one, other):
        weight.grad = torch.ones(3, 3)
    optimizer.step()
    before = one.detach().clone()
    optimizer.param_groups[1]["blend"] = 7.0
    with pytest.raises(ValueError, match="blend: expected 0 to 1, got 7"):
        optimizer.step()
    assert torch.equal(one, before)
    assert optimizer.state[one]["step"] == 1


def test_the_state_of_another_optimizer_is_refused():
    weight = nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.ones(3, 3)
    for other in (torch.optim.AdamW([weight]), torch.optim.SGD([weight])):
        other.step()
        optimizer = TALT([weight], lr=0.1)
        with pytest.raises(ValueError, match="state_dict: expected one of a TALT, got groups without 'skipped'"):
            optimizer.load_state_dict(other.state_dict())
        optimizer.step()


def test_a_probe_and_a_state_that_was_only_looked_at():
    weight, unused = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = TALT([weight, unused], probe=lambda: weight.square().sum(), options=TALTOptions(probe_interval=1))
    assert not optimizer.state[unused]
    for _ in range(3):
        weight.grad = weight.detach().clone()
        optimizer.step()
    assert optimizer.state[weight]["step"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens: expected None or a number > 0, got 0"),
        ({"tokens": "8"}, "tokens: expected None or a number > 0, got '8'"),
        ({"probe": 5}, "probe: expected a function that computes a loss, got int"),
        ({"lr": math.inf}, "lr: expected a number >= 0, got inf"),
        ({"lr": torch.ones(2)}, r"lr: expected one number, got a tensor of shape \(2,\)"),
        ({"weight_decay": math.inf}, "weight_decay: expected a number >= 0, got inf"),
    ],
)
def test_impossible_arguments_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TALT([nn.Parameter(torch.ones(3, 3))], **settings)


def test_numbers_of_numpy_are_numbers():
    assert TALTOptions(max_side=np.int64(64)) == TALTOptions(max_side=64)
    assert type(TALTOptions(max_side=np.int64(64)).max_side) is int


def test_a_fused_optimizer_behind_talt_wants_gradients_without_a_scale():
    """It divides by the scale in its own step, where TALT's update stands in the gradient's place."""
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    attach_talt(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = weight.detach().clone()
    scaler.scale(weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match="attach_talt: expected gradients without a loss scale; call scaler"):
        scaler.step(optimizer)
    assert torch.equal(weight, before)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got Linear"):
        attach_talt(nn.Linear(2, 2))


def test_phases_need_averages():
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = TALT([weight], betas=(0.0, 0.99))
    for seed in range(4):
        weight.grad = torch.randn(4, 3, generator=gen(seed))
        optimizer.step()
    with pytest.raises(ValueError, match=r"expected averaged gradients, got betas\[0\] = 0; phases need 0.1 or more"):
        phase(optimizer)


@pytest.mark.parametrize("kind", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_what_a_kernel_is_computed_from_is_a_kernel(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(nn.Conv2d(4, 5, 3)))
    hidden, _ = talt_param_groups(model)
    assert [tuple(weight.shape) for _, weight in hidden["params"]] == [(4, 3, 3, 3), (5, 4, 3, 3)]


def test_the_founders_form_says_what_it_was_given_by_mistake():
    model = nn.Linear(3, 3)
    for settings, message in (
        ({"base_optimizer": "sgd"}, "base_optimizer: expected a class such as torch.optim.SGD, got 'sgd'"),
        ({"weight_decay": 0.1}, "weight_decay: no such setting; it is the base optimizer's: base_optimizer=functools"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ImprovedTALTOptimizer(model, **settings)
    optimizer = ImprovedTALTOptimizer(model)
    with pytest.raises(ValueError, match="state_dict: expected one of ImprovedTALTOptimizer, got one without 'scaler'"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
