"""TALT on a GPU: the steps of the CPU, saved and loaded anywhere, half precision, scaled losses, threads, compiled."""

import copy
import math
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from devices import CUDA, DEVICE, equal, is_there, on_device, same
from losslab.optim import (
    FIXES,
    TALT,
    ImprovedTALTOptimizer,
    TALTDiagnostics,
    TALTOptimizer,
    TALTOptions,
    attach_talt,
    phase,
    step_curvature,
    valley_curvature,
)
from talt_twins import drawn, placed, step

pytestmark = on_device
# Sides as long as each other, or nearly: in a null space of more than one direction any basis is an eigenbasis, and
# the CPU's is another one than the GPU's.
SHAPES = [(4, 5), (4, 5), (3, 2, 2), (6, 6), (6,), ()]
NOTHING = TALTOptions().with_fixes([])
OPTIONS = {
    "all fixes": ("auto", TALTOptions()),
    **{f"without {fix}": ("auto", TALTOptions().without(fix)) for fix in FIXES},
    **{f"only {fix}": ("auto", TALTOptions().with_fixes([fix])) for fix in FIXES},
    "none": ("auto", NOTHING),
    "cut sides": ("auto", TALTOptions(max_side=4, adaptive_memory=False, base_memory=2, near_fraction=0.9)),
    "one-sided": ("auto", TALTOptions(one_sided=True, power=0.25, damping=0.3, clip=5.0)),
    "gradient_change": ("auto", TALTOptions(trigger="gradient_change")),
    "off_diagonal": ("auto", TALTOptions(trigger="off_diagonal", trigger_bound=0.1)),
    "another thread": ("auto", TALTOptions(asynchronous=True, update_interval=4)),
    "lowrank": ("lowrank", TALTOptions(base_memory=3)),
    "lowrank, last gradients": ("lowrank", TALTOptions(incremental_covariance=False, base_memory=3)),
    "polar": ("polar", TALTOptions(match_rms=0.2)),
    "diagonal": ("diagonal", TALTOptions()),
}
STRUCTURES = {name: OPTIONS[name] for name in ("cut sides", "another thread", "lowrank", "polar", "diagonal")}


def parameters(dtype=torch.float32, device=DEVICE, shapes=SHAPES):
    return [nn.Parameter(p.to(device, dtype)) for p in placed(shapes)]


def gradients(steps, dtype=torch.float32, device=DEVICE, shapes=SHAPES):
    return [[g.to(device, dtype) for g in now] for now in drawn(shapes, steps)]


def walk(optimizer, steps):
    for now in steps:
        step(optimizer, now)


@pytest.mark.parametrize("name", OPTIONS)
def test_thirty_steps_are_those_of_the_cpu(name):
    structure, options = OPTIONS[name]
    ends = []
    for device in ("cpu", DEVICE):
        ours = parameters(torch.float64, device)
        optimizer = TALT(ours, lr=0.01, weight_decay=0.1, structure=structure, options=options)
        walk(optimizer, gradients(30, torch.float64, device))
        ends.append((ours, optimizer))
    (here, first), (there, second) = ends
    for a, b in zip(there, here, strict=True):
        equal(a, b, 1e-6)  # thirty steps multiply rounding; bases are the same up to signs, which the rule does not see
        for key in ("exp_avg_sq", "cuts", "peak", "near", "refreshes"):
            if key in second.state[a]:
                equal(second.state[a][key], first.state[b][key], 1e-4)
    for state in second.state.values():
        assert is_there(value for key, value in state.items() if key != "step")
        assert state["step"].device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_state_goes_to_the_host_and_back(tmp_path, name, dtype):
    """Through a file on the CPU: the run goes on to the same bits."""
    structure, options = STRUCTURES[name]
    steps, whole = gradients(24, dtype), parameters(dtype)
    first = TALT(whole, weight_decay=0.1, structure=structure, options=options)
    walk(first, steps[:13])
    torch.save(first.state_dict(), tmp_path / "there.pt")
    host = parameters(dtype, "cpu")
    between = TALT(host, structure=structure, options=options)
    between.load_state_dict(torch.load(tmp_path / "there.pt", map_location="cpu", weights_only=True))
    assert all(value.device.type == "cpu" for state in between.state.values() for value in state.values())
    rest = [nn.Parameter(p.detach().clone()) for p in whole]
    second = TALT(rest, structure=structure, options=options)
    second.load_state_dict(between.state_dict())
    walk(first, steps[13:])
    walk(second, steps[13:])
    walk(between, gradients(3, dtype, "cpu"))  # and it can be used there
    assert same(whole, rest)
    assert all(p.dtype == dtype for p in rest)
    for a, b in zip(whole, rest, strict=True):
        assert first.state[a].keys() == second.state[b].keys()
        for key, value in first.state[a].items():
            assert torch.equal(value, second.state[b][key]), key
            assert value.dtype == second.state[b][key].dtype


