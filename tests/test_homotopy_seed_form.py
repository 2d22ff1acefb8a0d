"""The founders' form of the homotopy rate: their numbers by hand, their calling sequence, and its files."""

import csv
import math
import warnings
from dataclasses import asdict

import pytest
import torch
from torch import nn

from losslab.optim import CurvatureEstimator, HomotopyLR, HomotopyLRScheduler, HutchinsonConfig, Measured
from losslab.optim.homotopy.history import export
from losslab.optim.homotopy.rules import averaged, seed_factor
from losslab.ranks import Ranks

COLUMNS = ["step", "loss", "lr", "curvature", "hessian_norm", "grad_norm", "trace", "target", "seconds"]
CHEAP = HutchinsonConfig(num_samples=0, power_iterations=3)
SPECTRUM = (10.0, 3.0, 1.0)


def quadratic(*point, dtype=torch.float64, spectrum=SPECTRUM):
    """½Σλᵢθᵢ², its parameter, and what computes it."""
    weights = nn.Parameter(torch.tensor(point, dtype=dtype))
    scale = torch.tensor(spectrum, dtype=dtype)
    return weights, lambda: (scale * weights.square()).sum() / 2


def fixed(**settings):
    return HomotopyLRScheduler.Config(**{"base_lr": 0.1, "adaptive_target": False, **settings})


def every_step(**settings):
    return HutchinsonConfig(**{"num_samples": 0, "estimation_frequency": 1, "ema_decay": 0.0, **settings})


def test_names_and_defaults_are_the_founders():
    assert asdict(HutchinsonConfig()) == {
        "num_samples": 10,
        "power_iterations": 20,
        "power_iter_tol": 1e-6,
        "use_rademacher": True,
        "estimation_frequency": 10,
        "ema_decay": 0.9,
    }
    theirs = {
        "base_lr": 1e-3,
        "target_curvature": 1e4,
        "min_lr": 1e-7,
        "max_lr": 1.0,
        "alpha": 1.0,
        "warmup_steps": 100,
        "adaptive_target": True,
        "target_percentile": 0.75,
    }
    assert asdict(HomotopyLRScheduler.Config()) == {**theirs, "rule": "seed"}
    with pytest.raises(AttributeError, match="base_rate"):
        HomotopyLRScheduler.Config().base_rate = 0.1


@pytest.mark.parametrize(
    ("kappa", "alpha", "seed", "threshold"),
    [  # κ* = 2, η₀ = 0.1
        (0.0, 1.0, 0.1, 0.1),
        (1.0, 1.0, 0.1 / 1.5, 0.1),
        (2.0, 1.0, 0.05, 0.1),
        (6.0, 1.0, 0.025, 0.1 / 3),
        (6.0, 0.5, 0.04, 0.05),
        (6.0, 0.0, 0.1, 0.1),
        (1e12, 1.0, 1e-4, 1e-4),  # min_lr
    ],
)
@pytest.mark.parametrize("form", ["tensor", "function"])
def test_the_rate_is_that_of_a_table_made_by_hand(kappa, alpha, seed, threshold, form):
    """½λθ² at θ = 1: ‖H‖ = λ, ‖∇L‖ = λ, κ = 1/λ."""
    for rule, expected in (("seed", seed), ("seed_threshold", threshold)):
        if kappa:
            weights, loss = quadratic(1.0, spectrum=(1 / kappa,))
        else:  # a linear loss
            weights = nn.Parameter(torch.ones(1, dtype=torch.float64))
            loss = weights.sum
        config = fixed(target_curvature=2.0, alpha=alpha, rule=rule, min_lr=1e-4)
        scheduler = HomotopyLRScheduler(config, CHEAP)
        rate = scheduler.step(loss() if form == "tensor" else loss, [weights], 0)
        assert rate == pytest.approx(expected, rel=1e-10)
        assert scheduler.lr == rate


def test_max_lr_is_above_everything():
    weights, loss = quadratic(1.0, spectrum=(1e6,))
    assert HomotopyLRScheduler(fixed(base_lr=3.0), CHEAP).step(loss(), [weights], 0) == 1.0


def test_no_gradient_gives_the_smallest_rate_adaptive_or_not():
    for adaptive in (False, True):
        weights, loss = quadratic(0.0, 0.0, 0.0)
        config = fixed(min_lr=1e-5, adaptive_target=adaptive, warmup_steps=0)
        scheduler = HomotopyLRScheduler(config, CHEAP)
        assert scheduler.step(loss(), [weights], 0) == 1e-5
        assert scheduler.curvature == math.inf
        assert scheduler.history[0].grad_norm == 0.0


