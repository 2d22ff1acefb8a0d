"""TALT in every habit of a torch optimizer: resuming, copies, groups, schedules, scalers, layers, processes."""

import copy
import math
import pickle
import shutil
import warnings
from concurrent.futures import Future

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from losslab.optim import FIXES, TALT, TALTOptions
from losslab.ranks import Ranks
from processes import run_ranks
from talt_twins import drawn, placed, step

SHAPES = [(4, 5), (4, 5), (3, 2, 2), (6,), (), (5, 1)]
NOTHING = TALTOptions().with_fixes([])
STRUCTURES = {
    "auto": TALTOptions(),
    "kronecker": TALTOptions(max_side=4, adaptive_memory=False, base_memory=2, near_fraction=0.9),
    "lowrank": TALTOptions(incremental_covariance=False, base_memory=3),
    "polar": TALTOptions(),
    "diagonal": TALTOptions(trigger="gradient_change"),
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [nn.Parameter(p.to(dtype)) for p in placed(shapes)]


def gradients(steps, dtype=torch.float32, shapes=SHAPES):
    return [[g.to(dtype) for g in now] for now in drawn(shapes, steps)]


def walk(optimizer, steps):
    for now in steps:
        step(optimizer, now)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# What it is without its fixes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_any_fix_it_is_gradient_descent_bit_for_bit(dtype):
    ours, theirs, steps = parameters(dtype), parameters(dtype), gradients(20, dtype)
    walk(TALT(ours, lr=0.1, options=NOTHING, structure="kronecker"), steps)
    walk(torch.optim.SGD(theirs, lr=0.1), steps)
    assert same(ours, theirs)


def test_with_smoothing_alone_it_follows_the_unbiased_average():
    ours, steps = parameters(torch.float64), gradients(20, torch.float64)
    expected, average = [p.detach().clone() for p in ours], [torch.zeros_like(p) for p in ours]
    options = TALTOptions(nesterov=False).with_fixes(["gradient_smoothing"])
    walk(TALT(ours, lr=0.1, betas=(0.9, 0.5), options=options), steps)
    for t, now in enumerate(steps, start=1):
        for p, m, g in zip(expected, average, now, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            p.sub_(0.1 * m / (1 - 0.9**t))
    torch.testing.assert_close([p.detach() for p in ours], expected, rtol=1e-13, atol=1e-13)


def test_on_the_axes_it_is_adamw():
    ours, theirs, steps = parameters(torch.float64), parameters(torch.float64), gradients(30, torch.float64)
    settings = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-3, "weight_decay": 0.1}
    options = TALTOptions(nesterov=False, valley_strength=0.0)
    walk(TALT(ours, structure="diagonal", options=options, **settings), steps)
    walk(torch.optim.AdamW(theirs, **settings), steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# Saving, loading, copying.


def resumed(tmp_path, optimizer, into, through):
    if through == "torch":
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        into.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        return
    found = optimizer.state_dict()
    named = {f"{index}.{name}": value for index, state in found["state"].items() for name, value in state.items()}
    save_file(named, tmp_path / "state.safetensors")
    state = {index: {} for index in found["state"]}
    for name, value in load_file(tmp_path / "state.safetensors").items():
        index, _, key = name.partition(".")
        state[int(index)][key] = value
    into.load_state_dict({"state": state, "param_groups": found["param_groups"]})


@every_structure
@pytest.mark.parametrize("through", ["torch", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_run(tmp_path, structure, through, dtype):
    steps, settings = gradients(12, dtype), {"structure": structure, "options": STRUCTURES[structure]}
    whole = parameters(dtype)
    first = TALT(whole, weight_decay=0.1, **settings)
    walk(first, steps[:7])
    rest = [nn.Parameter(p.detach().clone()) for p in whole]
    second = TALT(rest, weight_decay=0.9)  # settings come with the state
    resumed(tmp_path, first, second, through)
    walk(first, steps[7:])
    walk(second, steps[7:])
    assert same(whole, rest)
    for a, b in zip(whole, rest, strict=True):
        for name, value in first.state[a].items():
            assert torch.equal(value, second.state[b][name]), name
            assert value.dtype == second.state[b][name].dtype == torch.float32


def test_a_saved_state_is_of_tensors_that_nobody_shares():
    optimizer = TALT(parameters())
    walk(optimizer, gradients(3))
    saved = optimizer.state_dict()
    tensors = [value for state in saved["state"].values() for value in state.values()]
    assert all(isinstance(value, torch.Tensor) for value in tensors)
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)
    before = copy.deepcopy(saved["state"])
    walk(optimizer, gradients(3))
    assert all(torch.equal(before[i][name], v) for i, state in saved["state"].items() for name, v in state.items())


def test_loading_leaves_what_was_given_alone():
    first, second = TALT(parameters()), TALT(parameters())
    walk(first, gradients(3))
    saved = first.state_dict()
    before = copy.deepcopy(saved["state"])
    second.load_state_dict(saved)
    walk(second, gradients(4))
    assert all(torch.equal(before[i][name], v) for i, state in saved["state"].items() for name, v in state.items())


def test_a_state_loads_into_parameters_of_another_precision():
    first, second = TALT(parameters(torch.bfloat16)), TALT(parameters(torch.float64))
    walk(first, gradients(5, torch.bfloat16))
    second.load_state_dict(first.state_dict())
    walk(second, gradients(5, torch.float64))
    assert all(p.isfinite().all() for group in second.param_groups for p in group["params"])


def test_states_of_some_parameters_only_find_their_parameters(tmp_path):
    """In two groups, some never having moved: indices of the file are those of all parameters, in order."""
    runs = [[{"params": ps[:3], "power": 0.25}, {"params": ps[3:]}] for ps in (parameters(), parameters())]
    first, second = (TALT(groups, lr=0.01) for groups in runs)
    steps = [[None if i in (0, 4) else g for i, g in enumerate(now)] for now in gradients(6)]
    walk(first, steps)
    with torch.no_grad():
        for ours, theirs in zip(first.param_groups, second.param_groups, strict=True):
            for p, q in zip(ours["params"], theirs["params"], strict=True):
                q.copy_(p)
    resumed(tmp_path, first, second, "torch")
    for optimizer in (first, second):
        walk(optimizer, gradients(6))
    for ours, theirs in zip(first.param_groups, second.param_groups, strict=True):
        assert same(ours["params"], theirs["params"])


def test_other_groups_than_the_saved_ones_are_refused():
    optimizer = TALT(parameters())
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(TALT(parameters(shapes=SHAPES[:2])).state_dict())
    walk(optimizer, gradients(2))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_its_own_way(copied):
    ours = parameters()
    optimizer = TALT(ours, options=STRUCTURES["kronecker"])
    walk(optimizer, gradients(6))
    theirs, other = copied((ours, optimizer))
    before = [p.detach().clone() for p in ours]
    walk(other, gradients(5))
    assert same(ours, before)
    walk(optimizer, gradients(5))
    assert same(ours, theirs)


def test_parameters_that_come_later_start_afresh():
    ours, steps = parameters(), gradients(12)
    optimizer = TALT(ours[:1], lr=0.01)
    walk(optimizer, [now[:1] for now in steps[:5]])
    optimizer.add_param_group({"params": ours[1:], "lr": 0.02, "weight_decay": 0.1})
    walk(optimizer, steps[5:])
    alone, late = parameters(), parameters()
    walk(TALT(alone[:1], lr=0.01), [now[:1] for now in steps])
    walk(TALT(late[1:], lr=0.02, weight_decay=0.1), [now[1:] for now in steps[5:]])
    assert same(ours, [*alone[:1], *late[1:]])


# Gradients of every kind.


@every_structure
def test_a_gradient_that_is_not_finite_changes_nothing(structure):
    ours, others, steps = parameters(), parameters(), gradients(9)
    settings = {"structure": structure, "options": STRUCTURES[structure], "weight_decay": 0.1}
    optimizer, untroubled = TALT(ours, **settings), TALT(others, **settings)
    for t, now in enumerate(steps):
        step(untroubled, now)
        step(optimizer, now)
        if t in (0, 4, 6):
            broken = [g.clone() for g in now]
            broken[2].view(-1)[3] = {0: math.nan, 4: math.inf, 6: -math.inf}[t]
            step(optimizer, broken)
    assert optimizer.skipped == 3
    assert untroubled.skipped == 0
    assert same(ours, others)


def test_a_first_gradient_that_is_not_finite_takes_no_memory():
    ours = parameters()
    optimizer = TALT(ours)
    step(optimizer, [torch.full_like(p, math.nan) for p in ours])
    assert optimizer.skipped == 1
    assert not optimizer.state
    reloaded = TALT(parameters())
    reloaded.load_state_dict(optimizer.state_dict())
    assert reloaded.skipped == 1


@every_structure
def test_gradients_of_any_size(structure):
    """From 1e-30 to 1e30 in float32, whose squares end at 1e-38 and 3e38: the same steps as at size one, since
    floating-point numbers scale exactly by powers of two, and so does the rule where ε is zero.
    """
    found = []
    for exponent in (0, -100, -66, -40, 40, 66, 100):
        ours = parameters()
        optimizer = TALT(ours, eps=0.0, structure=structure, options=STRUCTURES[structure])
        walk(optimizer, [[g * 2.0**exponent for g in now] for now in gradients(6)])
        found.append(torch.cat([p.detach().flatten() for p in ours]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@every_structure
def test_sizes_that_change_on_the_way(structure):
    ours = parameters()
    optimizer = TALT(ours, lr=0.01, structure=structure, options=STRUCTURES[structure])
    for now, factor in zip(gradients(12), [1, 1e20, 1, 1e-30, 1e-30, 1e30, 0, 1e30, 1e-20, 1, 1, 1], strict=True):
        before = [p.detach().clone() for p in ours]
        step(optimizer, [g * factor for g in now])
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(ours, before, strict=True)])
        assert moved.isfinite().all()
        assert moved.abs().max() < 1  # lr 0.01: no more than some hundred times the usual step
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@every_structure
def test_no_gradient_at_all_and_gradients_of_low_rank(structure):
    """Zero gradients move nothing; rank one, and rows that never have any, leave everything finite."""
    ours = parameters()
    optimizer = TALT(ours, lr=0.1, structure=structure, options=STRUCTURES[structure])
    before = [p.detach().clone() for p in ours]
    walk(optimizer, [[torch.zeros_like(p) for p in ours]] * 3)
    assert same(ours, before)
    for now in gradients(12):
        flat = [g.reshape(len(g), -1) if g.ndim > 1 else g for g in now]
        step(
            optimizer,
            [
                (f[:, :1] @ f[:1] * (torch.arange(len(f)) > 0)[:, None]).reshape(g.shape) if f.ndim > 1 else g
                for f, g in zip(flat, now, strict=True)
            ],
        )
    assert all(p.isfinite().all() for p in ours)
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
    assert all((p - b).abs().max() < 12 for p, b in zip(ours, before, strict=True))


# Layers.


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.rnn = nn.Embedding(7, 6), nn.LSTM(6, 4, batch_first=True)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.table.weight  # tied
        self.scale = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        x = self.rnn(self.table(x))[0]
        x = self.attention(x, x, x)[0] * self.scale
        return self.out(self.head(x)).sum(1) + self.nothing.sum()


def convolutions(dimensions):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    transposed = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dimensions - 1]
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions - 1]
    return nn.Sequential(
        conv(2, 4, 2), norm(4), nn.Tanh(), conv(4, 4, 2, groups=2), nn.GroupNorm(2, 4), transposed(4, 3, 2),
        nn.Flatten(), nn.LayerNorm(3 * 2**dimensions), nn.Linear(3 * 2**dimensions, 7),
    )  # fmt: skip


MODELS = {
    "sequence": lambda: (Sequence(), torch.arange(15).view(3, 5) % 7),
    **{f"convolutions in {d}": lambda d=d: (convolutions(d), torch.randn(3, 2, *[3] * d)) for d in (1, 2, 3)},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers(name, dtype):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = model.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    targets = torch.arange(3)
    optimizer = TALT(model.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).float(), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())


def test_frozen_layers_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    optimizer = TALT(model.parameters(), weight_decay=0.5)
    told = optimizer.state_numbers()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, frozen[name]) for name, value in model[0].state_dict().items())
    assert set(optimizer.state) == set(model[1].parameters())
    assert told == sum(v.numel() for state in optimizer.state.values() for n, v in state.items() if n != "step")


