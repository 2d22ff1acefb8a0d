"""What every operator must satisfy. A new operator is one row of OPERATORS."""

import pytest
import torch
from torch import Tensor

from cases import CASES, Case, normal
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from untouched import assert_untouched


def dense_hessian(case: Case, risk: EmpiricalRisk) -> Tensor:
    return case.reference_hessian(risk)


def example_gradients(case: Case, risk: EmpiricalRisk) -> Tensor:
    """(N, P), one backward pass an example."""
    rows = []
    for batch in case.batches:
        for example in _examples(batch):
            single = Case(case.model, case.loss_fn, [example], case.whole, case.kwargs)
            rows.append(single.risk(check=False).gradient())
    return torch.stack(rows)


def dense_covariance(case: Case, risk: EmpiricalRisk) -> Tensor:
    return torch.cov(example_gradients(case, risk).mT, correction=0)


def dense_fisher(case: Case, risk: EmpiricalRisk) -> Tensor:
    gradients = example_gradients(case, risk)
    return gradients.mT @ gradients / len(gradients)


def _examples(batch):
    if isinstance(batch, tuple):
        return [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[0]))]
    if isinstance(batch, dict):
        return [{k: t[i : i + 1] for k, t in batch.items()} for i in range(len(batch["labels"]))]
    return [type(batch)(batch.x[i : i + 1], batch.y[i : i + 1]) for i in range(len(batch.x))]


OPERATORS = {
    "Hessian": (Hessian, dense_hessian),
    "GradientCovariance": (GradientCovariance, dense_covariance),
    "GradientCovariance, uncentred": (lambda risk: GradientCovariance(risk, centred=False), dense_fisher),
}


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return CASES[request.param]()


@pytest.fixture(params=OPERATORS, ids=str)
def row(request):
    return OPERATORS[request.param]


@pytest.mark.parametrize("graph_memory", ["auto", 0, 3000])
def test_equals_dense(case, row, graph_memory):
    make, dense = row
    risk = case.risk(graph_memory=graph_memory)
    operator = make(risk)
    expected = dense(case, risk)
    for _ in range(2):  # the first pass builds the graphs, the second uses them
        torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-8, atol=1e-11)
    v = normal(operator.size, seed=5)
    torch.testing.assert_close(operator @ v, expected @ v, rtol=1e-8, atol=1e-11)


def test_linear_and_symmetric(case, row):
    operator = row[0](case.risk())
    u, v = normal(operator.size, seed=5), normal(operator.size, seed=6)
    torch.testing.assert_close(operator @ (2 * u - 3 * v), 2 * (operator @ u) - 3 * (operator @ v))
    torch.testing.assert_close(u @ (operator @ v), v @ (operator @ u))


def test_algebra_and_scipy(case, row):
    operator = row[0](case.risk())
    dense = operator.to_dense()
    torch.testing.assert_close((2 * operator + operator).to_dense(), 3 * dense)
    matrix = normal(operator.size, 3, seed=8)
    from_scipy = operator.to_scipy() @ matrix.numpy()
    torch.testing.assert_close(torch.from_numpy(from_scipy), dense @ matrix)
    assert operator.shape == (operator.size, operator.size)


def test_touches_nothing(case, row):
    with assert_untouched(case.model):
        operator = row[0](case.risk())
        operator @ normal(operator.size)


def test_stays_at_its_point(case, row):
    risk = case.risk(graph_memory=0)
    operator, theta = row[0](risk), risk.space.vector()
    before = operator.to_dense()
    with risk.at(theta + 0.3):
        torch.testing.assert_close(operator.to_dense(), before)


def test_reference_depends_on_its_argument(case):
    """The ground truth is not the model itself: else every equality above would be empty."""
    space = case.risk().space
    theta = space.vector()
    with torch.no_grad():
        a, b = (case.whole(space.named_views(t)) for t in (theta, theta + normal(space.size, seed=9)))
    assert abs(float(a - b)) > 1e-3
