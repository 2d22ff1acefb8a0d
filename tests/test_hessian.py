"""Hessian products against closed forms, other precisions, under a memory budget, and where they do not exist."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import CASES, classes, mlp, normal, paired, seeded, split
from losslab.operators.base import LinearOperator
from losslab.operators.dense import DenseOperator
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from untouched import assert_untouched

X, Y = normal(10, 4), classes(10)
SIZES = [3, 3, 3, 1]


def linear(outputs: int) -> nn.Linear:
    return seeded(lambda: nn.Linear(4, outputs, bias=False)).double()


def hessian(model, loss_fn, x, y, sizes, **kwargs) -> Hessian:
    return Hessian(EmpiricalRisk(model, loss_fn, split(sizes, x, y), **kwargs))


# -- closed forms


@pytest.mark.parametrize("graph_memory", ["auto", 0])
class TestClosedForms:
    def test_linear_regression(self, graph_memory):
        h = hessian(linear(1), nn.MSELoss(), X, normal(10, 1, seed=2), SIZES, graph_memory=graph_memory)
        torch.testing.assert_close(h.to_dense(), 2 * X.T @ X / 10, rtol=1e-10, atol=1e-14)

    def test_summed_squares(self, graph_memory):
        loss_fn = nn.MSELoss(reduction="sum")
        h = hessian(linear(2), loss_fn, X, normal(10, 2, seed=2), SIZES, graph_memory=graph_memory)
        expected = torch.kron(2 * torch.eye(2, dtype=torch.float64), X.T @ X)
        torch.testing.assert_close(10 * h.to_dense(), expected, rtol=1e-10, atol=1e-13)

    def test_logistic_regression(self, graph_memory):
        model = linear(1)
        y = classes(10, 1, num=2).double()
        h = hessian(model, nn.BCEWithLogitsLoss(), X, y, SIZES, graph_memory=graph_memory)
        s = torch.sigmoid(model(X)).detach()
        torch.testing.assert_close(h.to_dense(), X.T @ (s * (1 - s) * X) / 10, rtol=1e-10, atol=1e-14)

    def test_softmax_regression(self, graph_memory):
        model = linear(3)
        h = hessian(model, nn.CrossEntropyLoss(), X, Y, SIZES, graph_memory=graph_memory)
        p = model(X).softmax(1).detach()
        terms = [torch.kron(torch.diag(q) - q.outer(q), x.outer(x)) for q, x in zip(p, X, strict=True)]
        torch.testing.assert_close(h.to_dense(), torch.stack(terms).mean(0), rtol=1e-10, atol=1e-14)


# -- memory


def batch_bytes(sizes=(3, 3, 3, 1), width: int = 5) -> list[int]:
    """What each batch's graph takes."""
    h = hessian(mlp().double(), nn.CrossEntropyLoss(), X, Y, list(sizes))
    h @ normal(h.size)
    assert h.num_kept == len(sizes)
    return [graph.num_bytes() for graph in h._graphs.kept]


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (lambda b: 0, 0),
        (lambda b: b[0] - 1, 0),
        (lambda b: b[0], 1),
        (lambda b: b[0] + b[1], 2),
        (sum, 4),
        (lambda b: "auto", 4),
    ],
)
def test_budget_keeps_a_prefix_and_changes_nothing(budget, kept):
    case = CASES["ragged MSE"]()
    full = Hessian(case.risk())
    expected = full.to_dense()
    risk = case.risk(graph_memory=budget([graph.num_bytes() for graph in full._graphs.kept]))
    h = Hessian(risk)
    for _ in range(3):
        torch.testing.assert_close(h.to_dense(), expected, rtol=1e-12, atol=1e-14)
        assert h.num_kept == kept
    assert sum(graph.num_bytes() for graph in h._graphs.kept) <= risk.graph_budget()


