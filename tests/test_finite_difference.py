"""Products by differences of gradients: as exact as they say, for vectors of any length and modules of any kind."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cases import CASES, classes, mlp, normal, seeded, split
from losslab.operators.finite_difference import FiniteDifferenceHessian, hessian_of
from losslab.operators.gradient_graph import GradientGraph
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.spectrum import SpectrumOptions, spectrum_of
from losslab.random import make_generator, rademacher
from losslab.solvers.lanczos import eigenpairs

X, Y = normal(60, 16), classes(60, num=5)


def network(width: int, activation: type[nn.Module] = nn.Tanh, steps: int = 0) -> nn.Module:
    """16 inputs, 5 classes; after some steps of Adam the loss bends within a hundredth of ‖θ‖."""

    def build() -> nn.Module:
        first, second, last = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 5)
        return nn.Sequential(first, activation(), second, activation(), last)

    model = seeded(build)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X.float()), Y).backward()
        optimizer.step()
    return model


def risk_of(model: nn.Module) -> EmpiricalRisk:
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), split([40, 20], X.float(), Y))


def signs(size: int, seed: int) -> Tensor:
    return rademacher((size,), make_generator(seed))


def errors(operator: FiniteDifferenceHessian, exact: Hessian, vectors: list[Tensor]) -> list[float]:
    """‖(Ĥ − H)v‖/‖v‖ of each, the exact product in float64."""
    return [float(((operator @ v).double() - exact @ v.double()).norm() / v.double().norm()) for v in vectors]


# -- accuracy


@pytest.mark.parametrize("steps", [0, 60])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 1e-8), (torch.float32, 3e-3)])
def test_within_the_stated_error(dtype, least, steps):
    exact = Hessian(risk_of(network(20, steps=steps)).to(torch.float64))
    operator = FiniteDifferenceHessian(risk_of(network(20, steps=steps)).to(dtype))
    top = eigenpairs(exact, 3, tol=1e-6)
    vectors = [*top.vectors.mT, normal(exact.size), signs(exact.size, 1), torch.eye(exact.size)[7]]
    found = errors(operator, exact, [v.to(dtype) for v in vectors])
    assert operator.precision < least
    assert max(found) <= 1.5 * operator.precision * top.values[0]  # 1.5: these are not the vector it was measured on


@pytest.mark.parametrize("width", [24, 130, 300])  # 1,133 to 96,605 parameters
def test_long_vectors_are_no_worse_in_float32(width):
    """A step along v itself, not v/‖v‖, is √n times too long for a vector of signs: 1e-2 at n = 276,000 in a peer."""
    risk = risk_of(network(width))
    operator, exact = FiniteDifferenceHessian(risk), Hessian(risk.to(torch.float64))
    v = signs(exact.size, 3)
    product = exact @ v.double()
    (error,) = errors(operator, exact, [v])
    assert error * float(v.norm()) < 1e-3 * float(product.norm())
    assert error <= operator.precision * eigenpairs(exact, 1, tol=1e-2).values[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_homogeneous(dtype):
    operator = FiniteDifferenceHessian(risk_of(network(6)).to(dtype))
    v = normal(operator.size).to(dtype)
    product = operator @ v
    for factor in (1e-6, 1e6):
        again = (operator @ (factor * v)) / factor
        assert float((again - product).norm()) < 1e-3 * float(product.norm())


def test_no_step_is_too_long_where_the_loss_is_quadratic():
    model = seeded(lambda: nn.Linear(16, 5, bias=False))
    risk = EmpiricalRisk(model, nn.MSELoss(), [(X.float(), normal(60, 5).float())])
    operator = FiniteDifferenceHessian(risk)
    (error,) = errors(operator, Hessian(risk.to(torch.float64)), [signs(risk.space.size, 1)])
    assert error < 1e-4
    assert operator.step > 1e-3  # near eps^(1/3)(1 + ‖θ‖) = 0.01


def test_a_jump_of_the_gradient_nearby():
    """A kink 10⁻⁶ from θ counts in every difference of float32, whose precision says so, and in none of float64."""
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(1e-6)
    x = torch.cat([torch.tensor([[1.0, -1.0]]), 3 + normal(3, 2).float()])
    single = EmpiricalRisk(model, nn.MSELoss(), [(x, torch.ones(4, 1))])
    double = single.to(torch.float64)
    assert FiniteDifferenceHessian(single).precision > 0.1
    operator = FiniteDifferenceHessian(double)
    assert operator.precision < 1e-6
    assert max(errors(operator, Hessian(double), list(torch.eye(3)))) < 1e-6


# -- solvers


def test_eigenpairs_and_spectrum_agree_in_double():
    risk = risk_of(network(8, steps=20)).to(torch.float64)
    operator, exact = FiniteDifferenceHessian(risk), Hessian(risk)
    found, expected = (eigenpairs(a, 4, which="both_ends", tol=1e-7) for a in (operator, exact))
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-7, atol=1e-8)
    options = SpectrumOptions(num_probes=2)
    ours, theirs = (spectrum_of(a, 3, risk.num_examples, options, 0, None)[0] for a in (operator, exact))
    np.testing.assert_allclose(ours.top, theirs.top, rtol=1e-6)
    np.testing.assert_allclose(ours.smallest, theirs.smallest, rtol=1e-4)
    # The exact Hessian gives each batch signs of its own.
    scatter = np.hypot(ours.trace.standard_error, theirs.trace.standard_error)
    assert abs(ours.trace.value - theirs.trace.value) < 4 * scatter


def test_error_bounds_of_eigenvalues_hold_in_float32():
    operator = FiniteDifferenceHessian(risk_of(network(20, steps=60)))
    truth = eigenpairs(Hessian(risk_of(network(20, steps=60)).to(torch.float64)), 5, which="largest", tol=1e-8)
    found = eigenpairs(operator, 5, which="largest", tol=1e-5)
    assert (np.abs(found.values - truth.values) <= found.errors).all()
    assert (found.errors >= 0.5 * operator.precision * truth.values[0]).all()


# -- modules without second derivatives


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Once(nn.Module):
    def forward(self, x):
        return _Sine.apply(x)


class Twice(nn.Module):
    def forward(self, x):
        return torch.sin(x)


class Prototypes(nn.Module):
    """torch's own cdist: the graph of its gradient can be built, but not differentiated."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(normal(9, 16, seed=4).float())

    def forward(self, x):
        return torch.cdist(x, self.centres, p=1.0)


