"""Rates layer by layer: blocks of known eigenvalues, parameters regrouped, a transformer's parts."""

import copy
import csv
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from losslab.optim import (
    TALT,
    CurvatureEstimator,
    PerLayerHomotopyLR,
    by_module,
    talt_param_groups,
    transformer_blocks,
)
from losslab.optim.homotopy.batch_hessian import BatchHessian
from losslab.optim.homotopy.blocks import JointPower, diagonal_blocks
from losslab.studies.models.bert import transformers
from second_derivatives import Once

EIGENVALUES = {"flat": (1.0, 0.5), "middle": (5.0, 1.0), "steep": (40.0, 20.0)}


class Quadratic(nn.Module):
    """Σ ½λᵢθᵢ² for each layer, turned so that no axis is an eigenvector; and a coupling between all layers."""

    def __init__(self, coupling: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({n: torch.tensor([1.0, -1.0], dtype=torch.float64) for n in EIGENVALUES})
        turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
        self.matrices = {n: turn @ torch.diag(torch.tensor(e).double()) @ turn.T for n, e in EIGENVALUES.items()}
        self.coupling = coupling

    def loss(self) -> Tensor:
        own = sum(w @ self.matrices[n] @ w / 2 for n, w in self.weights.items())
        return own + self.coupling * sum(self.weights.values()).sum().square() / 2

    def hessian(self) -> Tensor:
        parameters = list(self.weights.values())
        return BatchHessian(self.loss, parameters).to_dense()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


def named_groups(model: Quadratic) -> list[dict]:
    return [{"params": [weight], "name": name} for name, weight in model.weights.items()]


def trained(model: nn.Module, optimizer, scheduler, steps: range) -> list[list[float]]:
    rates = []
    for t in steps:
        x, y = batch(t)
        model.present = x, y
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr())
    return rates


def loss_of(model: nn.Module):
    return lambda: cross_entropy(model(model.present[0]), model.present[1])


# -- blocks -----------------------------------------------------------------------------------------------


def test_blocks_are_those_of_the_dense_hessian():
    model = network().double()
    x, y = batch()
    parameters = list(model.parameters())
    whole = BatchHessian(lambda: cross_entropy(model(x.double()), y), parameters)
    blocks = diagonal_blocks(whole, [2, 2, 2], [None] * 3)
    dense, first = whole.to_dense(), 0
    for block in blocks:
        inside = slice(first, first + block.size)
        torch.testing.assert_close(block.to_dense(), dense[inside, inside], rtol=0, atol=1e-12)
        first += block.size
    assert first == whole.size
    assert math.hypot(*(block.gradient_norm for block in blocks)) == pytest.approx(whole.gradient_norm)


@pytest.mark.parametrize("coupling", [0.0, 3.0])
def test_curvature_of_a_layer_is_the_largest_eigenvalue_of_its_block(coupling):
    model = Quadratic(coupling)
    optimizer = torch.optim.SGD(named_groups(model), lr=0.0)
    estimator = CurvatureEstimator(power_iterations=60, tol=1e-9)
    scheduler = PerLayerHomotopyLR(optimizer, model.loss, method="blocks", estimator=estimator)
    optimizer.step()
    scheduler.step()
    dense = model.hessian()
    for i, name in enumerate(EIGENVALUES):
        block = dense[2 * i : 2 * i + 2, 2 * i : 2 * i + 2]
        assert scheduler.found[name].hessian_norm == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6)
    assert scheduler.measured.hessian_norm == max(at.hessian_norm for at in scheduler.found.values())


def test_joint_rates_put_the_whole_step_at_the_allowed_part_of_its_limit():
    """The largest eigenvalue of diag(η)H is c; by blocks up to as many times as much as there are layers."""
    model = Quadratic(coupling=10.0)
    parameters = list(model.weights.values())
    whole = BatchHessian(model.loss, parameters)
    blocks, power = diagonal_blocks(whole, [1, 1, 1], [None] * 3), JointPower()
    for _ in range(40):
        found = power(whole, blocks, products=5)
    dense = model.hessian()

    def largest(rates: list[float]) -> float:
        root = torch.tensor(rates, dtype=torch.float64).repeat_interleave(2).sqrt()
        return float(torch.linalg.eigvalsh(root[:, None] * dense * root)[-1])

    assert largest([1 / at.hessian_norm for at in found]) == pytest.approx(1.0, abs=1e-9)
    by_block = [1 / float(torch.linalg.eigvalsh(dense[i : i + 2, i : i + 2])[-1]) for i in (0, 2, 4)]
    assert 1.5 < largest(by_block) <= 3


