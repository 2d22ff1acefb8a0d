"""HomotopyLR by torch's conventions for schedulers; that it goes on bit for bit; what it refuses."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR, LinearLR, SequentialLR

from cases import mlp, seeded
from losslab.optim import TALT, CurvatureEstimator, HomotopyLR
from quadratics import Quadratic, turned
from scheduled import VALUES, X, Y, bowl, made, train


def test_rates_that_are_tensors():
    model = bowl()
    rate = torch.tensor(1.0)
    optimizer = SGD(model.parameters(), lr=rate)
    scheduler = HomotopyLR(optimizer, model, warmup_steps=5)
    train(model, optimizer, scheduler, 12)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.04, rel=0.02)
    again = HomotopyLR(SGD(model.parameters(), lr=torch.tensor(1.0)), model, warmup_steps=5)
    again.load_state_dict(scheduler.state_dict())
    assert float(again.get_last_lr()[0]) == float(rate)


def test_sequential_after_a_warm_up():
    """At the milestone it measures, and begins at what the curvature allows; in all versions of torch alike."""
    model = bowl()
    optimizer = SGD(model.parameters(), lr=1.0)
    warmup = LinearLR(optimizer, 0.01, 0.04, total_iters=5)
    inner = HomotopyLR(optimizer, model, warmup_steps=0, fraction=0.5)
    scheduler = SequentialLR(optimizer, [warmup, inner], [6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = train(model, optimizer, scheduler, 12)
    assert rates[0] == 0.01
    assert rates[5] == pytest.approx(0.04)
    assert rates[6:] == pytest.approx([0.1] * 6, rel=0.02)
    assert [row.step for row in inner.history] == list(range(7))
    assert scheduler.get_last_lr() == inner.get_last_lr()


def test_a_milestone_as_older_versions_of_torch_pass_it():
    """They call `step(0)` where newer ones call `_update_lr(0)`."""
    model = bowl()
    optimizer, scheduler = made(model, warmup_steps=0, fraction=0.5)
    scheduler.last_epoch -= 1  # as SequentialLR undoes the first step
    train(model, optimizer, ConstantLR(optimizer, 0.01), 2)
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(0)
    assert scheduler.last_epoch == 0
    assert scheduler.lr == pytest.approx(0.1, rel=0.02)


def test_sequential_before_another():
    model = bowl()
    calls = []

    def loss():
        calls.append(0)
        return model()

    optimizer = SGD(model.parameters(), lr=1.0)
    first = HomotopyLR(optimizer, loss, warmup_steps=4)
    scheduler = SequentialLR(optimizer, [first, ConstantLR(optimizer, 0.001, 100)], [5])
    assert not calls
    assert optimizer.param_groups[0]["lr"] == 0.01
    rates = train(model, optimizer, scheduler, 8)
    assert rates[:2] == pytest.approx([0.01, 0.01 * 100**0.25])
    assert rates[5:] == pytest.approx([0.001] * 3)


def test_chained_with_a_decay():
    model = bowl()
    optimizer = SGD(model.parameters(), lr=1.0)
    inner = HomotopyLR(optimizer, model, warmup_steps=0)
    scheduler = ChainedScheduler([inner, ExponentialLR(optimizer, 0.5)], optimizer)
    train(model, optimizer, scheduler, 5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(inner.lr / 2)  # as with LambdaLR


def test_get_lr_measures_nothing():
    model = bowl()
    optimizer, scheduler = made(model)
    train(model, optimizer, scheduler, 3)
    rows = len(scheduler.history)
    assert scheduler.get_lr() == scheduler.get_last_lr()
    assert len(scheduler.history) == rows


def test_it_reminds_of_the_order_as_torch_does():
    _, scheduler = made(bowl())
    with pytest.warns(UserWarning, match="Detected call of `lr_scheduler.step"):
        scheduler.step()


def test_warnings_of_others_are_told_once():
    """Entering `catch_warnings` in each step would have Python forget which it has told."""
    model = bowl()
    optimizer, scheduler = made(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(4):
            train(model, optimizer, scheduler, 1)
            warnings.warn("someone else's", stacklevel=1)
    assert len(told) == 1


def test_made_anew_with_last_epoch():
    """torch's way to go on without a state: the optimizer has the rates."""
    model = bowl()
    optimizer, scheduler = made(model, warmup_steps=5, total_steps=100)
    train(model, optimizer, scheduler, 20)
    again = HomotopyLR(optimizer, model, warmup_steps=5, total_steps=100, last_epoch=scheduler.last_epoch)
    assert again.last_epoch == 21
    assert again.lr == pytest.approx(scheduler.lr, rel=1e-2)
    assert again.base_lr == 1.0


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (SGD, {"warmup_steps": 8, "total_steps": 60}),
        (Adam, {"rule": "seed", "target_window": "p2"}),
        (SGD, {"rule": "seed_threshold", "target_window": 5, "warmup_steps": 30}),
        (TALT, {"warmup_steps": 8}),
    ],
)
def test_it_goes_on_bit_for_bit(settings, make, tmp_path):
    def begun():
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 3))).double()
        loss = lambda: cross_entropy(model(X), Y)  # noqa: E731
        optimizer = make(model.parameters(), lr=0.3)
        estimator = CurvatureEstimator(num_samples=2, seed=5)
        return model, loss, optimizer, HomotopyLR(optimizer, loss, estimator=estimator, **settings)

    torch.manual_seed(0)
    model, loss, optimizer, scheduler = begun()
    train(model, optimizer, scheduler, 17, loss)
    state = [o.state_dict() for o in (model, optimizer, scheduler)] + [torch.get_rng_state()]
    torch.save(state, tmp_path / "state.pt")
    rates = train(model, optimizer, scheduler, 25, loss)
    history = [row for row in scheduler.history if row.step > 17]

    model, loss, optimizer, scheduler = begun()
    *states, random = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, value in zip((model, optimizer, scheduler), states, strict=True):
        part.load_state_dict(value)
    torch.set_rng_state(random)
    assert scheduler.get_last_lr() == [rates[0]]
    assert scheduler.measured.trace == scheduler.history[-1].trace
    assert train(model, optimizer, scheduler, 25, loss) == rates
    again = [row for row in scheduler.history if row.step > 17]
    assert [(r.step, r.lr, r.curvature, r.target, r.trace) for r in again] == [
        (r.step, r.lr, r.curvature, r.target, r.trace) for r in history
    ]
    json.dumps(scheduler.state_dict()["history"])
    state = scheduler.state_dict()
    state["history"].clear(), state["base_lrs"].clear()
    assert scheduler.history
    assert scheduler.base_lrs


