"""What TALT finds and does where the answer is known: eigenspaces, amplification, rotations, memory."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from losslab.optim import FIXES, TALT, TALTOptions
from losslab.optim.eigenspace.options import plain
from losslab.optim.eigenspace.polar import COEFFICIENTS, LONG, newton_schulz
from losslab.optim.talt_reference import TALTReference
from talt_twins import drawn, normal, placed, step

# New bases after steps 1, 11, 21, …
STILL = replace(TALTOptions(orthogonal=False, update_interval=10).with_fixes(FIXES), dynamic_updates=False)


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, generator=torch.Generator().manual_seed(seed))).Q


def test_the_eigenspace_of_a_quadratic_is_found():
    """Gradients H_L X H_R of ½⟨X, H_L X H_R⟩ plus noise, all Kronecker products with the same two eigenbases."""
    P, S, generator = orthogonal(4, 1), orthogonal(5, 2), torch.Generator().manual_seed(3)
    left, right = 4.0 ** torch.arange(4).double(), 3.0 ** torch.arange(5).double()
    X = normal(4, 5, generator=generator)
    # betas[1] and the covariance average over some 200 steps, a step size below 2/λ_max keeps X at the minimum
    options = replace(STILL, covariance_decay=0.995, valley_strength=0.0)
    optimizer = TALT([X], lr=1e-5, betas=(0.9, 0.995), options=options)
    for _ in range(250):
        noise = left.sqrt()[:, None] * normal(4, 5, generator=generator) * right.sqrt()
        hessian = left[:, None] * (P.T @ X @ S) * right * 1e-3
        step(optimizer, [P @ (hessian + noise) @ S.T])
    state = optimizer.state[X]
    for basis, true in ((state["basis_left"], P.flip(1)), (state["basis_right"], S.flip(1))):
        cosines = (basis.T @ true).abs()
        assert cosines.diagonal().min() > 0.99
    found = state["exp_avg_sq"] / (1 - 0.995**250)
    expected = (left[:, None] * right).flip(0, 1)
    error = (found / expected).log2().abs()  # expected ones span 2^12.3; the smallest have most of others mixed in
    assert error.max() < 1.5
    assert error.median() < 0.3


def updates(gradients, options, **settings):
    """Those of the last step, in the eigenbasis; the eigenvalues in units of that step's, and the thresholds."""
    X = placed([gradients[0][0].shape])[0]
    optimizer = TALT([X], lr=1.0, betas=(0.9, 0.95), options=options, **settings)
    for now in gradients[:-1]:
        step(optimizer, now)
    before, state = X.clone(), optimizer.state[X]
    left, right, cuts = (state[name].clone() for name in ("basis_left", "basis_right", "cuts"))
    near = bool(state["near"])
    step(optimizer, gradients[-1])
    values = state["exp_avg_sq"] / (1 - 0.95 ** len(gradients))
    return left.T @ (before - X) @ right, values, cuts.flatten(), near, float(state["scale"])


@pytest.mark.parametrize("width", [1e-3, 0.5, 1.0])
@pytest.mark.parametrize("fraction", [0.01, 0.9], ids=["far", "near"])
def test_valleys_and_only_they_are_amplified(width, fraction):
    """Fixes 3 and 7: by 1 + v·σ((log λ_low − log λ)/w), with 0.3·v near a minimum."""
    gradients = drawn([(4, 5)], 15)
    options = replace(STILL, gate_width=width, near_fraction=fraction, valley_strength=2.0)
    amplified, values, (low, _, _), near, _ = updates(gradients, options)
    plainly, same_values, *_ = updates(gradients, replace(options, valley_strength=0.0))
    assert torch.equal(values, same_values)  # amplification does not feed back
    assert near == (fraction > 0.5)
    strength = 2.0 * (0.3 if near else 1.0)
    expected = 1 + strength * torch.sigmoid((low.log() - values.log()) / width)
    torch.testing.assert_close(amplified / plainly, expected, rtol=1e-9, atol=0)
    assert 0 < (values < low).sum() < 15  # 20 % of the 20 were below it, five steps before


