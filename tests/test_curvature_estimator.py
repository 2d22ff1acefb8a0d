"""CurvatureEstimator on quadratics of known curvature, from cold and from warm, and of what has none."""

import copy
import itertools
import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from cases import classes, gen, mlp, normal, split
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.optim import Curvature, CurvatureEstimator
from losslab.optim.homotopy import curvature as module
from losslab.optim.homotopy.batch_hessian import BatchHessian
from losslab.status import Status
from quadratics import Quadratic, symmetric, turned
from second_derivatives import Once
from untouched import assert_untouched

VALUES = torch.cat([torch.linspace(-3.0, 6.0, 19), torch.tensor([10.0])]).double()


def measured(model: Quadratic, estimator: CurvatureEstimator | None = None, **settings) -> Curvature:
    return (estimator or CurvatureEstimator(**settings))(model, list(model.parameters()))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_the_norm_of_a_diagonal_matrix_within_a_percent(method, sign):
    """With the residual of the vector it is of; a negative eigenvalue may be the largest."""
    model = Quadratic(sign * torch.diag(VALUES))
    found = measured(model, power_iterations=30, method=method, tol=1e-2)
    assert found.hessian_norm == pytest.approx(10, rel=0.01)
    assert found.hessian_residual < 0.01 * 10
    assert found.status is Status.converged
    assert 5 < found.products <= 30
    assert found.loss == pytest.approx(float(model().detach()))
    assert found.gradient_norm == pytest.approx(float((VALUES * model.w).norm()))
    assert found.kappa == pytest.approx(found.hessian_norm / float((VALUES * model.w).norm()) ** 2)
    assert math.isnan(found.trace)
    assert found.eigenvalues == ()
    assert found.finite


def test_the_residual_tells_how_far_it_is():
    """After ten products from a random start: ‖Hv‖, and an eigenvalue within the residual of vᵀHv."""
    H, v = turned(VALUES), torch.randn(20, generator=gen(0)).double()
    found = measured(Quadratic(H), power_iterations=1, tol=1e-6)
    assert found.products == 10  # of the first call
    assert found.status is Status.budget_reached
    for _ in range(9):
        v = H @ v
    v /= v.norm()
    quotient = float(v @ H @ v)
    assert found.hessian_norm == pytest.approx(float((H @ v).norm()), rel=1e-5)
    assert found.hessian_residual == pytest.approx(float((H @ v - quotient * v).norm()), rel=1e-4)
    assert quotient == pytest.approx(math.sqrt(found.hessian_norm**2 - found.hessian_residual**2), rel=1e-5)
    assert quotient < found.hessian_norm < 10
    assert min(abs(VALUES - quotient)) <= found.hessian_residual


