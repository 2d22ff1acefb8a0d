"""Gauss-Newton products against closed forms and explicit Jacobians, and where the matrix does not exist."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian as explicit_hessian
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import Keyed, Unused, classes, mlp, normal, seeded, split
from losslab.operators.gauss_newton import GaussNewton
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from untouched import assert_untouched

X, Y = normal(10, 4), classes(10)
SIZES = [3, 3, 3, 1]


def linear(outputs: int) -> nn.Linear:
    return seeded(lambda: nn.Linear(4, outputs, bias=False)).double()


def explicit(risk: EmpiricalRisk, x: Tensor, loss_of_flat, flatten=torch.flatten) -> Tensor:
    """JᵀHJ with the Jacobian of all outputs on the whole data, flat, and the loss's Hessian between them."""

    def outputs(vector: Tensor) -> Tensor:
        return flatten(functional_call(risk.model, risk.space.named_views(vector), (x,)))

    j = jacobian(outputs, risk.space.vector())
    return j.mT @ explicit_hessian(loss_of_flat, outputs(risk.space.vector())) @ j


def check(model, loss_fn, x, y, expected, sizes=(10,), **kwargs) -> None:
    """The products equal the matrix, with graphs kept and rebuilt."""
    for graph_memory in ("auto", 0):
        risk = EmpiricalRisk(model, loss_fn, split(list(sizes), x, y), graph_memory=graph_memory, **kwargs)
        torch.testing.assert_close(GaussNewton(risk).to_dense(), expected(risk), rtol=1e-9, atol=1e-12)


# -- closed forms: where the model is linear in its parameters it is the Hessian


def test_linear_regression():
    y = normal(10, 1, seed=2)
    check(linear(1), nn.MSELoss(), X, y, lambda risk: 2 * X.T @ X / 10, SIZES)
    check(linear(1), nn.MSELoss(), X, y, lambda risk: Hessian(risk).to_dense(), SIZES)


def test_summed_squares():
    y = normal(10, 2, seed=2)
    expected = torch.kron(2 * torch.eye(2, dtype=torch.float64), X.T @ X) / 10
    check(linear(2), nn.MSELoss(reduction="sum"), X, y, lambda risk: expected, SIZES)


def test_logistic_regression():
    model, y = linear(1), classes(10, 1, num=2).double()
    s = torch.sigmoid(model(X)).detach()
    check(model, nn.BCEWithLogitsLoss(), X, y, lambda risk: X.T @ (s * (1 - s) * X) / 10, SIZES)
    check(model, nn.BCEWithLogitsLoss(), X, y, lambda risk: Hessian(risk).to_dense(), SIZES)


def test_softmax_regression():
    model = linear(3)
    p = model(X).softmax(1).detach()
    terms = [torch.kron(torch.diag(q) - q.outer(q), x.outer(x)) for q, x in zip(p, X, strict=True)]
    check(model, nn.CrossEntropyLoss(), X, Y, lambda risk: torch.stack(terms).mean(0), SIZES)
    check(model, nn.CrossEntropyLoss(), X, Y, lambda risk: Hessian(risk).to_dense(), SIZES)


def test_it_is_the_hessian_where_the_residuals_vanish():
    model = mlp().double()
    check(model, nn.MSELoss(), X, model(X).detach(), lambda risk: Hessian(risk).to_dense(), SIZES)


@pytest.mark.parametrize(
    ("loss_fn", "y"),
    [
        (nn.CrossEntropyLoss(), Y),
        (nn.MSELoss(), normal(10, 3, seed=2)),
        (nn.BCEWithLogitsLoss(), classes(10, 3, num=2).double()),
    ],
)
def test_positive_semidefinite_for_convex_losses(loss_fn, y):
    risk = EmpiricalRisk(mlp().double(), loss_fn, split(SIZES, X, y))
    assert float(torch.linalg.eigvalsh(GaussNewton(risk).to_dense())[0]) > -1e-14
    assert float(torch.linalg.eigvalsh(Hessian(risk).to_dense())[0]) < -1e-3  # so that it says something


# -- losses


LOSSES = {
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "ignored index": nn.CrossEntropyLoss(ignore_index=1),
    "class weights, summed": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1]).double(), reduction="sum"),
    "not convex": lambda f, y: (f.sin().sum(1) * (y + 1)).mean(),
    "mixes examples": lambda f, y: (f @ f.T).logsumexp((0, 1)) + F.cross_entropy(f, y),
    "a convolution of the outputs": lambda f, y: (
        F.conv1d(f.unsqueeze(1), f[:2].unsqueeze(1), padding=1).relu() ** 3
    ).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss_fn = LOSSES[name]
    scale = 0.1 if getattr(loss_fn, "reduction", "") == "sum" else 1.0

    def expected(risk: EmpiricalRisk) -> Tensor:
        return explicit(risk, X, lambda f: scale * loss_fn(f.view(10, 3), Y))

    check(mlp().double(), loss_fn, X, Y, expected)