def test_high_curvature_and_only_it_is_damped():
    gradients = drawn([(4, 5)], 15)
    options = replace(STILL, gate_width=1e-3, valley_strength=0.0, damping=0.25)
    damped, values, (_, _, high), *_ = updates(gradients, options)
    plainly, *_ = updates(gradients, replace(options, damping=1.0))
    torch.testing.assert_close(damped / plainly, torch.where(values > high, 0.25, 1.0).double(), rtol=1e-9, atol=0)
    assert 0 < (values > high).sum() < 10


def test_fixed_thresholds_are_in_units_of_the_squared_gradient():
    gradients = [[1e12 * g for g in now] for now in drawn([(4, 5)], 15)]
    plainly, values, _, _, unit = updates(gradients, replace(STILL, valley_strength=0.0))
    assert unit > 1e10  # squares of larger gradients would leave float32's range
    lower, upper = (float(v) for v in values.flatten().sort().values[9:11])
    cut = math.sqrt(lower * upper) * unit**2
    options = replace(STILL, gate_width=1e-4, statistical_thresholds=False, thresholds=(cut, math.inf))
    amplified, *_ = updates(gradients, options)
    torch.testing.assert_close(amplified / plainly, torch.where(values * unit**2 <= cut, 2.0, 1.0).double())


def test_before_there_is_a_basis_all_directions_are_alike():
    gradients = drawn([(4, 5)], 1)
    X = placed([(4, 5)])[0]
    before = X.clone()
    step(TALT([X], lr=1.0, options=TALTOptions(nesterov=False, orthogonal=False)), gradients[0])
    rms = gradients[0][0].square().mean().sqrt()
    torch.testing.assert_close(before - X, gradients[0][0] / (rms + 1e-8), rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_the_response_s_power_whitens(power):
    """s = λ^−p · rms^(2p−1): products of p = ½ and p = 0 are in the ratio λ^½ : rms, and so on."""
    gradients = drawn([(4, 5)], 15)
    options = replace(STILL, valley_strength=0.0)
    whitened, values, *_ = updates(gradients, options, eps=0.0)
    other, *_ = updates(gradients, replace(options, power=power), eps=0.0)
    expected = (values / values.mean()) ** (0.5 - power)
    torch.testing.assert_close(other / whitened, expected, rtol=1e-9, atol=0)


def path(gradient, start, options, structure):
    X, found = start.clone(), []
    optimizer = TALT([X], lr=0.05, options=options, structure=structure)
    for t in range(40):
        step(optimizer, [gradient(X, t)])
        found.append(X.clone())
    return torch.stack(found)


@pytest.mark.parametrize(
    "options",
    [
        TALTOptions(),
        TALTOptions(power=0.25, damping=0.5, clip=2.0, near_fraction=0.9),
        TALTOptions(incremental_covariance=False),
        TALTOptions(transformation_stability=False, dynamic_updates=False, update_interval=3),
    ],
    ids=["all fixes", "other responses", "batch covariance", "unmixed"],
)
def test_rotating_the_problem_rotates_the_trajectory(options):
    """X → P X Sᵀ: the same to rounding with Kronecker bases, not so with the axes for a basis, as Adam has it."""
    generator = torch.Generator().manual_seed(5)
    H, noise = normal(16, 16, generator=generator), normal(40, 4, 4, generator=generator)
    H, P, S, start = H @ H.T / 16, orthogonal(4, 6), orthogonal(4, 7), normal(4, 4, generator=generator)

    def gradient(X, t):
        return (H @ X.flatten()).view(4, 4) + noise[t]

    def turned(Y, t):
        return P @ gradient(P.T @ Y @ S, t) @ S.T

    for structure, bound in (("kronecker", 1e-8), ("polar", 1e-8)):
        expected = P @ path(gradient, start, options, structure) @ S.T
        found = path(turned, P @ start @ S.T, options, structure)
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    expected = P @ path(gradient, start, options, "diagonal") @ S.T
    assert (path(turned, P @ start @ S.T, options, "diagonal") - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        ("lowrank", TALTOptions(adaptive_memory=False, base_memory=3)),
        ("kronecker", TALTOptions(adaptive_memory=False, base_memory=2, max_side=3)),
    ],
    ids=["lowrank", "both sides truncated"],
)
def test_what_is_not_kept_still_moves(structure, options):
    """Directions outside the kept ones are the valleys: the founding prototype set them to zero."""
    gradients = drawn([(6, 7)], 20)
    X = placed([(6, 7)])[0]
    optimizer = TALT([X], lr=1.0, structure=structure, options=options)
    for now in gradients[:-1]:
        step(optimizer, now)
    before = X.clone()
    bases = [optimizer.state[X][name].clone() for name in ("basis_left", "basis_right")]
    step(optimizer, gradients[-1])
    U = before - X
    outside = U.flatten()[None] if structure == "lowrank" else U
    for axis, Q in enumerate(bases):
        if len(Q) > Q.shape[1]:
            outside = outside - (Q @ (Q.T @ outside) if axis == 0 else (outside @ Q) @ Q.T)
    assert outside.norm() > 0.1 * U.norm()


