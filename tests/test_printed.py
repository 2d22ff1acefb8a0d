"""Every result that a public function returns, and every result within one, prints words and numbers, not arrays."""

import dataclasses
import inspect
import re
import typing

import numpy as np
import pytest
import torch
from torch import nn

import losslab
from cases import mlp, normal
from losslab.operators.dense import DenseOperator
from losslab.operators.product_error import product_error
from losslab.probes.spanning_tree import SpanningTreeResult
from losslab.probes.trajectories.snapshots import Snapshot
from losslab.status import Status

POURED_OUT = re.compile(r"array|tensor\(|\[\[")


def holds_arrays(cls: type) -> bool:
    return any(
        kind in (np.ndarray, torch.Tensor) or (dataclasses.is_dataclass(kind) and holds_arrays(kind))
        for hint in typing.get_type_hints(cls).values()
        for kind in (hint, *typing.get_args(hint))
    )


def results() -> list[type]:
    """The dataclasses that the measuring functions of `losslab` return, those in them, and snapshots."""
    functions = [getattr(losslab, name) for name in losslab.__all__]
    waiting = [typing.get_type_hints(f).get("return") for f in functions if inspect.isfunction(f)] + [Snapshot]
    found: set[type] = set()
    while waiting:
        hint = waiting.pop()
        waiting += typing.get_args(hint)
        if inspect.isclass(hint) and dataclasses.is_dataclass(hint) and hint not in found:
            found.add(hint)
            waiting += typing.get_type_hints(hint).values()
    measured = (cls for cls in found if holds_arrays(cls) and not cls.__module__.startswith("losslab.studies"))
    return sorted(measured, key=lambda cls: cls.__name__)


def test_there_are_results():
    names = {cls.__name__ for cls in results()}
    assert names >= {"SpectrumResult", "Eigenpairs", "Density", "SpanningTreeResult", "PathGeometry", "Snapshot"}


@pytest.mark.parametrize("cls", results(), ids=lambda cls: cls.__name__)
def test_every_result_that_holds_arrays_says_how_it_prints(cls):
    assert "__str__" in vars(cls), f"{cls.__name__} prints its arrays: give it a __str__"


def solved() -> dict[str, object]:
    """What the solvers return, of a matrix of 60 × 60: long enough for an array that is poured out to show."""
    matrix = normal(60, 60)
    operator = DenseOperator(matrix @ matrix.mT + torch.eye(60))
    density = losslab.spectral_density(operator, num_nodes=8, num_probes=2)
    return {
        "eigenpairs": losslab.eigenpairs(operator, 3),
        "density": density,
        "log density": losslab.log_density(density, 60),
        "trace": losslab.trace(operator),
        "diagonal": losslab.diagonal(operator),
        "Frobenius norm": losslab.frobenius_norm(operator),
        "power iteration": losslab.power_iteration(operator),
        "conjugate gradients": losslab.conjugate_gradients(operator, normal(60)),
        "product error": product_error(operator, operator),
    }


def test_results_of_solvers_print_a_line():
    for name, result in solved().items():
        text = str(result)
        assert not POURED_OUT.search(text), (name, text)
        assert len(text) < 200, (name, text)
        assert "\n" not in text


def test_a_density_of_nothing_prints():
    density = losslab.spectral_density(DenseOperator(normal(4, 4) @ torch.zeros(4, 4).double()), num_nodes=2)
    empty = dataclasses.replace(density, grid=np.empty(0), density=np.empty(0))
    assert "0 points" in str(empty)


def test_snapshots_print_where_they_are():
    model, snapshots = mlp(), losslab.Snapshots()
    snapshots.take(3, model, torch.optim.SGD(model.parameters(), lr=0.1))
    size = sum(p.numel() for p in model.parameters())
    assert str(snapshots[0]) == f"step 3: {size} numbers in 4 tensors, η = 0.1, stable up to a curvature of 20"
    snapshots.take(4, model)
    assert str(snapshots[1]) == f"step 4: {size} numbers in 4 tensors"


def test_a_spanning_tree_prints_its_saddles():
    saddles = np.array([[np.inf, 3.0, np.inf], [3.0, np.inf, 2.0], [np.inf, 2.0, np.inf]])
    edges, passes = np.array([[1, 2], [0, 1]]), np.array([[1.0, 3, 3], [3, 1.5, 2], [3, 2, 0.5]])
    tree = SpanningTreeResult(Status.complete, np.array([1.0, 1.5, 0.5]), saddles, edges, passes, 2, 10, 0)
    assert str(tree).splitlines() == [
        "solutions             3, of loss 0.5 to 1.5",
        "saddles               of the tree's 2 paths: 2 to 3",
        "cost and status       2 paths tried, complete",
    ]


def test_a_pass_over_the_data_prints_its_size():
    model = nn.Linear(4, 3)
    risk = losslab.EmpiricalRisk(model, nn.CrossEntropyLoss(), [(torch.ones(2, 4), torch.tensor([0, 1]))])
    assert re.fullmatch(r"loss [\d.]+, gradient of norm [\d.]+", str(risk.evaluate()))
