"""The grid: coarse to fine, stopped with what is known, shared among processes, and its picture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import report_folders as folders
from cases import classes, mlp, normal, paired
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.plane import PlaneResult, line, plane
from losslab.probes.planes.grid import Grid
from losslab.probes.planes.projection import Projection
from losslab.ranks import ALONE, Ranks
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.chart import Contour, Points
from losslab.report.charts.plane import planes, slices
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from losslab.studies.config import load_config
from losslab.studies.probing import find_probe, measure, risk_of, shares_points
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.shipped import find_config
from losslab.studies.train import train
from processes import run_ranks


def mlp_risk(batches=slice(None), **kwargs) -> EmpiricalRisk:
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4])
    return EmpiricalRisk(case.model, case.loss_fn, case.batches[batches], **kwargs)


def numbered(resolution: int, **kwargs) -> tuple[Grid, list[tuple[float, float]]]:
    """A grid of 10·row + column offsets, and the order in which its points were asked."""
    asked: list[tuple[float, float]] = []

    def loss(alpha: float, beta: float) -> float:
        asked.append((beta, alpha))
        return 10 * beta + alpha

    axis = np.arange(resolution) - resolution // 2.0
    return Grid(loss, axis, axis, **kwargs), asked


def test_coarse_to_fine_and_row_by_row():
    grid, asked = numbered(11)
    assert grid.evaluate() is Status.complete
    coarse = [(j, i) for j in (-4, 0, 4) for i in (-4, 0, 4)]
    even = [(j, i) for j in range(-4, 5, 2) for i in range(-4, 5, 2) if (j, i) not in coarse]
    rest = [(j, i) for j in range(-5, 6) for i in range(-5, 6) if j % 2 or i % 2]
    assert asked == coarse + even + rest
    offsets = np.arange(11) - 5
    np.testing.assert_array_equal(grid.losses, 10 * offsets[:, None] + offsets[None, :])
    assert grid.stride == 1


@pytest.mark.parametrize(("calls", "stride"), [(1, 8), (8, 8), (9, 4), (24, 4), (25, 2), (120, 2)])
def test_stopped_with_what_is_known(calls, stride):
    def stop(done, total, note):
        assert total == 121
        if done == calls:
            raise StopRequested

    grid, asked = numbered(11, progress=stop)
    assert grid.evaluate() is Status.stopped
    assert (len(asked), int(np.isfinite(grid.losses).sum()), grid.stride) == (calls, calls, stride)


def test_a_stop_after_the_last_point_is_none():
    def stop(done, total, note):
        if done == total:
            raise StopRequested

    assert numbered(3, progress=stop)[0].evaluate() is Status.complete


@pytest.mark.parametrize("measure", [plane, line])
def test_stopped_and_resumed_equals_uninterrupted(measure, tmp_path):
    whole, file = measure(mlp_risk(), resolution=5), tmp_path / "points.npz"

    def stop(done, total, note):
        if done == 4:
            raise StopRequested

    part = measure(mlp_risk(), resolution=5, resume=file, progress=stop)
    assert part.status is Status.stopped
    known = np.isfinite(part.losses)
    assert known.sum() == 4
    assert (part.losses[known] == whole.losses[known]).all()
    assert file.is_file()
    resumed = measure(mlp_risk(), resolution=5, resume=file)
    assert resumed.losses.tobytes() == whole.losses.tobytes()
    assert not file.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        changes = ["model.name=mlp", "model.width=4", "training.epochs=1", "training.snapshots.every=4", f"seed={seed}"]
        train(load_config(find_config("sgd"), changes), RunFolder.create(path / name))
    return path


def probed(run: Path, name: str, ranks: Ranks = ALONE, **settings):
    loaded = load_run(run)
    risk = risk_of(loaded, max_examples=40)
    return measure(find_probe(name), loaded, settings={"resolution": 3} | settings, risk=risk, ranks=ranks)


def shared(ranks: Ranks, run: Path) -> dict:
    points = 0
    probed(run, "plane", ranks)

    def count(done, total, note):
        nonlocal points
        points += 1
        assert done <= total

    mine = mlp_risk(slice(ranks.rank, None, 2), ranks=ranks) if ranks.count == 2 else mlp_risk()
    split = plane(mlp_risk(), resolution=5, ranks=ranks, progress=count)
    sharded = plane(mine, resolution=3)

    def stop(done, total, note):
        if done == 3 and ranks.rank == 1:  # the key reaches one of the processes
            raise StopRequested

    stopped = plane(mine, resolution=3, progress=stop)
    alone = plane(mlp_risk(), resolution=5, ranks=ranks, progress=stop)
    return {"points": points, "split": split, "sharded": sharded, "stopped": stopped, "split, stopped": alone}


def test_processes_share_the_points_or_the_data(trained, tmp_path):
    first, second = run_ranks(shared, 2, tmp_path, trained / "a")
    record = PlaneResult.from_record(*RunFolder(trained / "a").read_record("plane"))
    assert record.losses.tobytes() == probed(trained / "a", "plane").losses.tobytes()
    whole = plane(mlp_risk(), resolution=5)
    assert (first["points"], second["points"]) == (13, 12)
    for found in (first, second):
        assert found["split"].losses.tobytes() == whole.losses.tobytes()
        assert found["split"].status is Status.complete
        np.testing.assert_allclose(found["sharded"].losses, plane(mlp_risk(), resolution=3).losses, rtol=1e-12)
        assert found["sharded"].losses.tobytes() == first["sharded"].losses.tobytes()
        assert found["stopped"].status is Status.stopped  # both, at the same point
        assert np.isfinite(found["stopped"].losses).sum() == 3
        assert found["split, stopped"].status is Status.stopped
        assert np.isfinite(found["split, stopped"].losses).sum() == 13 + 3


# -- pictures ---------------------------------------------------------------------------------------------


def drawn(tmp_path, result):
    name = "plane" if hasattr(result, "betas") else "line"
    folders.start_run(tmp_path / "run").write_probe(name, "1", *result.to_record())
    found = (planes if name == "plane" else slices)(read(tmp_path / "run"), {"run": "#0072B2"})
    for chart in found:
        assert chart.caption.endswith(".")
        assert ". " not in chart.caption
        matplotlib_backend.figure(chart)
        assert len(plotly_backend.figure(chart).data) > 0
    return found


def test_a_stopped_plane_is_drawn_at_its_stride(tmp_path):
    def stop(done, total, note):
        if done == 30:
            raise StopRequested

    result = plane(mlp_risk(), resolution=9, progress=stop)
    assert result.stride == 2
    _, chart = drawn(tmp_path, result)
    (contour,) = chart.panels[0].series
    np.testing.assert_array_equal(contour.x, result.alphas[::2])
    np.testing.assert_array_equal(contour.z, result.losses[::2, ::2])
    assert np.isfinite(contour.z).all()
    assert "stopped when one row and column in 2 was known" in chart.caption


def test_a_path_is_drawn_with_its_distance_as_colour(tmp_path):
    risk = mlp_risk()
    path = [risk.space.vector() + 0.3 * (3 - t) * normal(43, seed=t) for t in range(4)]
    result = plane(risk, directions="pca", trajectory=path, resolution=5)
    _, chart = drawn(tmp_path, result)
    contour, points = chart.panels[0].series
    assert isinstance(contour, Contour)
    np.testing.assert_array_equal(points.x, result.points.alphas)
    np.testing.assert_array_equal(points.y, result.points.betas)
    np.testing.assert_array_equal(points.values, result.points.residuals)
    assert f"{result.points.residuals.max():.3g} away from it" in chart.caption
    assert f"{result.values[0]:.0%} of the path" in chart.panels[0].x_label
    (scatter,) = [trace for trace in plotly_backend.figure(chart).data if trace.name == "path"]
    np.testing.assert_array_equal(scatter.marker.color, result.points.residuals)


def test_points_outside_of_the_picture_are_left_out(tmp_path):
    result = plane(mlp_risk(), resolution=3)
    points = Projection(np.array([0.0, 5.0]), np.array([0.5, 0.0]), np.array([1.0, 2.0]))
    _, chart = drawn(tmp_path, dataclasses.replace(result, points=points))
    assert chart.panels[0].series[1].x.tolist() == [0.0]
    assert "1 of 2 outside of the picture" in chart.caption


def test_solutions_are_marked(tmp_path):
    risk = mlp_risk()
    result = plane(risk, through=[risk.space.vector() + normal(43, seed=s) for s in range(3)], resolution=3)
    _, chart = drawn(tmp_path, result)
    marks = [series for series in chart.panels[0].series if isinstance(series, Points)]
    assert [mark.name for mark in marks] == ["solution 1", "solution 2", "solution 3"]
    assert len({mark.colour for mark in marks}) == 3
    assert "the cross marks the first solution" in chart.caption


def test_the_line_says_which_direction(tmp_path):
    (chart,) = drawn(tmp_path, line(mlp_risk(), direction="eigenvectors", resolution=3))
    assert "along the Hessian's top eigenvector" in chart.caption


def test_whole_numbers_of_torch_are_no_directions():
    with pytest.raises(ValueError, match="direction: expected a tensor of shape"):
        line(mlp_risk(), direction=torch.tensor(1.0))


# -- on the command line ----------------------------------------------------------------------------------


def test_a_run_gives_its_path_and_other_runs_their_solutions(trained):
    along = probed(trained / "a", "plane", directions="pca")
    assert len(along.points.alphas) > 3
    assert along.points.residuals[-1] < 1e-3  # the last snapshot is the solution
    assert probed(trained / "a", "plane").points is None
    assert len(probed(trained / "a", "line", direction="pca").points.alphas) == len(along.points.alphas)
    across = probed(trained / "a", "plane", through=[str(trained / name) for name in "abc"])
    np.testing.assert_allclose(across.points.residuals, 0, atol=1e-4)
    assert across.loss == pytest.approx(probed(trained / "a", "line").loss, rel=1e-5)


def test_processes_of_one_command_share_the_points(trained):
    assert shares_points(find_probe("plane"))
    assert shares_points(find_probe("line"))
    assert not shares_points(find_probe("spectrum"))