def test_a_module_without_second_derivatives_equals_its_differentiable_twin():
    broken, twin = (risk_of(network(6, kind)).to(torch.float64) for kind in (Once, Twice))
    with pytest.raises(RuntimeError, match="second derivatives: module '1' has none"):
        Hessian(broken) @ torch.ones(broken.space.size)
    expected = Hessian(twin).to_dense()
    operator = FiniteDifferenceHessian(broken)
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("build", "culprit"),
    [
        (lambda: network(6, Once), "1"),
        (lambda: seeded(lambda: nn.Sequential(nn.Linear(16, 16), Prototypes(), nn.Linear(9, 5))), "1"),
    ],
)
def test_the_choice_falls_back_with_a_warning(build, culprit):
    pattern = rf"module '{culprit}' has none .* FiniteDifferenceHessian: .* errors up to .e-..·‖H‖"
    with pytest.warns(UserWarning, match=pattern):
        operator = hessian_of(risk_of(build()))
    assert isinstance(operator, FiniteDifferenceHessian)


def test_the_choice_is_exact_where_it_can_be():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = hessian_of(risk_of(network(6)))
    assert isinstance(operator, Hessian)


def test_the_choice_lets_other_errors_through(monkeypatch):
    def failing(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(GradientGraph, "add_products", failing)
    with pytest.raises(RuntimeError, match="something else"):
        hessian_of(risk_of(network(6)))


# -- cost and edges


def test_cost(monkeypatch):
    calls = []
    gradient_at = EmpiricalRisk.gradient_at
    monkeypatch.setattr(EmpiricalRisk, "gradient_at", lambda *args: calls.append(1) or gradient_at(*args))
    operator = FiniteDifferenceHessian(risk_of(network(6)))
    assert len(calls) <= 30
    calls.clear()
    operator @ normal(operator.size, 3)
    assert len(calls) == 6


def test_zero_and_nonfinite_vectors():
    operator = FiniteDifferenceHessian(CASES["ragged MSE"]().risk())
    matrix = normal(operator.size, 4)
    expected = operator.matmat(matrix)
    matrix[:, 0], matrix[3, 1], matrix[5, 2] = 0.0, torch.nan, torch.inf
    product = operator.matmat(matrix)
    assert not product[:, 0].any()
    assert product[:, 1].isnan().any()
    assert product[:, 2].isnan().any()
    torch.testing.assert_close(product[:, 3], expected[:, 3])
    assert operator.matmat(matrix[:, :0]).shape == (operator.size, 0)


def test_no_curvature_at_all():
    risk = EmpiricalRisk(seeded(lambda: nn.Linear(16, 1)), lambda output, target: output.mean(), [(X.float(), Y)])
    operator = FiniteDifferenceHessian(risk)
    assert not (operator @ torch.ones(17)).any()


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"params: expected float32 or float64 .* got torch.bfloat16; use risk.to"):
        FiniteDifferenceHessian(risk_of(mlp(16, 5)).to(torch.bfloat16))


def test_the_seed_decides_and_repr_says_how_good_it_is():
    first, again = (FiniteDifferenceHessian(risk_of(network(6)), seed=3) for _ in range(2))
    assert (first.step, first.error) == (again.step, again.error)
    assert repr(first).startswith(f"FiniteDifferenceHessian({first.size}×{first.size}, torch.float32, cpu, ε = ")
    assert f"precision {first.precision:.0e})" in repr(first)