def test_a_loss_that_writes_into_the_outputs():
    def loss_fn(f, y):
        f[:, 2] = -1e3
        return F.cross_entropy(f.mul_(2), y)

    y = Y.clamp(max=1)
    check(
        mlp().double(), loss_fn, X, y, lambda risk: explicit(risk, X, lambda f: loss_fn(1.0 * f.view(10, 3), y)), SIZES
    )


# -- outputs


@dataclass
class Answer:
    logits: Tensor
    more: Any


class Structured(nn.Module):
    """Returns two tensors that the loss uses, one of them twice, one that it does not, and some that carry nothing."""

    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = mlp(), wrap

    def forward(self, x):
        f = self.body(x)
        return self.wrap(f, f.tanh() ** 2, torch.exp(f), x, torch.arange(3))


STRUCTURES = {
    "tuple": (lambda *parts: parts, lambda out: (out[0], out[1])),
    "dict": (
        lambda a, b, *rest: {"logits": a, "rest": rest, "inner": [{"b": b, "again": a}]},
        lambda out: (0.5 * (out["logits"] + out["inner"][0]["again"]), out["inner"][0]["b"]),
    ),
    "dataclass": (
        lambda a, b, *rest: Answer(a, {"b": b, "none": None, "rest": rest}),
        lambda o: (o.logits, o.more["b"]),
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structured_outputs(name):
    wrap, take = STRUCTURES[name]

    def loss(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(a, y) + (a * b).square().mean()

    def expected(risk: EmpiricalRisk) -> Tensor:
        def both(vector: Tensor) -> Tensor:
            a, b = take(functional_call(risk.model, risk.space.named_views(vector), (X,)))
            return torch.cat([a.flatten(), b.flatten()])

        j, f = jacobian(both, risk.space.vector()), both(risk.space.vector())
        h = explicit_hessian(lambda t: loss(t[:30].view(10, 3), t[30:].view(10, 3), Y), f)
        return j.mT @ h @ j

    check(Structured(wrap).double(), lambda out, y: loss(*take(out), y), X, Y, expected)


def test_batchnorm_in_train_mode_is_one_function_of_the_batch():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))).double()
    model.train()
    check(
        model,
        nn.CrossEntropyLoss(),
        X,
        Y,
        lambda risk: explicit(risk, X, lambda f: F.cross_entropy(f.view(10, 3), Y)),
        mode="train",
    )


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(2, 3, 3, padding=1),
    "stride, dilation": lambda: nn.Conv2d(2, 3, 2, stride=2, dilation=2),
    "groups": lambda: nn.Conv2d(2, 4, 3, groups=2, padding=1),
    "no bias": lambda: nn.Conv2d(2, 3, (1, 3), bias=False),
    "same": lambda: nn.Conv2d(2, 3, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 2, stride=2),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("select", [None, "0.*", "*.bias"])
def test_convolutions(name, select):
    if (name, select) == ("no bias", "*.bias"):
        select = "2.*"
    rest = [nn.MaxPool2d(2), nn.Flatten()]
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), CONVOLUTIONS[name](), *rest)).double()
    x, y = normal(3, 1, 6, 6), classes(3, num=2).double()

    def loss_fn(f: Tensor, target: Tensor) -> Tensor:
        return (f.square().mean(1) - target).square().mean()

    check(
        model,
        loss_fn,
        x,
        y,
        lambda risk: explicit(risk, x, lambda f: loss_fn(f.view(3, -1), y)),
        sizes=[3],
        params=select,
    )


