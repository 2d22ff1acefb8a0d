"""P^(−½) of every optimizer against the steps it takes; quadratics diverge just above limit/λ and not below."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from cases import gen, normal
from losslab.optim import (
    TALT,
    CurvatureEstimator,
    HomotopyLR,
    HomotopyOptions,
    PerLayerHomotopyLR,
    TALTOptions,
    attach_talt,
)
from losslab.optim.eigenspace.options import FIXES
from losslab.optim.homotopy.preconditioner import bare, inverse_root, leading, limit, ready
from quadratics import Quadratic, turned
from talt_twins import drawn, placed

LINEAR = TALTOptions(orthogonal=False)  # a step is P⁻¹ times the average
OPTIONS = replace(LINEAR, nesterov=False, dynamic_updates=False, update_interval=50)  # one basis, of the first step
SHAPES = [(6, 5), (7,), ()]


def variants() -> dict[str, tuple[str, TALTOptions]]:
    found = {structure: (structure, OPTIONS) for structure in ("auto", "kronecker", "lowrank", "diagonal")}
    found |= {f"without {fix}": ("auto", replace(OPTIONS, **{fix: False})) for fix in FIXES}
    for name, settings in {
        "kept sides": {"max_side": 3, "base_memory": 2, "adaptive_memory": False},
        "one side": {"one_sided": True},
        "power": {"power": 0.25},
        "no power": {"power": 0.0},
        "clipped": {"clip": 1.5},
        "damped": {"damping": 0.3, "gate_width": 0.5},
        "no valleys": {"valley_strength": 0.0},
        "plain": dict.fromkeys(FIXES, False) | {"valley_strength": 0.0},
        "smoothed": dict.fromkeys(FIXES, False) | {"gradient_smoothing": True, "valley_strength": 0.0},
        "raw scale": {"parameter_normalization": False, "damping": 0.3},
    }.items():
        found[name] = ("auto", replace(OPTIONS, **settings))
    return found


@pytest.mark.parametrize("scale", [1.0, 1e-15], ids=["", "tiny gradients"])
@pytest.mark.parametrize(("structure", "options"), variants().values(), ids=variants())
def test_a_step_of_talt_is_the_inverse_of_p_times_the_average(structure, options, scale):
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer = TALT(parameters, 0.5, betas=(0.8, 0.9), structure=structure, options=options, eps=1e-20)
    means = [torch.zeros_like(p) for p in parameters]
    beta = 0.8 if options.gradient_smoothing else 0.0
    for gradients in drawn(SHAPES, steps=6):
        before = [p.detach().clone() for p in parameters]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = scale * g
        optimizer.step()
        means = [beta * m + (1 - beta) * p.grad for m, p in zip(means, parameters, strict=True)]
    root = inverse_root(optimizer, parameters)
    for b, p, found in zip(before, parameters, root(root(means)), strict=True):
        step = (b - p.detach()) / 0.5
        assert step.norm() > 0
        assert float((found - step).norm()) < 1e-10 * float(step.norm())
    one, two = ([scale * v for v in placed(SHAPES, seed=seed)] for seed in (1, 2))
    for u, v, Ru, Rv in zip(one, two, root(one), root(two), strict=True):
        assert float((u * Rv).sum()) == pytest.approx(float((v * Ru).sum()), rel=1e-9)  # symmetric


def test_after_one_step_it_is_that_of_the_second():
    """The first knows no thresholds yet; what brakes the second must."""
    found = []
    for strength in (0.0, 1.0):
        weight = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        talt = TALT([weight], 1.0, options=replace(OPTIONS, valley_strength=strength))
        weight.grad = drawn([(6, 5)], steps=1)[0][0]
        talt.step()
        root = inverse_root(talt, [weight])
        vector = normal(6, 5)
        found.append(float((vector * root(root([vector]))[0]).sum()))
    assert 1.2 * found[0] < found[1] < 2 * found[0]


def adam(settings: dict[str, Any]) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda ps: Adam(ps, 0.5, betas=(0.8, 0.9), **settings)


@pytest.mark.parametrize(
    "make",
    [
        adam({}),
        adam({"amsgrad": True, "eps": 0.1}),
        lambda ps: AdamW(ps, 0.5, betas=(0.8, 0.9), weight_decay=0.0),
        lambda ps: RMSprop(ps, 0.5, alpha=0.9, centered=True),
        lambda ps: RMSprop(ps, 0.5, alpha=0.9),
        lambda ps: SGD(ps, 0.5),
    ],
    ids=["Adam", "AMSGrad", "AdamW", "centred RMSprop", "RMSprop", "SGD"],
)
def test_a_step_of_the_others_too(make):
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer = make(parameters)
    means, beta = [torch.zeros_like(p) for p in parameters], 0.8 if isinstance(optimizer, Adam) else 0.0
    for gradients in drawn(SHAPES, steps=6):
        before = [p.detach().clone() for p in parameters]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimizer.step()
        means = [beta * m + (1 - beta) * p.grad for m, p in zip(means, parameters, strict=True)]
    root = inverse_root(optimizer, parameters)
    assert (root is None) == isinstance(optimizer, SGD)
    for b, p, found in zip(before, parameters, means if root is None else root(root(means)), strict=True):
        assert torch.allclose(found, (b - p.detach()) / 0.5, rtol=1e-10)


def frozen(optimizer: Optimizer) -> Optimizer:
    """Its state at an age at which it hardly changes any more, and no momentum."""
    draw = gen(4)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    kept = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    for _ in range(3):
        optimizer.step()
    with torch.no_grad():
        for p, value in zip([p for group in optimizer.param_groups for p in group["params"]], kept, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(optimizer.state_dict())  # TALT's state in tensors of their own
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(1e15)
        for name in ("exp_avg", "momentum_buffer", "grad_avg"):
            if state.get(name) is not None:
                state[name].zero_()
    for group in optimizer.param_groups:
        group["betas"] = (group.get("betas", (0, 0))[0], 1 - 1e-12)
        group["alpha"] = 1 - 1e-12
        if isinstance(optimizer, TALT):
            del group["alpha"]
            group["update_interval"] = 10**9 + 7
    return optimizer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda ps: SGD(ps, 1.0), 2.0),
        (lambda ps: SGD(ps, 1.0, momentum=0.9), 3.8),
        (lambda ps: SGD(ps, 1.0, momentum=0.9, dampening=0.5), 7.6),
        (lambda ps: SGD(ps, 1.0, momentum=0.9, nesterov=True), 3.8 / 2.8),
        (lambda ps: Adam(ps, 1.0), 38.0),
        (lambda ps: Adam(ps, 1.0, betas=(0.5, 0.9), amsgrad=True), 6.0),
        (lambda ps: AdamW(ps, 1.0, weight_decay=0.0), 38.0),
        (lambda ps: RMSprop(ps, 1.0), 2.0),
        (lambda ps: RMSprop(ps, 1.0, momentum=0.9, centered=True), 3.8),
        (lambda ps: TALT(ps, 1.0, options=LINEAR), 38.0 / 2.8),
        (lambda ps: TALT(ps, 1.0, options=replace(LINEAR, nesterov=False)), 38.0),
        (lambda ps: TALT(ps, 1.0, options=replace(LINEAR, gradient_smoothing=False)), 2.0),
        (lambda ps: TALT(ps, 1.0, betas=(0.5, 0.9), structure="lowrank"), 6.0 / 2.0),
    ],
)
def test_a_quadratic_diverges_just_above_the_limit_and_not_below(make, expected):
    H = turned(torch.linspace(0.5, 9.0, 12))
    grown = []
    for excess in (0.93, 1.07):
        model = Quadratic(H, [(2, 4), (4,)])
        optimizer = frozen(make(list(model.parameters())))
        assert limit(optimizer) == pytest.approx(expected)
        parameters = list(model.parameters())
        estimator = CurvatureEstimator(power_iterations=300, tol=1e-4)
        found = estimator(model, parameters, root=inverse_root(optimizer, parameters))
        for group in optimizer.param_groups:
            group["lr"] = excess * limit(optimizer) / found.hessian_norm
        start, largest = float(model.w.detach().norm()), 0.0
        for _ in range(150):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
            largest = max(largest, float(model.w.detach().norm()) / start)
        grown.append(largest)
    assert grown[0] < 3  # momentum overshoots
    assert grown[1] > 10


def test_groups_count_by_their_ratio_to_the_first_that_moves():
    """η_i/η is a part of P⁻¹: what diverges is diag(η)H, whichever group the rate is told of."""
    parameters = [nn.Parameter(normal(4, seed=i)) for i in range(3)]
    rates = (0.0, 0.1, 0.4)
    optimizer = SGD([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)], 1.0)
    assert leading(optimizer.param_groups) == 1
    found = inverse_root(optimizer, parameters)([torch.ones(4)] * 3)
    assert [float(v[0]) for v in found] == pytest.approx([0.0, 1.0, 2.0])
    for group in optimizer.param_groups:  # the schedule's rates do not count, its η₀ do
        group["initial_lr"], group["lr"] = group["lr"], 7.0
    assert [float(v[0]) for v in inverse_root(optimizer, parameters)([torch.ones(4)] * 3)] == pytest.approx([0, 1, 2])
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.0
    assert leading(optimizer.param_groups) == 0
    assert inverse_root(optimizer, parameters[:1]) is None


@pytest.mark.parametrize("make", [Adam, AdamW, RMSprop, TALT])
def test_of_adaptive_optimizers_too(make):
    """P⁻¹ of a group at four times the rate is four times as large, so its root is twice."""
    roots = []
    for rates in ((0.1, 0.1), (0.1, 0.4)):
        parameters = [nn.Parameter(normal(3, 4, seed=i)) for i in range(2)]
        optimizer = make([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)])
        for parameter in parameters:
            parameter.grad = normal(3, 4, seed=7)
        optimizer.step()
        roots.append(inverse_root(optimizer, parameters)([normal(3, 4, seed=8)] * 2))
    (one, two), (same, twice) = roots
    assert torch.equal(one, same)
    torch.testing.assert_close(twice, 2 * two)


def test_the_smallest_limit_of_the_groups():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [one], "momentum": 0.9}, {"params": [two], "momentum": 0.5}, {"params": [], "momentum": 0.0}]
    assert limit(SGD(groups, 0.1)) == 3.0
    talt = TALT([{"params": [one]}, {"params": [two], "structure": "polar"}], 0.1)
    assert limit(talt) == pytest.approx(38 / 2.8)
    for order in (1, -1):  # one without limit does not hide the other's
        talt.param_groups = talt.param_groups[::order]
        assert limit(talt) == pytest.approx(38 / 2.8)


def test_what_has_no_limit():
    """Steps of one length at any gradient neither converge nor diverge; an optimizer that is not known."""
    weight = nn.Parameter(normal(3, 3))
    weight.grad = normal(3, 3, seed=1)
    for talt in (TALT([weight], structure="polar"), TALT([weight], options=TALTOptions(match_rms=0.2))):
        talt.step()
        assert math.isnan(limit(talt))
        assert not inverse_root(talt, [weight])([torch.ones(3, 3)])[0].any()
    unknown = Adagrad([weight])
    unknown.step()
    assert math.isnan(limit(unknown))
    assert inverse_root(unknown, [weight]) is None


def test_with_a_limit_that_is_not_exact_a_smaller_part_of_it_is_allowed():
    """TALT's, where it makes singular values equal; and where layers' own blocks are looked at, not all together."""
    matrix, gain = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))

    def parts(optimizer, kind=HomotopyLR, **settings):
        options = kind(optimizer, lambda: matrix.square().sum(), total_steps=10, **settings).options
        return options.part(0), options.part(10)

    assert parts(SGD([matrix], 0.1)) == (0.2, 0.5)
    assert parts(AdamW([matrix])) == (0.3, 0.5)
    assert parts(AdamW([matrix]), PerLayerHomotopyLR) == (0.3, 0.5)
    assert parts(AdamW([matrix]), PerLayerHomotopyLR, method="blocks") == (0.3, 0.3)
    assert parts(TALT([matrix, gain])) == (0.05, 0.05)
    assert parts(TALT([{"params": [matrix], "structure": "polar"}, {"params": [gain]}])) == (0.05, 0.05)
    scheduler = HomotopyLR(TALT([matrix]), lambda: matrix.square().sum())
    scheduler.options = HomotopyOptions(total_steps=10)
    assert scheduler.options.part(10) == 0.05
    assert parts(TALT([{"params": [gain]}, {"params": [matrix], "lr": 0.0}])) == (0.3, 0.5)
    assert parts(TALT([gain])) == parts(TALT([matrix, gain], options=TALTOptions(orthogonal=False))) == (0.3, 0.5)
    assert parts(SGD([matrix], 0.1), PerLayerHomotopyLR) == (0.2, 0.5)
    assert parts(SGD([matrix], 0.1), PerLayerHomotopyLR, method="blocks") == (0.2, 0.2)
    assert parts(TALT([matrix]), PerLayerHomotopyLR) == (0.05, 0.05)


def test_when_the_preconditioner_is_known():
    weight, other = nn.Parameter(normal(3)), nn.Parameter(normal(3))
    assert ready(SGD([weight], 0.1))
    assert ready(Adagrad([weight]))
    for make in (Adam, AdamW, RMSprop, TALT):
        optimizer = make([weight, other])
        assert not ready(optimizer)
        assert not optimizer.state[weight]  # asked, and then known without being there
        assert not ready(optimizer)
        weight.grad, other.grad = normal(3), None
        optimizer.step()
        assert ready(optimizer)
        found = inverse_root(optimizer, [weight, other])([torch.ones(3), torch.ones(3)])
        assert found[0].abs().min() > 0
        assert not found[1].any()


def test_the_optimizer_inside_fabrics():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = nn.Linear(3, 2)
    inner = TALT(model.parameters(), 0.1)
    _, outer = fabric.setup(model, inner)
    assert bare(outer) is inner
    assert limit(outer) == limit(inner)
    assert not ready(outer)


def test_gradients_that_are_shaped_on_their_way_have_no_limit_that_is_known():
    """SGD's is of its own gradients; behind `attach_talt` it gets others."""
    weight = nn.Parameter(normal(4, 4))
    optimizer = SGD([weight], 0.1)
    attachment = attach_talt(optimizer)
    with pytest.warns(UserWarning, match="no stability limit is known for SGD"):
        HomotopyLR(optimizer, lambda: weight.square().sum())
    attachment.remove()
    assert limit(optimizer) == 2.0


def test_the_state_stays_as_it_is():
    weight = nn.Parameter(normal(4, 4))
    optimizer = TALT([weight], 0.1)
    for seed in range(3):
        weight.grad = normal(4, 4, seed=seed)
        optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[weight].items()}
    vector = torch.ones(4, 4, dtype=torch.float32, requires_grad=True)
    found = inverse_root(optimizer, [weight])([vector])[0]
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[weight].items())


def test_the_root_is_of_the_state_when_it_was_taken():
    weight: Tensor = nn.Parameter(normal(4))
    optimizer = Adam([weight], 0.1)
    weight.grad = normal(4)
    optimizer.step()
    root = inverse_root(optimizer, [weight])
    first = root([torch.ones(4, dtype=torch.float64)])[0]
    weight.grad = 100 * normal(4)
    optimizer.step()
    assert torch.equal(root([torch.ones(4, dtype=torch.float64)])[0], first)