def test_one_product_a_call_follows_an_eigenvector_that_turns():
    estimator, model, errors, vectors = CurvatureEstimator(), Quadratic(torch.diag(VALUES)), [], []
    for step in range(60):
        angle = torch.tensor(0.02 * step, dtype=torch.float64)
        turn = torch.eye(20, dtype=torch.float64)
        turn[18:, 18:] = torch.stack(
            [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
        )
        turn = turn[torch.arange(19, -1, -1)]
        model.H = turn @ torch.diag(VALUES) @ turn.T
        found = measured(model, estimator)
        assert found.products == (10 if step == 0 else 1)
        errors.append(abs(found.hessian_norm / 10 - 1))
        vectors.append(estimator.state_dict()["vector"])
    assert max(errors[10:]) < 0.01
    assert float(vectors[10] @ model.H @ vectors[10]) < 8  # it has turned away from where it was


def test_a_cold_start_is_for_other_parameters_too():
    estimator = CurvatureEstimator()
    measured(Quadratic(torch.diag(VALUES)), estimator)
    assert measured(Quadratic(torch.diag(VALUES[5:])), estimator).products == 10


def test_trace_is_exact_over_all_signs(monkeypatch):
    """The mean over the 2ⁿ vectors of signs is the trace, not only on average."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)))
    monkeypatch.setattr(module, "rademacher", lambda shape, generator: signs)
    H = symmetric(8)
    found = measured(Quadratic(H), num_samples=len(signs))
    assert found.trace == pytest.approx(float(H.trace()), rel=1e-10, abs=1e-10)
    off = H - torch.diag(H.diag())
    spread = math.sqrt(2 * float(off.square().sum()) / (len(signs) - 1))  # of the mean of so many, all there are
    assert found.trace_error == pytest.approx(spread, rel=1e-6)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_trace_is_within_its_standard_error(distribution):
    """Variance a sample: 2(‖H‖_F² − Σ H_ii²) for signs, 2‖H‖_F² for normal numbers (Hutchinson 1990)."""
    H, samples = symmetric(30), 400
    found = measured(Quadratic(H), num_samples=samples, distribution=distribution)
    square = float(H.square().sum()) - (float(H.diag().square().sum()) if distribution == "rademacher" else 0.0)
    predicted = math.sqrt(2 * square / samples)
    assert abs(found.trace - float(H.trace())) < 3 * predicted
    assert found.trace_error == pytest.approx(predicted, rel=0.2)
    assert found.products == 10 + samples


def test_trace_of_a_diagonal_matrix_needs_one_vector_of_signs():
    found = measured(Quadratic(torch.diag(VALUES)), num_samples=1)
    assert found.trace == pytest.approx(float(VALUES.sum()))
    assert found.products == 11


def test_further_eigenvalues():
    found = measured(Quadratic(turned(VALUES)), top_k=4, tol=1e-6)
    expected = VALUES[VALUES.abs().argsort(descending=True)][:4]
    assert found.eigenvalues == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.products > 10
    few = measured(Quadratic(torch.diag(VALUES[-2:])), top_k=5)
    assert few.eigenvalues == pytest.approx([10, 6])


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e6])
def test_kappa_of_quadratics_of_known_condition(condition):
    """At w = (1, …, 1): ‖H‖ = c, ‖∇L‖² = Σ λ²."""
    values = torch.logspace(0, math.log10(condition), 10, dtype=torch.float64)
    model = Quadratic(torch.diag(values))
    model.parts[0].data.fill_(1.0)
    found = measured(model, power_iterations=200, tol=1e-8)
    assert found.kappa == pytest.approx(condition / float(values.square().sum()), rel=1e-3)
    assert 3 * found.loss == pytest.approx(3 * float(values.sum()) / 2)


def test_kappa_where_there_is_nothing_to_divide_by():
    assert Curvature(1.0, 0.0, 2.0).kappa == math.inf
    assert Curvature(1.0, 1e-200, 2.0).kappa == math.inf  # its square is 0
    assert Curvature(1.0, 0.0, 0.0).kappa == 0.0
    assert Curvature(1.0, 1e200, 2.0).kappa == 0.0  # its square is infinite
    assert math.isnan(Curvature(1.0, math.nan, 2.0).kappa)
    model = Quadratic(torch.diag(VALUES))
    model.parts[0].data.zero_()
    found = measured(model)
    assert (found.gradient_norm, found.kappa) == (0.0, math.inf)
    assert found.finite


@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_what_is_not_finite_is_told_and_forgotten(method):
    model, estimator = Quadratic(torch.diag(VALUES)), CurvatureEstimator(method=method)
    before = measured(model, estimator)
    for H in (math.nan * torch.diag(VALUES), math.inf * torch.diag(VALUES)):
        model.H = H
        found = measured(model, estimator)
        assert not found.finite
        assert found.products == 0
        assert found.status is Status.nonfinite
        assert math.isnan(found.hessian_norm)
        assert math.isnan(found.kappa)
    weight = model.parts[0]
    weight.data.fill_(1.0)  # loss and gradient finite, Hessian not
    found = estimator(lambda: (weight - 1).abs().pow(1.5).sum() + weight.sum(), [weight])
    assert math.isfinite(found.loss + found.gradient_norm)
    assert not found.finite
    model.H = torch.diag(VALUES)
    after = measured(model, estimator)
    assert after.finite
    assert after.products == 1
    assert after.hessian_norm == pytest.approx(before.hessian_norm, rel=0.05)


def test_a_loss_that_does_not_curve():
    w = nn.Parameter(normal(5))
    for method in ("power", "lanczos"):
        estimator = CurvatureEstimator(method=method, num_samples=3, top_k=2)
        for _ in range(2):
            found = estimator(w.sum, [w])
            assert (found.hessian_norm, found.trace, found.kappa) == (0.0, 0.0, 0.0)
            assert found.finite


def test_frozen_and_empty_parameters_are_left_out():
    model = Quadratic(torch.diag(VALUES), [(5,), (0,), (15,)])
    model.parts[2].requires_grad_(False)
    found = measured(model, power_iterations=100)
    assert found.hessian_norm == pytest.approx(3, rel=1e-2)  # of the first five, −3 … −1
    assert found.gradient_norm == pytest.approx(float((VALUES[:5] * model.w[:5]).norm()))
    model.parts[0].requires_grad_(False)
    with pytest.raises(ValueError, match="parameters: expected at least one that requires a gradient, got none"):
        measured(model)


def test_missing_second_derivatives_are_told_once():
    H = turned(VALUES)
    estimator, calls = CurvatureEstimator(power_iterations=3), []
    model = Quadratic(H)

    def loss():
        calls.append(0)
        return model(Once.apply)

    with (
        assert_untouched(model),
        pytest.warns(UserWarning, match=r"curvature: no second derivatives \(trying to differentiate twice") as told,
    ):
        first, second = (estimator(loss, list(model.parameters())) for _ in range(2))
    assert len(told) == 1
    assert told[0].filename == __file__
    assert first.hessian_norm == pytest.approx(measured(model).hessian_norm, rel=1e-4)
    assert len(calls) == 2 + 2 * first.products + 1 + 2 * second.products  # the second time it does not try


def test_it_touches_nothing():
    model = Quadratic(turned(VALUES), [(4, 4), (4,)])
    with assert_untouched(model):
        CurvatureEstimator(num_samples=4, top_k=2)(lambda: model() + torch.rand(1), list(model.parameters()))


def risk() -> EmpiricalRisk:
    return EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), split([5, 7], normal(12, 4), classes(12)))


def test_a_risk_in_place_of_a_function():
    """Its own parameters, in its own order, or some of them in any order: the mean over all its examples."""
    whole = risk()
    dense = Hessian(whole).to_dense()
    with assert_untouched(whole.model):
        found = CurvatureEstimator(power_iterations=100, num_samples=200)(whole)
    assert found.loss == pytest.approx(whole.loss())
    assert found.gradient_norm == pytest.approx(float(whole.gradient().norm()))
    assert found.hessian_norm == pytest.approx(float(torch.linalg.eigvalsh(dense).abs().max()), rel=1e-2)
    named = dict(whole.model.named_parameters())
    some = [named["2.bias"], named["0.weight"]]
    part = CurvatureEstimator(power_iterations=100)(whole, some)
    block = Hessian(whole.restrict(["0.weight", "2.bias"])).to_dense()
    assert part.hessian_norm == pytest.approx(float(torch.linalg.eigvalsh(block).abs().max()), rel=1e-2)
    sizes = [p.numel() for p in some]
    assert CurvatureEstimator()(whole, some, root=lambda vs: [vs[0] * 2, vs[1] * 0]).products <= 10 < sum(sizes)
    with pytest.raises(ValueError, match="parameters: expected those of the risk's model, got others"):
        CurvatureEstimator()(whole.to(torch.float32), some)


def test_a_gradient_that_is_there_is_used():
    model = Quadratic(turned(VALUES))
    hessian = BatchHessian(model, list(model.parameters()))
    assert CurvatureEstimator().measure(hessian) == measured(model)


def test_the_same_seed_gives_the_same_numbers():
    model = Quadratic(turned(VALUES))
    first, second = (measured(model, num_samples=5, seed=4) for _ in range(2))
    assert first == second
    assert first != measured(model, num_samples=5, seed=5)
    assert measured(model, num_samples=5, distribution="gaussian", seed=4).trace != first.trace


def test_it_goes_on_from_a_saved_state(tmp_path):
    model = Quadratic(turned(VALUES))
    estimator = CurvatureEstimator(num_samples=3, top_k=2)
    fresh = CurvatureEstimator(num_samples=3, top_k=2, seed=9)
    fresh.load_state_dict(estimator.state_dict())  # before the first call
    assert measured(model, fresh) == measured(model, estimator)
    torch.save(estimator.state_dict(), tmp_path / "state.pt")
    others = [copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator)), fresh]
    expected = [measured(model, estimator) for _ in range(3)]
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for other in others:
        assert [measured(model, other) for _ in range(3)] == expected


def test_random_vectors_are_those_of_the_generator():
    """Signs for the trace are drawn after the first vector, from one seed: as many as were asked for."""
    model, draw = Quadratic(turned(VALUES)), gen(6)
    found = measured(model, num_samples=7, seed=6)
    torch.randn(20, generator=draw)
    signs = torch.randint(0, 2, (7, 20), generator=draw, dtype=torch.int8).double() * 2 - 1
    samples = torch.einsum("si,ij,sj->s", signs, model.H, signs).numpy()
    assert found.trace == pytest.approx(samples.mean())
    assert found.trace_error == pytest.approx(samples.std(ddof=1) / np.sqrt(7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power_iterations": 0}, "power_iterations: expected an int of at least 1, got 0"),
        ({"power_iterations": 2.0}, "power_iterations: expected an int of at least 1, got 2.0"),
        ({"num_samples": -1}, "num_samples: expected an int of at least 0, got -1"),
        ({"top_k": True}, "top_k: expected an int of at least 0, got True"),
        ({"distribution": "normal"}, "distribution: expected one of rademacher, gaussian, got 'normal'"),
        ({"method": "lanzcos"}, "method: expected one of power, lanczos, got 'lanzcos'; did you mean 'lanczos'?"),
        ({"tol": 0}, "tol: expected a number above 0 and at most 1, got 0"),
        ({"tol": "1"}, "tol: expected a number above 0 and at most 1, got '1'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CurvatureEstimator(**settings)


def test_parameters_that_cannot_be_measured_are_named():
    here, there = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="parameters: expected all on one device, got cpu, meta"):
        CurvatureEstimator()(here.sum, [here, there])
    complex_one = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"parameters: expected real tensors, got torch.complex64"):
        CurvatureEstimator()(lambda: complex_one.abs().sum(), [complex_one])
