"""The elastic band's picture shows what the record holds."""

import dataclasses

import numpy as np
import pytest

import report_folders as folders
from losslab.probes.elastic_band import elastic_band
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.chart import Line, Points
from losslab.report.charts.elastic_band import elastic_band as figure
from losslab.report.contents import read
from losslab.studies.record import RunFolder
from potentials import trained_pair

COLOURS = dict.fromkeys(folders.NAMES, "#000000")


@pytest.fixture(scope="module")
def result():
    risk, (a, b) = trained_pair()
    return elastic_band(risk, a, b, schedule=[[20, 0.2], [10, 0.1, 1]])


def charts(path, result, pair="adamw--sgd"):
    study = folders.write_study(path)
    RunFolder(study).write_probe("elastic_band", pair, *result.to_record())
    return figure(read(study), COLOURS)


def test_path_pivots_and_straight_line(tmp_path, result):
    (chart,) = charts(tmp_path, result)
    path, pivots, straight = chart.panels[0].series
    assert (type(path), type(pivots), type(straight)) == (Line, Points, Line)
    np.testing.assert_allclose(path.x, result.positions / result.length)
    np.testing.assert_array_equal(path.y, result.losses)
    np.testing.assert_array_equal(pivots.y, result.pivot_losses)
    assert set(pivots.x) <= set(path.x)
    assert path.name == f"adamw → sgd: barrier {result.barrier:.3g}, straight {result.straight_barrier:.3g}"
    assert straight.dashed
    assert (straight.x[0], straight.x[-1]) == (0, 1)
    np.testing.assert_array_equal(chart.panels[1].series[0].y, result.saddles)
    assert chart.caption.endswith(".")
    assert ". " not in chart.caption
    matplotlib_backend.figure(chart)
    plotly_backend.figure(chart)


def test_one_cycle_needs_no_second_panel(tmp_path, result):
    short = dataclasses.replace(result, saddles=result.saddles[:2])
    (chart,) = charts(tmp_path, short)
    assert len(chart.panels) == 1
    assert "on the right" not in chart.caption


def test_nothing_measured_or_nothing_finite_gives_no_picture(tmp_path, result):
    assert figure(read(folders.write_study(tmp_path / "a")), COLOURS) == []
    assert charts(tmp_path / "b", dataclasses.replace(result, losses=np.full_like(result.losses, np.nan))) == []
