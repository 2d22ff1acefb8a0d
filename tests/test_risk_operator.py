"""A sum over batches that survives running out of memory, and its parts batch by batch."""

import warnings
import weakref

import pytest
import torch
from torch.testing import assert_close

from cases import CASES, normal
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.gradient_graph import GradientGraph
from losslab.operators.hessian import Hessian

CASE = "ragged MSE"  # four batches, of 3, 3, 3, 1 examples
FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 4096 bytes"),
    MemoryError(),
]


def fail_at(monkeypatch, calls, error=FAILURES[0], kind=GradientGraph) -> list[int]:
    """Let a batch's products number `calls`, from 1, run out of memory when they are done; the list counts them."""
    made: list[int] = []
    add_products = kind.add_products

    def failing(self, rows, out):
        made.append(1)
        add_products(self, rows, out)
        if len(made) in calls:
            raise type(error)(*error.args)  # a new one: an exception keeps its frames, and so the graph, alive

    monkeypatch.setattr(kind, "add_products", failing)
    return made


def budget_of(operator) -> int:
    """What kept graphs take and may still take."""
    return operator.kept_bytes + operator._graphs._budget


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("warm", [False, True])
def test_a_failed_product_is_made_again(monkeypatch, error, call, warm):
    case = CASES[CASE]()
    operator, v = Hessian(case.risk(graph_memory=1 << 30)), normal(43, 2)
    expected = Hessian(case.risk()) @ v
    if warm:
        operator @ v
    before = budget_of(operator)
    made = fail_at(monkeypatch, {call}, error)
    with pytest.warns(UserWarning, match=r"kept graphs dropped, their budget is now 512 MiB, .* smaller graph_memory"):
        product = operator @ v
    assert torch.equal(product, expected)  # nothing is lost, nothing counted twice
    assert len(made) == call + 4
    assert budget_of(operator) == before // 2
    assert operator.num_kept == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(operator @ v, expected)


def test_a_failure_while_a_graph_is_built(monkeypatch):
    case = CASES[CASE]()
    expected = Hessian(case.risk()) @ normal(43)
    built: list[int] = []
    init = GradientGraph.__init__

    def failing(self, *args):
        built.append(1)
        if len(built) == 3:
            raise FAILURES[0]
        init(self, *args)

    monkeypatch.setattr(GradientGraph, "__init__", failing)
    operator = Hessian(case.risk())
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.equal(operator @ normal(43), expected)
    assert len(built) == 3 + 4


def test_each_failure_halves_the_budget_down_to_nothing(monkeypatch):
    case = CASES[CASE]()
    operator = Hessian(case.risk(graph_memory=6 << 20))
    fail_at(monkeypatch, {1, 2, 3})
    with pytest.warns(UserWarning, match="out of memory") as caught:
        product = operator @ normal(43)
    assert [int(str(w.message).split("now ")[1].split(" MiB")[0]) for w in caught] == [3, 2, 0]  # 3, 1.5, below one: 0
    assert operator.num_kept == 0
    assert torch.equal(product, Hessian(case.risk()) @ normal(43))


@pytest.mark.parametrize("graph_memory", [0, 3 << 20])
def test_where_nothing_helps_it_says_what_could(monkeypatch, graph_memory):
    operator = Hessian(CASES[CASE]().risk(graph_memory=graph_memory))
    made = fail_at(monkeypatch, set(range(1, 100)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(MemoryError, match=r"one batch's graph does not fit on cpu .* use smaller batches"):
            operator @ normal(43)
    assert len(made) == len(caught) + 1 == (1 if graph_memory == 0 else 3)


def test_other_errors_go_through(monkeypatch):
    operator = Hessian(CASES[CASE]().risk())
    made = fail_at(monkeypatch, {2}, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        operator @ normal(43)
    assert len(made) == 2


@pytest.mark.parametrize("method", ["implicit", "explicit"])
def test_the_covariance_survives_too(monkeypatch, method):
    risk = CASES[CASE]().risk()
    operator, expected = (GradientCovariance(risk, method=method) for _ in range(2))
    expected = expected @ normal(43)
    fail_at(monkeypatch, {3}, kind=operator.kind)
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.equal(operator @ normal(43), expected)


@pytest.mark.parametrize("graph_memory", ["auto", 0])
def test_no_graph_outlives_its_turn(monkeypatch, graph_memory):
    """Streamed graphs are there one at a time, and a failed pass has freed its own before the next builds one."""
    alive: weakref.WeakSet = weakref.WeakSet()
    before_build: list[int] = []
    init = GradientGraph.__init__

    def counting(self, *args):
        before_build.append(len(alive))
        init(self, *args)
        alive.add(self)

    monkeypatch.setattr(GradientGraph, "__init__", counting)
    operator = Hessian(CASES[CASE]().risk(graph_memory=graph_memory))
    operator @ normal(43)
    assert before_build == ([0, 1, 2, 3] if graph_memory == "auto" else [0, 0, 0, 0])
    if graph_memory == 0:
        operator.batch_forms(normal(43, 1))
        assert before_build == [0] * 8
        return
    before_build.clear()
    fail_at(monkeypatch, {3})
    with pytest.warns(UserWarning, match="out of memory"):
        operator @ normal(43)
    assert before_build == [0, 1, 2, 3]


def test_shrinking_counts_what_is_kept():
    case = CASES[CASE]()
    operator = Hessian(case.risk(graph_memory=8 << 20))
    operator @ normal(43)
    assert operator.kept_bytes > 0
    graphs = operator._graphs
    assert graphs.shrink() == 4 << 20  # half of kept and free together, not of what was still free
    assert graphs.shrink() == 2 << 20
    assert graphs.shrink() == 1 << 20
    assert graphs.shrink() == 0
    assert graphs.shrink() is None


@pytest.mark.parametrize("graph_memory", ["auto", 0])
@pytest.mark.parametrize("make", [Hessian, lambda risk: GradientCovariance(risk, centred=False)])
def test_batch_forms_add_up_to_the_quadratic_form(make, graph_memory):
    case = CASES[CASE]()
    operator, vectors = make(case.risk(graph_memory=graph_memory)), normal(43, 3)
    forms, counts = operator.batch_forms(vectors)
    assert forms.shape == (4, 3)
    assert counts.tolist() == [3, 3, 3, 1]
    assert_close(forms.sum(0), (vectors * operator.matmat(vectors)).sum(0))
    # Each batch by itself: scaled by N/n_b its form is that of the risk of this batch alone.
    for batch, form, count in zip(case.batches, forms, counts, strict=True):
        alone = make(type(case)(case.model, case.loss_fn, [batch], case.whole, {}).risk(check=False))
        assert_close(form * 10 / count, (vectors * alone.matmat(vectors)).sum(0))
