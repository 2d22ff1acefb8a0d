"""From curvature to rate: the formulas against numbers worked out by hand, percentiles against NumPy's, refusals."""

import math
import re

import numpy as np
import pytest

from losslab.optim import Curvature, HomotopyOptions
from losslab.optim.homotopy.percentile import P2Percentile, WindowedPercentile
from losslab.optim.homotopy.rate import RateRule
from losslab.optim.homotopy.rules import averaged, decayed, followed, is_due, risen, seed_factor, stable_rate

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("kappa", "target", "alpha", "document", "code"),
    [
        (0.0, 100.0, 1.0, 1.0, 1.0),
        (50.0, 100.0, 1.0, 2 / 3, 1.0),
        (100.0, 100.0, 1.0, 1 / 2, 1.0),
        (200.0, 100.0, 1.0, 1 / 3, 1 / 2),
        (1000.0, 100.0, 1.0, 1 / 11, 1 / 10),
        (300.0, 100.0, 0.5, 2 / 5, 1 / 2),
        (300.0, 100.0, 2.0, 1 / 7, 1 / 5),
        (300.0, 100.0, 0.0, 1.0, 1.0),
        (INF, 100.0, 1.0, 0.0, 0.0),
        (INF, 100.0, 0.0, 1.0, 1.0),
        (INF, NAN, 1.0, 0.0, 0.0),
        (5.0, NAN, 1.0, 1.0, 1.0),
        (NAN, 100.0, 1.0, 1.0, 1.0),
        (5.0, 0.0, 1.0, 0.0, 0.0),
        (0.0, 0.0, 1.0, 1.0, 1.0),
    ],
)
def test_the_founders_rules_against_a_table(kappa, target, alpha, document, code):
    assert seed_factor(kappa, target, alpha) == pytest.approx(document, rel=1e-12)
    assert seed_factor(kappa, target, alpha, threshold=True) == pytest.approx(code, rel=1e-12)


def test_the_stable_rate_against_a_table():
    for curvature, limit, fraction, rate in (
        (10.0, 2.0, 1.0, 0.2),
        (10.0, 3.8, 0.25, 0.095),
        (0.5, 38.0, 0.25, 19.0),
        (0.0, 2.0, 0.5, INF),
        (-3.0, 2.0, 0.5, INF),
        (NAN, 2.0, 0.5, INF),
        (10.0, NAN, 0.5, INF),
        (INF, 2.0, 0.5, 0.0),
    ):
        assert stable_rate(curvature, limit, fraction) == pytest.approx(rate, rel=1e-12)


def test_followed_rises_at_once_and_falls_by_the_logarithm():
    assert followed(NAN, 3.0, 0.9) == 3.0
    assert followed(3.0, 3.0, 0.9) == 3.0
    assert followed(3.0, 400.0, 0.9) == 400.0
    assert followed(100.0, 1.0, 0.5) == pytest.approx(10.0)
    assert followed(100.0, 1.0, 0.0) == 1.0
    assert followed(100.0, 1.0, 1.0) == 100.0
    assert followed(100.0, 0.0, 0.9) == 90.0
    assert followed(0.0, 0.0, 0.9) == 0.0
    assert followed(100.0, -5.0, 0.9) == 90.0  # negative curvature breaks no step
    assert followed(0.0, 2.0, 0.9) == 2.0
    value = 1e30
    for _ in range(200):
        value = followed(value, 2.0, 0.9)
    assert value == pytest.approx(2.0, rel=1e-6)


def test_averaged_forgets_what_is_infinite():
    assert averaged(NAN, 5.0, 0.9) == 5.0
    assert averaged(10.0, 20.0, 0.75) == 12.5
    assert averaged(10.0, INF, 0.9) == INF
    assert averaged(INF, 4.0, 0.9) == 4.0


