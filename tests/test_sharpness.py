"""sharpness on quadratics: never above the exact maximum, the mean increase that a uniform ball has."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from losslab.operators.risk import EmpiricalRisk
from losslab.probes.sharpness import sharpness
from losslab.status import Status


class Point(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(values, dtype=torch.float64))

    def forward(self, x):
        return self.weight + 0 * x


def bowl(curvatures, centre=None, point=None) -> EmpiricalRisk:
    """L(θ) = ½ Σ hᵢ(θᵢ − cᵢ)² at θ = c, or at another point."""
    h = torch.as_tensor(curvatures, dtype=torch.float64)
    c = torch.zeros_like(h) if centre is None else torch.as_tensor(centre, dtype=torch.float64)
    model = Point(c if point is None else point)
    return EmpiricalRisk(
        model, lambda output, _: 0.5 * (h * (output - c) ** 2).sum(), [(torch.zeros(1), torch.zeros(1))]
    )


def watched(risk: EmpiricalRisk) -> list[torch.Tensor]:
    points, original = [], risk.loss_at

    def loss_at(vector, *args):
        points.append(vector.clone())
        return original(vector, *args)

    risk.loss_at = loss_at
    return points


@pytest.mark.parametrize("radius", [0.01, 2.0])
def test_never_above_the_exact_maximum(radius):
    curvatures = np.array([-2.0, 0.5, 1.0, 7.0])
    for seed in range(20):
        result = sharpness(bowl(curvatures), radius=radius, relative=False, seed=seed)
        assert result.value <= 0.5 * radius**2 * 7 * (1 + 1e-6)
        assert result.increases.min() >= -0.5 * radius**2 * 2 * (1 + 1e-6)
        assert result.value == result.increases.max()
        assert result.radius == radius


def test_in_one_dimension_it_is_the_maximum():
    result = sharpness(bowl([3.0]), radius=0.5, relative=False, num_samples=1000)
    exact = 0.5 * 0.5**2 * 3
    assert 0.995 * exact < result.value <= exact * (1 + 1e-6)
    # δ is uniform on [−ε, ε], so increase/exact = U²: mean 1/3, variance 4/45.
    shares = result.increases / exact
    assert abs(shares.mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / 1000)


@pytest.mark.parametrize(("dimension", "seed"), [(2, 0), (5, 1), (50, 2)])
def test_mean_increase_of_a_uniform_ball(dimension, seed):
    """E[δδᵀ] = ε²/(P + 2)·I for δ uniform in the ball, so the mean increase is ½ε² tr H/(P + 2)."""
    curvatures = np.linspace(0.1, 4.0, dimension)
    result = sharpness(bowl(curvatures), radius=0.3, relative=False, num_samples=1000, seed=seed)
    expected = 0.5 * 0.3**2 * curvatures.sum() / (dimension + 2)
    error = result.increases.std(ddof=1) / math.sqrt(1000)
    assert abs(result.increases.mean() - expected) < 4 * error < 0.2 * expected


def test_points_fill_the_ball():
    """All inside; ‖δ‖/ε to the power P uniform; directions without a preference."""
    risk = bowl([1.0, 1.0, 1.0], point=[5.0, -3.0, 1.0])
    points = watched(risk)
    sharpness(risk, radius=0.2, relative=False, num_samples=1000)
    deltas = torch.stack(points[1:]) - torch.tensor([5.0, -3.0, 1.0])
    norms = deltas.norm(dim=1) / 0.2
    assert norms.max() <= 1 + 1e-6
    volume = norms**3
    assert abs(float(volume.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 1000)
    assert abs(float(volume.var()) - 1 / 12) < 0.01
    assert ((deltas / norms.unsqueeze(1) / 0.2).mean(dim=0).abs() < 4 * math.sqrt(1 / 3 / 1000)).all()
    assert torch.equal(points[0], risk.space.vector())


def test_relative_radius_is_in_units_of_the_weights():
    risk = bowl([1.0, 2.0], centre=[3.0, 4.0])
    relative = sharpness(risk, radius=0.1)
    absolute = sharpness(risk, radius=0.5, relative=False)
    assert relative.radius == pytest.approx(0.5, rel=1e-15)
    assert relative.relative_radius == pytest.approx(0.1, rel=1e-15)
    assert absolute.relative_radius == pytest.approx(0.1, rel=1e-15)
    np.testing.assert_allclose(relative.increases, absolute.increases, rtol=1e-12)


def test_increase_is_measured_from_the_loss_at_the_point():
    """On a slope the increase has both signs; at the top of a hill none is positive."""
    slope = sharpness(bowl([1.0, 1.0], point=[10.0, 0.0]), radius=0.1, relative=False)
    assert slope.loss == 50.0
    assert slope.increases.min() < -0.1 < 0.1 < slope.value <= 10 * 0.1 + 0.5 * 0.1**2 + 1e-9
    assert sharpness(bowl([-1.0, -1.0]), relative=False).value <= 0


def test_nonfinite_loss_nearby_is_reported():
    risk = EmpiricalRisk(Point([0.05]), lambda output, _: torch.log(output).sum(), [(torch.zeros(1), torch.zeros(1))])
    result = sharpness(risk, radius=1.0, relative=False)
    assert result.status is Status.nonfinite
    assert not math.isfinite(result.value)
    assert np.isnan(result.increases).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, "radius: expected a number > 0, got 0.0"),
        ({"radius": float("nan")}, "radius: expected a number > 0"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({}, "radius: a relative radius needs parameters that are not all zero"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        sharpness(bowl([1.0, 2.0]), **arguments)