def test_curvature_of_a_quadratic_is_its_hessian():
    weights, loss = quadratic(1.0, 1.0, 1.0)
    config = HutchinsonConfig(num_samples=4, power_iterations=60, power_iter_tol=1e-12)
    scheduler = HomotopyLRScheduler(fixed(), config)
    scheduler.step(loss(), [weights], 0)
    (row,) = scheduler.history
    gradient = math.sqrt(sum(value**2 for value in SPECTRUM))
    assert row.hessian_norm == pytest.approx(10.0, rel=1e-10)
    assert row.grad_norm == pytest.approx(gradient, rel=1e-12)
    assert row.curvature == pytest.approx(10.0 / gradient**2, rel=1e-10)
    assert row.trace == pytest.approx(sum(SPECTRUM), rel=1e-12)  # random signs: exact for a diagonal H
    assert row.loss == pytest.approx(7.0, rel=1e-12)
    assert 2 * row.loss * row.curvature > 1  # ‖∇L‖² ≤ 2‖H‖L of any quadratic
    normal = HomotopyLRScheduler(fixed(), HutchinsonConfig(num_samples=4, use_rademacher=False))
    normal.step(loss(), [weights], 0)
    assert abs(normal.measured.trace - sum(SPECTRUM)) > 1e-6  # normal numbers are not


def test_negative_curvature_counts_by_its_size():
    weights, loss = quadratic(1.0, 1.0, spectrum=(-8.0, 1.0))
    scheduler = HomotopyLRScheduler(fixed(target_curvature=1.0), HutchinsonConfig(num_samples=0, power_iterations=40))
    scheduler.step(loss(), [weights], 0)
    assert scheduler.measured.hessian_norm == pytest.approx(8.0, rel=1e-8)
    assert scheduler.lr == pytest.approx(0.1 / (1 + 8 / 65), rel=1e-8)


def test_curvature_is_averaged_and_the_target_is_a_percentile_after_its_steps():
    """κ = 1/λ of five losses in turn; memory ½; target fixed for two steps, then the median."""
    config = fixed(target_curvature=8.0, adaptive_target=True, warmup_steps=2, target_percentile=0.5)
    scheduler = HomotopyLRScheduler(config, every_step(ema_decay=0.5))
    rates = []
    for step, kappa in enumerate((2.0, 4.0, 6.0, 10.0)):
        weights, loss = quadratic(1.0, spectrum=(1 / kappa,))
        rates.append(scheduler.step(loss(), [weights], step))
    averages, targets = (2.0, 3.0, 4.5, 7.25), (8.0, 8.0, 4.0, 5.0)
    assert [row.curvature for row in scheduler.history] == pytest.approx(averages)
    assert [row.target for row in scheduler.history] == pytest.approx(targets)
    assert rates == pytest.approx([0.1 / (1 + k / t) for k, t in zip(averages, targets, strict=True)])


def test_an_infinite_curvature_is_forgotten():
    assert averaged(math.inf, 3.0, 0.9) == 3.0
    assert averaged(3.0, math.inf, 0.9) == math.inf
    assert averaged(math.nan, 3.0, 0.9) == 3.0
    assert averaged(2.0, 4.0, 0.75) == 2.5
    assert seed_factor(math.inf, math.nan, 1.0) == 0.0
    assert seed_factor(math.inf, math.nan, 0.0) == 1.0


def test_curvature_is_measured_at_every_tenth_step_only():
    weights, loss = quadratic(1.0, 1.0, 1.0)
    calls = []
    scheduler = HomotopyLRScheduler(fixed(), CHEAP)
    for step in range(25):
        scheduler.step(lambda step=step: calls.append(step) or loss(), [weights], step)
    assert calls == [row.step for row in scheduler.history] == [0, 10, 20]
    late = HomotopyLRScheduler(fixed(), CHEAP)
    late.step(loss, [weights], 13)  # the first one is always measured
    late.step(None, [weights], 14)  # and what is not due is not looked at
    assert [row.step for row in late.history] == [13]


def test_the_graph_and_the_gradients_stay_as_they_are():
    weights, loss = quadratic(1.0, 2.0, 3.0)
    weights.grad = torch.full_like(weights, 5.0)
    value = loss()
    HomotopyLRScheduler(fixed()).step(value, [weights], 0)
    assert weights.grad.tolist() == [5.0, 5.0, 5.0]
    weights.grad = None
    value.backward()
    assert weights.grad.tolist() == [10.0, 6.0, 3.0]


