"""Per-example gradients, explicit and implicit: both equal the dense matrix, within the memory allowed."""

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from cases import CASES, classes, mlp, normal, seeded, split
from contracts.test_operators import dense_covariance, dense_fisher
from losslab.operators import example_gradients
from losslab.operators.example_gradients import ExampleJacobian, Examples, ExplicitGradients, ImplicitGradients
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import Ranks
from processes import run_ranks
from second_derivatives import Once
from untouched import assert_untouched

X, Y = normal(10, 4), classes(10)
SIZES = [3, 6, 1]


def chunks_of(monkeypatch, examples: int, num_parameters: int) -> None:
    """So many examples a chunk, in float64."""
    monkeypatch.setattr(example_gradients, "_CHUNK_BYTES", examples * num_parameters * 8)


def covariance(model: nn.Module, sizes=SIZES, method="explicit", **kwargs) -> GradientCovariance:
    return GradientCovariance(EmpiricalRisk(model, nn.CrossEntropyLoss(), split(sizes, X, Y), **kwargs), method=method)


# -- the same matrix


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_explicit_is_implicit_is_dense(monkeypatch, name, centred):
    """With one chunk a batch, with chunks that do not divide it, one example at a time; held and made anew."""
    case = CASES[name]()
    risk = case.risk()
    expected = (dense_covariance if centred else dense_fisher)(case, risk)
    vectors = normal(risk.space.size, 3, seed=5)
    implicit = GradientCovariance(risk, centred=centred, method="implicit")
    assert_close(implicit @ vectors, expected @ vectors, rtol=1e-8, atol=1e-11)
    for examples, graph_memory in ((100, "auto"), (2, "auto"), (2, 0), (1, 4 * 8 * risk.space.size)):
        chunks_of(monkeypatch, examples, risk.space.size)
        risk.graph_memory = graph_memory
        explicit = GradientCovariance(risk, centred=centred, method="explicit")
        assert (explicit.method, implicit.method) == ("explicit", "implicit")
        for _ in range(3):  # made, made and held, held
            assert_close(explicit @ vectors, expected @ vectors, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["conv and BatchNorm", "dict batches", "unused parameter", "tied weights"])
def test_without_vmap(monkeypatch, name):
    case = CASES[name]()
    chunks_of(monkeypatch, 2, case.risk().space.size)
    monkeypatch.setattr(Examples, "vectorised", lambda *_: None)
    explicit = GradientCovariance(case.risk(), method="explicit")
    assert_close(explicit.to_dense(), dense_covariance(case, case.risk()), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    expected, v = covariance(mlp().double()), normal(43)
    low = covariance(mlp().double()).risk.to(dtype)
    product = GradientCovariance(low, method="explicit") @ v
    assert product.dtype == dtype
    error = (product.double() - expected @ v).norm() / (expected @ v).norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 5e-2)


def test_the_same_bits_whether_held_or_made(monkeypatch):
    chunks_of(monkeypatch, 2, 43)
    held, made = covariance(mlp().double()), covariance(mlp().double(), graph_memory=0)
    v = normal(43, 2)
    products = [operator @ v for operator in (held, held, held, made, made)]
    assert all(torch.equal(product, products[0]) for product in products)


def test_a_shuffling_loader_with_some_gradients_held(monkeypatch):
    chunks_of(monkeypatch, 2, 43)
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)
    risk = EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), loader, graph_memory=7 * 43 * 8)
    operator, expected = GradientCovariance(risk, method="explicit"), covariance(mlp().double()).to_dense()
    for _ in range(3):
        assert_close(operator.to_dense(), expected, rtol=1e-10, atol=1e-13)
        torch.rand(1)
    assert operator.num_kept == 2


# -- what can be differentiated once


class Doubled(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_explicit_needs_no_second_derivative():
    layer = seeded(lambda: nn.Linear(4, 3)).double()
    model = nn.Sequential(layer, Doubled())
    twice = seeded(lambda: nn.Linear(4, 3)).double()
    with torch.no_grad():
        for p in twice.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError, match="second derivatives: module '1'"):
        covariance(model, method="implicit") @ normal(15)
    assert_close(covariance(model).to_dense(), 4 * covariance(twice).to_dense())


# -- memory


class LiveRows(TorchDispatchMode):
    """The most rows of P float64 numbers, in tensors of one row or more, that were alive at once."""

    def __init__(self, num_parameters: int):
        super().__init__()
        self._row, self._alive, self.peak = 8 * num_parameters, {}, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self._row:
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes() / self._row)
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(rows for _, rows in self._alive.values()))
        return result


@pytest.mark.parametrize(("rows_allowed", "held"), [(0, 0), (9, 8), (16, 16), (100, 40)])
def test_no_more_rows_than_allowed_and_a_chunk(monkeypatch, rows_allowed, held):
    """Batches of eight, chunks of two: the third batch is not held where sixteen rows are allowed, nor ever there."""
    torch.manual_seed(0)
    model = nn.Linear(50, 40).double()  # P = 2040, larger than everything else
    x, y = normal(40, 50), classes(40, num=40)
    row = 2040 * 8
    chunks_of(monkeypatch, 2, 2040)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), split([8] * 5, x, y), graph_memory=rows_allowed * row)
    operator = GradientCovariance(risk, centred=False, method="explicit")
    v = normal(2040)
    gc.collect()
    with LiveRows(2040) as live:
        first, _, third = operator @ v, (operator @ v).sum(), operator @ v
    assert operator.kept_bytes == held * row
    # Two copies of a chunk while it is put together; and vectors: v, the first product, a sum, what is added to it.
    assert held <= live.peak <= min(rows_allowed, 40) + 2 * 2 + 4
    assert torch.equal(first, third)


