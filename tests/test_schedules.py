"""Learning-rate schedules are torch's, as pure functions of the step."""

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)

from losslab.studies.schedules import rate_factor
from losslab.studies.sections import ScheduleConfig

TORCH = {
    "constant": lambda optimizer, steps: ConstantLR(optimizer, 1.0),
    "cosine": CosineAnnealingLR,
    "linear": lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, steps),
}


def driven(make, steps, rate=0.4):
    """The rate of each step under one of torch's schedulers, over the peak."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / rate)
        optimizer.step()
        scheduler.step()
    return rates


def factors(name, total, warmup=0):
    schedule = ScheduleConfig(name=name, warmup_steps=warmup)
    return [rate_factor(schedule, step, total) for step in range(total)]


@pytest.mark.parametrize("name", TORCH)
def test_falls_as_torchs(name):
    assert factors(name, 37) == pytest.approx(driven(lambda optimizer: TORCH[name](optimizer, 37), 37), abs=1e-12)


@pytest.mark.parametrize("name", TORCH)
def test_rises_first_and_then_falls_over_what_is_left(name):
    def make(optimizer):
        rise = LambdaLR(optimizer, lambda step: (step + 1) / 8)
        return SequentialLR(optimizer, [rise, TORCH[name](optimizer, 29)], milestones=[8])

    assert factors(name, 37, warmup=8) == pytest.approx(driven(make, 37), abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 8])
def test_cooldown_stays_and_falls_as_torchs_line_over_the_last_two_fifths(warmup):
    def make(optimizer):
        rise = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1.0) if warmup else 1.0)
        return SequentialLR(optimizer, [rise, LinearLR(optimizer, 1.0, 0.0, 16)], milestones=[24])

    assert factors("cooldown", 40, warmup) == pytest.approx(driven(make, 40), abs=1e-12)


@pytest.mark.parametrize("total", [4, 10, 37, 100])
def test_one_cycle_is_torchs(total):
    expected = driven(lambda optimizer: OneCycleLR(optimizer, 0.4, total_steps=total + 1), total + 1)
    found = factors("one_cycle", total + 1)
    assert found == pytest.approx(expected, rel=1e-9)


def test_one_cycle_rises_as_long_as_it_is_told():
    expected = driven(lambda optimizer: OneCycleLR(optimizer, 0.4, total_steps=41, pct_start=20 / 41), 41)
    assert factors("one_cycle", 41, warmup=20) == pytest.approx(expected, rel=1e-9)
    assert factors("one_cycle", 41, warmup=20).index(1.0) == 19


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "cooldown", "one_cycle"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 0), (3, 0), (1, 1), (3, 3), (3, 9), (2, 1), (5, 4)])
def test_shortest_runs_have_a_rate(name, total, warmup):
    found = factors(name, total, warmup)
    assert all(0 < factor <= 1 for factor in found[:-1])
    assert 0 <= found[-1] <= 1
    if warmup >= total:
        assert found == sorted(found)
