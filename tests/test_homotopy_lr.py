"""HomotopyLR: what its rate does on curvature that is known, and on none, on negative and on broken one."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR

import scheduled
from cases import mlp, normal
from losslab.optim import TALT, HomotopyLR
from quadratics import Quadratic, turned
from scheduled import VALUES, X, Y, bowl, made, train


def test_it_rises_to_what_the_curvature_allows():
    """From η₀/100 by a constant factor up to c·2/λ, and not one step above it."""
    model = bowl()
    optimizer, scheduler = made(model, warmup_steps=20, fraction=0.5)
    rates = train(model, optimizer, scheduler, 40)
    assert rates[:8] == pytest.approx([0.01 * 100 ** (step / 20) for step in range(8)])
    assert rates[-1] == pytest.approx(0.5 * 2 / 10, rel=0.01)
    assert max(rates[1:]) < 0.11  # λ is known from below, from ten products on
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    assert scheduler.factor == pytest.approx(scheduler.lr / scheduler.base_lr)
    assert scheduler.target == pytest.approx(1.0)
    assert scheduler.curvature == pytest.approx(10, rel=0.01)
    assert float(model().detach()) < 0.1


def test_it_reaches_its_rate_where_nothing_brakes():
    model = Quadratic(1e-3 * torch.eye(4, dtype=torch.float64))
    rates = train(model, *made(model, lr=0.5, warmup_steps=10), steps=14)
    assert rates[9] < 0.5
    assert rates[10:] == pytest.approx([0.5] * 4)


def test_it_stays_and_falls_in_the_end():
    model = Quadratic(1e-3 * torch.eye(4, dtype=torch.float64))
    optimizer, scheduler = made(model, lr=0.5, warmup_steps=10, total_steps=30)
    rates = train(model, optimizer, scheduler, 30)
    assert rates[10:19] == pytest.approx([0.5] * 9)
    assert rates[18:] == pytest.approx([0.5 * (1 - step / 12) for step in range(12)])
    assert scheduler.lr == 0.0


def test_it_falls_along_a_cosine_of_its_own():
    model = Quadratic(1e-3 * torch.eye(4, dtype=torch.float64))
    optimizer, scheduler = made(model, lr=0.5, warmup_steps=10, total_steps=30, decay="cosine")
    rates = train(model, optimizer, scheduler, 30)
    assert rates[20] == pytest.approx(0.25)
    assert rates[25] == pytest.approx(0.25 * (1 + math.cos(0.75 * math.pi)))
    assert scheduler.lr == 0.0


def test_brakes_at_once_and_recovers_slowly():
    model = Quadratic(torch.eye(4, dtype=torch.float64))
    optimizer, scheduler = made(model, warmup_steps=0, frequency=1, fraction=0.5, release=1.1, ema=0.5)
    train(model, optimizer, scheduler, 3)
    model.H = 100 * model.H
    train(model, optimizer, scheduler, 1)
    assert scheduler.lr == pytest.approx(0.01)
    model.H = model.H / 100
    assert train(model, optimizer, scheduler, 4)[1:] == pytest.approx([0.01 * 1.1**n for n in (1, 2, 3)])


@pytest.mark.parametrize(("make", "lr"), [(SGD, 30.0), (Adam, 30.0), (AdamW, 30.0), (RMSprop, 3.0), (TALT, 30.0)])
def test_a_rate_that_is_far_too_large_trains(make, lr):
    """With any optimizer: the constant rate fails, that of its curvature does not."""
    found = {}
    for name in ("constant", "homotopy"):
        model = mlp().double()
        loss = lambda: cross_entropy(model(X), Y)  # noqa: E731, B023
        optimizer = make(model.parameters(), lr=lr)
        scheduler = LambdaLR(optimizer, lambda _: 1.0) if name == "constant" else HomotopyLR(optimizer, loss)
        train(model, optimizer, scheduler, 60, loss)
        found[name] = loss().item()
    assert found["homotopy"] < 1.1
    assert not found["constant"] < 2 * found["homotopy"]


def test_groups_keep_their_ratios_one_of_zero_stays():
    model = Quadratic(turned(VALUES), [(4,), (5,), (1,)])
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), (0.0, 0.2, 0.6), strict=True)]
    optimizer = SGD(groups)
    scheduler = HomotopyLR(optimizer, model, warmup_steps=5, base_lr=0.1)
    still = model.parts[0].detach().clone()
    for _ in range(12):
        train(model, optimizer, scheduler, 1)
        rates = scheduler.get_last_lr()
        assert rates[0] == 0
        assert rates[2] == pytest.approx(3 * rates[1])
        assert rates[1] > 0
    assert scheduler.base_lr == 0.1
    assert scheduler.lr == rates[1] <= 0.1
    assert torch.equal(model.parts[0], still)


def test_groups_whose_rates_are_all_zero():
    model = bowl()
    optimizer, scheduler = made(model, lr=0.0)
    train(model, optimizer, scheduler, 3)
    assert scheduler.get_last_lr() == [0.0]
    assert scheduler.factor == 0.0
    with pytest.raises(ValueError, match="base_lr: expected a group whose lr is above 0, got none; set their lr"):
        made(model, lr=0.0, base_lr=0.1)


def test_empty_groups_and_frozen_layers():
    model = Quadratic(turned(VALUES), [(4,), (6,)])
    model.parts[1].requires_grad_(False)
    optimizer = SGD([{"params": []}, {"params": list(model.parameters())}], lr=0.1)
    scheduler = HomotopyLR(optimizer, model, warmup_steps=3)
    train(model, optimizer, scheduler, 10)
    assert scheduler.measured.hessian_norm == pytest.approx(
        float(torch.linalg.eigvalsh(turned(VALUES)[:4, :4])[-1]), rel=0.02
    )
    model.parts[1].requires_grad_(True)
    train(model, optimizer, scheduler, 10)
    assert scheduler.measured.hessian_norm == pytest.approx(10, rel=0.02)
    count = len(scheduler.history)
    for p in model.parameters():
        p.requires_grad_(False)
    scheduler.step()
    assert len(scheduler.history) == count  # nothing to measure
    with pytest.raises(ValueError, match="optimizer: expected a parameter that requires a gradient, got none"):
        HomotopyLR(optimizer, model)


def test_zero_gradient():
    """κ is infinite: the founders' rule goes to min_lr; the stable one has no use for it."""
    for settings, expected in (
        ({"rule": "seed", "min_lr": 1e-4}, 1e-4),
        ({"rule": "seed_threshold"}, 0.0),
        ({"warmup_steps": 0}, 0.04),
    ):
        model = bowl()
        model.parts[0].data.zero_()
        optimizer, scheduler = made(model, **settings)
        train(model, optimizer, scheduler, 3)
        assert scheduler.lr == pytest.approx(expected, rel=1e-2)
        assert scheduler.measured.kappa == math.inf
        assert scheduler.skipped == 0


