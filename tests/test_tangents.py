"""Tangents, nudged gradients, spacing and insertion: each against its formula, written out."""

import itertools

import numpy as np
import pytest
import torch

from cases import normal
from losslab.probes.paths.path_profile import PathProfile, inserted, insertions, profile_of
from losslab.probes.paths.tangents import lengths, nudged, redistributed, tangents

CORNER = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, 1.0]], dtype=torch.float64)  # long step right, short step up


@pytest.mark.parametrize(
    ("losses", "forward", "backward"),
    [
        ([0.0, 1.0, 3.0], 1, 0),
        ([3.0, 1.0, 0.0], 0, 1),
        ([0.0, 5.0, 1.0], 5, 4),  # a maximum: the larger change goes with the higher neighbour
        ([1.0, 5.0, 0.0], 4, 5),
        ([5.0, 0.0, 1.0], 1, 5),  # a minimum
        ([2.0, 2.0, 2.0], 1, 1),
        ([0.0, 7.0, 0.0], 1, 1),
        ([0.0, 0.0, 2.0], 1, 0),
        ([1e-300, 3e-300, 2e-300], 2, 1),
    ],
)
def test_improved_tangent(losses, forward, backward):
    """Differences are mixed before they are normalised: unit vectors would weigh a near neighbour like a far one."""
    expected = forward * np.array([0.0, 1.0]) + backward * np.array([4.0, 0.0])
    found = tangents(CORNER, torch.tensor(losses, dtype=torch.float64))
    np.testing.assert_allclose(found, [expected / np.linalg.norm(expected)], rtol=1e-15)


def test_all_tangents_at_once_are_the_single_ones(load):
    tangent_at = load("band_reference").tangent_at
    path, losses = normal(12, 5), normal(12, seed=3)
    losses[4] = losses[5] = losses[6]
    expected = [tangent_at(i, list(path), tuple(losses.tolist())) for i in range(1, 11)]
    torch.testing.assert_close(tangents(path, losses), torch.stack(expected), rtol=1e-14, atol=1e-14)


def test_a_pivot_on_its_neighbours_has_no_tangent():
    path = torch.ones(3, 2)
    assert tangents(path, torch.tensor([0.0, 1.0, 0.0])).tolist() == [[0.0, 0.0]]
    assert redistributed(path, np.ones(2)).tolist() == path.tolist()


def test_nothing_is_left_along_the_path_and_all_across():
    path, losses, gradients = normal(7, 4), normal(7, seed=1), normal(5, 4, seed=2)
    unit, found = tangents(path, losses), nudged(path, losses, gradients)
    torch.testing.assert_close((found * unit).sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-14, rtol=0)
    removed = gradients - found
    torch.testing.assert_close(removed, (removed * unit).sum(1, keepdim=True) * unit)


def test_springs_pull_along_the_path_towards_their_lengths():
    path, losses, gradients = normal(6, 4), normal(6, seed=1), normal(4, 4, seed=2)
    targets = np.array([1.0, 2.0, 1.0, 3.0, 1.0])
    unit, gaps = tangents(path, losses), lengths(path).numpy()
    wanted = targets / targets.sum() * gaps.sum()
    pull = nudged(path, losses, gradients, spring=0.7, targets=targets) - nudged(path, losses, gradients)
    expected = 0.7 * ((gaps[:-1] - wanted[:-1]) - (gaps[1:] - wanted[1:]))
    np.testing.assert_allclose((pull * unit).sum(1), expected, rtol=1e-12)


def test_a_climbing_pivot_is_mirrored_and_has_no_spring():
    path, losses, gradients = normal(6, 4), normal(6, seed=1), normal(4, 4, seed=2)
    unit = tangents(path, losses)
    found = nudged(path, losses, gradients, spring=0.7, climbing=3)
    along = (gradients[2] @ unit[2]).item()
    torch.testing.assert_close(found[2], gradients[2] - 2 * along * unit[2])
    others = nudged(path, losses, gradients, spring=0.7)
    assert torch.equal(found[[0, 1, 3]], others[[0, 1, 3]])


@pytest.mark.parametrize("fixed", [[], [2], [1, 4]])
def test_redistribution_along_the_polyline(fixed):
    """Distances are right along the old polyline, stretch by stretch; what is fixed stays to the bit."""
    path, targets = normal(7, 3), np.array([1.0, 2.0, 1.0, 4.0, 1.0, 1.0])
    found = redistributed(path, targets, fixed)
    stays = [0, *fixed, 6]
    assert torch.equal(found[stays], path[stays])
    along = arc_positions(path, found)
    corners = np.concatenate([[0], np.cumsum(lengths(path).numpy())])
    for first, last in itertools.pairwise(stays):
        shares = np.diff(along[first : last + 1]) / (corners[last] - corners[first])
        np.testing.assert_allclose(shares, targets[first:last] / targets[first:last].sum(), rtol=1e-9)