def test_a_shuffling_loader_counts_each_example_once_whatever_is_kept():
    """Kept graphs are of the first batches of one pass; the others are read again, and must still be the others."""
    expected = hessian(mlp().double(), nn.CrossEntropyLoss(), X, Y, [10]).to_dense()
    for generator in (None, torch.Generator().manual_seed(3)):
        loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, generator=generator)
        h = Hessian(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), loader, graph_memory=2 * batch_bytes()[0]))
        for _ in range(3):
            torch.testing.assert_close(h.to_dense(), expected, rtol=1e-10, atol=1e-12)
            torch.rand(1)  # what a user's own training does to the global generator
            if generator:
                torch.rand(1, generator=generator)
        assert 0 < h.num_kept < 4


@pytest.mark.parametrize(("graph_memory", "passes"), [(0, 3), ("auto", 1)])
@pytest.mark.parametrize("k", [1, 5])
def test_graphs_are_rebuilt_once_a_block(graph_memory, passes, k):
    model = mlp().double()
    h = hessian(model, nn.CrossEntropyLoss(), X, Y, SIZES, graph_memory=graph_memory, check=False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        h.matmat(normal(h.size, k))
    assert len(calls) == passes * len(SIZES)


def test_bytes_grow_with_the_batch_and_cover_the_activations():
    x, y = normal(80, 4), classes(80)
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 3)))

    def size(batch: int) -> int:
        h = hessian(model.double(), nn.CrossEntropyLoss(), x[:batch], y[:batch], [batch])
        h @ normal(h.size)
        return h._graphs.kept[0].num_bytes()

    sizes = {batch: size(batch) for batch in (20, 40, 80)}
    activations = 8 * (4 + 50 + 50 + 3)  # inputs, two layers of tanh, log-softmax: float64
    assert sizes[20] >= 20 * activations
    assert sizes[20] <= 20 * 10 * activations
    assert sizes[40] - sizes[20] >= 20 * activations
    assert sizes[80] - sizes[40] == pytest.approx(2 * (sizes[40] - sizes[20]), rel=0.05)


def test_the_point_is_fixed_when_the_operator_is_made():
    model = mlp().double()
    for graph_memory in ("auto", 0):
        h = hessian(model, nn.CrossEntropyLoss(), X, Y, SIZES, graph_memory=graph_memory)
        v = normal(h.size)
        before = h @ v
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        torch.testing.assert_close(h @ v, before, rtol=1e-12, atol=0)
        assert not torch.allclose(hessian(model, nn.CrossEntropyLoss(), X, Y, SIZES) @ v, before)


# -- precision


@pytest.mark.parametrize("name", ["ragged cross-entropy", "conv and BatchNorm", "embedding, norm, attention"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_is_near_double(name, dtype, tolerance):
    case = CASES[name]()
    exact = Hessian(case.risk())
    v = normal(exact.size)
    expected = exact @ v
    case.model.to(dtype)
    case.batches = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in case.batches]
    low = Hessian(case.risk()) @ v.to(dtype)
    assert low.dtype == dtype
    assert low.isfinite().all()
    assert float((low.double() - expected).norm() / expected.norm()) < tolerance


def test_nan_in_a_vector_stays_in_its_column():
    h = hessian(mlp().double(), nn.CrossEntropyLoss(), X, Y, SIZES)
    v = normal(h.size, 3)
    expected = h.matmat(v)
    v[4, 1] = float("nan")
    out = h.matmat(v)
    assert out[:, 1].isnan().any()
    torch.testing.assert_close(out[:, [0, 2]], expected[:, [0, 2]])
    torch.testing.assert_close(h.matmat(v[:, [0]]), expected[:, [0]])  # and does not spoil what is kept


# -- kinds of networks


def functional_reference(risk: EmpiricalRisk, model: nn.Module, x, y, loss_fn) -> torch.Tensor:
    def loss(vector):
        return loss_fn(torch.func.functional_call(model, risk.space.named_views(vector), (x,)), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, risk.space.vector())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x.unflatten(1, (2, 4))).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).mean((1, 2)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unflatten(1, (2, 4)))[0][:, -1]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.unflatten(1, (2, 4))).mean(1))


