"""The picture "learning rate, curvature, loss": what the rows hold, whoever draws it, and only where there are rows."""

import numpy as np
import pytest

import report_folders as folders
from losslab.report import matplotlib_backend, page, plotly_backend
from losslab.report.charts.homotopy import homotopy
from losslab.report.contents import read

COLOURS = {"stable": "#0072B2", "seed": "#D55E00", "plain": "#009E73"}


def write(path, rule):
    folder = folders.start_run(path)
    folder.write_config({**folder.config, "schedule": {"name": "homotopy", "rule": rule}})
    for step in range(1, 40, 3):
        row = {"lr": 0.1 / step, "hessian_norm": 3.0 + step, "curvature": 9.0, "target": 8.0, "kappa": float(step)}
        folder.log(step, {"kind": "homotopy", **row, "loss": 2.0 / step, "grad_norm": 1.0, "seconds": 0.1})
    folder.log(40, folders.epoch_row(1))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    write(path / "stable", "stable")
    write(path / "seed", "seed")
    folders.start_run(path / "plain")
    return path


def test_it_shows_the_rows_of_the_runs_that_have_any(study):
    (chart,) = homotopy(read(study), COLOURS)
    rate, metric, kappa, loss = chart.panels
    assert [panel.y_label for panel in chart.panels[1:3]] == ["curvature λ", "curvature κ"]
    steps = np.arange(1, 40, 3)
    for panel, values in ((rate, 0.1 / steps), (loss, 2.0 / steps)):
        assert {line.name: line.colour for line in panel.series} == {n: COLOURS[n] for n in ("stable", "seed")}
        for line in panel.series:
            np.testing.assert_array_equal(line.x, steps)
            np.testing.assert_allclose(line.y, values)
    for panel, name, measured in ((metric, "stable", 3.0 + steps), (kappa, "seed", 1.0 * steps)):
        found, reckoned, target = panel.series
        assert found.name == name
        np.testing.assert_allclose(found.y, measured)
        assert (reckoned.dashed, set(reckoned.y), set(target.y)) == (True, {9.0}, {8.0})
    assert chart.caption.endswith(".")
    assert ". " not in chart.caption
    plotly_backend.figure(chart)


def test_each_layer_has_a_line_and_all_together_one_loss(tmp_path):
    folder = folders.start_run(tmp_path / "stable")
    folder.write_config({**folder.config, "schedule": {"name": "homotopy", "per_layer": True}})
    for step in (1, 2):
        for number, layer in enumerate(("body", "head"), start=1):
            row = {"lr": 0.1 * number, "hessian_norm": 3.0, "curvature": 9.0, "target": 8.0, "kappa": 1.0}
            folder.log(step, {"kind": "homotopy", "layer": layer, **row, "loss": 2.0, "grad_norm": 1.0, "seconds": 0.1})
    (chart,) = homotopy(read(tmp_path), COLOURS)
    rate, metric, loss = chart.panels
    assert [list(line.y) for line in rate.series] == [[0.1, 0.1], [0.2, 0.2]]
    assert [(line.name, line.legend) for line in rate.series] == [("body", True), ("head", True)]
    assert rate.series[0].colour != rate.series[1].colour
    assert (len(metric.series), [line.name for line in loss.series]) == (6, ["stable"])
    write(tmp_path / "seed", "seed")
    (chart,) = homotopy(read(tmp_path), COLOURS)  # beside another run: one colour and one name
    layers = [line for line in chart.panels[0].series if line.name == "stable"]
    assert [(line.colour, line.legend) for line in layers] == [(COLOURS["stable"], True), (COLOURS["stable"], False)]


def test_it_is_on_the_page_of_a_single_run(study):
    text = page.build(study / "stable").read_text(encoding="utf-8")
    assert 'data-plot="homotopy"' in text
    assert (study / "stable" / "figures" / "homotopy.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_other_schedules_have_none(study):
    assert homotopy(read(study / "plain"), COLOURS) == []


def test_what_is_not_known_is_left_out_of_a_line(tmp_path):
    folder = write(tmp_path / "stable", "stable")
    folder.log(41, {"kind": "homotopy", "lr": 0.0, "loss": 1.0, "hessian_norm": float("inf"), "curvature": 9.0})
    (chart,) = homotopy(read(tmp_path / "stable"), COLOURS)
    assert np.isnan(chart.panels[1].series[2].y[-1])
    matplotlib_backend.figure(chart)
