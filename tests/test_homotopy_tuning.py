"""α and κ* tuned online: the hyper-gradient against differences, bounds, states; that it helps where it must."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from losslab.optim import HomotopyLR, OnlineTuning

EIGENVALUES = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)


class Problem:
    """½Σλᵢθᵢ² under a founders' rule."""

    def __init__(self, lr: float = 0.3, *, momentum: float = 0.0, tune: dict | None = None, **settings) -> None:
        self.theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.theta], lr=lr, momentum=momentum)
        self.scheduler = HomotopyLR(self.optimizer, self.loss, **{"rule": "seed"} | settings)
        self.tuning = None if tune is None else OnlineTuning(self.scheduler, **tune)

    def loss(self) -> Tensor:
        return (EIGENVALUES * self.theta.square()).sum() / 2

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("rule", ["seed", "seed_threshold"])
@pytest.mark.parametrize("name", ["alpha", "target"])
def test_slopes_are_the_derivatives_of_the_rate(rule, name):
    problem = Problem(rule=rule, alpha=1.7, target_curvature=0.2, tune={})
    problem.run(1)
    tuning, kappa = problem.tuning, problem.scheduler.curvature
    assert kappa > 0.2

    def log_rate(alpha: float, target: float) -> float:
        x = kappa / target
        return -math.log(1 + alpha * (x if rule == "seed" else max(0.0, x - 1)))

    h = 1e-6
    up, down = {"alpha": 1.7, "target": 0.2}, {"alpha": 1.7, "target": 0.2}
    up[name] *= math.exp(h)
    down[name] *= math.exp(-h)
    difference = (log_rate(**up) - log_rate(**down)) / (2 * h)
    assert tuning.slopes()[name == "target"] == pytest.approx(difference, rel=1e-6)
    assert difference != 0


def test_below_the_threshold_nothing_depends_on_alpha_and_target():
    problem = Problem(rule="seed_threshold", alpha=1.7, target_curvature=1e6, tune={})
    problem.run(3)
    assert problem.tuning.slopes() == (0.0, 0.0)
    assert problem.tuning.alpha == 1.7


def test_one_step_is_down_the_gradient_of_the_loss_by_alpha():
    """Δ ln α = −μ·(dL/d ln α)/(‖g‖‖Δ‖), where the loss after the step is differentiated by differences."""
    settings = {"alpha": 1.5, "target_curvature": 0.3, "frequency": 1, "ema": 0.0}
    problem = Problem(**settings, tune={"rate": 0.01})
    problem.run(1)  # κ is known: the next step is the first at the slowed rate
    start = problem.theta.detach().clone()
    kappa, gradient = problem.scheduler.curvature, EIGENVALUES * start

    def after(log_alpha: float) -> float:
        rate = 0.3 / (1 + 1.5 * math.exp(log_alpha) * kappa / 0.3)
        return float((EIGENVALUES * (start - rate * gradient).square()).sum() / 2)

    slope = (after(1e-5) - after(-1e-5)) / 2e-5
    problem.run(1)
    before = problem.tuning.alpha  # one adaption so far, of the step before, at η₀
    moved = problem.theta.detach() - start
    now = EIGENVALUES * problem.theta.detach()
    problem.run(1)
    expected = -0.01 * slope / float(now.norm() * moved.norm())
    assert math.log(problem.tuning.alpha / before) == pytest.approx(expected, rel=1e-5)
    assert expected != 0


def test_where_the_rate_is_too_small_alpha_falls_and_the_target_rises():
    problem = Problem(alpha=100.0, target_curvature=1.0, tune={"rate": 0.3})
    fixed = Problem(alpha=100.0, target_curvature=1.0)
    tuned, plain = problem.run(150)[-1], fixed.run(150)[-1]
    assert problem.tuning.alpha < 10
    assert problem.tuning.target > 10
    assert tuned < 0.1 * plain


def test_where_the_rate_overshoots_alpha_rises():
    problem = Problem(lr=0.56, alpha=0.2, target_curvature=0.5, tune={"rate": 0.3})  # 0.5 is the limit of λ = 4
    problem.run(1)
    with torch.no_grad():
        problem.theta.copy_(torch.tensor([1.0, 0.0, 0.0]))
    problem.run(4)
    assert problem.tuning.alpha > 0.2


def test_bounds_hold():
    problem = Problem(alpha=100.0, target_curvature=1.0, tune={"rate": 5.0, "bound": 3.0})
    problem.run(60)
    assert problem.tuning.alpha == pytest.approx(100 / 3)
    assert problem.tuning.target == pytest.approx(3.0)


def test_an_adaptive_target_stays_what_was_met():
    problem = Problem(alpha=100.0, tune={"rate": 0.3})
    problem.run(40)
    assert problem.scheduler.options.target_curvature == "adaptive"
    assert problem.tuning.target == problem.scheduler.rule.percentile.value
    assert problem.tuning.alpha < 100


def test_off_it_is_the_scheduler_alone():
    problem, plain = Problem(alpha=2.0, tune={}), Problem(alpha=2.0)
    problem.tuning.remove()
    assert problem.run(30) == plain.run(30)
    assert problem.scheduler.options == plain.scheduler.options


def test_resumes_bit_for_bit():
    settings = {"momentum": 0.9, "alpha": 20.0, "target_curvature": 0.5, "tune": {"rate": 0.2}}
    problem = Problem(**settings)
    problem.run(25)
    parts = (problem.optimizer, problem.scheduler, problem.tuning)
    saved, theta = copy.deepcopy([part.state_dict() for part in parts]), problem.theta.detach().clone()
    losses = problem.run(25)
    again = Problem(**settings)
    with torch.no_grad():
        again.theta.copy_(theta)
    for part, state in zip((again.optimizer, again.scheduler, again.tuning), saved, strict=True):
        part.load_state_dict(state)
    assert again.run(25) == losses
    assert (again.tuning.alpha, again.tuning.target) == (problem.tuning.alpha, problem.tuning.target)


def test_no_gradient_no_tuning():
    problem = Problem(alpha=2.0, tune={})
    problem.run(3)
    steps, alpha = problem.tuning.steps, problem.tuning.alpha
    problem.optimizer.zero_grad()
    problem.optimizer.step()
    assert (problem.tuning.steps, problem.tuning.alpha) == (steps, alpha)


def test_wrong_arguments_are_refused():
    theta = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([theta], lr=0.1)
    loss = lambda: theta.square().sum()  # noqa: E731
    stable, flat = HomotopyLR(optimizer, loss), HomotopyLR(optimizer, loss, rule="seed", alpha=0.0)
    good = HomotopyLR(optimizer, loss, rule="seed")
    for call, message in (
        (lambda: OnlineTuning(stable), "scheduler: expected the rule 'seed' or 'seed_threshold', got 'stable'"),
        (lambda: OnlineTuning(flat), "scheduler: expected an alpha above 0"),
        (lambda: OnlineTuning(good, rate=0.0), "rate: expected"),
        (lambda: OnlineTuning(good, bound=0.5), "bound: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    OnlineTuning(good)
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step(loss)
