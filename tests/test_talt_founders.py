"""The founding interface, and TALT in front of other optimizers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import talt
from losslab.optim import (
    FIXES,
    TALT,
    ImprovedTALTOptimizer,
    TALTOptimizer,
    TALTOptions,
    attach_talt,
    create_enhanced_talt_config,
    talt_param_groups,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def examples(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs[:, :3] + 0.1 * inputs[:, 3:]).argmax(1)


def trained(optimizer: ImprovedTALTOptimizer, steps: int) -> list[float]:
    inputs, targets = examples()
    return [optimizer.step(cross_entropy, inputs, targets)[0] for _ in range(steps)]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_founders_names_are_these():
    assert talt.ImprovedTALTOptimizer is ImprovedTALTOptimizer
    assert talt.TALTOptimizer is TALTOptimizer
    assert talt.create_enhanced_talt_config is create_enhanced_talt_config


def test_the_enhanced_configuration_turns_all_eight_on():
    config = create_enhanced_talt_config()
    assert {name: config[name] for name in FIXES} == dict.fromkeys(FIXES, True)


def test_step_does_forward_backward_and_update():
    model, (inputs, targets) = network(), examples()
    expected = model(inputs).detach()
    optimizer = ImprovedTALTOptimizer(model=model, base_optimizer=torch.optim.SGD, **create_enhanced_talt_config())
    loss, output = optimizer.step(cross_entropy, inputs, targets)
    assert torch.equal(output.detach(), expected)
    assert loss == pytest.approx(cross_entropy(expected, targets).item())
    assert trained(optimizer, 60)[-1] < 0.5 * loss


def test_on_sgd_it_is_talt():
    first, second = network(), network()
    improved = ImprovedTALTOptimizer(first, torch.optim.SGD, lr=0.02)
    plain = TALT(second.parameters(), 0.02)
    plain.param_groups[0]["params"] = [second[index].weight for index in (0, 2, 4)]
    plain.add_param_group({"params": [second[index].bias for index in (0, 2, 4)], "structure": "diagonal"})
    inputs, targets = examples()
    for _ in range(15):
        improved.step(cross_entropy, inputs, targets)
        plain.zero_grad()
        cross_entropy(second(inputs), targets).backward()
        plain.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_batches_of_arguments_and_of_names():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, left, right):
            return self.layer(left + right)

    torch.manual_seed(0)
    model, x = Sum(), torch.ones(4, 2)
    optimizer = ImprovedTALTOptimizer(model)
    with torch.no_grad():
        expected = model(x, x)
    _, output = optimizer.step(lambda out: out.square().mean(), (x, x))
    assert torch.equal(output, expected)
    _, named = optimizer.step_complex(lambda out, wanted: (out - wanted).square().mean(), {"left": x, "right": x}, 1.0)
    assert named.shape == (4, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_single_precision(precision):
    losses = trained(ImprovedTALTOptimizer(network(), mixed_precision=precision), 30)
    assert losses[-1] == pytest.approx(trained(ImprovedTALTOptimizer(network()), 30)[-1], rel=0.1)


def test_an_overflow_under_a_scaled_loss_changes_nothing():
    model, (inputs, targets) = network(), examples()
    optimizer = ImprovedTALTOptimizer(model, mixed_precision="fp16")
    trained(optimizer, 2)
    before, scale = copy.deepcopy(model), optimizer.scaler.get_scale()
    optimizer.step(lambda out, wanted: cross_entropy(out, wanted) * 1e35, inputs, targets)
    assert same(model, before)
    assert optimizer.scaler.get_scale() < scale
    assert optimizer.talt.skipped == 1


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_base_optimizer_and_a_schedule(base):
    model = network()
    optimizer = ImprovedTALTOptimizer(model, base, lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
    first = trained(optimizer, 1)[0]
    schedule.step()
    for _ in range(9):
        last = trained(optimizer, 1)[0]
        schedule.step()
    assert last < first
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    model = network()
    optimizer = ImprovedTALTOptimizer(model, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.5), mixed_precision="fp16")
    trained(optimizer, 7)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    trained(optimizer, 7)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = network()
    other = ImprovedTALTOptimizer(again, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.5), mixed_precision="fp16")
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    trained(other, 7)
    assert same(model, again)


def test_the_first_version_has_no_fix_and_ten_directions():
    optimizer = TALTOptimizer(network(), lr=0.1)
    group = optimizer.talt.param_groups[0]
    assert not any(group[name] for name in FIXES)
    assert (group["structure"], group["base_memory"], group["update_interval"]) == ("lowrank", 10, 20)
    losses = trained(optimizer, 60)
    assert losses[-1] < losses[0]


def test_the_founders_names_for_settings():
    optimizer = ImprovedTALTOptimizer(
        network(), memory_size=7, use_adaptive_memory=False, smoothing_beta=0.8, eigenspace_blend_factor=0.7
    )
    group = optimizer.talt.param_groups[0]
    assert (group["base_memory"], group["adaptive_memory"], group["blend"]) == (7, False, 0.7)
    assert group["betas"] == (0.8, 0.99)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="valley_strenght: no such setting; did you mean 'valley_strength'"):
        ImprovedTALTOptimizer(network(), valley_strenght=1.0)
    with pytest.raises(ValueError, match="mixed_precision: expected None, 'bf16' or 'fp16', got True"):
        ImprovedTALTOptimizer(network(), mixed_precision=True)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    inputs, targets = examples()
    model.zero_grad()
    cross_entropy(model(inputs), targets).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def require_one_path(*trained, steps):
    """Two networks, each with its optimizer, are where the other is."""
    for _ in range(steps):
        for model, optimizer in trained:
            gradients(model)
            optimizer.step()
    (first, _), (second, _) = trained
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_attached_to_sgd_it_is_talt():
    first, second = network(), network()
    sgd = torch.optim.SGD(first.parameters(), 0.02)
    attach_talt(sgd, structure="kronecker")
    plain = TALT(second.parameters(), 0.02, structure="kronecker")
    require_one_path((first, sgd), (second, plain), steps=12)


def test_attached_to_groups_of_talts_it_keeps_their_structures():
    first, second = network(), network()
    sgd = torch.optim.SGD(talt_param_groups(first), 0.02)
    attachment = attach_talt(sgd, structure="lowrank")
    plain = TALT(talt_param_groups(second), 0.02, structure="lowrank")
    assert [group["structure"] for group in attachment.talt.param_groups] == ["lowrank", "diagonal"]
    require_one_path((first, sgd), (second, plain), steps=3)


def test_removed_it_leaves_raw_gradients():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.02)
    attachment = attach_talt(sgd, options=TALTOptions(valley_strength=0.0))
    attachment.remove()
    raw = gradients(model)
    sgd.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), raw, strict=True))
    assert not attachment.talt.state


def test_a_closure_is_refused_before_anything_is_done():
    model = network()
    before = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), 0.02)
    attach_talt(sgd)
    with pytest.raises(RuntimeError, match=r"expected step\(\) without a closure"):
        sgd.step(lambda: torch.zeros(()))
    assert same(model, before)


def broken(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    attachment = attach_talt(sgd)
    gradients(model)
    sgd.step()
    before = copy.deepcopy(model)
    broken(model)
    sgd.step()
    assert same(model, before)
    assert attachment.talt.skipped == 1
    optimizer, (inputs, targets) = ImprovedTALTOptimizer(model), examples()
    optimizer.step(lambda out, wanted: cross_entropy(out, wanted) * math.nan, inputs, targets)
    assert same(model, before)
    assert optimizer.talt.skipped == 1


def test_new_parameters_are_refused():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.02)
    attach_talt(sgd)
    sgd.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    gradients(model)
    with pytest.raises(RuntimeError, match="the optimizer has new parameters"):
        sgd.step()
    with pytest.raises(RuntimeError, match="add_param_group: expected the model's own parameters"):
        ImprovedTALTOptimizer(model).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(TypeError, match=r"cannot be copied or pickled; save its state_dict\(\)"):
        copy.deepcopy(ImprovedTALTOptimizer(model))