def test_risen_and_decayed():
    assert risen(0.5, 1.5, 1.0) == 0.75
    assert risen(0.5, 1.5, 0.6) == 0.6
    assert risen(0.5, 1.5, 0.1) == 0.1
    for shape, half, quarter in (("cosine", 0.5, 0.5 + 0.5 * math.cos(math.pi / 4)), ("linear", 0.5, 0.75)):
        assert decayed(0, 10, 50, shape) == decayed(10, 10, 50, shape) == 1.0
        assert decayed(20, 10, 50, shape) == pytest.approx(quarter)
        assert decayed(30, 10, 50, shape) == pytest.approx(half)
        assert decayed(50, 10, 50, shape) == decayed(70, 10, 50, shape) == pytest.approx(0, abs=1e-15)
        assert decayed(11, 10, 10, shape) == pytest.approx(0, abs=1e-15)
    for start, step in ((10, 30), (10, 40), (34, 42), (40, 45)):  # of 50 steps the last 20, or what the rise leaves
        assert decayed(step, start, 50, "cooldown") == pytest.approx((50 - step) / min(20, 50 - start))
    assert decayed(29, 10, 50, "cooldown") == decayed(0, 0, 1, "cooldown") == 1.0
    assert decayed(50, 10, 50, "cooldown") == decayed(70, 10, 50, "cooldown") == 0.0
    assert decayed(40, 10, None, "cosine") == decayed(40, 10, None, "cooldown") == decayed(40, 10, 50, "none") == 1.0


def test_estimates_are_many_at_first():
    def due(frequency: int) -> list[int]:
        return [step for step in range(400) if is_due(step, frequency)]

    assert due(1) == list(range(400))
    assert due(10)[12:24] == [12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 28, 30]
    assert [step for step in due(10) if step >= 128] == list(range(130, 400, 10))
    often = due(100)
    for low in (16, 32, 64, 128):  # eight for each doubling
        assert sum(low <= step < 2 * low for step in often) == 8


def test_the_rate_stays_below_the_sharpest_batchs_bound_for_good():
    """Where batches are fitted curvature vanishes: the followed λ forgets, the bound of the largest does not."""
    rule = RateRule(HomotopyOptions(warmup_steps=0, fraction=0.25, ema=0.5, release=2.0), limit=2.0)
    rates = []
    for step, number in enumerate((8.0, 8.0, 1e-3, 1e-6, 1e-9, 1e-12)):
        rule.take(curved(number))
        rule.advance(1.0, step)
        rates.append(rule.rate)
    assert rates == pytest.approx([0.0625, 0.0625, 0.125, 0.25, 0.25, 0.25])  # 2/8, and a quarter of it at first


def test_exact_percentiles():
    numbers = np.random.default_rng(0).lognormal(size=40)
    whole, windowed = WindowedPercentile(0.75), WindowedPercentile(0.75, 7)
    assert math.isnan(whole.value)
    for count, number in enumerate(numbers, start=1):
        whole.add(float(number))
        windowed.add(float(number))
        assert whole.value == pytest.approx(np.quantile(numbers[:count], 0.75))
        assert windowed.value == pytest.approx(np.quantile(numbers[max(count - 7, 0) : count], 0.75))
    assert len(windowed.numbers) == 7
    again = WindowedPercentile(0.75, 7)
    again.load_state_dict(windowed.state_dict())
    windowed.add(1.0)
    assert len(again.numbers) == 7
    assert again.value != windowed.value


