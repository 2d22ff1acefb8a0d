"""The warm-up rises as fast as curvature allows, and passes on."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from losslab.optim import CurvatureAwareWarmup, CurvatureEstimator, HomotopyLR
from losslab.optim.homotopy.regroup import regrouped


def optimizer(*rates):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates or (1.0,)]
    return torch.optim.SGD(groups, lr=1.0)


def rates(of):
    return [group["lr"] for group in of.param_groups]


def test_the_rates_are_those_of_a_table_made_by_hand():
    """From 1 % of 8 by doubling; threshold 10; curvature 40 allows a quarter, 1e9 no less than the start."""
    sgd = optimizer(0.4, 0.1)
    warmup = CurvatureAwareWarmup(sgd, 8.0, initial_lr_fraction=0.125, growth=2.0, curvature_threshold=10.0)
    assert rates(sgd) == [1.0, 0.25]
    assert [group["initial_lr"] for group in sgd.param_groups] == [8.0, 2.0]  # what schedulers take for their base
    table = [(0.0, 2.0), (10.0, 4.0), (40.0, 2.0), (40.0, 2.0), (1e9, 1.0), (math.inf, 1.0), (5.0, 2.0), (9.0, 4.0)]
    for curvature, rate in table:
        assert warmup.step(curvature) == rate
        assert rates(sgd) == [rate, rate / 4]
        assert not warmup.is_complete
    assert warmup.step(10.0) == 8.0
    assert warmup.is_complete
    assert warmup.step(math.inf) == 8.0  # it is another's now
    assert rates(sgd) == [8.0, 2.0]


def test_defaults_take_95_steps_where_nothing_is_curved():
    sgd = optimizer()
    warmup = CurvatureAwareWarmup(sgd, 0.1)
    assert rates(sgd) == pytest.approx([0.001])
    steps = 0
    while not warmup.is_complete:
        warmup.step(1e6)
        steps += 1
    assert (steps, rates(sgd)) == (math.ceil(math.log(100) / math.log(1.05)), [0.1])


def test_one_that_is_held_back_for_good_ends_where_it_is():
    sgd = optimizer(1.0, 0.5)
    warmup = CurvatureAwareWarmup(sgd, 1.0, curvature_threshold=1.0, growth=2.0, max_steps=20)
    for _ in range(20):
        assert not warmup.is_complete
        warmup.step(4.0)
    assert warmup.is_complete
    assert rates(sgd) == [0.25, 0.125]
    assert CosineAnnealingLR(sgd, 10).base_lrs == [0.25, 0.125]


def test_nan_keeps_the_rate_and_warns_once():
    warmup = CurvatureAwareWarmup(optimizer(), 1.0, growth=2.0)
    before = warmup.step(1.0)
    with pytest.warns(UserWarning, match="a curvature of NaN was passed over; the rate stays") as caught:
        assert [warmup.step(math.nan) for _ in range(3)] == [before] * 3
    assert (len(caught), warmup.skipped, warmup.step(1.0)) == (1, 3, 2 * before)


def test_with_the_norm_of_the_hessian_a_step_stays_stable():
    """½·100·θ² with SGD diverges above 2/100; a threshold of ¼·2/target holds the rate at a quarter of that."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    sgd = torch.optim.SGD([weight], lr=1.0)
    loss = lambda: 50 * weight.square().sum()  # noqa: E731
    estimator = CurvatureEstimator()
    warmup = CurvatureAwareWarmup(sgd, 1.0, growth=1.5, curvature_threshold=0.25 * 2 / 1.0, initial_lr_fraction=1e-4)
    for _ in range(40):
        sgd.zero_grad()
        loss().backward()
        sgd.step()
        warmup.step(estimator(loss, [weight]).hessian_norm)
    assert warmup.rate == pytest.approx(0.25 * 2 / 100)
    assert not warmup.is_complete
    assert abs(weight.item()) < 1e-3