class Derivative(nn.Module):
    """A network of x and its derivative along x, as physics-informed ones have: it differentiates within forward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.net(x)
            return value + torch.autograd.grad(value.sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_within_forward():
    x, y = normal(4, 1, 5), normal(4, 1, 5, seed=2)
    check(
        seeded(Derivative).double(),
        nn.MSELoss(),
        x,
        y,
        lambda risk: explicit(risk, x, lambda f: F.mse_loss(f.view(4, 1, 5), y)),
        sizes=[4],
    )


# -- cost


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def conv_risk() -> EmpiricalRisk:
    def build() -> nn.Module:
        layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(8, 3))

    model = seeded(build)
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), [(normal(6, 1, 8, 8).float(), classes(6))])


def test_a_product_takes_no_convolution_too_many():
    """Jv: two for each layer but the first, whose input does not move. Jᵀu: one backward for each."""
    risk = conv_risk()
    operator = GaussNewton(risk)
    v = torch.ones(operator.size)
    operator @ v
    with Operations() as operations:
        operator @ v
    assert operations.counts["convolution"] == 5
    assert operations.counts["convolution_backward"] == 3


def test_graphs_hold_the_activations_and_no_gradients_beside_them():
    risk = conv_risk()
    operator, hessian = GaussNewton(risk), Hessian(risk)
    for a in (operator, hessian):
        a @ torch.ones(a.size)
    activations = 4 * 6 * (64 + 4 * 36 + 4 * 16)  # bytes of the convolutions' inputs: ReLUs save no others
    assert activations <= operator.kept_bytes <= 1.5 * activations < hessian.kept_bytes


@pytest.mark.parametrize(("graph_memory", "passes"), [(0, 3), ("auto", 1)])
def test_graphs_are_rebuilt_once_a_block(graph_memory, passes):
    model = mlp().double()
    batches = split(SIZES, X, Y)
    operator = GaussNewton(EmpiricalRisk(model, nn.CrossEntropyLoss(), batches, graph_memory=graph_memory, check=False))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        operator.matmat(normal(operator.size, 5))
    assert len(calls) == passes * len(SIZES)


def test_lower_precision():
    expected = GaussNewton(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), split([4, 6], X, Y)))
    v = normal(expected.size)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        batches = [(x.to(dtype), y) for x, y in split([4, 6], X, Y)]
        low = GaussNewton(EmpiricalRisk(mlp().to(dtype), nn.CrossEntropyLoss(), batches)) @ v.to(dtype)
        assert low.dtype == dtype
        assert float((low.double() - expected @ v).norm() / (expected @ v).norm()) < tolerance


# -- where it does not exist, or is nothing


def test_parameters_that_the_outputs_do_not_use():
    risk = EmpiricalRisk(seeded(Unused).double(), nn.CrossEntropyLoss(), split([4, 6], X, Y), params="idle")
    assert not GaussNewton(risk).to_dense().any()


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.sign(self.layer(x))


def test_outputs_that_do_not_change_with_the_parameters():
    risk = EmpiricalRisk(seeded(Rounded).double(), nn.CrossEntropyLoss(), split([4, 6], X, Y))
    assert not GaussNewton(risk).to_dense().any()


def keyed_risk(loss_fn) -> EmpiricalRisk:
    return EmpiricalRisk(seeded(Keyed).double(), loss_fn, [{"features": X, "labels": Y}])


def test_a_model_with_its_own_loss_is_refused():
    with pytest.raises(ValueError, match=r"^loss_fn: expected .* got None, .*; pass EmpiricalRisk\(model, loss_fn"):
        GaussNewton(keyed_risk(None))


@pytest.mark.parametrize("loss_fn", [lambda output, _: output["loss"], lambda output, _: output["logits"].mean()])
def test_a_loss_that_is_linear_in_the_outputs_is_refused(loss_fn):
    operator = GaussNewton(keyed_risk(loss_fn))
    with pytest.raises(ValueError, match="expected a loss that is curved in the model's outputs, got a linear one"):
        operator @ normal(operator.size)


class Opaque(nn.Module):
    """Returns an object that nobody can look into."""

    class Holder:
        def __init__(self, logits):
            self.logits = logits

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.Holder(self.body(x))


def test_a_loss_that_reaches_the_parameters_on_another_way_is_refused():
    model = Opaque().double()
    operator = GaussNewton(EmpiricalRisk(model, lambda f, y: F.cross_entropy(f.logits, y), split(SIZES, X, Y)))
    with assert_untouched(model), pytest.raises(ValueError, match="through the tensors of the model's output alone"):
        operator @ normal(operator.size)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Culprit(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_a_missing_second_derivative_is_explained():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), Culprit())).double()
    operator = GaussNewton(EmpiricalRisk(model, nn.CrossEntropyLoss(), [(X, Y)]))
    with assert_untouched(model), pytest.raises(RuntimeError, match="second derivatives: module '1' has none"):
        operator @ normal(operator.size)
    operator = GaussNewton(EmpiricalRisk(mlp().double(), lambda f, y: F.cross_entropy(Once.apply(f), y), [(X, Y)]))
    with pytest.raises(RuntimeError, match="second derivatives: the loss function or code outside"):
        operator @ normal(operator.size)


@pytest.mark.parametrize("bad", [torch.zeros(3), None, torch.zeros(1, 43)])
def test_wrong_shapes(bad):
    operator = GaussNewton(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), [(X, Y)]))
    with pytest.raises(ValueError, match=r"matrix: expected a tensor of shape \(43, k\)"):
        operator @ bad