def arc_positions(path: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """Where on the polyline each point lies; it must lie on it."""
    gaps, found = lengths(path).numpy(), []
    for point in points:
        for i, gap in enumerate(gaps):
            t = float((point - path[i]) @ (path[i + 1] - path[i])) / gap**2
            on_it = (path[i] + t * (path[i + 1] - path[i]) - point).norm() < 1e-12
            if on_it and -1e-12 <= t <= 1 + 1e-12:
                found.append(gaps[:i].sum() + t * gap)
                break
    assert len(found) == len(points)
    return np.array(found)


def test_even_redistribution_is_the_readable_one(load):
    path = normal(9, 4)
    spread = load("band_reference").spread
    torch.testing.assert_close(redistributed(path, np.ones(8)), torch.stack(spread(list(path))))


class Hat:
    """A tent of height 1 over [x − w, x + w] on the line, in a valley of slope `tilt`."""

    def __init__(self, x: float, width: float, tilt: float = 0.0):
        self.x, self.width, self.tilt = x, width, tilt

    def losses(self, points):
        return (1 - (points[:, 0] - self.x).abs() / self.width).clamp(min=0) + self.tilt * points[:, 0]


def line(n: int) -> torch.Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)[:, None]


def test_profile_is_the_path_in_order():
    profile = profile_of(Hat(0.6, 0.3), CORNER[:, :1] / 4, 3)
    np.testing.assert_allclose(profile.positions, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(profile.losses[:5], [0, 0, 2 / 3, 0.5, 0], atol=1e-15)
    assert profile.losses[profile.pivots].tolist() == [0, 0, 0]
    assert profile.saddle == pytest.approx(2 / 3)
    assert profile.mean == pytest.approx(np.trapezoid(profile.losses, profile.positions))


@pytest.mark.parametrize("x", [0.21, 0.475, 0.98])
def test_a_pivot_goes_where_the_path_deviates_most(x):
    """Also in the last gap, where a published implementation leaves a spike."""
    profile = profile_of(Hat(x, 0.02), line(5), 9)
    ((gap, fraction),) = insertions(profile, 0.1, 2)
    assert (gap + fraction) / 4 == pytest.approx(x, abs=0.0125)
    path, targets = inserted(line(5), np.ones(4), [(gap, fraction)])
    assert (lengths(path) > 0).all()
    np.testing.assert_allclose(targets / targets.sum(), lengths(path).numpy(), rtol=1e-12)


def test_no_pivot_where_the_loss_is_straight_below_or_little_above():
    for potential in (Hat(5.0, 1.0, tilt=3.0), Hat(0.6, 0.04, tilt=20.0)):
        assert insertions(profile_of(potential, line(5), 9), 0.1, 2) == []
    assert len(insertions(profile_of(Hat(0.6, 0.04, tilt=5.0), line(5), 9), 0.1, 2)) == 1


def test_the_gaps_of_largest_excess_win_and_come_in_order():
    class Peaks:
        def losses(self, points):
            heights = [(0.125, 0.5), (0.375, 0.2), (0.625, 0.9), (0.875, 0.7)]
            return sum(h * (1 - (points[:, 0] - x).abs() / 0.05).clamp(min=0) for x, h in heights)

    profile = profile_of(Peaks(), line(5), 9)
    assert [gap for gap, _ in insertions(profile, 0.1, 2)] == [2, 3]
    assert [gap for gap, _ in insertions(profile, 0.1, 9)] == [0, 1, 2, 3]
    assert insertions(profile, 0.1, 0) == []
    path, targets = inserted(line(5), np.ones(4), insertions(profile, 0.1, 2))
    np.testing.assert_allclose(path[:, 0], [0, 0.25, 0.5, 0.625, 0.75, 0.875, 1])
    np.testing.assert_allclose(targets, [1, 1, 0.5, 0.5, 0.5, 0.5])


def test_a_gap_with_nan_gets_no_pivot():
    losses = np.zeros(9)
    losses[1] = np.nan
    assert insertions(PathProfile(np.arange(9.0), losses, 3), 0.1, 2) == []
