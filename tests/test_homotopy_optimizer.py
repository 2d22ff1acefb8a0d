"""HomotopyOptimizer: one object for forward, backward, curvature, clipping, the optimizer's step and the rate."""

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

from losslab.optim import (
    TALT,
    CurvatureAwareGradientClipper,
    CurvatureAwareWarmup,
    CurvatureEstimator,
    HomotopyLR,
    HomotopyOptimizer,
    PerLayerHomotopyLR,
    by_module,
    talt_param_groups,
)
from losslab.optim.homotopy.rules import is_due
from second_derivatives import Once


def network(middle: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), middle or nn.Tanh(), nn.Linear(8, 3))


def batch(t: int, count: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(t))
    return x, x[:, :3].argmax(1)


def closure(model: nn.Module, t: int, count: int = 16):
    x, y = batch(t, count)
    return lambda: cross_entropy(model(x), y)


class Present:
    """The loss of batch t, for a scheduler that is made before there is one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.t = model, 0

    def __call__(self) -> Tensor:
        return closure(self.model, self.t)()


def trained(training: HomotopyOptimizer, steps: range) -> list[float]:
    return [training.step(closure(training.model, t)) for t in steps]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_curvature_of_the_shared_graph_is_that_of_a_graph_of_its_own():
    """At each step that is due: the same estimate, the same gradient, from one closure call instead of two."""
    model, other = network(), network()
    calls = 0

    def counted(loss):
        def call():
            nonlocal calls
            calls += 1
            return loss()

        return call

    training = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), warmup_steps=10)
    estimator, plain = CurvatureEstimator(), torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    due = 0
    for t in range(40):
        loss = closure(other, t)
        if is_due(t, 10):
            due += 1
            apart = estimator(loss, list(other.parameters()))
        plain.zero_grad()
        loss().backward()
        plain.param_groups[0]["lr"] = training.lr
        plain.step()
        training.step(counted(closure(model, t)))
        assert training.scheduler.measured.hessian_norm == pytest.approx(apart.hessian_norm, rel=1e-4)
        assert training.kappa == pytest.approx(apart.kappa, rel=1e-4)
    assert calls == 40
    assert len(training.scheduler.history) == due
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rates_are_a_part_of_the_limit():
    model = network()
    training = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=50.0), total_steps=40)
    losses = trained(training, range(40))
    assert losses[-1] < losses[0]
    part, history = training.scheduler.options.part, training.scheduler.history
    assert all(row.lr <= part(row.step) * 2 / row.hessian_norm * (1 + 1e-6) for row in history)
    assert max(row.lr for row in history) > 0.05
    assert training.lr == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, TALT, "talt groups"])
def test_adaptive_optimizers_are_measured_apart_three_times_and_then_on_the_shared_graph(make):
    model, calls = network(), []
    grouped = make == "talt groups"
    optimizer = TALT(talt_param_groups(model), lr=0.02) if grouped else make(model.parameters(), lr=0.02)
    training = HomotopyOptimizer(model, optimizer, warmup_steps=0)
    losses = []
    for t in range(30):
        loss = closure(model, t)
        losses.append(training.step(lambda loss=loss: (calls.append(1), loss())[1]))
    assert len(calls) == 33  # until there are three estimates, as many as their median takes
    assert sum(losses[-5:]) < sum(losses[:5])
    assert training.scheduler.measured.hessian_norm > 0


def test_an_adaptive_optimizers_first_three_estimates_are_the_schedulers_own():
    """On the graph of the second step P would be that of the first, and its λ be in the median twice."""
    model, other = network(), network()
    settings = {"warmup_steps": 4}
    training = HomotopyOptimizer(model, torch.optim.AdamW(model.parameters(), lr=0.1), **settings)
    trained(training, range(3))
    loss, optimizer = Present(other), torch.optim.AdamW(other.parameters(), lr=0.1)
    scheduler = HomotopyLR(optimizer, loss, **settings)
    for loss.t in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    assert [row.hessian_norm for row in training.scheduler.history] == [row.hessian_norm for row in scheduler.history]
    assert len(scheduler.history) == 3
    assert training.lr == scheduler.lr


def test_dropout_draws_on_as_without_measuring():
    model, other = network(nn.Dropout(0.5)), network(nn.Dropout(0.5))
    settings = {"lr": 0.1}
    shared = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), **settings), rule="seed", alpha=0.0)
    torch.manual_seed(5)
    trained(shared, range(12))
    state = torch.get_rng_state()
    plain = torch.optim.SGD(other.parameters(), **settings)
    torch.manual_seed(5)
    for t in range(12):
        plain.zero_grad()
        closure(other, t)().backward()
        plain.step()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", [True, False], ids=["twice", "once"])
def test_batch_norm_sees_each_batch_once(second):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    training = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def loss(t: int) -> Tensor:
        x, y = batch(t)
        outputs = model(x)
        return cross_entropy(outputs if second else Once.apply(outputs), y)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for t in range(8):
            training.step(lambda t=t: loss(t))
    assert int(model[1].num_batches_tracked) == 8
    assert len(told) == (0 if second else 1)
    assert training.scheduler.measured.hessian_norm > 0


def test_accumulated_calls_are_one_step_at_their_mean():
    model, other = network(), network()
    training = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulation=4, warmup_steps=0)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    for update in range(3):
        plain.zero_grad()
        parts = [closure(other, 4 * update + i) for i in range(4)]
        torch.stack([part() for part in parts]).mean().backward()
        plain.param_groups[0]["lr"] = training.lr
        before = weights(model)
        for i in range(4):
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            training.step(closure(model, 4 * update + i))
        plain.step()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert training.scheduler.last_epoch == 3
    training.step(closure(model, 0))
    with pytest.raises(RuntimeError, match="expected a whole update, got 1 of 4"):
        training.state_dict()


def test_gradients_are_clipped_by_the_newest_curvature():
    model = network()
    seen = []

    class Watching(CurvatureAwareGradientClipper):
        def clip(self, parameters, kappa):
            parameters = list(parameters)
            norm = super().clip(parameters, kappa)
            seen.append((kappa, norm, math.hypot(*(float(p.grad.norm()) for p in parameters))))
            return norm

    clipper = Watching(0.5, target_curvature=0.1, min_norm=1e-6)
    training = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), clipper=clipper)
    for t in range(5):
        training.step(closure(model, t))
        kappa, norm, length = seen[-1]
        assert kappa == training.scheduler.measured.kappa
        assert norm == pytest.approx(0.5 / (1 + kappa / 0.1))
        assert length <= norm * 1.0001
    assert len(seen) == 5


def test_a_warm_up_has_the_rate_until_it_is_complete():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warmup = CurvatureAwareWarmup(optimizer, 0.1, initial_lr_fraction=0.1, growth=1.5)
    training = HomotopyOptimizer(model, optimizer, warmup=warmup, total_steps=60, decay="cosine")
    rates = []
    for t in range(12):
        rates.append(training.lr)
        training.step(closure(model, t))
    assert rates[:6] == pytest.approx([0.01 * 1.5**i for i in range(6)])
    assert warmup.is_complete
    assert rates[8] < 0.1  # the scheduler's decay, over the whole run
    assert rates[8:] == sorted(rates[8:], reverse=True)


def test_a_scaled_overflow_changes_nothing_but_the_scale():
    model = network()
    scaler = GradScaler("cpu", init_scale=2.0**10)
    training = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), scaler=scaler)
    trained(training, range(5))
    before, rate, scale = weights(model), training.lr, scaler.get_scale()
    overflowing = closure(model, 5)
    training.step(lambda: overflowing() * math.inf)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert (training.lr, training.skipped, training.scheduler.last_epoch) == (rate, 1, 5)
    assert scaler.get_scale() == scale / 2
    trained(training, range(6, 9))
    assert training.skipped == 1
    assert training.scheduler.last_epoch == 8


def test_a_scaler_leaves_curvature_and_steps_alone():
    """A power of two in front of the loss is exact: the same path, and curvature of the unscaled loss."""
    model, other = network(), network()
    scaled = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.5), scaler=GradScaler("cpu"))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    present = Present(other)
    apart = HomotopyOptimizer(other, optimizer, HomotopyLR(optimizer, present))
    for t in range(20):
        present.t = t
        scaled.step(closure(model, t))
        apart.step(present)
    assert scaled.scheduler.history[-1].hessian_norm == pytest.approx(apart.scheduler.history[-1].hessian_norm)
    assert scaled.lr == pytest.approx(apart.lr)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_inside_forward_passes():
    model, kinds = network(), set()
    model[0].register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    training = HomotopyOptimizer(model, torch.optim.AdamW(model.parameters(), lr=0.02), precision=torch.bfloat16)
    trained(training, range(10))
    assert kinds == {torch.bfloat16}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert training.scheduler.measured.finite


def test_a_loss_that_is_not_finite_moves_nothing():
    model = network()
    training = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    trained(training, range(5))
    before, rate = weights(model), training.lr
    broken = closure(model, 5)
    with pytest.warns(UserWarning, match="a loss that is not finite was passed over"):
        assert math.isnan(training.step(lambda: broken() * math.nan))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert (training.lr, training.skipped) == (rate, 1)
    trained(training, range(6, 9))
    assert training.scheduler.history[-1].step == 8


def test_layers_have_rates_of_their_own():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    present = Present(model)
    scheduler = PerLayerHomotopyLR(optimizer, present, layers=by_module(model), warmup_steps=0)
    training = HomotopyOptimizer(model, optimizer, scheduler, clipper=CurvatureAwareGradientClipper())
    for t in range(10):
        present.t = t
        training.step(present)
    assert len(set(scheduler.rates.values())) == 2
    assert training.kappa == scheduler.measured.kappa


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, TALT], ids=["sgd", "adamw", "talt"])
def test_resumes_bit_for_bit(make):
    def start() -> HomotopyOptimizer:
        model = network(nn.Dropout(0.2))
        optimizer = make(model.parameters(), lr=0.05)
        warmup = CurvatureAwareWarmup(optimizer, 0.05, growth=1.2, curvature_threshold=1e3)
        clipper = CurvatureAwareGradientClipper(1.0, target_curvature=10.0)
        return HomotopyOptimizer(
            model, optimizer, clipper=clipper, warmup=warmup, scaler=GradScaler("cpu", enabled=False), total_steps=60
        )

    training = start()
    torch.manual_seed(1)
    trained(training, range(23))  # the next step is not due: κ is remembered
    saved = copy.deepcopy([training.state_dict(), training.model.state_dict(), torch.get_rng_state()])
    losses = trained(training, range(23, 45))
    again = start()
    again.load_state_dict(saved[0])
    again.model.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    assert again.lr == saved[0]["optimizer"]["param_groups"][0]["lr"]
    assert trained(again, range(23, 45)) == losses
    assert again.lr == training.lr
    assert again.kappa == training.kappa
    assert all(torch.equal(a, b) for a, b in zip(weights(training.model), weights(again.model), strict=True))


def test_wrong_arguments_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = HomotopyLR(optimizer, closure(model, 0))
    for call, message in (
        (lambda: HomotopyOptimizer(model, optimizer, scheduler, alpha=2.0), "alpha: expected it in the scheduler's"),
        (lambda: HomotopyOptimizer(model, optimizer, scheduler, estimator=CurvatureEstimator()), "estimator: expected"),
        (lambda: HomotopyOptimizer(model, optimizer, accumulation=0), "accumulation: expected an int of at least 1"),
        (lambda: HomotopyOptimizer(model, optimizer, total_step=9), "did you mean 'total_steps'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("settings", [{}, {"total_steps": 100}, {"rule": "seed", "target_curvature": 1e12}])
def test_a_warm_up_that_was_held_back_ends_where_it_is(settings):
    """What follows begins there, and does not jump to the target."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warmup = CurvatureAwareWarmup(optimizer, 0.1, curvature_threshold=1e-9, max_steps=5)
    training = HomotopyOptimizer(model, optimizer, warmup=warmup, **settings)
    trained(training, range(12))
    assert warmup.is_complete
    assert training.lr == pytest.approx(0.001)
    assert training.scheduler.base_lrs == pytest.approx([0.001])


