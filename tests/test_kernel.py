"""The neural tangent kernel's Gram matrix against torch.func.jacrev, by products, from rows, on several processes."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import CASES, Case, classes, conv_batchnorm, mlp, normal, seeded, split
from losslab.operators import example_gradients, kernel
from losslab.operators.kernel import NeuralTangentKernel
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import Ranks
from losslab.solvers.lanczos import eigenpairs
from processes import run_ranks
from untouched import assert_untouched

X, Y = normal(10, 4), classes(10)
SIZES = [3, 6, 1]


def jacobian(case: Case, risk: EmpiricalRisk) -> Tensor:
    """(N·C, P): the outputs of one batch after the other, example-major."""

    def outputs(vector: Tensor, batch: Any) -> Tensor:
        parameters = risk.space.named_views(vector)
        if isinstance(batch, dict):
            return functional_call(case.model, parameters, (batch["features"],))["logits"].flatten()
        arguments = batch[:-1] if isinstance(batch, tuple) else (batch,)
        return functional_call(case.model, parameters, arguments).flatten()

    with sdpa_kernel(SDPBackend.MATH):
        return torch.cat([jacrev(lambda v, b=batch: outputs(v, b))(risk.space.vector()) for batch in case.batches])


def kernel_of(model: nn.Module, sizes=SIZES, **kwargs) -> NeuralTangentKernel:
    return NeuralTangentKernel(EmpiricalRisk(model.double(), nn.CrossEntropyLoss(), split(sizes, X, Y), **kwargs))


# -- the same matrix


@pytest.mark.parametrize("graph_memory", ["auto", 0, 3000])
@pytest.mark.parametrize("name", CASES)
def test_equals_jacrev(monkeypatch, name, graph_memory):
    case = CASES[name]()
    risk = case.risk(graph_memory=graph_memory)
    theta = NeuralTangentKernel(risk)
    j = jacobian(case, risk)
    assert theta.size == len(j) == sum(theta._widths[i] * len(b) for i, b in enumerate(map(first_tensor, case.batches)))
    for _ in range(2):
        assert_close(theta._from_products(), j @ j.mT, rtol=1e-9, atol=1e-12)
    u = normal(theta.size, seed=3)
    assert_close(theta @ u, j @ (j.mT @ u), rtol=1e-9, atol=1e-12)
    for rows in (1000, 4, 1):  # J's rows: all at once, blocks and chunks that divide nothing, one example at a time
        monkeypatch.setattr(example_gradients, "_CHUNK_BYTES", rows * risk.space.size * 8)
        risk.graph_memory = graph_memory if rows > 4 else 7 * risk.space.size * 8
        assert theta._separable()
        assert_close(theta._from_rows(), j @ j.mT, rtol=1e-9, atol=1e-12)
    assert_close(theta.to_dense(), j @ j.mT, rtol=1e-9, atol=1e-12)


def first_tensor(batch: Any) -> Tensor:
    return batch[0] if isinstance(batch, tuple) else batch["features"] if isinstance(batch, dict) else batch.x


def test_linear_model_in_closed_form():
    """f = Wx: outputs of different classes never move together, Θ = XXᵀ ⊗ I."""
    theta = kernel_of(nn.Linear(4, 3, bias=False))
    expected = torch.kron(X @ X.mT, torch.eye(3, dtype=torch.float64))
    assert_close(theta.to_dense(), expected, rtol=1e-12, atol=1e-14)
    assert_close(theta._from_products(), expected, rtol=1e-12, atol=1e-14)


def test_eigenvalues_are_those_of_gauss_newton():
    """MSELoss averages over N·C numbers: the Gauss-Newton matrix is 2/(N·C)·JᵀJ, made here from jacrev."""
    case = CASES["ragged MSE"]()
    risk = case.risk()
    theta, j = NeuralTangentKernel(risk), jacobian(case, risk)
    assert theta.size == 30 < risk.space.size == 43
    f = torch.cat([case.model(x) for x, _ in case.batches]).detach()
    y = torch.cat([y for _, y in case.batches])
    curvature = torch.func.hessian(lambda outputs: case.loss_fn(outputs.view_as(y), y))(f.flatten())
    gauss_newton = torch.linalg.eigvalsh(j.mT @ curvature @ j)
    assert_close(2 / theta.size * torch.linalg.eigvalsh(theta.to_dense()), gauss_newton[-30:], rtol=1e-9, atol=1e-13)
    pairs = eigenpairs(theta, 3, tol=1e-10)
    np.testing.assert_allclose(2 / theta.size * np.sort(pairs.values), gauss_newton[-3:], rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    exact = kernel_of(mlp())
    low = NeuralTangentKernel(exact.risk.to(dtype))
    for dense in (low.to_dense(), low._from_rows(), low._from_products()):
        assert dense.dtype == dtype
        assert float((dense.double() - exact.to_dense()).norm() / exact.to_dense().norm()) < (
            1e-5 if dtype == torch.float32 else 3e-2
        )


def test_sequences_of_several_lengths(monkeypatch):
    """C is the batch's own: examples of 15, 15, 6, 6, 6 and 21 rows."""
    model = seeded(lambda: nn.Linear(4, 3)).double()
    x = [normal(2, 5, 4), normal(3, 2, 4, seed=1), normal(1, 7, 4, seed=2)]
    words = torch.cat([batch.flatten(0, 1) for batch in x])
    expected = torch.kron(words @ words.mT + 1, torch.eye(3, dtype=torch.float64))  # 1: the bias
    risk = EmpiricalRisk(model, None, x, check=False)
    assert NeuralTangentKernel(risk).size == len(expected) == 2 * 15 + 3 * 6 + 21
    assert_close(NeuralTangentKernel(risk)._from_products(), expected)
    monkeypatch.setattr(example_gradients, "_CHUNK_BYTES", 1)
    for rows_allowed in (100, 22, 0):  # 22: the second example does not fit beside the first, the third would
        risk.graph_memory = rows_allowed * 15 * 8
        assert_close(NeuralTangentKernel(risk)._from_rows(), expected)