def test_joint_is_the_blocks_where_layers_are_not_coupled():
    model = Quadratic()
    optimizer = torch.optim.SGD(named_groups(model), lr=0.0)
    estimator = CurvatureEstimator(power_iterations=60)
    scheduler = PerLayerHomotopyLR(optimizer, model.loss, method="joint", estimator=estimator)
    optimizer.step()
    scheduler.step()
    for name, eigenvalues in EIGENVALUES.items():
        assert scheduler.found[name].hessian_norm == pytest.approx(eigenvalues[0], rel=1e-6)
        assert scheduler.found[name].products == 60


# -- rates ------------------------------------------------------------------------------------------------


def run_quadratic(steps: int = 30, lr: float = 10.0, **settings) -> tuple[PerLayerHomotopyLR, Quadratic]:
    model = Quadratic()
    optimizer = torch.optim.SGD(named_groups(model), lr=lr)
    scheduler = PerLayerHomotopyLR(optimizer, model.loss, **{"warmup_steps": 0} | settings)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        scheduler.step()
    return scheduler, model


def test_stable_rates_are_a_fraction_of_each_layers_own_limit():
    scheduler, _ = run_quadratic(lr=1.0, estimator=CurvatureEstimator(power_iterations=30))
    for name, eigenvalues in EIGENVALUES.items():
        assert scheduler.rates[name] == pytest.approx(min(1.0, 0.2 * 2 / eigenvalues[0]), rel=1e-4)


def test_groups_keep_their_own_base_rates():
    model = Quadratic()
    groups = named_groups(model)
    groups[0]["lr"], groups[1]["lr"] = 0.1, 0.001
    optimizer = torch.optim.SGD(groups, lr=10.0)
    scheduler = PerLayerHomotopyLR(optimizer, model.loss, warmup_steps=0)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.1, 0.001, 0.4 / 40], rel=1e-3)


@pytest.mark.parametrize("rule", ["seed", "seed_threshold"])
def test_the_founders_rule_with_the_median_of_the_layers(rule):
    scheduler, _ = run_quadratic(1, rule=rule, normalize_by_median=True, alpha=2.0, lr=0.01)
    kappas = {name: at.kappa for name, at in scheduler.found.items()}
    median = sorted(kappas.values())[1]
    for name, kappa in kappas.items():
        excess = kappa / median if rule == "seed" else max(0.0, kappa / median - 1)
        assert scheduler.rates[name] == pytest.approx(0.01 / (1 + 2 * excess), rel=1e-9)


def test_normalised_stable_rates_are_in_inverse_proportion_to_curvature():
    settings = {"release": 1e6, "estimator": CurvatureEstimator(power_iterations=30)}
    scheduler, _ = run_quadratic(lr=1e-3, normalize_by_median=True, **settings)
    rates = scheduler.rates
    assert rates["middle"] == pytest.approx(1e-3, rel=1e-4)
    assert rates["flat"] == pytest.approx(5e-3, rel=1e-4)
    assert rates["steep"] == pytest.approx(1e-3 * 5 / 40, rel=1e-4)


def test_a_layer_far_off_the_median_is_not_followed_without_end():
    model = Quadratic()
    model.matrices["flat"] = torch.eye(2, dtype=torch.float64) * 1e-6
    optimizer = torch.optim.SGD(named_groups(model), lr=1e-3)
    scheduler = PerLayerHomotopyLR(optimizer, model.loss, normalize_by_median=True, release=1e6, warmup_steps=0)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert scheduler.rates["flat"] == pytest.approx(1e-2)


def test_a_base_rate_far_too_large_converges():
    scheduler, model = run_quadratic(250, lr=1000.0)
    assert model.loss().item() < 1e-6
    assert scheduler.skipped == 0


def test_rise_and_decay_are_those_of_the_other_scheduler():
    scheduler, _ = run_quadratic(10, lr=1e-3, warmup_steps=10, total_steps=20)
    assert scheduler.get_last_lr() == pytest.approx([1e-3] * 3)
    scheduler, _ = run_quadratic(20, lr=1e-3, warmup_steps=10, total_steps=20)
    assert scheduler.get_last_lr() == pytest.approx([0.0] * 3, abs=1e-9)


