"""Projection: least squares against a plain solver, exact residuals; planes through solutions and along paths."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from cases import classes, mlp, normal, paired, seeded
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.plane import line, plane
from losslab.probes.planes import plane_axes
from losslab.probes.planes.projection import principal, project, spanned
from losslab.status import Status
from second_derivatives import Once


class Parabola(nn.Module):
    """½ Σ hᵢ θᵢ² with h = 1 … 6."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * (x * self.weight.reshape(-1) ** 2).sum(dim=1)


H = torch.arange(1.0, 7.0, dtype=torch.float64)


def parabola() -> EmpiricalRisk:
    batch = (H.repeat(2, 1), torch.zeros(2))
    return EmpiricalRisk(Parabola(), lambda output, target: output.mean(), [batch])


def height(point: torch.Tensor) -> float:
    return float(0.5 * (H * point**2).sum())


@pytest.mark.parametrize("angle", [1.0, 1e-3])
def test_least_squares_where_directions_are_neither_unit_nor_orthogonal(angle):
    d1 = normal(20, seed=1) * 3
    directions = [d1, 0.2 * d1 + angle * normal(20, seed=2)]
    origin, points = normal(20, seed=3), [normal(20, seed=s) for s in range(4, 8)]
    found = project(points, origin, directions)
    matrix = torch.stack(directions, dim=1).numpy()
    for i, point in enumerate(points):
        offset = (point - origin).numpy()
        expected, *_ = np.linalg.lstsq(matrix, offset, rcond=None)
        np.testing.assert_allclose([found.alphas[i], found.betas[i]], expected, rtol=1e-8)
        assert found.residuals[i] == pytest.approx(np.linalg.norm(offset - matrix @ expected), rel=1e-10)
        # What others draw: dot products with unit directions.
        assert abs(found.alphas[i] - offset @ matrix[:, 0] / np.linalg.norm(matrix[:, 0])) > 1e-2


def test_points_on_the_plane_are_found_where_they_are():
    directions = [normal(9, seed=1), normal(9, seed=2)]
    points = [2.0 * directions[0] - 3.0 * directions[1], directions[1]]
    found = project(points, torch.zeros(9, dtype=torch.float64), directions)
    np.testing.assert_allclose(found.alphas, [2, 0], atol=1e-12)
    np.testing.assert_allclose(found.betas, [-3, 1], atol=1e-12)
    np.testing.assert_allclose(found.residuals, [0, 0], atol=1e-12)
    np.testing.assert_array_equal(project(points, points[0], directions[:1]).betas, [0, 0])


def test_plane_through_three_solutions():
    a, b, c = (normal(6, seed=s) for s in (1, 2, 3))
    result = plane(parabola(), through=(a, b, c), resolution=7)
    first, second = spanned([a, b, c], "through")
    assert float(first.norm()) == pytest.approx(1, abs=1e-14)
    assert abs(float(first @ second)) < 1e-14
    for j, beta in enumerate(result.betas):
        for i, alpha in enumerate(result.alphas):
            assert result.losses[j, i] == pytest.approx(height(a + alpha * first + beta * second), rel=1e-12)
    np.testing.assert_allclose(result.points.residuals, 0, atol=1e-12)
    places = list(zip(result.points.alphas, result.points.betas, strict=True))
    np.testing.assert_allclose(places[0], 0, atol=1e-14)
    np.testing.assert_allclose(places[1], [float((b - a).norm()), 0], atol=1e-12)
    for (alpha, beta), solution in zip(places, (a, b, c), strict=True):
        torch.testing.assert_close(a + alpha * first + beta * second, solution)
        assert result.alphas[0] < alpha < result.alphas[-1]
        assert result.betas[0] < beta < result.betas[-1]
    assert result.loss == pytest.approx(height(a), rel=1e-12)
    assert (result.normalization, result.status) == ("solutions", Status.complete)
    assert 0.0 in result.alphas
    assert 0.0 in result.betas
    np.testing.assert_allclose(np.ptp(result.alphas), np.ptp(result.betas))


def test_line_through_two_solutions_as_modules_state_dicts_and_vectors():
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()
    other = mlp().double()
    with torch.no_grad():
        other[0].weight += 1
    results = [line(risk, through=(risk.model, form), resolution=5) for form in
               (other, other.state_dict(), risk.space.vector_of(other))]  # fmt: skip
    for result in results:
        np.testing.assert_array_equal(result.losses, results[0].losses)
        np.testing.assert_allclose(result.points.alphas, [0, 20**0.5])
    assert results[0].loss == pytest.approx(risk.loss(), rel=1e-12)
    step = (risk.space.vector_of(other) - risk.space.vector()) / 20**0.5
    for alpha, loss in zip(results[0].alphas, results[0].losses, strict=True):
        assert loss == pytest.approx(risk.loss_at(risk.space.vector() + float(alpha) * step), rel=1e-12)