def test_a_state_that_was_loaded_onto_the_device_whole():
    """As torch.load(map_location="cuda") gives it: with the step counts."""
    ours, steps = parameters(), gradients(8)
    optimizer = TALT(ours)
    walk(optimizer, steps[:4])
    found = copy.deepcopy(optimizer.state_dict())
    for state in found["state"].values():
        state["step"] = state["step"].to(DEVICE)
    rest = [nn.Parameter(p.detach().clone()) for p in ours]
    other = TALT(rest)
    other.load_state_dict(found)
    for taken in (optimizer, other):
        walk(taken, steps[4:])
    assert same(ours, rest)


def test_parameters_that_move_to_the_device_before_the_first_step():
    """Fabric makes the optimizer first, and moves the network then."""
    model = nn.Linear(5, 4)
    optimizer = TALT(model.parameters())
    model.to(DEVICE)
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(2, 5, device=DEVICE)).square().sum().backward()
        optimizer.step()
    assert is_there(model.parameters())
    assert is_there(optimizer.state[model.weight][key] for key in ("exp_avg", "basis_left"))


@pytest.mark.parametrize("sizes", [[1, 1e20, 1, 1e-30, 1e-30, 1e30, 0, 1e30, 1e-20, 1, 1, 1]])
def test_gradients_of_any_size(sizes):
    for structure, options in STRUCTURES.values():
        ours = parameters()
        optimizer = TALT(ours, lr=0.01, structure=structure, options=options)
        for now, factor in zip(gradients(12), sizes, strict=True):
            step(optimizer, [g * factor for g in now])
        assert all(p.isfinite().all() for p in ours)
        assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    structure, options = STRUCTURES[name]
    ours, others = parameters(), parameters()
    troubled, untroubled = (TALT(ps, structure=structure, options=options) for ps in (ours, others))
    for t, now in enumerate(gradients(9)):
        walk(untroubled, [now])
        walk(troubled, [now])
        if t in (0, 5):
            broken = [g.clone() for g in now]
            broken[2].view(-1)[3] = math.inf
            walk(troubled, [broken])
    assert (troubled.skipped, untroubled.skipped) == (2, 0)
    assert same(ours, others)


def test_large_and_tall_tensors_in_float32():
    """Eigenvectors of ranks far below their sides, in batches; kernels in the memory layout of images."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 8), (96, 8), (32, 16, 3, 3), (300, 20), (1, 40)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in shapes]
    ours[2].data = ours[2].data.to(memory_format=torch.channels_last)
    optimizer = TALT(ours, lr=0.05)
    first = sum(float(p.detach().square().sum()) for p in ours)
    for _ in range(40):
        step(optimizer, [p.detach().clone() for p in ours])
    assert sum(float(p.detach().square().sum()) for p in ours) < 0.5 * first
    assert ours[2].is_contiguous(memory_format=torch.channels_last)


# Mixed precision.


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)


def examples(count=32):
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return inputs.to(DEVICE), (inputs[:, :3] + 0.1 * inputs[:, 3:]).argmax(1).to(DEVICE)


def test_a_scaled_loss_and_a_gradient_that_overflows():
    """What is in people's loops: autocast, GradScaler, clipping; an infinite gradient is no step."""
    model, (x, y) = net(), examples()
    optimizer, scaler = TALT(model.parameters(), lr=0.02), torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    losses, before = [], None
    for t in range(16):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16 if CUDA else torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if t == 5:
            model[0].weight.grad[0, 0] = math.inf
            before = copy.deepcopy(model)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        if t == 5:
            assert same(model, before)
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped == 0  # the scaler did not even ask
    assert int(optimizer.state[model[0].weight]["step"]) == 15
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_inside_autocast_is_a_step():
    ends = []
    for inside in (False, True):
        ours = parameters()
        optimizer = TALT(ours, 1e-2)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=inside):
            walk(optimizer, gradients(5))
        ends.append(ours)
    assert same(*ends)