# -- layers -----------------------------------------------------------------------------------------------


def test_layers_of_a_model_become_groups_with_their_settings():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    scheduler = PerLayerHomotopyLR(optimizer, loss_of(model), layers=by_module(model))
    assert list(scheduler.rates) == ["0", "2", "4"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2, 2, 2]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
    trained(model, optimizer, scheduler, range(3))
    assert len({round(at.hessian_norm, 6) for at in scheduler.found.values()}) == 3


def test_registering_after_the_start_keeps_state_and_rate():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = PerLayerHomotopyLR(optimizer, loss_of(model))
    trained(model, optimizer, scheduler, range(5))
    momentum, rate = optimizer.state[model[4].weight]["momentum_buffer"].clone(), scheduler.get_last_lr()[0]
    scheduler.register_layer("head", list(model[4].parameters()))
    assert optimizer.param_groups[-1]["lr"] == rate
    assert torch.equal(optimizer.state[model[4].weight]["momentum_buffer"], momentum)
    rates = trained(model, optimizer, scheduler, range(5, 10))
    assert list(scheduler.rates) == ["group 0", "head"]
    assert rates[0][1] == pytest.approx(rate * 100**0.01, rel=0.02)  # it rises on from where it was
    assert set(scheduler.found) == {"group 0", "head"}


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"rule": "seed", "target_curvature": 0.01}),
    ],
)
def test_a_layer_that_is_registered_late_knows_the_curvature_that_it_was_part_of(make, settings):
    """Otherwise nothing brakes it before its own estimates: up to 75 steps of AdamW's, at the founders' rule at η₀."""
    model = network()
    optimizer = make(model.parameters(), lr=0.3)
    scheduler = PerLayerHomotopyLR(optimizer, loss_of(model), warmup_steps=0, **settings)
    rate = trained(model, optimizer, scheduler, range(42))[-1][0]
    curvature = scheduler.rules["group 0"].curvature
    scheduler.register_layer("head", list(model[4].parameters()))
    assert scheduler.rules["head"].curvature == curvature > 0
    rates = trained(model, optimizer, scheduler, range(42, 44))[-1]  # the next estimate comes after step 44
    assert rates[0] == rates[1] < 0.3
    assert rates[1] == pytest.approx(rate, rel=0.05)


def test_names_of_parameters_go_with_them():
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    PerLayerHomotopyLR(optimizer, loss_of(model), layers={"head": list(model[4].parameters())})
    assert optimizer.param_groups[1]["param_names"] == ["4.weight", "4.bias"]
    assert len(optimizer.param_groups[0]["param_names"]) == 4


def test_a_layer_may_lie_in_several_groups():
    """TALT's matrices and their biases are in different groups; each of both parts keeps its structure."""
    model = network()
    optimizer = TALT(talt_param_groups(model), lr=0.01)
    scheduler = PerLayerHomotopyLR(optimizer, loss_of(model), layers=by_module(model))
    trained(model, optimizer, scheduler, range(4))
    scheduler.register_layer("bias", [model[0].bias])  # its state lies in a stack with others
    trained(model, optimizer, scheduler, range(4, 8))
    assert list(scheduler.rates) == ["0", "2", "4", "bias"]
    of = {id(p): g["structure"] for g in optimizer.param_groups for p in g["params"]}
    assert of[id(model[0].weight)] == of[id(model[4].weight)] == "auto"
    assert of[id(model[0].bias)] == "diagonal"
    assert optimizer.skipped == 0
    assert all(at.finite and at.hessian_norm > 0 for at in scheduler.found.values())


def test_frozen_and_empty_layers_have_no_curvature():
    model = network()
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = PerLayerHomotopyLR(optimizer, loss_of(model), layers=by_module(model))
    trained(model, optimizer, scheduler, range(3))
    assert list(scheduler.found) == ["0", "4"]
    assert list(scheduler.rates) == ["0", "2", "4"]
    for parameter in model[2].parameters():  # thawed
        parameter.requires_grad_(True)
    trained(model, optimizer, scheduler, range(3, 5))
    assert list(scheduler.found) == ["0", "2", "4"]


