"""The band in potentials whose saddles and paths are known; interrupted and resumed; stopped; NaN."""

import math

import numpy as np
import pytest
import torch

import potentials
from losslab.probes.paths import band as module
from losslab.probes.paths.path_profile import PathProfile
from losslab.probes.paths.tangents import lengths, nudged
from losslab.status import Status, StopRequested
from potentials import MINIMUM_A, MINIMUM_B, MINIMUM_C, SADDLE_1, SADDLE_2, curvy_valley, muller_brown, relaxation

CLIMBING = [[250, 1e-4], [300, 1e-4, 0, True]]


@pytest.mark.parametrize("spring", [None, 100.0], ids=["redistributed", "springs"])
@pytest.mark.parametrize(
    ("start", "end", "saddle"),
    [(MINIMUM_A, MINIMUM_B, SADDLE_1), (MINIMUM_A, MINIMUM_C, SADDLE_1), (MINIMUM_C, MINIMUM_B, SADDLE_2)],
    ids=["A-B", "A-C", "C-B"],
)
def test_muller_brown_saddles_with_a_climbing_image(start, end, saddle, spring):
    """Nine pivots, both ends among them."""
    band = relaxation(muller_brown, start, end, 9, CLIMBING, spring=spring)
    assert band.run() is Status.complete
    path = band.state.path
    losses, gradients = potentials.Analytic(muller_brown).slope(path)
    assert losses.max().item() == pytest.approx(saddle, abs=1e-4)
    assert gradients[losses[1:-1].argmax()].norm() < 0.05
    assert torch.equal(path[[0, -1]], torch.tensor([start, end], dtype=torch.float64))


def test_without_climbing_the_highest_pivot_misses_the_saddle():
    """What the climbing image is for; the dense maximum is near it, on chords of the path that lie above the valley."""
    band = relaxation(muller_brown, MINIMUM_A, MINIMUM_B, 9, [[350, 2e-4]])
    band.run()
    assert muller_brown(band.state.path).max().item() == pytest.approx(-40.851, abs=0.02)
    assert band.best()[1].saddle == pytest.approx(-40.625, abs=0.01)
    assert band.state.saddles[0] == pytest.approx(12.62, abs=0.01)
    assert band.state.best_cycle == 1


def test_springs_and_redistribution_agree():
    """Both find pivots that are at rest across the path, evenly spaced: the same ones."""
    found = []
    for spring in (None, 100.0):
        band = relaxation(muller_brown, MINIMUM_A, MINIMUM_B, 15, [[400, 2e-4]], spring=spring)
        band.run()
        path = band.state.path
        losses, gradients = potentials.Analytic(muller_brown).slope(path)
        assert nudged(path, losses, gradients).norm(dim=1).max() < 0.5 < 0.01 * gradients.norm(dim=1).max()
        np.testing.assert_allclose(lengths(path) / lengths(path).mean(), np.ones(14), rtol=0.02)
        found.append(path)
    assert (found[0] - found[1]).norm(dim=1).max() < 0.01


def test_curvy_valley():
    """Barrier 1; the path is the valley's floor y = sin x, up to what its tilt and the chords add."""
    start, end = (-potentials.VALLEY_END[0], -1.0), potentials.VALLEY_END
    band = relaxation(curvy_valley, start, end, 21, [[250, 0.03], [100, 0.03, 0, True]])
    assert band.run() is Status.complete
    x, y = band.state.path.unbind(1)
    assert curvy_valley(band.state.path).max().item() == pytest.approx(1.0, abs=1e-6)
    assert band.best()[1].saddle == pytest.approx(1.0, abs=1e-3)
    assert band.state.saddles[0] == pytest.approx(2.97667, abs=1e-3)
    assert (y - x.sin()).abs().max() < 0.06


def test_autoneb_inserts_where_the_path_deviates():
    """From three inner pivots; more of them come only while a gap has something hidden in it."""
    start, end = (-potentials.VALLEY_END[0], -1.0), potentials.VALLEY_END
    band = relaxation(curvy_valley, start, end, 5, [[100, 0.03], *[[100, 0.03, 2]] * 5])
    band.run()
    saddles = band.state.saddles
    assert len(saddles) == 7
    assert saddles[1] > 2  # three pivots cannot follow five quarters of a wave
    assert band.best()[1].saddle == pytest.approx(1.0, abs=0.05)
    assert 7 < len(band.state.path) < 5 + 2 * 5
    shares = lengths(band.state.path) / lengths(band.state.path).sum()
    np.testing.assert_allclose(shares, band.state.targets / band.state.targets.sum(), rtol=0.1)


