"""What every operator must satisfy. A new operator is one row of OPERATORS."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import Bernoulli, Categorical, Normal
from torch.func import functional_call

from cases import CASES, Case, normal
from losslab.operators.block_diagonal import BlockDiagonal
from losslab.operators.finite_difference import FiniteDifferenceHessian
from losslab.operators.fisher import Fisher
from losslab.operators.gauss_newton import GaussNewton
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.rescaled import Rescaled
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


def dense_gauss_newton(case: Case, risk: EmpiricalRisk) -> Tensor:
    """Explicit Jacobians and loss Hessians, one example at a time."""
    terms = []
    for example in [example for batch in case.batches for example in _examples(batch)]:
        j = jacobian(lambda vector, e=example: _logits(case, risk, vector, e), risk.space.vector())
        j = j.flatten(0, -2)

        def loss(outputs, e=example):
            return case.loss_fn(*(({"logits": outputs}, e) if isinstance(e, dict) else (outputs, _targets(e))))

        h = hessian(loss, _logits(case, risk, risk.space.vector(), example)).reshape(len(j), len(j))
        terms.append(j.mT @ h @ j)
    return torch.stack(terms).mean(0)


def dense_sampled_fisher(case: Case, risk: EmpiricalRisk) -> Tensor:
    """Gradients of torch's own log p at the labels that were drawn: one row a label, each divided by an example's."""
    terms = []
    for batch, drawn in zip(case.batches, Fisher(risk)._labels.drawn.values(), strict=True):
        for example, label in zip(_examples(batch), drawn.split(1), strict=True):

            def log_p(vector, e=example, y=label):
                f = _logits(case, risk, vector, e)
                if isinstance(case.loss_fn, nn.CrossEntropyLoss):
                    return Categorical(logits=f).log_prob(y[:, 0])
                if isinstance(case.loss_fn, nn.BCEWithLogitsLoss):
                    return Bernoulli(logits=f).log_prob(y).flatten()
                return Normal(f, 0.5**0.5).log_prob(f.detach() + y.sqrt()).flatten()  # drawn: squared distances

            rows = jacobian(log_p, risk.space.vector())
            terms.append(rows.mT @ rows / len(rows))
    return torch.stack(terms).mean(0)


def _logits(case: Case, risk: EmpiricalRisk, vector: Tensor, example) -> Tensor:
    parameters = risk.space.named_views(vector)
    if isinstance(example, dict):
        return functional_call(case.model, parameters, (example["features"],))["logits"]
    return functional_call(case.model, parameters, example[:-1] if isinstance(example, tuple) else (example,))


def _targets(example):
    return example[-1] if isinstance(example, tuple) else example


def _examples(batch):
    if isinstance(batch, tuple):
        return [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[0]))]
    if isinstance(batch, dict):
        return [{k: t[i : i + 1] for k, t in batch.items()} for i in range(len(batch["labels"]))]
    return [type(batch)(batch.x[i : i + 1], batch.y[i : i + 1]) for i in range(len(batch.x))]


def dense_blocks(dense):
    """Within each module's parameters the same, zero elsewhere."""

    def masked(case: Case, risk: EmpiricalRisk) -> Tensor:
        owners = [name.rpartition(".")[0] for name in risk.space.names]
        labels = torch.tensor([sorted(set(owners)).index(owner) for owner in owners])
        labels = labels.repeat_interleave(torch.tensor(risk.space.sizes))
        return dense(case, risk) * (labels.unsqueeze(1) == labels)

    return masked


def scale_of(risk: EmpiricalRisk) -> Tensor:
    return risk.space.vector().abs()


def dense_rescaled(case: Case, risk: EmpiricalRisk) -> Tensor:
    return dense_hessian(case, risk) * scale_of(risk).outer(scale_of(risk))


