"""What the homotopy rate's parts are given by mistake: one line that says so, and states that fit."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from losslab.optim import (
    CurvatureEstimator,
    HomotopyLR,
    HomotopyLRScheduler,
    HomotopyOptions,
    OnlineTuning,
    PerLayerHomotopyLR,
)
from losslab.optim.homotopy.preconditioner import limit


@pytest.fixture
def weight():
    return nn.Parameter(torch.tensor([1.0, 2.0]))


def bowl(weight):
    return lambda *_: weight.square().sum()


def test_one_tensor_is_as_good_as_a_list_of_one(weight):
    assert CurvatureEstimator()(bowl(weight), weight).hessian_norm == pytest.approx(2.0)
    scheduler = HomotopyLRScheduler()
    scheduler.step(bowl(weight)(), weight, 0)
    assert scheduler.measured.hessian_norm == pytest.approx(2.0)
    found = PerLayerHomotopyLR(SGD([weight], lr=0.1), bowl(weight), layers={"one": weight})
    assert list(found.rates) == ["one"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 2.0}, "alpha: does nothing with rule='stable'; rule='seed' has it"),
        ({"floor": 0.1}, "floor: does nothing with rule='stable'"),
        ({"rule": "seed", "fraction": 0.3}, "fraction: does nothing with rule='seed'; rule='stable' has it"),
        ({"rule": "seed_threshold", "release": 1.1}, "release: does nothing with rule='seed_threshold'"),
    ],
)
def test_settings_of_another_rule_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HomotopyOptions(**settings)


def test_numbers_of_numpy_are_numbers():
    assert HomotopyOptions(frequency=np.int64(10)).frequency == 10
    assert HomotopyOptions(rule="seed", alpha=np.float32(1)).alpha == 1


def test_the_shortest_runs_rise_too(weight):
    optimizer = SGD([weight], lr=50.0)
    HomotopyLR(optimizer, bowl(weight), total_steps=5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_all_gradients_but_the_first_left_out_have_no_limit(weight):
    assert limit(SGD([weight], lr=0.1, momentum=0.9, dampening=1.0)) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o, loss: HomotopyLR(o, loss, estimator="power"), "estimator: expected None or a CurvatureEstimator"),
        (lambda o, loss: HomotopyLR(o, loss, model="m"), "model: expected None or a Module, got str"),
        (lambda o, loss: PerLayerHomotopyLR("x", loss), "optimizer: expected None or a Optimizer, got str"),
        (lambda o, loss: PerLayerHomotopyLR(o, 3.0), "loss: expected None or a function, got float"),
        (lambda o, loss: PerLayerHomotopyLR(o, loss, layers=[1]), "layers: expected None or a Mapping, got list"),
        (lambda o, loss: PerLayerHomotopyLR(o, loss, examples=0), "examples: expected None or an int of at least 1"),
        (
            lambda o, loss: OnlineTuning(PerLayerHomotopyLR(o, loss, rule="seed")),
            "scheduler: expected a HomotopyLR, got PerLayerHomotopyLR",
        ),
        (lambda o, loss: HomotopyLRScheduler({"base_lr": 1}), "config: expected None or a SeedConfig, got dict"),
        (lambda o, loss: HomotopyLRScheduler().step(3.0, [], 0), "loss: expected a tensor with its graph, or a func"),
        (lambda o, loss: HomotopyLRScheduler().step(loss(), [], "0"), "step: expected an int of at least 0, got '0'"),
    ],
)
def test_other_kinds_are_refused(weight, make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(SGD([weight], lr=0.1), bowl(weight))


def test_states_that_do_not_fit_are_refused(weight):
    def made(groups=1, **settings):
        extra = [{"params": [nn.Parameter(torch.ones(1))]} for _ in range(groups - 1)]
        return HomotopyLR(SGD([{"params": [weight]}, *extra], lr=0.1), bowl(weight), **settings)

    for state, into, message in (
        (made(2), made(), "expected the rates of 1 parameter groups, got 2"),
        (made(), made(rule="seed"), "expected one with rule='seed', got 'stable'"),
        (made(rule="seed"), made(rule="seed", target_window="p2"), "expected one with target_window='p2', got 1000"),
    ):
        with pytest.raises(ValueError, match=f"state_dict: {message}"):
            into.load_state_dict(state.state_dict())
    blocks, joint = (PerLayerHomotopyLR(SGD([weight], lr=0.1), bowl(weight), method=m) for m in ("blocks", "joint"))
    with pytest.raises(ValueError, match="state_dict: expected one with method='joint', got 'blocks'"):
        joint.load_state_dict(blocks.state_dict())


def test_eigenvalues_that_rounding_hides_end_no_training(weight, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("operator: expected a symmetric one")

    monkeypatch.setattr("losslab.optim.homotopy.curvature.eigenpairs", refuse)
    found = CurvatureEstimator(top_k=2)(bowl(weight), [weight])
    assert found.hessian_norm == pytest.approx(2.0)
    assert all(map(math.isnan, found.eigenvalues))
    assert len(found.eigenvalues) == 2