def test_no_spike_stays_in_the_last_gap():
    """Two minima and a narrow hill just before the second: pivots at even distances never see it."""
    start, end = (0.0, 0.0), (1.0, 0.0)
    plain = relaxation(potentials.detour, start, end, 5, [[300, 0.003]])
    plain.run()
    assert plain.best()[1].saddle > 0.9
    band = relaxation(potentials.detour, start, end, 5, [[100, 0.003], *[[200, 0.003, 2]] * 4])
    band.run()
    profile = band.best()[1]
    assert profile.saddle < 0.1
    last = profile.losses[-profile.subdivisions - 2 :]
    assert last.max() - last[[0, -1]].max() < 0.05


@pytest.mark.parametrize("options", [{}, {"spring": 50.0}, {"weight_decay": 3.0}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("climb", [False, True], ids=["plain", "climbing"])
def test_agrees_with_the_readable_one(load, options, climb):
    band = relaxation(muller_brown, MINIMUM_A, MINIMUM_B, 7, [[25, 2e-4, 0, climb]], **options)
    path = list(band.state.path.clone())
    band.run()

    def evaluate(step, point):
        leaf = point.clone().requires_grad_()
        loss = muller_brown(leaf[None])[0]
        return loss.item(), torch.autograd.grad(loss, leaf)[0]

    expected = load("band_reference").relax_one_by_one(evaluate, path, steps=25, lr=2e-4, climb=climb, **options)
    torch.testing.assert_close(band.state.path, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert (band.state.path - torch.stack(path)).norm() > 0.1


SCHEDULE = [[4, 2e-4], [3, 2e-4, 2], [3, 2e-4, 1, True]]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopRequested])
@pytest.mark.parametrize("after", [1, 3, 6, 7, 9, 10, 13])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, after, stop):
    """The calls after which it stops: the straight line, inside a cycle, after one with its insertion, near the end."""
    whole = relaxation(muller_brown, MINIMUM_A, MINIMUM_B, 5, SCHEDULE)
    whole.run()
    file, calls = tmp_path / "band.npz", []

    def interrupt(done, total, note):
        calls.append((done, total))
        if len(calls) == after:
            raise stop

    arguments = (muller_brown, MINIMUM_A, MINIMUM_B, 5, SCHEDULE)
    first = relaxation(*arguments, resume=file, progress=interrupt)
    if stop is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            first.run()
    else:
        assert first.run() is Status.stopped
        assert first.best()[1].saddle <= first.state.saddles[0]
    second = relaxation(*arguments, resume=file, progress=lambda *call: calls.append(call[:2]))
    assert second.run() is Status.complete
    assert calls == [(i, 14) for i in range(1, 15)]
    expected, found = whole.state.to_arrays(), second.state.to_arrays()
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].tobytes() == found[name].tobytes(), name
    assert not file.exists()


def test_interrupted_while_it_moves_keeps_the_last_whole_state(tmp_path, monkeypatch):
    """Between the optimizer's step and the redistribution the pivots are of no use."""
    file = tmp_path / "band.npz"
    first = relaxation(muller_brown, MINIMUM_A, MINIMUM_B, 5, SCHEDULE, resume=file)
    monkeypatch.setattr("losslab.probes.paths.band.redistributed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert not file.exists()


def test_a_file_of_another_band_is_ignored(tmp_path):
    file = tmp_path / "band.npz"
    band = relaxation(muller_brown, MINIMUM_A, MINIMUM_B, 5, SCHEDULE, resume=file)
    band.file.key = "another"
    band.file.save(band.state.to_arrays())
    assert relaxation(muller_brown, MINIMUM_A, MINIMUM_B, 5, SCHEDULE, resume=file).file.load() == {}


def test_nan_ends_the_relaxation_before_it_reaches_the_pivots():
    def cliff(points):
        return torch.where(points[:, 1] < -0.05, math.nan, (points[:, 0] ** 2 - 1) ** 2 + points[:, 1])

    band = relaxation(cliff, (-1.0, 0.0), (1.0, 0.0), 5, [[50, 0.01]])
    assert band.run() is Status.nonfinite
    assert torch.isfinite(band.state.path).all()
    assert 0 < band.state.step < 50
    profile = band.best()[1]
    assert band.state.best_cycle == 0
    assert profile.saddle == 1.0
    assert math.isnan(band.state.saddles[-1])


def test_from_a_point_to_itself():
    band = relaxation(muller_brown, MINIMUM_A, MINIMUM_A, 4, [[3, 1e-4, 1, True]])
    assert band.run() is Status.complete
    assert band.best()[1].mean == pytest.approx(-146.69951721)


def test_any_path_is_better_than_one_with_nan():
    def profile(*losses: float):
        path = torch.arange(float(len(losses)), dtype=torch.float64)[:, None]
        return PathProfile.of(path, np.array(losses), 0)

    nan, hill, flat = profile(0, math.nan, 0), profile(0, 5, 0), profile(0, 1, 0)
    better = [(hill, nan), (flat, hill)]
    assert all(module._is_better(*pair) for pair in better)
    assert not any(module._is_better(*pair[::-1]) for pair in better)
    assert not module._is_better(nan, nan)
