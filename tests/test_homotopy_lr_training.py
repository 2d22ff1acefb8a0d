"""HomotopyLR in the midst of a training: nothing is touched, whatever the optimizer, the precision, the loss."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adagrad, Adam
from torch.optim.lr_scheduler import LambdaLR

from cases import mlp, seeded, split
from losslab.operators.risk import EmpiricalRisk
from losslab.optim import TALT, HomotopyLR
from quadratics import Quadratic, turned
from scheduled import VALUES, X, Y, bowl, made, train
from second_derivatives import Once
from untouched import assert_untouched


def test_training_is_not_touched():
    """The weights after steps at the rates it gives are those of a training without it: dropout, BatchNorm, `.grad`."""

    def end(scheduled: list[float] | None) -> tuple[nn.Module, list[float]]:
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)]
        model = seeded(lambda: nn.Sequential(*[copy.deepcopy(layer) for layer in layers])).double()
        for p, q in zip(model.parameters(), LAYERS.parameters(), strict=True):
            p.data.copy_(q)
        loss = lambda: cross_entropy(model(X), Y)  # noqa: E731
        optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
        at = lambda step: scheduled[step] / 0.5 if step < 12 else 1.0  # noqa: E731
        scheduler = LambdaLR(optimizer, at) if scheduled else HomotopyLR(optimizer, loss, model=model, frequency=1)
        torch.manual_seed(4)
        return model, train(model, optimizer, scheduler, 12, loss)

    LAYERS = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))).double()
    with_it, rates = end(None)
    without, _ = end(rates)
    for (name, one), two in zip(with_it.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.allclose(one, two, rtol=1e-12), name
    assert with_it[1].num_batches_tracked == 12


def test_a_measurement_touches_nothing():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))).double()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = HomotopyLR(optimizer, lambda: cross_entropy(model(X), Y), model=model)
    optimizer._opt_called = True
    with assert_untouched(model):
        scheduler.step()
    assert len(scheduler.history) == 1


def test_a_slice_of_the_batch():
    model, asked = mlp().double(), []

    def loss(examples: int = 24) -> torch.Tensor:
        asked.append(examples)
        return cross_entropy(model(X[:examples]), Y[:examples])

    optimizer, scheduler = made(model, loss=loss, examples=6)
    train(model, optimizer, scheduler, 3, loss)
    assert asked.count(6) == len(scheduler.history) == 3
    for bad in (0, 2.0, True):
        with pytest.raises(
            ValueError, match="examples: expected an int of at least 1 and a function for the loss, got"
        ):
            made(model, loss=loss, examples=bad)


@pytest.mark.parametrize("make", [SGD, Adam, TALT])
def test_a_risk_in_place_of_a_function(make):
    """The optimizer's groups are in another order than the risk's parameters; some are not in it."""
    model = mlp().double()
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), split([10, 14], X, Y))
    named = dict(model.named_parameters())
    groups = [{"params": [named["2.bias"]], "lr": 0.2}, {"params": [named["2.weight"], named["0.weight"]], "lr": 0.1}]
    loss = lambda: cross_entropy(model(X), Y)  # noqa: E731
    found = []
    for function in (risk, loss):
        twin = copy.deepcopy(model.state_dict())
        optimizer = make(groups, lr=0.1)
        scheduler = HomotopyLR(optimizer, function, warmup_steps=3)
        train(model, optimizer, scheduler, 6, loss)
        found.append([(row.lr, row.hessian_norm, row.loss, row.grad_norm) for row in scheduler.history])
        model.load_state_dict(twin)
    assert found[0] == [pytest.approx(row, rel=1e-6) for row in found[1]]
    with pytest.raises(ValueError, match="examples: expected an int of at least 1 and a function"):
        HomotopyLR(SGD(model.parameters(), lr=0.1), risk, examples=5)


def test_modules_without_second_derivatives():
    model = Quadratic(turned(VALUES))
    optimizer, scheduler = made(model, loss=lambda: model(Once.apply), warmup_steps=4)
    with pytest.warns(UserWarning, match="products are differences of gradients") as told:
        train(model, optimizer, scheduler, 12)
    assert len(told) == 1
    assert scheduler.lr == pytest.approx(0.04, rel=0.02)


def test_an_optimizer_that_is_not_known():
    model = bowl()
    optimizer = Adagrad(model.parameters(), lr=0.5)
    with pytest.warns(UserWarning, match="no stability limit is known for Adagrad") as told:
        scheduler = HomotopyLR(optimizer, model, warmup_steps=4)
    assert told[0].filename == __file__
    train(model, optimizer, scheduler, 8)
    assert scheduler.lr == 0.5
    assert scheduler.measured.hessian_norm == pytest.approx(10, rel=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HomotopyLR(optimizer, model, rule="seed")  # which asks for none


def test_an_optimizer_without_state():
    """Of one's own, and not known: the founders' rule measures all the same."""

    class Plain(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(self.param_groups[0]["lr"] * p.grad)

    model = bowl()
    optimizer = Plain(model.parameters(), 0.05)
    scheduler = HomotopyLR(optimizer, model, rule="seed", target_curvature=1e-3)
    train(model, optimizer, scheduler, 4)
    assert len(scheduler.history) == 4
    assert scheduler.lr < 0.05


def test_adaptive_optimizers_are_measured_from_their_first_step_on():
    model = bowl()
    optimizer, scheduler = made(model, make=Adam, lr=0.1)
    optimizer._opt_called = True
    scheduler.step()  # as after a step that GradScaler has left out
    assert not scheduler.history
    train(model, optimizer, scheduler, 1)
    assert len(scheduler.history) == 1


def test_grad_scaler_and_autocast():
    """Curvature is that of the unscaled loss, also where the scaler leaves steps out."""
    found = []
    for scaled in (False, True):
        model = mlp().float()
        x, scaler = X.float(), torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=scaled)

        def loss() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return 8 * cross_entropy(model(x).float(), Y)  # noqa: B023

        optimizer = SGD(model.parameters(), lr=5.0)
        scheduler = HomotopyLR(optimizer, loss, warmup_steps=5)
        for _ in range(12):
            optimizer.zero_grad()
            scaler.scale(loss()).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        found.append(scheduler.lr)
        assert not scaled or scaler.get_scale() < 2.0**126  # steps were left out
        assert scheduler.measured.loss == pytest.approx(float(loss()), rel=0.3)
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_gradient_accumulation():
    """`step()` after each step of the optimizer; gradients gathered so far are left alone."""
    model = mlp().double()
    parts = split([6, 6, 6, 6], X, Y)
    optimizer, scheduler = made(model, loss=lambda: cross_entropy(model(X), Y), warmup_steps=5)
    for _ in range(8):
        for x, y in parts:
            (cross_entropy(model(x), y) / 4).backward()
        optimizer.step()
        gradients = [p.grad.clone() for p in model.parameters()]
        scheduler.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
        optimizer.zero_grad()
    whole = mlp().double()
    other, reference = made(whole, loss=lambda: cross_entropy(whole(X), Y), warmup_steps=5)
    train(whole, other, reference, 8, reference.loss)
    assert scheduler.lr == pytest.approx(reference.lr, rel=1e-9)


def test_optimizers_whose_momentum_changes():
    """The limit is that of the settings now."""
    model = bowl()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = HomotopyLR(optimizer, model, warmup_steps=0, fraction=0.5)
    train(model, optimizer, scheduler, 3)
    optimizer.param_groups[0]["momentum"] = 0.9
    scheduler.options = scheduler.options.of({"warmup_steps": 0, "fraction": 0.5, "release": 100.0})
    optimizer.step()
    scheduler.step()
    assert scheduler.lr == pytest.approx(0.5 * 3.8 / 10, rel=0.02)


def test_a_resumed_run_goes_on_with_the_limit_of_its_last_estimate():
    """Not with that of the settings now, which the run that was not interrupted asks for at the next estimate only."""
    model = bowl()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = HomotopyLR(optimizer, model, warmup_steps=0)
    train(model, optimizer, scheduler, 3)
    other = HomotopyLR(SGD(model.parameters(), lr=1.0, momentum=0.9), model, warmup_steps=0)
    assert other.rule.limit == 3.8
    other.load_state_dict(scheduler.state_dict())
    assert other.rule.limit == scheduler.rule.limit == 2.0