def test_a_warm_up_has_the_first_rate_beside_a_scheduler_that_was_made_before():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warmup = CurvatureAwareWarmup(optimizer, 0.1, initial_lr_fraction=0.5)
    scheduler = HomotopyLR(optimizer, closure(model, 0), warmup_steps=20)
    training = HomotopyOptimizer(model, optimizer, scheduler, warmup=warmup)
    assert training.lr == pytest.approx(0.05)


def test_it_tells_once_that_a_type_has_too_few_bits():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = HomotopyOptimizer(model, optimizer, precise_to=1e-30, frequency=1, warmup_steps=0)
    with pytest.warns(UserWarning, match=r"precision: .* ask for .* bits and float\d+ has") as told:
        trained(training, range(8))
    assert len([each for each in told if "precision:" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(HomotopyOptimizer(model, optimizer, precise_to=1e9, frequency=1, warmup_steps=0), range(8))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected a Optimizer, got str"),
        ({"scheduler": 3}, "scheduler: expected None or a HomotopyLR or PerLayerHomotopyLR, got int"),
        ({"clipper": 1.0}, "clipper: expected None or a CurvatureAwareGradientClipper, got float"),
        ({"precision": "bf16"}, "precision: expected None or a dtype, got str"),
    ],
)
def test_parts_of_another_kind_are_refused(parts, message):
    model = network()
    given = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **parts}
    with pytest.raises(TypeError, match=message):
        HomotopyOptimizer(model, **given)