def test_the_founders_sequence_with_the_graph_kept_trains():
    """backward, step of the schedule, update by hand: three ways to have a graph, the same numbers."""
    found = []
    for way in ("before", "retained", "function"):
        weights, loss = quadratic(1.0, 1.0, 1.0)
        scheduler = HomotopyLRScheduler(fixed(target_curvature=1.0), every_step())
        for step in range(5):
            weights.grad = None
            value = loss()
            if way == "before":
                lr = scheduler.step(value, [weights], step)
                value.backward()
            else:
                value.backward(retain_graph=way == "retained")
                lr = scheduler.step(value if way == "retained" else loss, [weights], step)
            with torch.no_grad():
                weights.sub_(lr * weights.grad)
        found.append(weights.tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert found[0] == pytest.approx(found[2], rel=1e-12)
    assert abs(found[0][0]) < 0.5


def test_a_graph_that_is_gone_is_refused_with_what_to_do():
    weights, loss = quadratic(1.0, 1.0, 1.0)
    value = (loss() ** 2).exp().log()
    value.backward()
    with pytest.raises(ValueError, match=r"^loss: expected its whole graph, got one that backward\(\) has freed; call"):
        HomotopyLRScheduler(fixed()).step(value, [weights], 0)
    value = loss()
    with torch.no_grad():
        weights.add_(1.0)
    with pytest.raises(ValueError, match=r"got one whose parameters have changed since; call step before backward\(\)"):
        HomotopyLRScheduler(fixed()).step(value, [weights], 0)


@pytest.mark.parametrize("loss", [torch.tensor(1.0), torch.ones(2, requires_grad=True)])
def test_what_is_no_loss_with_a_graph_is_refused(loss):
    weights, _ = quadratic(1.0)
    with pytest.raises(ValueError, match=r"^loss: expected one number with its graph, got shape .*; give what"):
        HomotopyLRScheduler(fixed()).step(loss, [weights], 0)


class OnceOnly(torch.autograd.Function):
    """x², without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@pytest.mark.filterwarnings("ignore:curvature. no second derivatives")
def test_without_second_derivatives_a_function_is_asked_for_and_works():
    weights = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    loss = lambda: OnceOnly.apply(weights).square().sum()  # noqa: E731   θ⁴
    with pytest.raises(ValueError, match=r"^loss: expected second derivatives, got an operation that has none; give a"):
        HomotopyLRScheduler(fixed(), CHEAP).step(loss(), [weights], 0)
    assert weights.tolist() == [1.0, 2.0]
    scheduler = HomotopyLRScheduler(fixed(), CHEAP)
    scheduler.step(loss, [weights], 0)
    assert scheduler.measured.hessian_norm == pytest.approx(12 * 2.0**2, rel=1e-3)


def test_what_is_not_finite_keeps_the_rate_and_warns_once():
    weights, loss = quadratic(1.0, 1.0, 1.0)
    scheduler = HomotopyLRScheduler(fixed(target_curvature=0.1), every_step())
    before = scheduler.step(loss(), [weights], 0)
    with pytest.warns(UserWarning, match="not finite was passed over; the rate stays"):
        assert scheduler.step(loss() * math.nan, [weights], 1) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scheduler.step(loss() * math.inf, [weights], 2) == before
    assert (scheduler.skipped, len(scheduler.history)) == (2, 1)
    assert scheduler.step(loss(), [weights], 3) == pytest.approx(before, rel=1e-3)


def test_frozen_parameters_are_left_out():
    weights, loss = quadratic(1.0, 1.0, 1.0)
    still = nn.Parameter(torch.ones(2), requires_grad=False)
    scheduler = HomotopyLRScheduler(fixed(), CHEAP)
    scheduler.step(loss(), (p for p in (still, weights)), 0)
    assert scheduler.measured.gradient_norm == pytest.approx(math.sqrt(110))
    with pytest.raises(ValueError, match=r"^parameters: expected at least one that requires a gradient"):
        HomotopyLRScheduler(fixed()).step(loss(), [still], 0)


@pytest.mark.parametrize(
    ("config", "hvp", "message"),
    [
        ({"base_lr": 0.0}, {}, r"^base_lr: expected a finite number above 0, got 0\.0$"),
        ({"base_lr": math.inf}, {}, r"^base_lr: expected a finite number above 0, got inf$"),
        ({"base_lr": "fast"}, {}, r"^base_lr: expected a finite number above 0, got 'fast'$"),
        ({"target_curvature": -1.0}, {}, r"^target_curvature: expected a number above 0, got -1\.0$"),
        ({"min_lr": 2.0}, {}, r"^min_lr: expected a number of at least 0 and at most 1, got 2\.0$"),
        ({"max_lr": math.nan}, {}, r"^max_lr: expected a number above 0, got nan$"),
        ({"alpha": -0.5}, {}, r"^alpha: expected a finite number of at least 0, got -0\.5$"),
        ({"warmup_steps": 1.5}, {}, r"^warmup_steps: expected an int of at least 0, got 1\.5$"),
        ({"target_percentile": 75}, {}, r"^target_percentile: expected a number of at least 0 and at most 1, got 75$"),
        ({"rule": "sed"}, {}, r"^rule: expected one of seed, seed_threshold, got 'sed'; did you mean 'seed'\?$"),
        ({}, {"num_samples": -1}, r"^num_samples: expected an int of at least 0, got -1$"),
        ({}, {"power_iterations": 0}, r"^power_iterations: expected an int of at least 1, got 0$"),
        ({}, {"power_iter_tol": 0}, r"^power_iter_tol: expected a number above 0 and at most 1, got 0$"),
        ({}, {"estimation_frequency": 0}, r"^estimation_frequency: expected an int of at least 1, got 0$"),
        ({}, {"ema_decay": 1.5}, r"^ema_decay: expected a number of at least 0 and at most 1, got 1\.5$"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(config, hvp, message):
    with pytest.raises(ValueError, match=message):
        HomotopyLRScheduler(HomotopyLRScheduler.Config(**config), HutchinsonConfig(**hvp))


def test_the_history_is_read_back_from_csv(tmp_path):
    weights, loss = quadratic(1.0, 1.0, 1.0)
    scheduler = HomotopyLRScheduler(fixed(), every_step())
    for step in range(3):
        scheduler.step(loss(), [weights], step)
    path = tmp_path / "x.csv"
    path.write_text("older")
    scheduler.export_metrics(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    read = [{name: float(cell) for name, cell in row.items()} for row in rows]
    for row, said in zip(scheduler.history, read, strict=True):
        assert math.isnan(said.pop("trace"))  # it was not asked for
        assert said == {name: value for name, value in vars(row).items() if name != "trace"}  # to the last bit
    assert [child.name for child in tmp_path.iterdir()] == ["x.csv"]


def test_a_csv_without_rows_has_its_header_and_a_missing_folder_is_named(tmp_path):
    HomotopyLRScheduler().export_metrics(str(tmp_path / "empty.csv"))
    assert (tmp_path / "empty.csv").read_text() == ",".join(COLUMNS) + "\n"
    with pytest.raises(OSError, match=r"nowhere/x\.csv"):
        export([], Measured, tmp_path / "nowhere" / "x.csv")


def test_the_torch_scheduler_writes_the_same_columns(tmp_path):
    weights, loss = quadratic(1.0, 1.0, 1.0)
    optimizer = torch.optim.SGD([weights], lr=0.01)
    scheduler = HomotopyLR(optimizer, loss, estimator=CurvatureEstimator(num_samples=2))
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    scheduler.export_metrics(tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [float(row["lr"]) for row in rows] == [row.lr for row in scheduler.history]
    assert float(rows[-1]["trace"]) == pytest.approx(14.0, rel=1e-6)


class Pair(Ranks):
    """This process, and another one whose loss is three times as large."""

    def __init__(self):
        super().__init__()
        self.count = 2

    def sum(self, tensor):
        return 4 * tensor

    def total(self, *numbers):
        return tuple(4 * number for number in numbers)


@pytest.mark.parametrize("form", ["tensor", "function"])
def test_curvature_is_averaged_over_the_processes(form, monkeypatch):
    monkeypatch.setattr(Ranks, "world", classmethod(lambda cls: Pair()))
    weights, loss = quadratic(1.0, spectrum=(1.0,))
    scheduler = HomotopyLRScheduler(fixed(target_curvature=1.0), CHEAP)
    assert scheduler.step(loss() if form == "tensor" else loss, [weights], 0) == pytest.approx(0.1 / (1 + 2 / 2**2))
    assert scheduler.history[0].loss == pytest.approx(1.0)


def test_it_goes_on_from_its_state_to_the_bit():
    def trained(scheduler, weights, loss, steps):
        for step in steps:
            weights.grad = None
            lr = scheduler.step(loss, [weights], step)
            loss().backward()
            with torch.no_grad():
                weights.sub_(lr * weights.grad)

    config, hvp = fixed(adaptive_target=True, warmup_steps=3), HutchinsonConfig(num_samples=2, estimation_frequency=2)
    weights, loss = quadratic(1.0, 1.0, 1.0)
    whole = HomotopyLRScheduler(config, hvp)
    trained(whole, weights, loss, range(20))
    other, other_loss = quadratic(1.0, 1.0, 1.0)
    first, second = HomotopyLRScheduler(config, hvp), HomotopyLRScheduler(config, hvp, seed=5)
    trained(first, other, other_loss, range(9))
    second.load_state_dict(first.state_dict())
    assert second.measured == first.measured
    trained(second, other, other_loss, range(9, 20))
    assert torch.equal(weights, other)
    assert [row.lr for row in second.history] == [row.lr for row in whole.history]
    assert [row.trace for row in second.history] == [row.trace for row in whole.history]