# -- how the matrix is made


def test_rows_where_they_are_cheaper(monkeypatch):
    """A linear layer takes two operations a weight, three classes want three; used at 16 places it takes more."""
    made = []
    monkeypatch.setattr(NeuralTangentKernel, "_from_products", lambda _: made.append("products"))
    monkeypatch.setattr(NeuralTangentKernel, "_from_rows", lambda _: made.append("rows"))
    kernel_of(nn.Linear(4, 3)).to_dense()
    convolution = nn.Sequential(nn.Conv1d(1, 3, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double()
    NeuralTangentKernel(EmpiricalRisk(convolution, None, [normal(4, 1, 18)], check=False)).to_dense()
    NeuralTangentKernel(
        EmpiricalRisk(seeded(conv_batchnorm).double(), None, [normal(6, 1, 4, 4)], mode="train", check=False)
    ).to_dense()
    assert made == ["products", "rows", "products"]


class Trimmed(nn.Module):
    """Cuts a batch down to its longest sequence, as collating functions do."""

    def __init__(self):
        super().__init__()
        self.layer = seeded(lambda: nn.Linear(4, 3))

    def forward(self, x):
        return self.layer(x[:, : int((x != 0).any(2).sum(1).max())])


def test_outputs_whose_number_depends_on_the_batch():
    """An example alone has fewer of them: its rows are not those of its batch."""
    x = normal(3, 4, 4)
    x[0, 2:], x[2, 1:] = 0, 0
    theta = NeuralTangentKernel(EmpiricalRisk(Trimmed().double(), None, [x], check=False))
    assert theta.size == 36
    assert not theta._separable()
    words = x.flatten(0, 1)
    assert_close(theta.to_dense(), torch.kron(words @ words.mT + 1, torch.eye(3, dtype=torch.float64)))


def test_batchnorm_in_train_mode():
    """The outputs of a batch depend on all its examples: J is theirs together."""
    model = seeded(conv_batchnorm).double()
    x = [normal(6, 1, 4, 4), normal(4, 1, 4, 4, seed=1)]
    risk = EmpiricalRisk(model, None, x, mode="train", check=False)
    with assert_untouched(model):
        theta = NeuralTangentKernel(risk)
        dense = theta.to_dense()
    model.train()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    rows = []
    for batch in x:

        def outputs(v, batch=batch):
            state = risk.space.named_views(v) | {n: b.clone() for n, b in buffers.items()}
            return functional_call(model, state, (batch,)).flatten()

        rows.append(torch.autograd.functional.jacobian(outputs, risk.space.vector()))
    j = torch.cat(rows)
    assert_close(dense, j @ j.mT)


@pytest.mark.parametrize(("rows_allowed", "times"), [(100, 1), (15, 1.5), (6, 3), (0, 5.5)])
def test_how_often_rows_are_made(monkeypatch, rows_allowed, times):
    """b blocks: (b + 1)/2 times."""
    model = mlp().double()
    monkeypatch.setattr(example_gradients, "_CHUNK_BYTES", 3 * 43 * 8)
    risk = EmpiricalRisk(model, None, [X[:4], X[4:]], check=False, graph_memory=rows_allowed * 43 * 8)
    theta = NeuralTangentKernel(risk)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    theta._from_rows()
    assert len(calls) == 10 * times


def test_graphs_are_kept_within_the_budget():
    case = CASES["ragged MSE"]()
    full = NeuralTangentKernel(case.risk())
    expected = full._from_products()
    first, second = (graph.num_bytes() for graph in full._graphs.kept[:2])
    assert full.num_kept == 4
    for budget, kept in ((0, 0), (first - 1, 0), (first, 1), (first + second, 2)):
        theta = NeuralTangentKernel(case.risk(graph_memory=budget))
        for _ in range(2):
            assert torch.equal(theta._from_products(), expected)
        assert theta.num_kept == kept
        assert theta.kept_bytes <= budget


@pytest.mark.parametrize("phase", ["add_back", "along"])
def test_running_out_of_memory(monkeypatch, phase):
    case = CASES["ragged MSE"]()
    theta, u = NeuralTangentKernel(case.risk(graph_memory=8 << 20)), normal(30, 2)
    expected, calls = theta @ u, []
    method = getattr(kernel._OutputGraph, phase)

    def failing(self, *args):
        calls.append(1)
        result = method(self, *args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(kernel._OutputGraph, phase, failing)
    with pytest.warns(UserWarning, match="their budget is now 4 MiB"):
        assert torch.equal(theta @ u, expected)
    assert len(calls) == 3 + 4


def test_a_shuffling_loader():
    """Rows are in the order in which the risk reads the data, the same on every pass."""
    model = mlp().double()
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), loader)
    with risk.evaluating():
        ordered = [x for (x, _), _ in risk.read()]
    expected = NeuralTangentKernel(EmpiricalRisk(model, None, ordered, check=False)).to_dense()
    for memory in ("auto", 0):
        risk.graph_memory = memory
        theta = NeuralTangentKernel(risk)
        for _ in range(2):
            torch.rand(1)
            assert_close(theta._from_products(), expected)
            assert_close(theta._from_rows(), expected)


# -- the model's output


class Returning(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = seeded(lambda: nn.Linear(4, 3)), wrap

    def forward(self, x):
        return self.wrap(torch.tanh(self.layer(x)))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


@dataclass
class Scores:
    scores: Tensor
    labels: Tensor


class Plain:
    """Neither a mapping nor a dataclass."""

    def __init__(self, scores):
        self.scores, self.name = scores, "scores"


Pair = namedtuple("Pair", ["logits", "hidden"])
ACCEPTED = {
    "logits in a dict": lambda f: {"hidden": 2 * f, "logits": f},
    "logits in a dataclass": lambda f: Output(f, 2 * f),
    "logits in a named tuple": lambda f: Pair(f, 2 * f),
    "one real tensor in a dict": lambda f: {"scores": f, "labels": f.argmax(1)},
    "one real tensor in a dataclass": lambda f: Scores(f, f.argmax(1)),
    "one real tensor in a tuple": lambda f: (f, None),
    "one real tensor in an object": Plain,
}
REFUSED = {
    "two tensors": (lambda f: (f, 2 * f), "tuple with 2 of them"),
    "two in a dict": (lambda f: {"a": f, "b": f}, "dict with 2 of them"),
    "classes": (lambda f: f.argmax(1), "Tensor with 0 of them"),
    "nothing": (lambda f: None, "NoneType with 0 of them"),
    "logits that are none": (lambda f: {"logits": f.argmax(1)}, "dict with 0 of them"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_outputs_that_are_found(name):
    expected = NeuralTangentKernel(EmpiricalRisk(Returning(lambda f: f).double(), None, [X], check=False))
    theta = NeuralTangentKernel(EmpiricalRisk(Returning(ACCEPTED[name]).double(), None, [X], check=False))
    assert_close(theta._from_products(), expected.to_dense())
    assert_close(theta._from_rows(), expected.to_dense())


@pytest.mark.parametrize("name", REFUSED)
def test_outputs_that_are_refused(name):
    wrap, got = REFUSED[name]
    model = Returning(wrap).double()
    with (
        assert_untouched(model),
        pytest.raises(TypeError, match=f"kernel: expected a model that returns one real tensor, got {got}"),
    ):
        NeuralTangentKernel(EmpiricalRisk(model, None, [X], check=False))


@pytest.mark.parametrize(("wrap", "shape"), [(lambda f: f.mT, r"\(3, 10\)"), (lambda f: f.sum(), r"\(\)")])
def test_examples_come_first(wrap, shape):
    risk = EmpiricalRisk(Returning(wrap).double(), None, [X], check=False)
    with pytest.raises(ValueError, match=f"the batch's 10 examples on their first axis, got shape {shape}"):
        NeuralTangentKernel(risk)


def test_a_missing_second_derivative_is_explained():
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

    theta = kernel_of(nn.Sequential(nn.Linear(4, 3), Culprit()))
    with pytest.raises(RuntimeError, match="second derivatives: module '1' has none"):
        theta @ normal(theta.size)


# -- as an operator


@pytest.mark.parametrize("name", CASES)
def test_linear_symmetric_and_touches_nothing(name):
    case = CASES[name]()
    with assert_untouched(case.model):
        theta = NeuralTangentKernel(case.risk())
        u, v = normal(theta.size, seed=5), normal(theta.size, seed=6)
        assert_close(theta @ (2 * u - 3 * v), 2 * (theta @ u) - 3 * (theta @ v))
        assert_close(u @ (theta @ v), v @ (theta @ u))
        dense = theta.to_dense()
    assert_close(torch.from_numpy(theta.to_scipy() @ u.numpy()), dense @ u)
    assert theta.matmat(u[:, None][:, :0]).shape == (theta.size, 0)


@pytest.mark.parametrize("graph_memory", ["auto", 0])
def test_stays_at_its_point(graph_memory):
    theta = kernel_of(mlp(), graph_memory=graph_memory)
    before = theta._from_rows()
    with theta.risk.at(theta.risk.space.vector() + 0.3):
        assert_close(theta._from_products(), before)
        assert_close(theta._from_rows(), before)
        assert not torch.allclose(NeuralTangentKernel(theta.risk).to_dense(), before)


@pytest.mark.parametrize("bad", [torch.zeros(3), None, torch.zeros(1, 30)])
def test_wrong_shapes(bad):
    with pytest.raises(ValueError, match=r"matrix: expected a tensor of shape \(30, k\)"):
        kernel_of(mlp()) @ bad


def measured(ranks: Ranks) -> dict[str, Tensor]:
    """Of four batches the first process holds two, the second none, the third two."""
    case = CASES["ragged MSE"]()
    owners = [0, 0, 2, 2]
    own = [batch for batch, owner in zip(case.batches, owners, strict=True) if ranks.count == 1 or owner == ranks.rank]
    theta = NeuralTangentKernel(EmpiricalRisk(case.model, case.loss_fn, own, ranks=ranks))
    return {
        "size": torch.tensor(theta.size),
        "local": torch.tensor(theta.split.local_size),
        "product": theta @ normal(30, 2),
        "dense": theta.to_dense(),
        "eigenvalues": torch.from_numpy(eigenpairs(theta, 3, tol=1e-10, seed=1).values.copy()),
    }


def test_several_processes_one_without_data(tmp_path):
    expected = measured(Ranks())
    found = run_ranks(measured, 3, tmp_path)
    assert [int(one["local"]) for one in found] == [18, 0, 12]
    for one in found:
        for name in ("size", "product", "dense", "eigenvalues"):
            assert_close(one[name], expected[name], rtol=1e-9, atol=1e-10)
        assert torch.equal(one["product"], found[0]["product"])
