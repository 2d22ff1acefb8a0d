"""Products under autocast: their error is measured, stated, and part of every error bound."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cases import classes, normal, seeded, split
from losslab.operators.dense import DenseOperator
from losslab.operators.hessian import Hessian
from losslab.operators.product_error import product_error
from losslab.operators.risk import EmpiricalRisk
from losslab.random import make_generator
from losslab.solvers.lanczos import eigenpairs
from matrices import diagonal, rotated
from untouched import assert_untouched

HALF = [torch.bfloat16, torch.float16]


def trained(build, steps: int = 40, num: int = 60) -> EmpiricalRisk:
    model = seeded(build)
    x, y = normal(num, 8).float(), classes(num)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), split([num - num // 3, num // 3], x, y))


def dense_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))


def conv_net() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 2), nn.GELU(), nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(nn.Unflatten(1, (1, 2, 4)), *layers)


@pytest.mark.parametrize("build", [dense_net, conv_net])
@pytest.mark.parametrize("dtype", HALF)
def test_the_stated_error_is_that_of_a_direct_comparison(build, dtype):
    risk = trained(build)
    operator, exact = Hessian(risk, autocast=dtype), Hessian(risk).to_dense()
    wrong = operator.to_dense() - exact
    norm, error = (float(torch.linalg.matrix_norm(m.double(), 2)) for m in (exact, wrong))
    assert 0.6 * norm <= operator.error.norm <= 1.001 * norm
    assert 0.4 * error <= operator.error.error <= 1.3 * error  # products in half precision are not quite linear
    assert operator.error.relative == operator.error.error / operator.error.norm
    assert operator.precision == 2 * operator.error.relative
    assert 1e-5 < operator.precision < 0.1
    assert operator.error == product_error(operator, Hessian(risk))


@pytest.mark.parametrize("build", [dense_net, conv_net])
@pytest.mark.parametrize("dtype", HALF)
def test_eigenvalues_are_within_their_error_bounds(build, dtype):
    risk = trained(build)
    truth = np.linalg.eigvalsh(Hessian(risk.to(torch.float64)).to_dense().numpy())[::-1]
    found = eigenpairs(Hessian(risk, autocast=dtype), 4, which="largest")
    wrong = np.abs(found.values - truth[:4])
    assert found.status.ok
    assert (wrong <= found.errors).all()
    assert (wrong > 1e-5 * truth[0]).any()  # autocast was at work
    assert (found.errors < 0.1 * truth[0]).all()


def test_float16_keeps_its_digits_with_many_examples_and_short_vectors():
    """Without scaling, each example's 1/N and a vector's small entries fall below 6·10⁻⁵, where digits end."""
    risk = trained(dense_net, num=100_000)
    v = 1e-3 * normal(risk.space.size).float()
    expected = Hessian(risk) @ v
    product = Hessian(risk, autocast=torch.float16) @ v
    assert float((product - expected).norm()) < 2e-3 * float(expected.norm())


def test_vectors_of_any_length_in_float16():
    operator = Hessian(trained(dense_net), autocast=torch.float16)
    v = normal(operator.size).float()
    for factor in (2.0**-40, 2.0**40):
        torch.testing.assert_close((operator @ (factor * v)) / factor, operator @ v)
    matrix = torch.stack([0 * v, v, v], dim=1)
    matrix[3, 2] = torch.nan
    product = operator.matmat(matrix)
    assert not product[:, 0].any()
    torch.testing.assert_close(product[:, 1], operator @ v)
    assert product[:, 2].isnan().any()


def test_kept_graphs_are_smaller():
    x, y = normal(500, 8).float(), classes(500)
    risk = EmpiricalRisk(seeded(dense_net), nn.CrossEntropyLoss(), [(x, y)])
    half, full = Hessian(risk, autocast=torch.bfloat16), Hessian(risk)
    for operator in (half, full):
        operator @ torch.ones(operator.size)
    assert half.num_kept == full.num_kept == 1
    assert half.kept_bytes < 0.8 * full.kept_bytes


def test_touches_nothing():
    risk = trained(dense_net)
    with assert_untouched(risk.model):
        Hessian(risk, autocast=torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")


def test_float64_and_other_types_are_refused():
    risk = trained(dense_net, steps=0)
    with pytest.raises(ValueError, match=r"autocast: expected float32 parameters, got torch.float64.* use risk.to"):
        Hessian(risk.to(torch.float64), autocast=torch.bfloat16)
    for dtype in (torch.float32, torch.int8, "bfloat16", True):
        with pytest.raises(ValueError, match=r"autocast: expected torch.bfloat16, torch.float16 or None, got"):
            Hessian(risk, autocast=dtype)


def test_repr_tells_type_and_error():
    operator = Hessian(trained(dense_net), autocast=torch.bfloat16)
    assert repr(operator).endswith(f"cpu, autocast to torch.bfloat16, error {operator.error})")
    assert str(operator.error).startswith(f"{operator.error.relative:.1e} (")
    assert Hessian(trained(dense_net)).error is None


def test_overflow_is_refused():
    """Inputs of 10⁴ are finite in float16; their products are not."""
    x, y = 1e4 * normal(9, 5).float(), normal(9, 1).float()
    risk = EmpiricalRisk(torch.nn.Linear(5, 1), torch.nn.MSELoss(), [(x, y)])
    with pytest.raises(ValueError, match=r"autocast: expected finite products.*float16.*use torch\.bfloat16"):
        Hessian(risk, autocast=torch.float16)
    assert Hessian(risk, autocast=torch.bfloat16).error.relative < 0.1


# -- product_error on matrices


def test_products_that_are_not_finite_are_infinitely_wrong():
    broken = diagonal([math.nan, 1.0, 1.0])
    assert product_error(broken, diagonal([1.0, 1.0, 1.0])).relative == math.inf


def test_error_of_a_known_perturbation():
    """Both norms from below, in the directions where they are largest: not the mean over directions, 1/√n of it."""
    a, e = rotated([10.0, 3.0] + [0.01] * 98), rotated([0.5] + [0.001] * 99, seed=4)
    found = product_error(DenseOperator(a.matrix + e.matrix), a, seed=2)
    assert 0.9 * 0.5 < found.error < 0.5 + 1e-9
    assert 9.5 < found.norm < 10.0 + 1e-9


def test_no_error_and_nothing_to_compare():
    a, zero = diagonal([2.0, 1.0, 0.0]), diagonal([0.0, 0.0, 0.0])
    assert product_error(a, a).relative == 0.0
    assert product_error(zero, zero).relative == 0.0
    assert product_error(a, zero).relative == 1.0
    assert product_error(zero, a).relative == 1.0


def test_seed_and_generator():
    a, b = rotated(np.linspace(-1.0, 2.0, 50)), rotated(np.linspace(-1.0, 2.1, 50))
    assert product_error(a, b, seed=3) == product_error(a, b, seed=make_generator(3)) != product_error(a, b, seed=4)