def test_copies_and_pickles():
    model = bowl()
    optimizer, scheduler = made(model, warmup_steps=5)
    train(model, optimizer, scheduler, 12)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert other.loss is not model
        assert other.get_last_lr() == scheduler.get_last_lr()
        train(other.loss, other.optimizer, other, 12)
        assert len(other.history) == 20
    assert len(scheduler.history) == 12


def test_the_same_seed_gives_the_same_rates():
    def met(seed: int) -> list[tuple[float, float]]:
        model = mlp().double()
        loss = lambda: cross_entropy(model(X), Y)  # noqa: E731
        optimizer = SGD(model.parameters(), lr=3.0)
        scheduler = HomotopyLR(optimizer, loss, estimator=CurvatureEstimator(seed=seed))
        train(model, optimizer, scheduler, 20, loss)
        return [(row.lr, row.hessian_norm) for row in scheduler.history]

    assert met(0) == met(0) != met(1)


def test_a_group_that_is_added_later():
    model = Quadratic(turned(VALUES), [(4,), (6,)])
    optimizer = SGD([model.parts[0]], lr=0.1)
    scheduler = HomotopyLR(optimizer, model, warmup_steps=5)
    train(model, optimizer, scheduler, 3)
    optimizer.add_param_group({"params": [model.parts[1]], "lr": 0.05})
    train(model, optimizer, scheduler, 6)
    assert scheduler.get_last_lr()[1] == pytest.approx(scheduler.get_last_lr()[0] / 2)
    assert scheduler.measured.hessian_norm == pytest.approx(
        float(torch.linalg.eigvalsh(turned(VALUES) * torch.cat([torch.ones(4), torch.full((6,), 0.5**0.5)])[:, None]
              * torch.cat([torch.ones(4), torch.full((6,), 0.5**0.5)]))[-1]), rel=0.02)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o, m: HomotopyLR(m, m), TypeError, "optimizer: expected a torch.optim.Optimizer, got Quadratic"),
        (lambda o, m: HomotopyLR(o, 3.0), TypeError, "loss: expected a function or an EmpiricalRisk, got float"),
        (
            lambda o, m: HomotopyLR(o, m, base_lr=0),
            ValueError,
            "base_lr: expected None or a finite number above 0, got 0",
        ),
        (
            lambda o, m: HomotopyLR(o, m, base_lr="1"),
            ValueError,
            "base_lr: expected None or a finite number above 0, got '1'",
        ),
        (lambda o, m: HomotopyLR(o, m, freqency=3), ValueError, "did you mean 'frequency'?"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(make, error, message):
    model = bowl()
    optimizer = SGD(model.parameters(), lr=1.0)
    with pytest.raises(error) as told:
        make(optimizer, model)
    assert message in str(told.value)
    assert "initial_lr" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["lr"] == 1.0
