"""The norm that gradients are clipped to shrinks as curvature grows."""

import math

import pytest
import torch
from torch import nn

from losslab.optim import CurvatureAwareGradientClipper


def gradients(*rows):
    parameters = [nn.Parameter(torch.zeros(len(row), dtype=torch.float64)) for row in rows]
    for parameter, row in zip(parameters, rows, strict=True):
        parameter.grad = torch.tensor(row, dtype=torch.float64)
    return parameters


def total(parameters):
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))


@pytest.mark.parametrize(
    ("kappa", "norm"),
    [  # c₀ = 2, κ* = 100, at least 0.05
        (0.0, 2.0),
        (1e-9, 2.0),
        (50.0, 4 / 3),
        (100.0, 1.0),
        (300.0, 0.5),
        (1e4, 0.05),
        (math.inf, 0.05),
        (math.nan, 2.0),
    ],
)
def test_the_norm_is_that_of_a_table_made_by_hand(kappa, norm):
    clipper = CurvatureAwareGradientClipper(2.0, target_curvature=100.0, min_norm=0.05)
    parameters = gradients([3.0, 0.0], [0.0, 4.0])
    assert clipper.clip(parameters, kappa) == pytest.approx(norm, rel=1e-10)
    assert total(parameters) == pytest.approx(norm, rel=1e-6)
    assert float(parameters[0].grad[0] / parameters[1].grad[1]) == pytest.approx(0.75)  # the direction stays


def test_defaults_are_the_founders():
    clipper = CurvatureAwareGradientClipper()
    assert (clipper.norm(0.0), clipper.norm(1e4), clipper.norm(math.inf)) == (1.0, 0.5, 0.01)


def test_without_curvature_it_is_torch_to_the_bit_and_short_gradients_stay():
    clipper = CurvatureAwareGradientClipper(1.0)
    mine, torchs = gradients([0.3, -0.9], [5.0]), gradients([0.3, -0.9], [5.0])
    clipper.clip(mine, 0.0)
    nn.utils.clip_grad_norm_(torchs, 1.0)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, torchs, strict=True))
    short = gradients([0.3, -0.9])
    assert clipper.clip(short, 0.0) == 1.0
    assert short[0].grad.tolist() == [0.3, -0.9]
    assert clipper.clip(short, 1e4) == 0.5
    assert total(short) == pytest.approx(0.5, rel=1e-5)


def test_zero_and_missing_gradients_and_a_single_tensor():
    clipper = CurvatureAwareGradientClipper()
    parameters = [*gradients([0.0, 0.0]), nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty(0))]
    assert clipper.clip(iter(parameters), math.inf) == 0.01
    assert parameters[0].grad.tolist() == [0.0, 0.0]
    assert parameters[1].grad is None
    (one,) = gradients([3.0, 4.0])
    clipper.clip(one, 0.0)
    assert float(one.grad.norm()) == pytest.approx(1.0, rel=1e-5)
    assert clipper.clip([], 0.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_norm": 0}, r"^base_norm: expected a finite number above 0, got 0$"),
        ({"base_norm": math.inf}, r"^base_norm: expected a finite number above 0, got inf$"),
        ({"target_curvature": 0.0}, r"^target_curvature: expected a number above 0, got 0\.0$"),
        ({"min_norm": 2.0}, r"^min_norm: expected a number of at least 0 and at most 1, got 2\.0$"),
        ({"min_norm": True}, r"^min_norm: expected a number of at least 0 and at most 1, got True$"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(settings, message):
    with pytest.raises(ValueError, match=message):
        CurvatureAwareGradientClipper(**settings)


def test_a_negative_curvature_is_refused_and_nothing_is_clipped():
    parameters = gradients([3.0, 4.0])
    with pytest.raises(ValueError, match=r"^kappa: expected a number of at least 0, got -1\.0$"):
        CurvatureAwareGradientClipper().clip(parameters, -1.0)
    assert parameters[0].grad.tolist() == [3.0, 4.0]