OPERATORS = {
    "Hessian": (Hessian, dense_hessian),
    "GradientCovariance": (GradientCovariance, dense_covariance),
    "GradientCovariance, uncentred": (lambda risk: GradientCovariance(risk, centred=False), dense_fisher),
    "GradientCovariance, explicit": (lambda risk: GradientCovariance(risk, method="explicit"), dense_covariance),
    "GradientCovariance, implicit": (lambda risk: GradientCovariance(risk, method="implicit"), dense_covariance),
    "GaussNewton": (GaussNewton, dense_gauss_newton),
    "Fisher": (Fisher, dense_sampled_fisher),
    "FiniteDifferenceHessian": (FiniteDifferenceHessian, dense_hessian),
    "BlockDiagonal": (BlockDiagonal, dense_blocks(dense_hessian)),
    "BlockDiagonal of GradientCovariance": (
        lambda risk: BlockDiagonal(risk, GradientCovariance),
        dense_blocks(dense_covariance),
    ),
    "Rescaled": (lambda risk: Rescaled(Hessian(risk), scale_of(risk)), dense_rescaled),
}

# (operator, case) that it refuses: why. The operator's own tests hold the message.
REFUSED = {
    ("GaussNewton", "model with .loss"): "nothing says where the model ends and the loss begins",
    **{
        ("Fisher", name): "a loss of the user's own does not say how labels are distributed"
        for name in ("sequence outputs", "dict batches", "model with .loss", "dataclass batches")
    },
}

# Relative and absolute, where products are not exact to rounding; all others: EXACT.
EXACT = {"rtol": 1e-8, "atol": 1e-11}
TOLERANCES = {"FiniteDifferenceHessian": {"rtol": 1e-7, "atol": 1e-9}}


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return CASES[request.param]()


@pytest.fixture(params=OPERATORS, ids=str)
def row(request):
    reason = REFUSED.get((request.param, request.node.callspec.params.get("case")))
    if reason:
        pytest.skip(reason)
    return OPERATORS[request.param]


@pytest.fixture
def tolerance(request) -> dict[str, float]:
    return TOLERANCES.get(request.node.callspec.params["row"], EXACT)


@cache
def truth(case: str, row: str) -> Tensor:
    """The matrix of the reference; to be changed by nobody."""
    made = CASES[case]()
    return OPERATORS[row][1](made, made.risk())


@pytest.fixture
def expected(request) -> Tensor:
    params = request.node.callspec.params
    return truth(params["case"], params["row"])


def test_equals_dense(case, row, expected, tolerance):
    torch.testing.assert_close(row[0](case.risk()).to_dense(), expected, **tolerance)


@pytest.mark.parametrize("graph_memory", ["auto", 0, 3000])
def test_products_of_graphs_kept_rebuilt_or_both(case, row, expected, tolerance, graph_memory):
    operator = row[0](case.risk(graph_memory=graph_memory))
    for vectors in (normal(operator.size, 3, seed=5), normal(operator.size, seed=6)):  # the first pass builds graphs
        torch.testing.assert_close(operator @ vectors, expected @ vectors, **tolerance)


def test_linear_and_symmetric(case, row):
    operator = row[0](case.risk())
    u, v = normal(operator.size, seed=5), normal(operator.size, seed=6)
    torch.testing.assert_close(operator @ (2 * u - 3 * v), 2 * (operator @ u) - 3 * (operator @ v))
    torch.testing.assert_close(u @ (operator @ v), v @ (operator @ u))


def test_algebra_and_scipy(case, row):
    operator = row[0](case.risk())
    matrix = normal(operator.size, 3, seed=8)
    products = operator @ matrix
    torch.testing.assert_close((2 * operator + operator) @ matrix, 3 * products)
    from_scipy = operator.to_scipy() @ matrix.numpy()
    torch.testing.assert_close(torch.from_numpy(from_scipy), products)
    assert operator.shape == (operator.size, operator.size)


def test_touches_nothing(case, row):
    with assert_untouched(case.model):
        operator = row[0](case.risk())
        operator @ normal(operator.size)


def test_stays_at_its_point(case, row):
    risk = case.risk(graph_memory=0)
    operator, theta = row[0](risk), risk.space.vector()
    vectors = normal(operator.size, 2, seed=8)
    before = operator @ vectors
    with risk.at(theta + 0.3):
        torch.testing.assert_close(operator @ vectors, before)


def test_reference_depends_on_its_argument(case):
    """The ground truth is not the model itself: else every equality above would be empty."""
    space = case.risk().space
    theta = space.vector()
    with torch.no_grad():
        a, b = (case.whole(space.named_views(t)) for t in (theta, theta + normal(space.size, seed=9)))
    assert abs(float(a - b)) > 1e-3