class InPlace(nn.Module):
    """Goes on with a tensor that an in-place function changed."""

    def __init__(self, function):
        super().__init__()
        self.body, self.head, self.function = nn.Linear(8, 5), nn.Linear(5, 3), function

    def forward(self, x):
        h = self.body(x) * 1
        self.function(h)
        return self.head(h)


NETWORKS = {
    "scaled_dot_product_attention": Attending,
    "LSTM": Recurrent,
    "encoder layer": Encoder,
    "F.relu(inplace=True)": lambda: InPlace(lambda h: F.relu(h, inplace=True)),
    "relu_": lambda: InPlace(torch.relu_),
    "nn.ReLU(inplace=True)": lambda: InPlace(nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model = seeded(NETWORKS[name]).double().eval()
    x, y = normal(6, 8), classes(6)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), split([4, 2], x, y))
    dense = Hessian(risk).to_dense()
    torch.testing.assert_close(dense, dense.mT)
    torch.testing.assert_close(dense, functional_reference(risk, model, x, y, F.cross_entropy), rtol=1e-8, atol=1e-11)


def test_weight_norm_against_central_differences():
    """torch 2.13's own second derivative of the fused weight norm is wrong (gradgradcheck fails)."""
    model = seeded(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))).double()
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), split([4, 6], X, Y))
    here, rows = risk.space.vector(), []
    for step in 1e-5 * torch.eye(risk.space.size, dtype=torch.float64):
        with risk.at(here + step):
            ahead = risk.gradient()
        with risk.at(here - step):
            rows.append((ahead - risk.gradient()) / 2e-5)
    torch.testing.assert_close(Hessian(risk).to_dense(), torch.stack(rows), rtol=1e-6, atol=1e-9)


CONVOLUTIONS = {
    "stride and padding": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "dilation": lambda: nn.Conv2d(2, 3, 2, dilation=2),
    "groups": lambda: nn.Conv2d(2, 4, 3, groups=2, padding=1),
    "no bias": lambda: nn.Conv2d(2, 3, (1, 3), bias=False),
    "same": lambda: nn.Conv2d(2, 3, 3, padding="same"),
    "circular": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 2, stride=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("select", [None, "0.*", "*.bias"])
def test_convolutions(name, select):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), CONVOLUTIONS[name]())).double()
    x, y = normal(3, 1, 6, 6), classes(3, num=2).double()

    def loss_fn(output, target):
        return (output.flatten(1).square().mean(1) - target).square().mean()

    risk = EmpiricalRisk(model, loss_fn, split([2, 1], x, y), params=select)
    expected = functional_reference(risk, model, x, y, loss_fn)
    torch.testing.assert_close(Hessian(risk).to_dense(), expected, rtol=1e-8, atol=1e-11)


# -- no second derivative


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Culprit(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.activation, self.norm = nn.Linear(5, 5), Culprit(), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.activation(self.linear(x)))


def once() -> nn.Module:
    layers = {"stem": nn.Linear(4, 5), "block": Block(), "head": nn.Linear(5, 3)}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net.double()


@pytest.mark.parametrize("graph_memory", ["auto", 0])
def test_a_missing_second_derivative_names_its_module(graph_memory):
    model = seeded(once)
    h = hessian(model, nn.CrossEntropyLoss(), X, Y, [5, 5], graph_memory=graph_memory)
    with (
        assert_untouched(model),
        pytest.raises(RuntimeError, match=r"second derivatives: module 'block\.activation' has"),
    ):
        h @ normal(h.size)


def test_the_search_for_the_module_leaves_running_statistics_alone():
    model = seeded(once)
    h = hessian(model, nn.CrossEntropyLoss(), X, Y, [5, 5], mode="train")
    with assert_untouched(model), pytest.raises(RuntimeError, match=r"module 'block\.activation'"):
        h @ normal(h.size)


def test_a_loss_without_second_derivative_is_named():
    def loss_fn(output, target):
        return F.cross_entropy(Once.apply(output), target)

    h = hessian(mlp().double(), loss_fn, X, Y, [10])
    with pytest.raises(RuntimeError, match="second derivatives: the loss function or code outside"):
        h @ normal(h.size)