def trained(followed_by, *, restart=None, steps=24):
    """A small classifier through the warm-up into what follows; the rates of all steps. `restart` after that step."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.arange(32) % 2
    model = nn.Linear(4, 2)

    def made():
        sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        return sgd, CurvatureAwareWarmup(sgd, 0.5, initial_lr_fraction=0.1, growth=1.3, curvature_threshold=8.0)

    loss = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    (sgd, warmup), estimator, scheduler, found = made(), CurvatureEstimator(), None, []
    for step in range(steps):
        sgd.zero_grad()
        loss().backward()
        sgd.step()
        if scheduler is not None:
            scheduler.step()
        else:
            warmup.step(estimator(loss, list(model.parameters())).hessian_norm)
            if warmup.is_complete:
                scheduler = followed_by(sgd, loss)
        found.append(sgd.param_groups[0]["lr"])
        if step == restart:
            states = copy.deepcopy([each and each.state_dict() for each in (warmup, scheduler, estimator, sgd)])
            (sgd, warmup), estimator = made(), CurvatureEstimator()
            warmup.load_state_dict(states[0])
            scheduler = followed_by(sgd, loss) if warmup.is_complete else None
            if scheduler is not None:
                scheduler.load_state_dict(states[1])
            estimator.load_state_dict(states[2])
            sgd.load_state_dict(states[3])
    return found, model.weight.detach().clone()


FOLLOWERS = {
    "homotopy": lambda sgd, loss: HomotopyLR(sgd, loss, warmup_steps=0, total_steps=20),
    "cosine": lambda sgd, loss: CosineAnnealingLR(sgd, 20),
    "steps": lambda sgd, loss: StepLR(sgd, 4, 0.5),
}


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_it_passes_on_at_the_rate_it_has_reached(follower):
    found, _ = trained(FOLLOWERS[follower])
    top = found.index(0.5)
    assert found[0] == pytest.approx(0.5 * 0.1 * 1.3)
    assert all(a < b for a, b in itertools.pairwise(found[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(found[top:]))
    assert found[top + 1] > 0.45  # no jump
    assert found[-1] < 0.45  # it is at work


@pytest.mark.parametrize("follower", ["homotopy", "cosine"])
@pytest.mark.parametrize("restart", [3, 15])
def test_it_goes_on_from_its_state_to_the_bit(follower, restart):
    whole, weights = trained(FOLLOWERS[follower])
    parts, same = trained(FOLLOWERS[follower], restart=restart)
    assert parts == whole
    assert torch.equal(weights, same)


def test_a_rate_that_is_a_tensor_stays_one():
    sgd = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.1), capturable=True)
    lr = sgd.param_groups[0]["lr"]
    warmup = CurvatureAwareWarmup(sgd, 1.0, growth=2.0)
    warmup.step(0.0)
    assert sgd.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_lr": 0.0}, r"^target_lr: expected a finite number above 0, got 0\.0$"),
        ({"initial_lr_fraction": 2}, r"^initial_lr_fraction: expected a number above 0 and at most 1, got 2$"),
        ({"growth": 1.0}, r"^growth: expected a finite number above 1, got 1\.0$"),
        ({"curvature_threshold": -1.0}, r"^curvature_threshold: expected a number above 0, got -1\.0$"),
        ({"max_steps": 0}, r"^max_steps: expected an int of at least 1, got 0$"),
    ],
)
def test_a_number_out_of_range_is_refused_and_the_rates_stay(settings, message):
    sgd = optimizer(0.3)
    with pytest.raises(ValueError, match=message):
        CurvatureAwareWarmup(sgd, **{"target_lr": 1.0, **settings})
    assert rates(sgd) == [0.3]


def test_a_first_group_without_a_rate_and_a_negative_curvature_are_refused():
    with pytest.raises(ValueError, match=r"^optimizer: expected a first group whose lr is above 0, got 0\.0; set its"):
        CurvatureAwareWarmup(optimizer(0.0, 1.0), 1.0)
    warmup = CurvatureAwareWarmup(optimizer(), 1.0)
    with pytest.raises(ValueError, match=r"^curvature: expected a number of at least 0, got -1\.0$"):
        warmup.step(-1.0)


def test_groups_that_are_split_or_added_later_keep_their_ratio():
    one, two, three = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [one, two], "lr": 0.4}], lr=0.1)
    warmup = CurvatureAwareWarmup(optimizer, 0.2, initial_lr_fraction=0.1, growth=2.0)
    regrouped(optimizer, "second", [two])
    optimizer.add_param_group({"params": [three], "lr": 0.05})
    for _ in range(4):
        warmup.step(0.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.2, 0.05])
