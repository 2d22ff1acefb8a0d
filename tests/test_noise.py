"""gradient_noise against the explicit covariance of the examples' gradients, and against closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from cases import classes, mlp, normal, paired, seeded
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.noise import gradient_noise
from losslab.status import Status


def explicit(case) -> tuple[float, float]:
    """λ_max of C and of H as matrices, one backward pass an example."""
    risk = case.risk()
    rows = []
    for x, y in case.batches:
        for i in range(len(x)):
            rows.append(EmpiricalRisk(case.model, case.loss_fn, [(x[i : i + 1], y[i : i + 1])]).gradient())
    covariance = torch.cov(torch.stack(rows).mT, correction=0)
    hessian = case.reference_hessian(risk)
    return tuple(float(torch.linalg.eigvalsh(m)[-1]) for m in (covariance, hessian))


@pytest.mark.parametrize("sizes", [[3, 4], [7], [1] * 7])
def test_against_explicit_matrices(sizes):
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), sizes)
    top_c, top_h = explicit(case)
    result = gradient_noise(case.risk(), tol=1e-4)
    assert abs(result.covariance_top - top_c) <= result.covariance_error <= 2e-4 * top_c
    assert abs(result.hessian_top - top_h) <= result.hessian_error <= 2e-4 * top_h
    assert result.ratio == pytest.approx(top_c / top_h, rel=1e-3)
    assert result.ratio == result.covariance_top / result.hessian_top
    assert (result.num_examples, result.status) == (7, Status.converged)


def test_linear_regression_in_closed_form():
    """gᵢ = 2rᵢxᵢ with residuals rᵢ, H = (2/N)XᵀX."""
    x, y = normal(12, 3), normal(12, 1, seed=2)
    case = paired(seeded(lambda: nn.Linear(3, 1, bias=False)), nn.MSELoss(), x, y, [5, 7])
    residual = (functional_call(case.model, {}, (x,)) - y).detach()
    covariance = torch.cov((2 * residual * x).mT, correction=0)
    result = gradient_noise(case.risk())
    assert result.covariance_top == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-1]), rel=1e-12)
    assert result.hessian_top == pytest.approx(float(torch.linalg.eigvalsh(2 / 12 * x.mT @ x)[-1]), rel=1e-12)
    assert result.matvecs == 6  # two Krylov spaces of dimension 3: both exact


def test_no_noise_where_every_example_is_fitted():
    x = normal(6, 2)
    model = seeded(lambda: nn.Linear(2, 1, bias=False))
    case = paired(model, nn.MSELoss(), x, model.double()(x).detach(), [6])
    result = gradient_noise(case.risk())
    assert result.covariance_top == pytest.approx(0, abs=1e-20)
    assert result.ratio == pytest.approx(0, abs=1e-20)
    assert result.status.ok


def test_same_gradient_for_every_example_is_no_noise():
    """The covariance is centred: a common gradient is signal."""
    x, y = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    case = paired(seeded(lambda: nn.Linear(2, 1, bias=False)), nn.MSELoss(), x, y, [2, 2])
    assert float(case.risk().gradient().norm()) > 0.1
    result = gradient_noise(case.risk())
    assert result.covariance_top == pytest.approx(0, abs=1e-14)


def test_flat_loss_has_no_ratio():
    model = seeded(lambda: nn.Linear(2, 1, bias=False))
    case = paired(model, lambda output, target: output.mean(), normal(5, 2), normal(5, 1), [5])
    result = gradient_noise(case.risk())
    assert (result.hessian_top, result.ratio) == (0.0, math.inf)
    assert result.covariance_top > 0


def test_nonfinite_second_derivative_is_reported():
    """|w|^1.5 has the gradient 0 at 0, and no second derivative."""

    class Cusp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return x * (self.w.abs() ** 1.5).sum()

    risk = EmpiricalRisk(Cusp(), lambda output, _: output.mean(), [(torch.ones(2, 1).double(), torch.zeros(2))])
    result = gradient_noise(risk)
    assert result.status is Status.nonfinite
    assert math.isnan(result.ratio)
    assert math.isinf(result.hessian_error)


def test_loss_that_mixes_examples_is_refused():
    case = paired(mlp(), lambda output, target: output.std() + output.mean(), normal(6, 4), normal(6, 3), [6])
    with pytest.raises(ValueError, match="mean of its examples' losses"):
        gradient_noise(case.risk())


def test_never_makes_the_matrix(monkeypatch):
    """Through products only: as many as it says."""
    count, original = 0, GradientCovariance._matmat

    def counted(self, matrix):
        nonlocal count
        count += matrix.shape[1]
        return original(self, matrix)

    monkeypatch.setattr(GradientCovariance, "_matmat", counted)
    result = gradient_noise(paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk())
    assert 0 < count < result.matvecs < 43