@pytest.mark.parametrize("level", [0.1, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("draw", ["normal", "lognormal", "uniform", "exponential"])
def test_p2_against_numpy(level, draw):
    """Five numbers are enough: within a fiftieth in rank after 1,000, exact up to five."""
    numbers = getattr(np.random.default_rng(3), draw)(size=1000)
    found = P2Percentile(level)
    assert math.isnan(found.value)
    for count, number in enumerate(numbers, start=1):
        found.add(float(number))
        if count <= 5:
            assert found.value == pytest.approx(np.quantile(numbers[:count], level))
        assert numbers[:count].min() <= found.value <= numbers[:count].max()
    assert abs((numbers <= found.value).mean() - level) < 0.02
    assert len(found.state_dict()["heights"]) == 5


def test_p2_of_the_authors():
    """The example of Jain & Chlamtac 1985, table I: the median of twenty numbers."""
    found = P2Percentile(0.5)
    numbers = [0.02, 0.15, 0.74, 3.39, 0.83, 22.37, 10.15, 15.43, 38.62, 15.92]
    for number in [*numbers, 34.60, 10.28, 1.47, 0.40, 0.05, 11.39, 0.27, 0.42, 0.09, 11.37]:
        found.add(number)
    assert found.value == pytest.approx(4.44, abs=0.005)
    assert found.heights == pytest.approx([0.02, 0.49, 4.44, 17.20, 38.62], abs=0.006)


@pytest.mark.parametrize("level", [0.0, 1.0, 0.75])
def test_p2_of_numbers_that_are_all_alike_or_sorted(level):
    alike = P2Percentile(level)
    for _ in range(50):
        alike.add(3.0)
    assert alike.value == 3.0
    for numbers in (np.arange(500.0), np.arange(500.0)[::-1]):
        found = P2Percentile(level)
        for number in numbers:
            found.add(float(number))
        assert found.value == pytest.approx(499 * level, abs=500 * 0.02)


def test_p2_goes_on_from_a_saved_state():
    numbers = np.random.default_rng(1).normal(size=100)
    for stop in (3, 50):
        one, two = P2Percentile(0.75), P2Percentile(0.75)
        for number in numbers[:stop]:
            one.add(float(number))
        two.load_state_dict(one.state_dict())
        for number in numbers[stop:]:
            one.add(float(number))
        value = two.value
        assert value != one.value
        for number in numbers[stop:]:
            two.add(float(number))
        assert two.value == one.value


def curved(hessian_norm: float, gradient_norm: float = 1.0) -> Curvature:
    return Curvature(1.0, gradient_norm, hessian_norm)


def test_the_stable_rule_along_a_way():
    """Rises by 100^(1/4) a step, is braked to fraction·limit/λ at once, recovers by `release`."""
    options = HomotopyOptions(warmup_steps=4, fraction=0.5, release=1.5, ema=0.5)
    rule, growth, rates = RateRule(options, limit=2.0), 100**0.25, []
    for step in range(9):
        if step == 3:
            rule.take(curved(4.0))
        if step == 6:
            rule.take(curved(0.04))  # 0.4 is reckoned with: half the way down, by the logarithm
        rule.advance(1.0, step)
        rates.append(rule.at(step + 1))
    # 2/4, the bound of the largest λ, is where it ends
    expected = [0.01, 0.01 * growth**2, 0.01 * growth**3, 0.25, 0.25, 0.25, 0.375, 0.5, 0.5]
    assert rates[0] == 0.01
    assert rates[1:3] == pytest.approx([0.01 * growth, 0.01 * growth**2])
    assert rates[3:] == pytest.approx(expected[3:])
    assert rule.target(1.0, 8) == 1.0
    assert rule.curvature == pytest.approx(0.4)


def test_the_part_of_the_limit_grows():
    """In a straight line over the run, whatever it begins at; where nothing says how long that is it stays."""
    parts = [HomotopyOptions(total_steps=200).part(step) for step in (-1, 0, 50, 100, 200, 300)]
    assert parts == pytest.approx([0.2, 0.2, 0.275, 0.35, 0.5, 0.5])
    assert HomotopyOptions().part(10**6) == 0.2
    falling = HomotopyOptions(total_steps=10, fraction=0.8, late_fraction=0.2)
    assert [falling.part(step) for step in (0, 5, 10)] == pytest.approx([0.8, 0.5, 0.2])
    assert HomotopyOptions(total_steps=10, fraction=1.5).part(7) == 1.5
    rule = RateRule(HomotopyOptions(warmup_steps=0, total_steps=100, decay="none", release=10.0), limit=2.0)
    rates = []
    for step in range(100):
        rule.take(curved(8.0))
        rule.advance(1.0, step)
        rates.append(rule.at(step + 1))
    assert rates == pytest.approx([(0.2 + 0.3 * step / 100) * 2 / 8 for step in range(100)])


@pytest.mark.parametrize(
    ("known", "given", "expected"),
    [
        ({}, {}, (0.2, 0.5)),
        ({}, {"fraction": 2.0}, (2.0, 2.0)),
        ({"adaptive": True}, {}, (0.3, 0.5)),
        ({"together": False}, {}, (0.2, 0.2)),
        ({"adaptive": True, "together": False}, {}, (0.3, 0.3)),
        ({"exact": False, "adaptive": True}, {}, (0.05, 0.05)),
        ({"exact": False}, {"fraction": 0.3, "late_fraction": 0.4}, (0.3, 0.4)),
        ({"exact": False, "together": False}, {"late_fraction": 0.4}, (0.05, 0.4)),
    ],
)
def test_fractions_that_were_not_given(known, given, expected):
    found = HomotopyOptions(**given).settled(**known)
    assert (found.fraction, found.late_fraction) == expected
    assert found.settled(adaptive=True, together=False) == found


def test_an_adaptive_optimizer_survives_one_sharp_batch():
    """With fixed P the peak counts at once; else the median of three."""
    options = HomotopyOptions(warmup_steps=0, fraction=0.4, ema=0.5)
    found = {}
    for adaptive in (False, True):
        rule, found[adaptive] = RateRule(options, limit=2.0, adaptive=adaptive), []
        for number in (4.0, 64.0, 4.0, 32.0, 16.0, 16.0):
            rule.take(curved(number))
            found[adaptive].append(rule.curvature)
        rule.advance(1.0, 0)
        assert rule.sharpest == (0.0 if adaptive else 64.0)
        assert rule.at(1) == pytest.approx(0.8 / rule.curvature if adaptive else min(0.8 / rule.curvature, 2 / 64))
    # medians: 4, 32, 16, 16; peaks are forgotten by half, of the logarithm
    assert found[False] == pytest.approx([4, 64, 16, 32, 2**4.5, 2**4.25])
    assert found[True] == pytest.approx([NAN, NAN, 4, 32, 2**4.5, 2**4.25], nan_ok=True)


def test_without_a_rise_an_adaptive_optimizer_is_held_back_from_its_first_estimate_on():
    """λ is far too large after the first step: it brakes; once there are three the rate begins anew at the median's."""
    rule = RateRule(HomotopyOptions(warmup_steps=0, fraction=0.5), limit=2.0, adaptive=True)
    rates = []
    for step, number in enumerate((4000.0, 8.0, 4.0, 4.0)):
        rule.take(curved(number))
        rule.advance(1.0, step)
        rates.append(rule.at(step + 1))
    # medians: 8, 4; the peak of 8 is forgotten to 8^0.9·4^0.1, and the rate follows by 2 % a step at most
    assert rates == pytest.approx([1 / 4000, 1 / 8, 1 / 8, 1.02 / 8])


def test_where_nothing_was_measured_a_rate_goes_on():
    """As after a resumption: the rate that the optimizer had is not η₀ again before the next estimate."""
    rule = RateRule(HomotopyOptions(warmup_steps=0), limit=2.0, adaptive=True)
    rule.rate = 0.01
    rule.advance(1.0, 7)
    assert rule.rate == pytest.approx(0.0102)


def test_an_adaptive_optimizers_bound_for_good_waits_until_its_averages_are_formed():
    rule = RateRule(HomotopyOptions(), limit=2.0, adaptive=True)
    seen = []
    for number in (*[100.0] * 10, *[10.0] * 20, 20.0, 20.0, 1.0):
        rule.take(curved(number))
        seen.append(rule.sharpest)
    # two estimates make no median, and the sixteenth median is that of the last of 18
    assert seen[:17] == [0.0] * 17
    assert seen[17] == 10.0
    assert seen[-1] == 20.0
    other = RateRule(HomotopyOptions(), limit=2.0, adaptive=True)
    other.load_state_dict(rule.state_dict())
    assert (other.sharpest, other.seen) == (20.0, rule.seen)


def test_the_last_estimates_are_saved():
    one, two = (RateRule(HomotopyOptions(), limit=2.0, adaptive=True) for _ in range(2))
    for number in (4.0, 64.0):
        one.take(curved(number))
    two.load_state_dict(one.state_dict())
    for rule in (one, two):
        rule.take(curved(50.0))
    assert two.curvature == one.curvature == 50.0


def test_the_founders_rule_along_a_way():
    """The κ are averaged, their percentile is of the κ themselves; a zero gradient stops, and does not stall."""
    options = HomotopyOptions(rule="seed", ema=0.5, target_percentile=0.5)
    rule = RateRule(options, limit=math.nan)
    rates = []
    for step, (h, g) in enumerate([(4.0, 2.0), (3.0, 1.0), (5.0, 0.0), (1.0, 1.0)]):
        rule.take(curved(h, g))
        rule.advance(1.0, step)
        rates.append(rule.at(step + 1))
    # κ 1, 3, ∞, 1; averages 1, 2, ∞, 1; medians of the finite ones 1, 2, 2, 1
    assert rates == pytest.approx([1 / 2, 1 / 2, 0.0, 1 / 2])
    assert rule.percentile.numbers == [1.0, 3.0, 1.0]
    assert rule.target(1.0, 8) == 1.0


def test_a_rate_of_zero_in_a_warm_up_is_not_the_last():
    rule = RateRule(HomotopyOptions(rule="seed", warmup_steps=10, target_curvature=1.0), limit=math.nan)
    rates = []
    for step in range(14):
        if step in (0, 3):
            rule.take(curved(1.0, gradient_norm=0.0 if step == 0 else 10.0))
        rule.advance(1.0, step)
        rates.append(rule.at(step + 1))
    assert rates[:3] == [0, 0, 0]
    assert rates[3] == pytest.approx(0.01 ** (1 - 4 / 10))
    assert rates[9:] == pytest.approx([1 / 1.01] * 5)


def test_floor_and_bounds():
    for settings, expected in (({"floor": 0.1}, 0.1), ({"min_lr": 0.02}, 0.02), ({}, 0.0)):
        rule = RateRule(HomotopyOptions(rule="seed", target_curvature=1.0, **settings), limit=math.nan)
        rule.take(curved(1.0, gradient_norm=0.0))
        rule.advance(1.0, 0)
        assert rule.at(0) == expected
    rule = RateRule(HomotopyOptions(rule="seed", max_lr=0.3), limit=math.nan)
    rule.advance(1.0, 0)
    assert rule.at(0) == 0.3
    rule = RateRule(HomotopyOptions(warmup_steps=0, total_steps=10, min_lr=0.01), limit=2.0)
    rule.advance(1.0, 0)
    assert (rule.at(6), rule.at(8), rule.at(10)) == (1.0, 0.5, 0.01)


def test_how_long_the_rise_takes():
    assert HomotopyOptions().rise == 100
    assert HomotopyOptions(total_steps=500).rise == 50
    assert HomotopyOptions(total_steps=500, warmup_steps=7).rise == 7
    assert HomotopyOptions(rule="seed", total_steps=500).rise == 0
    assert HomotopyOptions(rule="seed", warmup_steps=7).rise == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rule": "stabel"},
            "rule: expected one of stable, seed, seed_threshold, got 'stabel'; did you mean 'stable'?",
        ),
        ({"decay": 1}, "decay: expected one of cooldown, cosine, linear, none, got 1"),
        ({"fraction": 0}, "fraction: expected None or a finite number above 0, got 0"),
        ({"fraction": "0.5"}, "fraction: expected None or a finite number above 0, got '0.5'"),
        ({"initial_fraction": 1.5}, "initial_fraction: expected a number above 0 and at most 1, got 1.5"),
        ({"release": 1.0}, "release: expected a finite number above 1, got 1.0"),
        ({"alpha": -1.0}, "alpha: expected a finite number of at least 0, got -1.0"),
        ({"alpha": INF}, "alpha: expected a finite number of at least 0, got inf"),
        ({"alpha": NAN}, "alpha: expected a finite number of at least 0, got nan"),
        ({"target_curvature": 0}, "target_curvature: expected 'adaptive' or a finite number above 0, got 0"),
        ({"target_curvature": "x"}, "target_curvature: expected 'adaptive' or a finite number above 0, got 'x'"),
        ({"target_percentile": 75}, "target_percentile: expected a number of at least 0 and at most 1, got 75"),
        ({"target_window": "p3"}, "target_window: expected 'p2' or an int of at least 1, got 'p3'"),
        ({"target_window": 0}, "target_window: expected 'p2' or an int of at least 1, got 0"),
        ({"floor": 2}, "floor: expected a number of at least 0 and at most 1, got 2"),
        ({"frequency": 0}, "frequency: expected an int of at least 1, got 0"),
        ({"frequency": 2.5}, "frequency: expected an int of at least 1, got 2.5"),
        ({"ema": True}, "ema: expected a number of at least 0 and at most 1, got True"),
        ({"min_lr": 0.2, "max_lr": 0.1}, "min_lr: expected a number of at least 0 and at most 0.1, got 0.2"),
        ({"max_lr": 0}, "max_lr: expected a number above 0, got 0"),
        ({"warmup_steps": -1}, "warmup_steps: expected None or an int of at least 0, got -1"),
        ({"total_steps": 0}, "total_steps: expected None or an int of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        HomotopyOptions.of(settings)


def test_an_unknown_setting_is_told_with_the_nearest():
    with pytest.raises(ValueError, match=r"warmup: HomotopyLR has no such setting; .*; did you mean 'warmup_steps'\?"):
        HomotopyOptions.of({"warmup": 3})