@pytest.mark.parametrize("method", ["blocks", "joint"])
def test_a_layer_that_the_loss_does_not_know_goes_no_faster_than_the_slowest(method):
    model = Quadratic()
    model.matrices["flat"] = torch.zeros(2, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD([*named_groups(model), {"params": [nn.Parameter(torch.ones(1))], "name": "idle"}], lr=1)
    settings = {"warmup_steps": 0, "normalize_by_median": True, "method": method}
    scheduler = PerLayerHomotopyLR(optimizer, model.loss, **settings)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert scheduler.skipped == 0
    assert scheduler.found["steep"].hessian_norm == pytest.approx(40, rel=1e-3)
    assert scheduler.rates["idle"] == scheduler.rates["flat"] == scheduler.rates["steep"] < 0.02
    assert scheduler.found["idle"].hessian_norm == 0


def test_a_layer_that_is_thawed_is_measured_at_once():
    """It may be braked by nothing until then: from a rate of η₀ = 10 the loss rose to 4e9."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    x, y = 2 * torch.randn(128, 20).double(), torch.randint(5, (128,))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0, momentum=0.9)
    scheduler = PerLayerHomotopyLR(optimizer, lambda: cross_entropy(model(x), y), layers=by_module(model))
    losses = []
    for t in range(400):
        if t == 300:
            model[0].requires_grad_(True)
            assert scheduler.rates["0"] <= scheduler.rates["2"] < 1
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert next(row.step for row in scheduler.history if row.layer == "0") == 301
    assert max(losses[300:]) < 3 * max(losses[:300])


def test_a_part_that_vanishes_comes_back():
    """A v that is not finite would leave the brake off for good."""
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    scale = [1e-30]
    loss = lambda: (weights[0].square() + scale[0] * weights[1].square()).sum() / 2  # noqa: E731
    optimizer = torch.optim.SGD([{"params": [w], "name": n} for w, n in zip(weights, "ab", strict=True)], lr=1e-3)
    scheduler = PerLayerHomotopyLR(optimizer, loss, warmup_steps=0, frequency=1)
    optimizer.step()
    scheduler.step()
    scheduler.curvature._joint.vector[1] = 0.0
    scale[0] = 1e4
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert scheduler.skipped == 0
    assert scheduler.found["b"].hessian_norm == pytest.approx(1e4, rel=1e-3)
    assert scheduler.rates["b"] < 2e-4
    assert scheduler.curvature._joint.vector.isfinite().all()


def test_a_new_layer_is_measured_from_a_vector_of_its_own():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    x, y = batch()
    scheduler = PerLayerHomotopyLR(optimizer, lambda: cross_entropy(model(x), y), warmup_steps=0, frequency=1)
    for t in range(20):
        if t == 10:
            scheduler.register_layer("first", list(model[0].parameters()))  # they are the last from now on
        optimizer.step()
        scheduler.step()
    known = {row.layer: row.hessian_norm for row in scheduler.history if row.step == 11}
    later = {row.layer: row.hessian_norm for row in scheduler.history if row.step == 20}
    assert known == pytest.approx(later, rel=0.05)
    assert scheduler.measured.products == 1


def test_what_is_thawed_after_a_resumption_is_measured_at_once_too():
    def made(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss = lambda: cross_entropy(model(batch()[0]), batch()[1])  # noqa: E731
        return PerLayerHomotopyLR(optimizer, loss, layers=by_module(model), warmup_steps=0)

    model = network()
    model[0].requires_grad_(False)
    before = made(model)
    for _ in range(17):
        before.optimizer.step()
        before.step()
    after = made(model)
    after.load_state_dict(before.state_dict())
    model[0].requires_grad_(True)
    after.optimizer.step()
    after.step()  # step 17, when nothing is due
    assert [row.layer for row in after.history if row.step == 18] == ["0", "2", "4"]


def test_with_last_epoch_it_goes_on_at_the_optimizers_rates():
    model = Quadratic()
    rates = (0.5, 0.2, 0.1)
    groups = [{**g, "initial_lr": 1.0, "lr": rate} for g, rate in zip(named_groups(model), rates, strict=True)]
    scheduler = PerLayerHomotopyLR(torch.optim.SGD(groups), model.loss, last_epoch=500)
    assert list(scheduler.rates.values()) == [0.5, 0.2, 0.1]
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler.rates["flat"] == pytest.approx(0.5 * 1.02)


def test_rows_have_the_layers_own_rates_and_targets():
    model = Quadratic()
    for settings in ({}, {"rule": "seed", "normalize_by_median": True}, {"normalize_by_median": True}):
        groups = [{**group, "lr": rate} for group, rate in zip(named_groups(model), (1.0, 0.1, 0.01), strict=True)]
        scheduler = PerLayerHomotopyLR(torch.optim.SGD(groups), model.loss, warmup_steps=0, **settings)
        scheduler.optimizer.step()
        rates = scheduler.step()
        assert {row.layer: row.lr for row in scheduler.history} == rates
        targets = [row.target for row in scheduler.history]
        assert len(set(targets)) == (3 if settings == {"normalize_by_median": True} else 1)
    assert targets == pytest.approx([0.8, 0.4, 0.32], rel=1e-2)  # 0.4/(0.5/λ) for λ = 1, 0.1·5, 0.01·40


def test_joint_refuses_what_it_would_not_do():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    for estimator in (
        CurvatureEstimator(num_samples=1),
        CurvatureEstimator(top_k=1),
        CurvatureEstimator(method="lanczos"),
    ):
        with pytest.raises(ValueError, match=r"^estimator: expected power iteration alone"):
            PerLayerHomotopyLR(optimizer, lambda: torch.ones(()), estimator=estimator)
        PerLayerHomotopyLR(optimizer, lambda: torch.ones(()), estimator=estimator, method="blocks")


def test_what_is_frozen_and_not_the_optimizers_is_no_layer():
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = PerLayerHomotopyLR(optimizer, lambda: torch.ones(()), layers=by_module(model))
    assert list(scheduler.rates) == ["2", "4"]


def test_a_models_own_parameters_have_a_name():
    model = network()
    model.gain = nn.Parameter(torch.ones(()))
    assert list(by_module(model)) == ["(model)", "0", "2", "4"]


def test_a_state_of_other_groups_and_parameters_that_cannot_be_measured_are_refused():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    apart = PerLayerHomotopyLR(torch.optim.SGD([{"params": [p], "name": "a"} for p in (one, two)], lr=1.0), one.sum)
    both = PerLayerHomotopyLR(torch.optim.SGD([{"params": [one, two], "name": "a"}], lr=1.0), one.sum)
    with pytest.raises(ValueError, match=r"^state_dict: expected the rates of 1 parameter groups, got 2$"):
        both.load_state_dict(apart.state_dict())
    wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    scheduler = PerLayerHomotopyLR(torch.optim.SGD([wave], lr=1.0), lambda: wave.abs().sum())
    scheduler.optimizer.step()
    with pytest.raises(ValueError, match=r"^parameters: expected real tensors, got torch.complex64"):
        scheduler.step()


def test_a_state_of_another_scheduler_is_refused():
    scheduler = PerLayerHomotopyLR(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), lambda: torch.ones(()))
    state = {name: value for name, value in scheduler.state_dict().items() if name != "rates"}
    with pytest.raises(ValueError, match=r"^state_dict: expected one with the rates of layers"):
        scheduler.load_state_dict(state)


def test_a_loss_that_is_not_finite_leaves_the_rates():
    scheduler, model = run_quadratic(20, frequency=1)
    before, seen = scheduler.rates, scheduler.found
    scheduler.loss = lambda: model.loss() * math.nan
    scheduler.optimizer.step()
    with pytest.warns(UserWarning, match="not finite"):
        scheduler.step()
    assert scheduler.skipped == 1
    assert scheduler.found is seen
    assert scheduler.rates == pytest.approx(before)


@pytest.mark.parametrize("method", ["blocks", "joint"])
def test_without_second_derivatives_it_says_so_once(method):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    loss = lambda: cross_entropy(Once.apply(model(x)), y)  # noqa: E731
    scheduler = PerLayerHomotopyLR(optimizer, loss, layers=by_module(model), method=method, warmup_steps=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
            scheduler.step()
    assert [str(one.message)[:34] for one in told] == ["curvature: no second derivatives ("]
    exact = BatchHessian(lambda: cross_entropy(2 * model(x), y), list(model[4].parameters())).to_dense()
    largest = float(torch.linalg.eigvalsh(exact)[-1])
    if method == "blocks":
        assert scheduler.found["4"].hessian_norm == pytest.approx(largest, rel=0.05)
    else:
        assert largest < scheduler.found["4"].hessian_norm < 3 * largest


def test_the_history_has_a_row_for_each_layer_and_is_a_table_too(tmp_path):
    model = Quadratic(1.0)
    optimizer = torch.optim.SGD(named_groups(model), lr=1.0)
    scheduler = PerLayerHomotopyLR(optimizer, model.loss, warmup_steps=0)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        rates = scheduler.step()
    rows = scheduler.history
    assert [(row.step, row.layer) for row in rows] == [(step, name) for step in (1, 2, 3) for name in EIGENVALUES]
    assert {row.layer: row.lr for row in rows[-len(rates) :]} == pytest.approx(rates)
    for row in rows[-len(rates) :]:
        found = scheduler.found[row.layer]
        assert (row.loss, row.hessian_norm, row.grad_norm) == (found.loss, found.hessian_norm, found.gradient_norm)
        assert (row.curvature, row.target) == (scheduler.rules[row.layer].curvature, pytest.approx(0.2 * 2.0))
        assert row.seconds > 0
    scheduler.export_metrics(tmp_path / "layers.csv")
    with (tmp_path / "layers.csv").open(newline="") as file:
        assert [(line["layer"], float(line["lr"])) for line in csv.DictReader(file)] == [(r.layer, r.lr) for r in rows]
    again = PerLayerHomotopyLR(torch.optim.SGD(named_groups(model), lr=1.0), model.loss, warmup_steps=0)
    again.load_state_dict(scheduler.state_dict())
    assert again.history == rows


# -- the founders' form -----------------------------------------------------------------------------------


def test_the_founders_form_gives_rates_by_name():
    model = Quadratic()
    scheduler = PerLayerHomotopyLR(base_lr=0.5, rule="seed", alpha=1.0, target_curvature=0.1)
    for name, weight in model.weights.items():
        scheduler.register_layer(name, [weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(12):
            loss = model.loss()
            found = scheduler.step(loss, step)
            loss.backward()
            with torch.no_grad():
                for name, weight in model.weights.items():
                    weight.sub_(0.0 * found[name] * weight.grad)
    assert list(found) == list(EIGENVALUES)
    for name, at in scheduler.found.items():
        assert found[name] == pytest.approx(
            0.5 / (1 + at.kappa / 0.1), rel=0.01
        )  # κ averaged, the vector still turning
    assert scheduler.measured.loss == pytest.approx(model.loss().item())


def test_the_founders_form_needs_the_graph():
    model = Quadratic()
    scheduler = PerLayerHomotopyLR(base_lr=0.5)
    scheduler.register_layer("all", list(model.weights.values()))
    loss = model.loss()
    loss.backward()
    with pytest.raises(ValueError, match=r"loss: expected its whole graph.*before backward"):
        scheduler.step(loss, 0)


# -- schedules, states, refusals --------------------------------------------------------------------------


def test_it_follows_another_scheduler():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = PerLayerHomotopyLR(optimizer, loss_of(model), layers=by_module(model), warmup_steps=0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, own], [3])
    rates = trained(model, optimizer, scheduler, range(6))
    assert rates[1] == pytest.approx([0.07] * 4)
    assert rates[-1][1:] == pytest.approx([0.1] * 3)
    assert own.found


@pytest.mark.parametrize("method", ["blocks", "joint"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, TALT], ids=["adamw", "talt"])
def test_resumes_bit_for_bit(make, method):
    def start():
        model = network()
        optimizer = make(model.parameters(), lr=2.0)  # so that curvature decides
        settings = {"method": method, "layers": by_module(model), "warmup_steps": 0, "release": 1e6, "ema": 0.0}
        return model, optimizer, PerLayerHomotopyLR(optimizer, loss_of(model), **settings)

    model, optimizer, scheduler = start()
    trained(model, optimizer, scheduler, range(15))
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, scheduler)])
    rates = trained(model, optimizer, scheduler, range(15, 35))
    again = start()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    assert trained(*again, range(15, 35)) == rates
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again[0].parameters(), strict=True))


def test_a_state_of_other_layers_is_refused():
    model = network()
    saved = PerLayerHomotopyLR(torch.optim.SGD(model.parameters(), lr=0.1), loss_of(model)).state_dict()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"expected the layers group 0, 0, 2, 4, got group 0"):
        PerLayerHomotopyLR(other, loss_of(model), layers=by_module(model)).load_state_dict(saved)


def test_wrong_arguments_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    head, stranger = list(model[4].parameters()), nn.Parameter(torch.ones(2))
    scheduler = PerLayerHomotopyLR(optimizer, loss_of(model), layers={"head": head})
    for call, message in (
        (lambda: scheduler.register_layer("head", [model[0].bias]), "name: expected a name that is not taken"),
        (lambda: scheduler.register_layer("none", []), "params: expected the parameters of layer 'none', each once"),
        (lambda: scheduler.register_layer("twice", [head[0], head[0]]), "each once, got 2"),
        (lambda: scheduler.register_layer("other", [stranger]), "got one that it lacks"),
        (lambda: PerLayerHomotopyLR(optimizer, loss_of(model), base_lr=0.1), "base_lr: expected None"),
        (lambda: PerLayerHomotopyLR(base_lr=-1.0), "base_lr: expected"),
        (lambda: PerLayerHomotopyLR(optimizer, loss_of(model), method="block"), "did you mean 'blocks'"),
        (lambda: PerLayerHomotopyLR(optimizer, loss_of(model), frequncy=3), "did you mean 'frequency'"),
        (lambda: transformer_blocks(model), "model: expected a transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert len(optimizer.param_groups) == 2  # nothing half done


# -- transformers -----------------------------------------------------------------------------------------


def names_of(model: nn.Module) -> dict[str, set[str]]:
    """Groups as names of parameters; each parameter is in exactly one."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {layer: [names[id(p)] for p in ps] for layer, ps in transformer_blocks(model).items()}
    everything = [name for members in groups.values() for name in members]
    assert sorted(everything) == sorted(names.values())
    return {layer: set(members) for layer, members in groups.items()}


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found = names_of(nn.Sequential(nn.Linear(3, 8), encoder, nn.Linear(8, 2)))
    assert list(found) == [
        "1.layers.0.attention",
        "1.layers.0.feed_forward",
        "1.layers.1.attention",
        "1.layers.1.feed_forward",
        "0",
        "2",
    ]
    assert {name.split(".")[3] for name in found["1.layers.0.attention"]} == {"self_attn", "norm1"}
    assert {name.split(".")[3] for name in found["1.layers.1.feed_forward"]} == {"linear1", "linear2", "norm2"}


def test_torchs_decoder_has_two_attentions():
    found = names_of(nn.TransformerDecoderLayer(8, 2, 16))
    assert {n.split(".")[0] for n in found["attention"]} == {"self_attn", "multihead_attn", "norm1", "norm2"}
    assert {n.split(".")[0] for n in found["feed_forward"]} == {"linear1", "linear2", "norm3"}


def test_bert_and_vit():
    library = transformers()
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert = library.BertModel(library.BertConfig(vocab_size=20, **sizes))
    found = names_of(bert)
    assert [n for n in found if "encoder" in n] == [
        f"encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention", "feed_forward")
    ]
    assert all(".attention." in n for n in found["encoder.layer.0.attention"])
    assert not any(".attention." in n for n in found["encoder.layer.0.feed_forward"])
    assert "pooler.dense" in found
    vit = library.ViTModel(library.ViTConfig(image_size=8, patch_size=4, **sizes))
    found = names_of(vit)
    assert sum(name.endswith((".attention", ".feed_forward")) for name in found) == 4
    first = next(members for name, members in found.items() if name.endswith("0.attention"))
    assert any("layernorm_before" in n for n in first)
    assert not any("layernorm_after" in n for n in first)


def test_a_transformer_whose_attention_is_linear_layers_only(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name in ("optimizer_tasks", "optimizer_data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from optimizer_tasks import Transformer, autoencoder

    found = names_of(Transformer(50, 6, 2))
    assert {n.split(".")[2] for n in found["blocks.0.attention"]} == {"first", "asked", "gathered"}
    assert {n.split(".")[2] for n in found["blocks.1.feed_forward"]} == {"second", "wide", "narrow"}
    assert {"tokens", "places", "norm", "head"} < set(found)
    with pytest.raises(ValueError, match="transformer"):  # 64 → 96 → … → 64 → 96 is no attention
        transformer_blocks(autoencoder())


def test_a_transformers_parts_train_at_rates_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.Unflatten(1, (1, 8)),
        nn.TransformerEncoderLayer(8, 2, 16, 0.0),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    layers = transformer_blocks(model)
    scheduler = PerLayerHomotopyLR(optimizer, loss_of(model), layers=layers, warmup_steps=0)
    trained(model, optimizer, scheduler, range(12))
    assert list(scheduler.rates) == ["2.attention", "2.feed_forward", "0", "4"]
    assert len(set(scheduler.rates.values())) > 1
    assert all(0 < rate < 1.0 for rate in scheduler.rates.values())