def test_chunks_count_all_rows_of_an_example(monkeypatch):
    chunks_of(monkeypatch, 6, 43)
    risk = EmpiricalRisk(mlp().double(), None, [X], check=False)
    for width, sizes in ((1, [6, 4]), (3, [2] * 5), (7, [1] * 10)):
        jacobian = ExampleJacobian(risk, {}, Examples(X, 10), risk.output, width)
        assert [span.stop - span.start for span in jacobian.spans()] == sizes


def test_held_from_the_second_product_on():
    model, calls = mlp().double(), []
    held, made = covariance(model), covariance(model, graph_memory=0)
    model.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for operator in (held, held, held, made, made, made):
        calls.clear()
        operator.matmat(normal(43, 4))
        counts.append(len(calls))
    assert counts == [3, 3, 0, 3, 3, 3]  # one vectorised call a batch, for all vectors at once


def test_running_out_of_memory_is_not_taken_for_a_missing_rule(monkeypatch):
    calls = []

    def out_of_memory(*args, **kwargs):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    operator = covariance(mlp().double(), graph_memory=0)
    monkeypatch.setattr(example_gradients, "vjp", out_of_memory)
    with pytest.raises(MemoryError, match="does not fit"):
        operator @ normal(43)
    assert len(calls) == 1


def test_running_out_of_memory_while_rows_are_held(monkeypatch):
    operator, v = covariance(mlp().double(), graph_memory=8 << 20), normal(43)
    expected = operator @ v
    rows, calls = ExampleJacobian.rows, []

    def failing(self, span):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows(self, span)

    monkeypatch.setattr(ExampleJacobian, "rows", failing)
    with pytest.warns(UserWarning, match="their budget is now 4 MiB"):
        assert torch.equal(operator @ v, expected)
    assert torch.equal(operator @ v, expected)


# -- the choice


def wide(places: int) -> EmpiricalRisk:
    """One weight matrix used at so many places by each of ten examples."""

    def loss_fn(output, targets):
        return nn.functional.cross_entropy(output.mean(1), targets)

    model = seeded(lambda: nn.Linear(4, 3, bias=False)).double()
    return EmpiricalRisk(model, loss_fn, split(SIZES, normal(10, places, 4), Y))


@pytest.mark.parametrize(
    ("places", "rows_allowed", "method"),
    [
        (1, 100, "implicit"),
        (9, 100, "implicit"),
        (10, 100, "explicit"),
        (10, 10, "explicit"),
        (10, 9, "implicit"),
        (49, 0, "implicit"),
        (50, 0, "explicit"),
    ],
)
def test_auto(places, rows_allowed, method):
    """One layer takes two operations a weight for each place: from 20 if all rows fit, from 100 always."""
    risk = wide(places)
    risk.graph_memory = rows_allowed * 12 * 8
    operator = GradientCovariance(risk)
    assert operator.method == method
    assert operator.kind is (ExplicitGradients if method == "explicit" else ImplicitGradients)
    other = GradientCovariance(risk, method="implicit" if method == "explicit" else "explicit")
    assert_close(operator.to_dense(), other.to_dense())


def test_auto_on_batches_of_one():
    risk = wide(50)
    batches = split([1] * 10, normal(10, 50, 4), Y)
    assert GradientCovariance(EmpiricalRisk(risk.model, risk.loss_fn, batches)).method == "explicit"


def test_auto_counts_the_chosen_parameters_alone():
    """The last layer is used once, however often those before it are."""
    model = seeded(lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 98, 3))).double()
    x = normal(10, 1, 100)
    methods = {}
    for params in ("0.*", "3.*"):
        risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), split(SIZES, x, Y), params=params)
        methods[params] = GradientCovariance(risk).method
    assert methods == {"0.*": "explicit", "3.*": "implicit"}


def test_unknown_method():
    with pytest.raises(ValueError, match="method: expected 'auto', 'explicit' or 'implicit', got 'fast'"):
        covariance(mlp().double(), method="fast")


# -- nothing is touched, several processes


@pytest.mark.parametrize("name", ["conv and BatchNorm", "embedding, norm, attention"])
def test_touches_nothing(monkeypatch, name):
    case = CASES[name]()
    chunks_of(monkeypatch, 2, case.risk().space.size)
    with assert_untouched(case.model):
        operator = GradientCovariance(case.risk(), method="explicit")
        for _ in range(3):
            operator @ normal(operator.size)
    with torch.no_grad():  # gradients are taken whatever the caller's mode is
        assert_close(operator @ normal(operator.size), dense_covariance(case, case.risk()) @ normal(operator.size))


def products(ranks: Ranks) -> list[torch.Tensor]:
    case = CASES["ragged MSE"]()
    own = [batch for i, batch in enumerate(case.batches) if ranks.count == 1 or [0, 2, 2, 0][i] == ranks.rank]
    operator = GradientCovariance(EmpiricalRisk(case.model, case.loss_fn, own, ranks=ranks), method="explicit")
    return [operator @ normal(operator.size, 2) for _ in range(3)]


def test_several_processes_one_without_data(tmp_path):
    expected = products(Ranks())[0]
    for found in run_ranks(products, 3, tmp_path):
        for product in found:
            assert_close(product, expected, rtol=1e-10, atol=1e-12)