@pytest.mark.parametrize("rule", ["stable", "seed", "seed_threshold"])
def test_no_curvature_and_negative_curvature(rule):
    flat = nn.Parameter(normal(4))
    optimizer = SGD([flat], lr=0.1)
    scheduler = HomotopyLR(optimizer, flat.sum, rule=rule, warmup_steps=0)
    for _ in range(5):
        flat.grad = torch.ones_like(flat)
        optimizer.step()
        scheduler.step()
    assert scheduler.lr == 0.1
    assert scheduler.measured.hessian_norm == 0
    model = Quadratic(-turned(VALUES))
    own = {} if rule == "stable" else {"target_curvature": 1e-3}
    optimizer, scheduler = made(model, lr=0.1, rule=rule, warmup_steps=0, **own)
    train(model, optimizer, scheduler, 5)
    assert 0 < scheduler.lr < 0.1
    assert scheduler.measured.hessian_norm == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("rule", ["stable", "seed"])
def test_a_loss_that_is_not_a_number(rule):
    """Skipped, counted, told once; the rate stays what it was."""
    model, broken = bowl(), []
    optimizer, scheduler = made(
        model, lr=0.01, loss=lambda: model() * (math.nan if broken else 1.0), rule=rule, frequency=1, warmup_steps=30
    )
    train(model, optimizer, scheduler, 10)
    before, rows, vector = scheduler.lr, len(scheduler.history), scheduler.estimator.state_dict()["vector"]
    broken.append(1)
    with pytest.warns(UserWarning, match="curvature that is not finite was passed over; the rate stays") as told:
        train(model, optimizer, scheduler, 5)
    assert len(told) == 1
    assert told[0].filename == scheduled.__file__  # who called it
    assert (scheduler.skipped, scheduler.lr, len(scheduler.history)) == (5, before, rows)
    assert torch.equal(scheduler.estimator.state_dict()["vector"], vector)
    broken.clear()
    train(model, optimizer, scheduler, 1)
    assert scheduler.skipped == 5
    assert len(scheduler.history) == rows + 1
    assert scheduler.lr != before