def trained(optimizer, steps):
    inputs, targets = examples()
    return [optimizer.step(F.cross_entropy, inputs, targets)[0] for _ in range(steps)]


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize("kind", [ImprovedTALTOptimizer, TALTOptimizer])
def test_the_founding_interface(kind, precision):
    model = net()
    optimizer = kind(model, lr=0.02, mixed_precision=precision, gradient_clip_norm=5.0)
    losses = trained(optimizer, 30)
    assert losses[-1] < losses[0]
    if kind is ImprovedTALTOptimizer:
        plain = trained(ImprovedTALTOptimizer(net(), lr=0.02, gradient_clip_norm=5.0), 30)
        assert losses[-1] == pytest.approx(plain[-1], rel=0.15, abs=0.02)
    other = copy.deepcopy(model)
    again = kind(other, lr=0.02, mixed_precision=precision, gradient_clip_norm=5.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert trained(optimizer, 4) == trained(again, 4)
    assert same(model, other)


def test_an_overflow_under_the_founding_interface_changes_nothing():
    model, (inputs, targets) = net(), examples()
    optimizer = ImprovedTALTOptimizer(model, mixed_precision="fp16")
    trained(optimizer, 2)
    before, scale = copy.deepcopy(model), optimizer.scaler.get_scale()
    optimizer.step(lambda out, wanted: F.cross_entropy(out, wanted) * 1e35, inputs, targets)
    assert same(model, before)
    assert optimizer.scaler.get_scale() < scale


def test_attached_to_sgd_it_is_talt():
    first, second, (x, y) = net(), net(), examples()
    sgd = torch.optim.SGD(first.parameters(), 0.02)
    attach_talt(sgd, structure="kronecker")
    plain = TALT(second.parameters(), 0.02, structure="kronecker")
    for _ in range(12):
        for model, optimizer in ((first, sgd), (second, plain)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # SGD's own kernel multiplies and adds in another order


# What runs beside it.


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, for a GPU too")
def test_compiled_it_makes_the_same_steps():
    if CUDA:
        pytest.importorskip("triton", reason="torch.compile needs triton for a GPU")
    shapes, ends = [(3, 4), (6, 5)], []
    for compiled in (False, True):
        ours = parameters(torch.float64, shapes=shapes)
        options = TALTOptions(compiled=compiled, max_side=4, base_memory=2, clip=5.0)
        walk(TALT(ours, options=options), gradients(12, torch.float64, shapes=shapes))
        ends.append(ours)
    for a, b in zip(*ends, strict=True):
        equal(a, b, 1e-9)


def test_bases_on_their_way_are_saved():
    """A run that is saved between two refreshes, while another thread looks for bases, is the run that was not."""
    options, given, paths = TALTOptions(asynchronous=True, update_interval=4), gradients(45), []
    for saved_at in (None, 25, 42):
        ours = parameters()
        optimizer = TALT(ours, options=options)
        for done, now in enumerate(given):
            if done == saved_at:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = TALT(ours, options=options)
                optimizer.load_state_dict(state)
            step(optimizer, now)
        paths.append(ours)
    assert same(paths[0], paths[1])
    assert same(paths[0], paths[2])


def curved(device):
    """A net in float64 after some steps, with its optimizer and a loss of one batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 6)).double().to(device)
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    targets = inputs.argmax(1)

    def loss():
        return F.cross_entropy(model(inputs), targets)

    options = TALTOptions(probe_interval=4)
    optimizer = TALT(model.named_parameters(), lr=0.02, options=options, probe=loss)
    diagnostics = TALTDiagnostics(optimizer, every=3)
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return model, optimizer, loss, diagnostics


def test_probes_phases_and_diagnostics():
    here, there = curved("cpu"), curved(DEVICE)
    for a, b in zip(there[0].parameters(), here[0].parameters(), strict=True):
        equal(a, b, 1e-6)
    for measure in (step_curvature, valley_curvature):
        equal(measure(there[1], there[2]), measure(here[1], here[2]), 1e-5)
    ours, theirs = (phase(optimizer, loss=loss) for _, optimizer, loss, _ in (there, here))
    assert (ours.overall, ours.tensors) == (theirs.overall, theirs.tensors)
    equal([ours.gradient, ours.coherence, ours.curvature], [theirs.gradient, theirs.coherence, theirs.curvature], 1e-5)
    samples = [diagnostics.records() for *_, diagnostics in (there, here)]
    assert len(samples[0]) == len(samples[1]) > 0
    for a, b in zip(*samples, strict=True):
        mine, its = a.scalars(), b.scalars()
        assert mine.keys() == its.keys()
        for key, value in its.items():
            assert mine[key] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), key


def test_diagnostics_go_on_from_a_file(tmp_path):
    _, optimizer, _, diagnostics = curved(DEVICE)
    torch.save(diagnostics.state_dict(), tmp_path / "kept.pt")
    again = TALTDiagnostics(optimizer, every=3)
    again.load_state_dict(torch.load(tmp_path / "kept.pt", map_location="cpu", weights_only=True))
    step(optimizer, [p.detach() for group in optimizer.param_groups for p in group["params"]])
    step(optimizer, [p.detach() for group in optimizer.param_groups for p in group["params"]])
    assert repr(again.records()[-1]) == repr(diagnostics.records()[-1])