def test_parameters_above_the_culprit_work():
    h = hessian(seeded(once), nn.CrossEntropyLoss(), X, Y, [5, 5], params="head.*")
    dense = h.to_dense()
    torch.testing.assert_close(dense, dense.mT)


# -- shapes and algebra


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(3), torch.zeros(43 + 1), torch.zeros(1, 43), torch.zeros(()), torch.zeros(43, 1, 1), None, [0.0] * 43],
)
def test_wrong_shapes(bad):
    h = hessian(mlp().double(), nn.CrossEntropyLoss(), X, Y, [10])
    with pytest.raises(ValueError, match=r"matrix: expected a tensor of shape \(43, k\), got"):
        h @ bad


def test_right_shapes():
    h = hessian(mlp().double(), nn.CrossEntropyLoss(), X, Y, [10])
    v = normal(43, 3)
    assert (h @ v[:, 0]).shape == (43,)
    assert h.matmat(v[:, :0]).shape == (43, 0)
    torch.testing.assert_close(torch.stack([h @ c for c in v.unbind(1)], 1), h @ v)
    assert (h @ v[:, 0].float()).dtype == torch.float64
    assert not (h @ v).requires_grad
    assert repr(h) == "Hessian(43×43, torch.float64, cpu)"
    with torch.no_grad():
        torch.testing.assert_close(h @ v, hessian(mlp().double(), nn.CrossEntropyLoss(), X, Y, SIZES) @ v)


def test_dense_operator_and_algebra():
    matrix = normal(4, 4)
    matrix = matrix + matrix.T
    a: LinearOperator = DenseOperator(matrix)
    v = normal(4, 2)
    torch.testing.assert_close((a + 2 * a) @ v, 3 * matrix @ v)
    torch.testing.assert_close((a * 0.5).to_dense(), matrix / 2)
    torch.testing.assert_close(torch.from_numpy(a.to_scipy() @ v.numpy()), matrix @ v)
    mixed = a + DenseOperator(torch.eye(4))
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed.to_dense(), matrix + torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="equal sizes, got 4 and 3"):
        a + DenseOperator(torch.eye(3))
    for factor in ("2", a, None, 1j):
        with pytest.raises(TypeError, match="expected a number c"):
            a * factor
    assert DenseOperator(torch.full((2, 2), torch.nan)) @ torch.ones(2) is not None
    for bad, message in (
        (torch.ones(2, 3), "square"),
        (torch.ones(2), "square"),
        (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "symmetric"),
        (torch.eye(2, dtype=torch.int64), "floating-point"),
    ):
        with pytest.raises(ValueError, match=f"matrix: expected .*{message}"):
            DenseOperator(bad)


def test_ragged_batches_weigh_by_their_examples():
    """Equal weights a batch are wrong by tens of percent: every split gives one and the same matrix."""
    dense = [
        Hessian(paired(mlp(), nn.CrossEntropyLoss(), X, Y, list(sizes)).risk()).to_dense()
        for sizes in ([10], [9, 1], [1, 9], [4, 0, 6])
    ]
    for a, b in itertools.pairwise(dense):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_batches_in_another_order_beside_kept_graphs_are_refused():
    """A kept prefix and a streamed rest would count some examples twice and others never."""

    class Reordered:
        """Two orders in turn, from a random state that no one else can see."""

        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            order = [0, 1, 2] if self.passes < 5 else [2, 0, 1]  # counting, two checks, and the first product
            return iter([batches[i] for i in order])

    x, y = normal(9, 4), classes(9)
    batches = split([3, 3, 3], x, y)
    one = Hessian(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), batches[:1], check=False))
    one @ torch.ones(one.size, dtype=torch.float64)
    size = one._graphs.kept[0].num_bytes()
    hessian = Hessian(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), Reordered(), graph_memory=size))
    v = torch.ones(hessian.size, dtype=torch.float64)
    hessian @ v
    assert hessian.num_kept == 1
    with pytest.raises(ValueError, match="same order"):
        hessian @ v
