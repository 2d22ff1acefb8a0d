"""DAD: the curvature in other units, and what does not depend on them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cases import classes, normal, seeded
from losslab.operators.dense import DenseOperator
from losslab.operators.finite_difference import FiniteDifferenceHessian
from losslab.operators.hessian import Hessian
from losslab.operators.rescaled import Rescaled
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import Split
from losslab.solvers.lanczos import eigenpairs
from losslab.solvers.trace import trace
from matrices import rotated

A = rotated(np.linspace(-1.0, 3.0, 12))


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))).double()


def risk_of(model: nn.Module) -> EmpiricalRisk:
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), [(normal(20, 4), classes(20))])


@pytest.mark.parametrize("scale", [normal(12), torch.ones(12), torch.cat([torch.zeros(5), torch.ones(7)])])
def test_equals_dense(scale):
    expected = torch.diag(scale.double()) @ A.matrix @ torch.diag(scale.double())
    operator = Rescaled(A, scale)
    assert_close(operator.to_dense(), expected)
    assert_close(operator @ normal(12), expected @ normal(12))


def test_relative_curvature_does_not_see_the_units_of_a_layer():
    """ReLU(aW₁x)·W₂/a is the same function: H changes, |θ|H|θ| does not, up to signs (adaptive sharpness)."""
    model, scaled = net(), net()
    with torch.no_grad():
        scaled[0].weight.mul_(10.0), scaled[0].bias.mul_(10.0), scaled[2].weight.div_(10.0)
    risks = [risk_of(model), risk_of(scaled)]
    plain = [eigenpairs(Hessian(r), 3, tol=1e-9).values for r in risks]
    relative = [eigenpairs(Rescaled(Hessian(r), r.space.vector().abs()), 3, tol=1e-9).values for r in risks]
    np.testing.assert_allclose(relative[0], relative[1], rtol=1e-7)
    assert abs(plain[1][0] / plain[0][0]) > 2


def test_preconditioned_eigenvalues_are_those_of_the_product():
    preconditioner = normal(12, seed=3).abs() + 0.1
    operator = Rescaled(A, preconditioner.rsqrt())
    expected = torch.linalg.eigvals(A.matrix / preconditioner.unsqueeze(1)).real.max()
    found = eigenpairs(operator, 1, which="largest", tol=1e-10)
    assert abs(found.values[0] - float(expected)) < 1e-9


def test_trace():
    scale = normal(12)
    assert abs(trace(Rescaled(A, scale)).value - float(scale.square() @ A.matrix.diagonal())) < 1e-9


def test_precision_split_dtype_are_those_of_the_operator():
    operator = FiniteDifferenceHessian(risk_of(net()))
    rescaled = Rescaled(operator, torch.ones(operator.size, dtype=torch.float32))
    assert rescaled.precision == operator.precision > torch.finfo(torch.float64).eps
    assert rescaled.split is operator.split
    assert (rescaled @ torch.ones(operator.size)).dtype == torch.float64
    assert isinstance(Rescaled(A, torch.ones(12)).split, Split)


def test_a_parameter_may_be_the_scale_and_is_not_followed():
    scale = nn.Parameter(torch.ones(12, dtype=torch.float64))
    operator = Rescaled(A, scale)
    before = operator.to_dense()
    with torch.no_grad():
        scale.mul_(2.0)
    assert not operator.to_dense().requires_grad
    assert_close(operator.to_dense(), before)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(11), r"scale: expected a real tensor of shape \(12,\), got \(11,\)"),
        (torch.ones(12, 1), r"got \(12, 1\)"),
        (torch.ones(12, dtype=torch.complex64), r"got \(12,\), torch.complex64"),
        (2.0, "got float"),
        (torch.full((12,), torch.inf), "scale: expected finite numbers"),
        (torch.zeros(12).rsqrt(), "keep a preconditioner away from zero"),
    ],
)
def test_a_wrong_scale_is_refused(scale, message):
    with pytest.raises(ValueError, match=message):
        Rescaled(A, scale)


def test_nested():
    twice = Rescaled(Rescaled(A, normal(12)), normal(12, seed=2))
    assert_close(twice.to_dense(), Rescaled(A, normal(12) * normal(12, seed=2)).to_dense())
    shifted = 2 * twice + DenseOperator(torch.eye(12, dtype=torch.float64))
    assert_close(shifted.to_dense(), 2 * twice.to_dense() + torch.eye(12, dtype=torch.float64))