def test_principal_components_of_a_path():
    """A spiral in a plane of its own, and a small step out of it at the end."""
    plane_of = torch.linalg.qr(normal(6, 3, seed=5))[0]
    t = torch.linspace(0, 3, 12, dtype=torch.float64)
    flat = torch.stack([3 * t, torch.sin(2 * t), 0.05 * (t > 2.9)], dim=1)
    path = flat @ plane_of.T
    result = plane(parabola(), directions="pca", trajectory=path, resolution=5)
    scatter = np.linalg.svd((flat - flat.mean(0)).numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(result.values, scatter[:2] / scatter.sum(), rtol=1e-10)
    (first, second), _ = principal(list(path), 2, "trajectory")
    assert abs(float(first @ second)) < 1e-14
    assert result.points.alphas[-1] > result.points.alphas[0]
    assert result.points.residuals.max() > 1e-3
    low, high = result.points.alphas.min(), result.points.alphas.max()
    assert result.alphas[0] < low
    assert high < result.alphas[-1]
    for i, point in enumerate(path):  # the plane goes through the risk's own point, here 0
        place = result.points.alphas[i] * first + result.points.betas[i] * second
        assert result.points.residuals[i] == pytest.approx(float((point - place).norm()), abs=1e-12)
    assert (result.loss, 0.0 in result.alphas, 0.0 in result.betas) == (0.0, True, True)


def test_a_path_on_other_directions():
    risk = parabola()
    e = torch.eye(6, dtype=torch.float64)
    path = [3 * e[0] + 4 * e[1], 2 * e[5]]
    result = plane(risk, directions=(2 * e[0], e[5]), trajectory=path, resolution=3)
    np.testing.assert_allclose(result.points.alphas, [1.5, 0], atol=1e-14)
    np.testing.assert_allclose(result.points.betas, [0, 2], atol=1e-14)
    np.testing.assert_allclose(result.points.residuals, [4, 0], atol=1e-14)
    np.testing.assert_array_equal(result.alphas, [-1, 0, 1])


A, B = torch.ones(6), torch.arange(6.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"through": (A, B)}, "through: expected at least 3 points, got 2"),
        ({"through": (A, B, A, B)}, "through: expected 3 solutions, got 4"),
        ({"through": (A, B, A + 2 * (B - A))}, "through: expected three points that are not on one line"),
        ({"through": (A, A, B)}, "through: expected three points"),
        ({"through": (A, B, torch.ones(5))}, r"through\[2\]: expected a tensor of shape \(6,\)"),
        ({"through": (A, B, A * float("nan"))}, r"through\[2\]: expected finite numbers"),
        ({"through": (A, B, B), "directions": "layer"}, "through: expected no other directions"),
        ({"trajectory": (A, B), "directions": "pca"}, "trajectory: expected a path that spans 2 directions"),
    ],
)  # fmt: skip
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        plane(parabola(), **arguments)


def test_eigenvectors():
    result = plane(parabola(), directions="eigenvectors", distance=0.5, resolution=5)
    np.testing.assert_allclose(result.values, [6, 5], rtol=1e-10)
    expected = 0.5 * (6 * result.alphas[None, :] ** 2 + 5 * result.betas[:, None] ** 2)
    np.testing.assert_allclose(result.losses, expected, atol=1e-10)
    np.testing.assert_allclose(result.lengths, [1, 1])
    assert result.normalization == "eigenvectors"
    top = line(parabola(), direction="eigenvectors", resolution=3)
    assert top.value == pytest.approx(6)
    np.testing.assert_allclose(top.losses, [3, 0, 3], atol=1e-10)


def test_eigenvectors_that_have_not_converged_are_not_complete(monkeypatch):
    monkeypatch.setattr(plane_axes, "eigenpairs", functools.partial(plane_axes.eigenpairs, max_matvecs=3))
    assert plane(parabola(), directions="eigenvectors", resolution=3).status is Status.budget_reached


def test_eigenvectors_without_second_derivatives():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return Once.apply(self.layer(x))

    risk = EmpiricalRisk(seeded(Doubled), nn.CrossEntropyLoss(), [(normal(9, 4), classes(9))])
    with pytest.warns(UserWarning, match="FiniteDifferenceHessian"):
        found = plane(risk, directions="eigenvectors", resolution=3)
    assert found.status is Status.complete
    assert found.values[0] > 0


def test_points_survive_the_record():
    result = plane(parabola(), through=(A, B, B**2), resolution=3)
    again = type(result).from_record(*result.to_record())
    for name in ("alphas", "betas", "residuals"):
        np.testing.assert_array_equal(getattr(again.points, name), getattr(result.points, name))
    assert (again.values, again.stride, again.normalization) == (None, 1, "solutions")