def test_a_polar_step_is_muons():
    """Newton–Schulz of the averaged gradient, as long as AdamW's: torch.optim.Muon, whose steps bring singular values
    less near to 1.
    """
    gradients = [[g.float() for g in now] for now in drawn([(6, 9)], 10)]
    ours, theirs = (nn.Parameter(placed([(6, 9)])[0].float()) for _ in range(2))
    options = TALTOptions(nesterov=False)
    first = TALT([ours], lr=0.1, weight_decay=0.1, structure="polar", options=options)
    second = torch.optim.Muon([theirs], lr=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for now in gradients:
        step(first, now)
        step(second, now)
    assert (ours - theirs).norm() < 0.2 * (ours - start).norm()


@pytest.mark.parametrize("shape", [(6, 6), (7, 12), (5, 40), (12, 7)])
def test_singular_values_end_near_one(shape):
    """Those above 0.003 of √‖MMᵀ‖; smaller ones grow by 250 at least, and none beyond 1.22."""
    generator = torch.Generator().manual_seed(11)
    left, _, right = torch.linalg.svd(normal(*shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, -5, len(right), dtype=torch.float64)
    M = (left * values) @ right / values.norm()
    bound = float((M @ M.T).norm().sqrt())
    for X in (M, M.float()):
        found = (left.T @ newton_schulz(X[None])[0].double() @ right.T).diag()
        near = values / values.norm() / bound > 0.003
        assert 1 < near.sum() < len(near)
        assert (found[near] - 1).abs().max() < 0.22
        grown = found * bound * values.norm() / values
        assert grown[~near].min() > 250 - 50 * (X.dtype == torch.float32)
        assert found.max() < 1.22


def test_the_largest_singular_value_may_be_rounded_up():
    """The polynomials grow fast beyond 1: a hundredth above, as TensorFloat-32's products may be, is still safe."""
    x = torch.tensor([1.0, 1.001, 1.01], dtype=torch.float64)
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    assert (x - 1).abs().max() < 0.22


def test_a_matrix_and_its_transpose_are_one_stack():
    gradients = drawn([(4, 7)], 20)
    tall, wide = placed([(7, 4)])[0], placed([(7, 4)])[0].T.clone()
    optimizer = TALT([tall, wide], lr=0.1, weight_decay=0.1)
    for (now,) in gradients:
        step(optimizer, [now.T, now])
    [(members, stack)] = optimizer._plans._plans[0].stacks
    assert len(members) == 2
    assert stack.state["exp_avg"].shape == (2, 4, 7)
    assert torch.equal(tall, wide.T)


def test_a_tall_matrix_moves_as_its_definition_says():
    """Which does not transpose it. One-sided: of the longer side's covariance rounding decides some eigenvectors."""
    options = TALTOptions(one_sided=True)
    fast, slow = placed([(7, 4)])[0], placed([(7, 4)])[0]
    optimizer, reference = TALT([fast], lr=0.1, options=options), TALTReference([slow], lr=0.1, options=options)
    for (now,) in drawn([(7, 4)], 20):
        step(optimizer, [now])
        reference.step([now])
    assert torch.allclose(fast, slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", [False, True], ids=["averages", "last gradients"])
def test_states_from_before_matrices_were_transposed(batch):
    """They held tall matrices as they are, and matrices without a basis too."""
    shapes = [(7, 4), (3, 5, 2), (6, 9), (5,)]
    options = TALTOptions(max_side=8, base_memory=2, incremental_covariance=not batch)
    params = [nn.Parameter(p) for p in placed([*shapes, (8, 3)])]
    groups = [{"params": params[:4]}, {"params": params[4:], "structure": "diagonal"}]
    gradients = drawn([*shapes, (8, 3)], 8)
    optimizer = TALT(groups, lr=0.1, options=options)
    for now in gradients[:5]:
        step(optimizer, now)
    saved, values = optimizer.state_dict(), [p.detach().clone() for p in params]
    old = {**saved, "state": {index: dict(state) for index, state in saved["state"].items()}}
    tall = old["state"][0]
    for name in {"exp_avg", "exp_avg_sq", "recent"} & set(tall):
        tall[name] = tall[name].mT
    for kind in ("basis", "covariance"):
        tall[f"{kind}_left"], tall[f"{kind}_right"] = tall[f"{kind}_right"], tall[f"{kind}_left"]
    for name in ("exp_avg", "exp_avg_sq"):
        old["state"][4][name] = old["state"][4][name].reshape(8, 3)
    ends = []
    for state in (saved, old):
        for p, value in zip(params, values, strict=True):
            p.data = value.clone()
        optimizer = TALT([dict(group) for group in groups], lr=0.1, options=options)
        optimizer.load_state_dict(state)
        for now in gradients[5:]:
            step(optimizer, now)
        ends.append([p.detach().clone() for p in params])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_a_clipped_response_where_most_directions_have_no_gradient():
    """The middle λ is 0 there; and after a leap in size all thresholds are."""
    x = nn.Parameter(torch.zeros(8, 8))
    generator = torch.Generator().manual_seed(5)
    optimizer = TALT([x], lr=0.01, options=TALTOptions(clip=10.0))
    for _ in range(600):
        before, gradient = x.detach().clone(), torch.randn(8, 8, generator=generator)
        gradient[2:] = 0.0
        step(optimizer, [gradient])
    assert (x - before).norm() < 0.1
    x = nn.Parameter(torch.zeros(4, 4))
    optimizer = TALT([x], lr=0.01, options=TALTOptions(clip=2.0))
    for size in (1.0, 1.0, 1e30, 1e30):
        step(optimizer, [size * torch.randn(4, 4, generator=generator)])
    assert x.isfinite().all()
    assert optimizer.skipped == 0


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
@pytest.mark.parametrize("leap", [1e13, 1e-13])
def test_gradients_leap_in_size(structure, leap):
    """The state is then in other units than before; its definition knows none."""
    shapes = [(3, 3), (2, 2)]  # longer sides would have eigenvectors that rounding decides
    sizes = [1.0, *5 * [leap], *6 * [1.0]] if leap > 1 else [leap] * 6 + [1.0] * 6
    fast, slow = placed(shapes), placed(shapes)
    optimizer = TALT(fast, lr=0.1, structure=structure)
    reference = TALTReference(slow, lr=0.1, structure=structure)
    units = set()
    for now, size in zip(drawn(shapes, 12), sizes, strict=True):
        step(optimizer, [size * g for g in now])
        reference.step([size * g for g in now])
        units.add(float(optimizer.state[fast[0]]["scale"]))
    assert len(units) == 2
    for p, q in zip(fast, slow, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


def test_vectors_are_laid_end_to_end():
    """Also where the sizes of their gradients are far apart, and change; each moves as it would alone."""
    shapes = [(5,), (), (3,), (64,), (2, 300)]
    sizes = [1e-30, 1.0, 1e30, 1e-3, 1.0]
    gradients = [[g.float() * size for g, size in zip(now, sizes, strict=True)] for now in drawn(shapes, 12)]
    for now in gradients[6:]:
        now[1] *= 1e25
    together, alone = ([nn.Parameter(p.float()) for p in placed(shapes)] for _ in range(2))
    joint = TALT(together, lr=0.1, weight_decay=0.1, structure="diagonal")
    each = [TALT([p], lr=0.1, weight_decay=0.1, structure="diagonal") for p in alone]
    for count, now in enumerate(gradients):
        if count == 8:
            saved = joint.state_dict()
            joint = TALT(together, lr=0.1, weight_decay=0.1, structure="diagonal")
            joint.load_state_dict(saved)
        step(joint, now)
        for optimizer, g in zip(each, now, strict=True):
            step(optimizer, [g])
    assert [len(stack.lengths) for _, stack in joint._plans._plans[0].stacks] == [5]
    for p, q, optimizer in zip(together, alone, each, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[q].items():
            assert torch.equal(value, joint.state[p][name])
    for options in (TALTOptions(match_rms=0.2), TALTOptions(power=0.25)):  # a mean square is each tensor's own
        scaled = TALT(together, structure="diagonal", options=options)
        step(scaled, gradients[0])
        assert len(scaled._plans._plans[0].stacks) == 5


@pytest.mark.parametrize("shape", [(2, 5, 20), (1, 31, 6), (1, 3, 200), (3, 1, 7)])
def test_several_steps_at_a_time_are_newton_schulzs_one_by_one(shape):
    """Where one side is much longer; also where singular values are far apart, or zero."""
    M = normal(*shape, generator=torch.Generator().manual_seed(4))
    assert max(shape[1:]) >= LONG * min(shape[1:])
    if min(shape[1:]) > 1:
        axis = 1 if shape[1] < shape[2] else 2
        M[0].select(axis - 1, -1).mul_(1e-6)
        assert torch.linalg.cond(M[0]) > 1e5
    if shape[0] > 1:
        M[-1] = 0.0
    M = M / M.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    X = M / torch.linalg.svdvals(M).pow(4).sum(1).pow(1 / 4).clamp_min(1e-30)[:, None, None]
    for a, b, c in COEFFICIENTS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    assert torch.allclose(newton_schulz(M), X, rtol=1e-9, atol=1e-12)
    single = newton_schulz(M.float()).double()
    assert torch.allclose(single, X, rtol=1e-4, atol=1e-5)


MODEL = {"matrix": (12, 20), "kernel": (8, 3, 3, 3), "gain": (7,), "scalar": (), "column": (9, 1), "nothing": (0, 4)}


@pytest.mark.parametrize("structure", ["auto", "kronecker", "lowrank", "polar", "diagonal"])
@pytest.mark.parametrize(
    "options",
    [TALTOptions(), TALTOptions(max_side=6, incremental_covariance=False), TALTOptions(one_sided=True, max_side=10)],
    ids=["default", "truncated, batch covariance", "one-sided"],
)
def test_memory_is_told_before_it_is_taken(structure, options):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in MODEL.values()]
    optimizer = TALT(parameters, structure=structure, options=options)
    told = optimizer.state_numbers()
    assert not optimizer.state
    step(optimizer, [torch.ones_like(parameter) for parameter in parameters])
    kept = [state for parameter, state in optimizer.state.items() if parameter.numel()]
    assert told == sum(v.numel() for state in kept for name, v in state.items() if name != "step")


def test_memory_has_hard_caps():
    """10 % of a million dimensions are 100,000 rows of 4 MB each: fix 1's formula alone would ask for 373 GB."""
    X = nn.Parameter(torch.empty(1000, 1000, device="meta"))
    for options, rank in (
        (TALTOptions(), 67),  # 256 MiB of rows of 4 MB, before 128 rows are reached
        (TALTOptions(max_megabytes=1000.0), 128),
        (TALTOptions(max_megabytes=1000.0, max_memory=20), 20),
        (TALTOptions(max_megabytes=1e-3), 1),
        (TALTOptions(adaptive_memory=False), 10),
    ):
        numbers = TALT([X], structure="lowrank", options=options).state_numbers()
        assert 2 * rank * 10**6 + 10**6 < numbers < (2 * rank + 1) * 10**6 + 10**4
        batch = replace(options, incremental_covariance=False)
        assert TALT([X], structure="lowrank", options=batch).state_numbers() == numbers + rank * 10**6


def test_the_formula_of_fix_1():
    on, off = TALTOptions(max_memory=10**6), TALTOptions(adaptive_memory=False, max_memory=10**6)
    assert [on.rank(d, 8) for d in (4, 9, 100, 400, 700, 2000)] == [4, 9, 20, 40, 70, 200]
    assert [off.rank(d, 8) for d in (4, 9, 100, 400, 700, 2000)] == [4, 9, 10, 10, 10, 10]


def test_the_schedule_of_fix_2():
    on, off = TALTOptions(), TALTOptions(dynamic_updates=False)
    assert [on.interval(t) for t in (1, 3, 5, 6, 22, 59, 60, 5000)] == [1, 1, 1, 2, 7, 19, 20, 20]
    assert [replace(on, update_ramp=10).interval(t) for t in (1, 19, 20, 99, 100)] == [1, 1, 2, 9, 10]
    assert {off.interval(t) for t in range(1, 200)} == {20}
    due = [1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29, 38, 50, 66, 86, 106, 126, 146]
    assert [t for t in range(1, 151) if on.next_due(t - 1) == t] == due
    assert [on.next_due(t) for t in (0, 12, 13, 70, 126, 10**9 + 7)] == [1, 13, 17, 86, 146, 10**9 + 26]
    assert [t for t in range(1, 90) if off.next_due(t - 1) == t] == [1, 21, 41, 61, 81]
    for ramp, longest in ((1, 7), (3, 20), (5, 2), (50, 4), (10**6, 10)):
        options, found = replace(on, update_ramp=ramp, update_interval=longest), [1]
        while found[-1] < 400:
            found.append(found[-1] + options.interval(found[-1]))
        assert [options.next_due(t) for t in range(400)] == [min(f for f in found if f > t) for t in range(400)]
    assert 10**8 < replace(on, update_ramp=10**6).next_due(10**8) <= 10**8 + 20  # in no time
    assert [t for t in range(1, 8) if replace(on, update_interval=1).next_due(t - 1) == t] == [*range(1, 8)]
    X = torch.zeros(3, 3, dtype=torch.float64)
    optimizer = TALT([X], options=on)
    for now in drawn([(3, 3)], 47):
        step(optimizer, now)
    assert optimizer.state[X]["refreshes"].tolist() == [13, 0, 38]


def test_each_group_has_structure_and_fixes_of_its_own():
    gradients = drawn([(3, 4), (3, 4), (3, 4)], 12)
    settings = [
        {"structure": "diagonal"},
        plain(TALTOptions(power=0.25)),
        {"structure": "lowrank", "lr": 0.1, "weight_decay": 0.3, "betas": (0.5, 0.9), "nesterov": False},
    ]
    together, alone = placed([(3, 4)] * 3), placed([(3, 4)] * 3)
    one = TALT([{"params": [p], **own} for p, own in zip(together, settings, strict=True)], lr=0.01)
    many = [TALT([{"params": [p], **own}], lr=0.01) for p, own in zip(alone, settings, strict=True)]
    for now in gradients:
        step(one, now)
        for optimizer, gradient in zip(many, now, strict=True):
            step(optimizer, [gradient])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def test_singular_values_are_made_equal_and_the_norm_stays():
    """`orthogonal` makes of the update of before one with the same singular vectors; in front of it all is the same."""
    gradients = drawn([(4, 5)], 15)
    plain_update, values, *_ = updates(gradients, STILL)
    update, same_values, *_ = updates(gradients, replace(STILL, orthogonal=True))
    assert torch.equal(values, same_values)
    assert float(update.norm()) == pytest.approx(float(plain_update.norm()), rel=1e-12)
    left, before, right = torch.linalg.svd(plain_update, full_matrices=False)
    assert before[0] / before[-1] > 2
    inside = left.T @ update @ right.T
    assert (inside - inside.diag().diag()).abs().max() < 1e-9 * before[0]
    assert inside.diag().max() / inside.diag().min() < 1.2 / 0.65  # what five steps of Newton and Schulz leave
    raw = [updates(gradients, replace(STILL, parameter_normalization=False, orthogonal=on))[0] for on in (True, False)]
    assert torch.equal(*raw)  # a part of fix 6