def test_complex_and_sparse_are_refused_by_name():
    with pytest.raises(ValueError, match=r"params: expected real tensors, got torch.complex64; use torch.view_as_real"):
        TALT([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = TALT(parameters())
    with pytest.raises(ValueError, match=r"got torch\.complex128"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex128)]})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"expected a dense gradient, got a sparse one; embeddings: sparse=False"):
        TALT(table.parameters()).step()


# Training loops.


def bowl(steps, make, each=lambda optimizer: optimizer.step()):
    """Parameters after training a small net: `make` gives what `each` is called with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = make(model.parameters())
    inputs = torch.randn(steps, 8, 3)
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        each(optimizer)
    return [p.detach() for p in model.parameters()], optimizer


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    ],
    ids=["StepLR", "OneCycleLR", "LinearLR"],
)
def test_schedules_set_the_rate_of_every_step(schedule):
    twin = schedule(torch.optim.SGD([torch.zeros(1)], lr=0.02))
    rates = []
    for _ in range(10):
        rates.append(twin.optimizer.param_groups[0]["lr"])
        twin.optimizer.step()
        twin.step()
    assert len(set(rates)) > 3
    scheduler, position = None, iter(rates)

    def scheduled(optimizer):
        nonlocal scheduler
        scheduler = scheduler or schedule(optimizer)
        optimizer.step()
        scheduler.step()

    def by_hand(optimizer):
        optimizer.param_groups[0]["lr"] = next(position)
        optimizer.step()

    expected, _ = bowl(10, lambda ps: TALT(ps, lr=0.02), by_hand)
    assert same(bowl(10, lambda ps: TALT(ps, lr=0.02), scheduled)[0], expected)


def test_a_rate_may_be_a_tensor():
    number, _ = bowl(5, lambda ps: TALT(ps, lr=0.25, weight_decay=0.5))
    tensor, _ = bowl(5, lambda ps: TALT(ps, lr=torch.tensor(0.25), weight_decay=0.5))
    assert same(number, tensor)


def test_gradient_scaler_skips_what_overflows():
    """Unscaled, a scaled run is the run; a step whose gradients overflow is no step."""
    expected, _ = bowl(6, lambda ps: TALT(ps, lr=0.02))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, scaler = TALT(model.parameters(), lr=0.02), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t, x in enumerate(torch.randn(6, 8, 3)):
        for overflows in (True, False) if t == 2 else (False,):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if overflows:
                model[0].weight.grad[0, 0] = math.inf
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped == 0  # the scaler did not even ask
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)


def test_accumulated_and_clipped_gradients():
    """The gradient that is there at `step` is what counts, whatever was done to it before."""
    torch.manual_seed(0)
    one, two = (nn.Linear(3, 2) for _ in range(2))
    two.load_state_dict(one.state_dict())
    first, second = TALT(one.parameters()), TALT(two.parameters())
    for x in torch.randn(5, 8, 3):
        first.zero_grad()
        one(x).square().mean().backward()
        second.zero_grad()
        for part in x.split(2):
            (two(part).square().mean() / 4).backward()
        norms = [float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)) for model in (one, two)]
        assert min(norms) > 0.1
        first.step()
        second.step()
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=1e-3, atol=1e-5)


def test_closures_compute_with_gradients_and_give_their_loss():
    expected, _ = bowl(5, TALT)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = TALT(model.parameters())
    for x in torch.randn(5, 8, 3):
        before = model(x).square().mean().item()

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).item() == before
    assert same(expected, [p.detach() for p in model.parameters()])


def test_uphill_is_downhill_of_the_negative():
    ours, theirs, steps = parameters(), parameters(), gradients(8)
    walk(TALT(ours, maximize=True, weight_decay=0.1), steps)
    walk(TALT(theirs, weight_decay=0.1), [[-g for g in now] for now in steps])
    assert same(ours, theirs)


def test_hooks_and_zero_grad():
    ours = parameters()
    optimizer, seen = TALT(ours), []

    def without_gradient(*_):
        for p in ours:
            p.grad.zero_()

    hook = optimizer.register_step_pre_hook(without_gradient)
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(o))
    before = [p.detach().clone() for p in ours]
    walk(optimizer, [[g.clone() for g in now] for now in gradients(2)])
    assert same(ours, before)
    assert seen == [optimizer, optimizer]
    hook.remove()
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours)
    optimizer.step()
    assert same(ours, before)


def test_gradients_are_left_as_they_were():
    ours, (now,) = parameters(), gradients(1)
    walk(TALT(ours, maximize=True), [[g.clone() for g in now]])
    assert same([p.grad for p in ours], now)


def test_strides_do_not_matter():
    ours, theirs = parameters(shapes=[(4, 3, 2, 2)]), parameters(shapes=[(4, 3, 2, 2)])
    theirs[0].data = theirs[0].data.to(memory_format=torch.channels_last)
    steps = gradients(5, shapes=[(4, 3, 2, 2)])
    walk(TALT(ours), steps)
    walk(TALT(theirs), [[g.to(memory_format=torch.channels_last) for g in now] for now in steps])
    assert same(ours, theirs)
    assert theirs[0].is_contiguous(memory_format=torch.channels_last)


def distributed(ranks: Ranks) -> list[torch.Tensor]:
    torch.manual_seed(ranks.rank)  # the wrapper copies process 0's parameters
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()  # covariances of full rank
    parallel = nn.parallel.DistributedDataParallel(model) if ranks.count > 1 else model
    optimizer = TALT(parallel.parameters(), lr=0.02)
    data = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for batch in data:
        optimizer.zero_grad()
        parallel(batch[ranks.rank :: ranks.count]).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_two_processes_train_as_one(tmp_path):
    first, second = run_ranks(distributed, 2, tmp_path)
    assert same(first, second)
    torch.testing.assert_close(first, distributed(Ranks()), rtol=1e-9, atol=1e-9)


# Wrong settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "kron"}, r"structure: expected one of auto, kronecker, .*, got 'kron'"),
        ({"lr": -1.0}, r"lr: expected a number >= 0, got -1.0"),
        ({"lr": math.nan}, r"lr: expected a number >= 0, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ({"lr": "0.1"}, r"lr: expected a number >= 0, got '0.1'"),
        ({"betas": (0.9,)}, r"betas: expected two numbers"),
        ({"betas": 0.9}, r"betas: expected two numbers from 0 to below 1, got 0.9"),
        ({"betas": ("0.9", 0.99)}, r"betas: expected two numbers from 0 to below 1, got \('0.9', 0.99\)"),
        ({"eps": None}, r"eps: expected a number >= 0, got None"),
        ({"eps": -1e-8}, r"eps: expected a number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay: expected a number >= 0, got -0.1"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TALT(parameters(), **settings)
    optimizer = TALT(parameters(shapes=SHAPES[:1]))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(shapes=SHAPES[:1]), **settings})
    assert len(optimizer.param_groups) == 1


def test_unknown_settings_of_a_group_are_refused():
    with pytest.raises(
        ValueError, match=r"blent: TALT has no such setting; expected one of .*blend.*; did you mean 'blend'"
    ):
        TALT([{"params": parameters(), "blent": 0.3}])
    with pytest.raises(ValueError, match=r"power: expected 0 to 1, got 1.5"):
        TALT([{"params": parameters(), "power": 1.5}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptive_memory": 1}, "adaptive_memory: expected True or False, got 1"),
        ({"base_memory": 0}, "base_memory: expected a whole number >= 1, got 0"),
        ({"update_interval": 2.5}, "update_interval: expected a whole number >= 1, got 2.5"),
        ({"covariance_decay": 1.0}, "covariance_decay: expected a number < 1, got 1.0"),
        (
            {"percentiles": (80.0, 20.0)},
            r"percentiles: expected two numbers, 0 <= low <= high <= 100, got \(80.0, 20.0\)",
        ),
        ({"percentiles": 20}, "percentiles: expected two numbers, 0 <= low <= high <= 100, got 20"),
        ({"base_memory": True}, "base_memory: expected a whole number >= 1, got True"),
        ({"power": "0.5"}, "power: expected 0 to 1, got '0.5'"),
        ({"orthogonal": 1}, "orthogonal: expected True or False, got 1"),
        ({"match_rms": "0.2"}, "match_rms: expected None or a finite number > 0, got '0.2'"),
        ({"thresholds": (-1.0, 1.0)}, r"thresholds: expected two numbers, 0 <= low <= high <= inf, got \(-1.0, 1.0\)"),
        ({"power": -0.1}, "power: expected 0 to 1, got -0.1"),
        ({"clip": 0.5}, "clip: expected a number >= 1, got 0.5"),
        ({"clip": True}, "clip: expected a number >= 1, got True"),
        ({"blend": 0.0}, "blend: expected a finite number > 0, got 0.0"),
        ({"trigger": "gradient"}, "trigger: expected one of none, gradient_change, off_diagonal, got 'gradient'"),
        ({"match_rms": 0.0}, "match_rms: expected None or a finite number > 0, got 0.0"),
        ({"gate_width": 0.0}, "gate_width: expected a finite number > 0, got 0.0"),
        ({"valley_strength": math.nan}, "valley_strength: expected a finite number >= 0, got nan"),
        ({"max_megabytes": 0.0}, "max_megabytes: expected a finite number > 0, got 0.0"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TALTOptions(**settings)


def test_fixes_by_name():
    some = TALTOptions().with_fixes(["gradient_smoothing", "dynamic_updates"])
    assert [fix for fix in FIXES if getattr(some, fix)] == ["dynamic_updates", "gradient_smoothing"]
    fewer = TALTOptions().with_fixes(FIXES).without("dynamic_updates")
    assert [fix for fix in FIXES if not getattr(fewer, fix)] == ["dynamic_updates"]
    message = r"fixes: gradient_smothing: expected one of .*; did you mean 'gradient_smoothing'\?"
    with pytest.raises(ValueError, match=message):
        TALTOptions().with_fixes(["gradient_smothing"])
    with pytest.raises(ValueError, match=message):
        TALTOptions().without("gradient_smothing")


def test_bases_on_their_way_are_saved_and_copied():
    """A run that is saved, copied or goes on between two refreshes is the run that was not."""
    options = TALTOptions(asynchronous=True, update_interval=4)
    gradients = drawn([(3, 4), (4, 4)], 45)
    paths = []
    for saved_at in (None, 25, 42):
        parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((3, 4), (4, 4))]
        optimizer = TALT(parameters, options=options)
        for done, given in enumerate(gradients):
            if done == saved_at:
                copy.deepcopy(optimizer)
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = TALT(parameters, options=options)
                optimizer.load_state_dict(state)
            step(optimizer, given)
        paths.append([parameter.detach().clone() for parameter in parameters])
    for path in paths[1:]:
        assert all(torch.equal(a, b) for a, b in zip(path, paths[0], strict=True))


def test_bases_from_another_thread_take_no_trigger():
    with pytest.raises(ValueError, match="trigger: expected 'none' with asynchronous=True, got 'off_diagonal'"):
        TALTOptions(asynchronous=True, trigger="off_diagonal")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_it_makes_the_same_steps():
    gradients = drawn([(3, 4), (6, 5)], 12)
    ends = []
    for compiled in (False, True):
        parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((3, 4), (6, 5))]
        optimizer = TALT(parameters, options=TALTOptions(compiled=compiled, max_side=4, base_memory=2, clip=5.0))
        for given in gradients:
            step(optimizer, given)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)


def test_what_lies_outside_a_cut_side_is_never_divided_by_less_than_its_rounding():
    """Gradients that stay in the kept directions: outside, the average is rounding, and so is its mean square."""
    torch.manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(256, 8)).Q.T * 16
    for size in (1.0, 1e3):
        x = nn.Parameter(torch.zeros(32, 256))
        optimizer = TALT([x], 1e-3, options=TALTOptions(max_side=64))
        for done in range(1, 1301):
            before = x.detach().clone()
            x.grad = size * torch.randn(32, 8) @ inputs
            optimizer.step()
            if done > 20:
                assert (x.detach() - before).square().mean().sqrt() < 1e-3


def test_a_state_that_is_set_anew_is_taken():
    x = nn.Parameter(torch.ones(3, 4))
    optimizer = TALT([x], 1e-2)
    for given in drawn([(3, 4)], 5):
        step(optimizer, [given[0].float()])
    optimizer.state.clear()
    step(optimizer, [torch.ones(3, 4)])
    assert optimizer.state[x]["step"] == 1
    assert len(optimizer.state_dict()["state"]) == 1


def test_layers_that_are_frozen_one_by_one_keep_no_others_memory():
    layers = [nn.Parameter(torch.zeros(8, 8)) for _ in range(6)]
    optimizer = TALT(layers)
    for frozen in range(6):
        step(optimizer, [None if index < frozen else torch.randn(8, 8) for index in range(6)])
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
    }
    numbers = optimizer.state_numbers() + len(layers)  # and the step counts
    assert sum(storages.values()) == 4 * numbers


def test_a_step_inside_autocast_is_a_step():
    ends = []
    for inside in (False, True):
        x = nn.Parameter(torch.ones(3, 4))
        optimizer = TALT([x], 1e-2)
        for given in drawn([(3, 4)], 5):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                step(optimizer, [given[0].float()])
        ends.append(x.detach().clone())
    assert torch.equal(*ends)


def test_where_the_loss_curves_down_valleys_stay_as_amplified_as_they_were():
    """Low gradients and a falling loss: a saddle, not a minimum."""
    ends = {}
    for near, rising in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        x = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        optimizer = TALT(
            [x], options=TALTOptions(update_interval=50, dynamic_updates=False, selective_amplification=True)
        )
        *first, last = drawn([(3, 4)], 6)
        for given in first:
            step(optimizer, given)
        optimizer.state[x]["near"].fill_(near)
        optimizer.state[x]["rising"].fill_(rising)
        step(optimizer, last)
        ends[near, rising] = x.detach().clone()
    assert torch.equal(ends[1.0, 0.0], ends[0.0, 1.0])
    assert not torch.allclose(ends[1.0, 1.0], ends[0.0, 1.0], atol=1e-6)


def test_a_probe_that_no_fix_asks_for_is_not_called():
    x = nn.Parameter(torch.ones(3, 4))
    with pytest.warns(UserWarning, match="TALT: nothing asks the probe; selective_amplification=True does"):
        optimizer = TALT([x], probe=lambda: 1 / 0, options=TALTOptions(probe_interval=1))
    for _ in range(3):
        step(optimizer, [torch.ones(3, 4)])


def test_bases_that_could_not_be_found_are_those_of_before(monkeypatch):
    x = nn.Parameter(torch.ones(3, 4))
    optimizer = TALT([x], options=TALTOptions(asynchronous=True))
    given = [torch.randn(3, 4)]
    step(optimizer, given)
    stack = optimizer._plans._plans[0].stacks[0][1]
    failed = Future()
    failed.set_exception(torch.linalg.LinAlgError("not found"))
    stack.coming = failed
    with pytest.raises(torch.linalg.LinAlgError, match="not found"):
        optimizer.state_dict()
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_a_costly_tensor_is_named_where_the_tokens_are_told():
    wide = nn.Parameter(torch.zeros(64, 100))
    with pytest.warns(UserWarning, match=r"a step of \(64, 100\) costs 6.1 times its forward and backward pass at 64"):
        TALT([wide], tokens=64)
    with pytest.warns(UserWarning, match="costs 0.56 times"):  # half as much is the bound
        TALT([wide], tokens=700)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TALT([wide], tokens=900)
        TALT([wide], tokens=400, options=TALTOptions(orthogonal=False))
        TALT([wide], tokens=64, structure="diagonal")
        TALT([wide])
    long = nn.Parameter(torch.zeros(16, 144))  # 16 + 4/3·24 for its sides, 16·46/27 for products of the short one
    with pytest.warns(UserWarning, match="costs 0.75 times"):
        TALT([long], tokens=100)


def test_a_probe_has_a_say_in_what_is_near_a_minimum():
    """At a saddle the loss curves down along the way, and valleys stay as amplified as they were."""
    for sign, rising in ((1.0, 1.0), (-1.0, 0.0)):
        x = nn.Parameter(torch.ones(3, 4))

        def loss(x=x, sign=sign):
            return sign * x.square().sum()

        optimizer = TALT([x], 1e-3, probe=loss, options=TALTOptions(selective_amplification=True, probe_interval=3))
        for done in range(1, 6):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            assert optimizer.state[x]["rising"].item() == (1.0 if done <= 3 else rising)


def test_a_state_that_is_older_than_an_option_goes_on_as_it_was():
    """Its groups do not name it, and loading takes groups as they are."""
    (first,), (second,) = placed([(4, 6)]), placed([(4, 6)])
    saving = TALT([first], options=TALTOptions(orthogonal=False, update_ramp=10))
    gradients = drawn([(4, 6)], 30, seed=3)
    for now in gradients[:15]:
        step(saving, now)
    state = saving.state_dict()
    for group in state["param_groups"]:
        del group["orthogonal"], group["update_ramp"]
    loading = TALT([second])
    loading.load_state_dict(state)
    second.data.copy_(first.data)
    for now in gradients[15:]:
        step(saving, now)
        step(loading, now)
    assert torch.equal(first, second)
