"""What the charts show is what the records hold, whoever draws them."""

import matplotlib
import numpy as np
import pytest

import report_folders as folders
from losslab.records import to_record
from losslab.report import charts as figures
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.chart import PALETTE, Contour, Landscape, Line, Points, Surface, log_ticks, tick_label
from losslab.report.contents import read
from losslab.studies.record import RunFolder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return folders.write_study(tmp_path_factory.mktemp("studies") / "demo")


@pytest.fixture(scope="module")
def charts(study):
    return {chart.name: chart for chart in figures.charts(read(study))}


def test_a_complete_study_gives_every_chart(charts):
    landscapes = [f"{kind}-{name}" for name in folders.NAMES for kind in ("surface", "map")]
    ends = ["sharpness", "noise", "interpolation"]
    assert list(charts) == ["training", "spectrum", "density", *landscapes, *ends]


def test_every_caption_is_one_sentence(charts):
    for chart in charts.values():
        assert chart.caption.endswith(".")
        assert ". " not in chart.caption, chart.caption


def test_a_run_has_one_colour_everywhere(charts):
    for name in ("training", "spectrum", "density", "sharpness", "noise"):
        for panel in charts[name].panels:
            for series in panel.series:
                run = series.name.split(" (")[0].split(",")[0]
                assert series.colour == PALETTE[folders.NAMES.index(run)]


def test_training_shows_the_rows(charts):
    loss, accuracy = charts["training"].panels
    train, validation = loss.series[:2]
    rows = [folders.epoch_row(epoch) for epoch in range(1, 21)]
    np.testing.assert_array_equal(train.x, np.arange(1, 21))
    np.testing.assert_array_equal(train.y, [row["train_loss"] for row in rows])
    np.testing.assert_array_equal(validation.y, [row["validation_loss"] for row in rows])
    assert validation.dashed
    assert not train.dashed
    np.testing.assert_allclose(accuracy.series[0].y, [100 * row["train_accuracy"] for row in rows])


def test_spectrum_shows_eigenvalues_and_bounds(charts):
    top, smallest = charts["spectrum"].panels
    for index in range(3):
        _, arrays = folders.spectrum(index)
        np.testing.assert_array_equal(top.series[index].y, arrays["top"])
        np.testing.assert_array_equal(top.series[index].error, arrays["top_errors"])
        np.testing.assert_array_equal(smallest.series[index].y, arrays["smallest"])
        np.testing.assert_array_equal(np.round(top.series[index].x), [1, 2, 3, 4, 5])
    assert not smallest.log_y, "negative Ritz values have no place on a log axis"


def test_density_shows_the_band_on_a_log_axis(charts):
    (panel,) = charts["density"].panels
    _, arrays = folders.spectrum(0)
    np.testing.assert_array_equal(panel.series[0].x, arrays["density.grid"])
    np.testing.assert_array_equal(panel.series[0].y, arrays["density.density"])
    np.testing.assert_array_equal(panel.series[0].error, arrays["density.standard_error"])
    assert panel.log_y
    assert panel.y_range[0] > 0


def test_densities_of_very_different_width_get_panels_of_their_own(tmp_path):
    for name, seed in (("narrow", 0), ("wide", 9)):
        folder = folders.start_run(tmp_path / name)
        folder.write_probe("spectrum", "1", *folders.spectrum(seed))
    (chart,) = figures.density(read(tmp_path), dict.fromkeys(("narrow", "wide"), "#000000"))
    assert [panel.series[0].name for panel in chart.panels] == ["narrow", "wide"]


def test_planes_share_one_scale_and_show_the_record(charts):
    found = [charts[f"{kind}-{name}"].panels[0].series[0] for name in folders.NAMES for kind in ("surface", "map")]
    assert [type(series) for series in found] == 3 * [Surface, Contour]
    assert len({(series.low, series.high, series.log) for series in found}) == 1
    np.testing.assert_array_equal(found[0].z, folders.plane(0)[1]["losses"])
    assert found[0].log
    assert found[0].low == pytest.approx(0.004)


def test_a_wall_is_cut_and_the_caption_says_so(tmp_path):
    folder = folders.start_run(tmp_path / "run")
    values, arrays = folders.plane()
    arrays["losses"][0, :3] = [np.inf, 1e30, np.nan]
    folder.write_probe("plane", "1", values, arrays)
    surface, contours = figures.charts(read(tmp_path / "run"))
    heights = surface.panels[0].series[0].heights()
    assert np.isnan(heights[0, 2])
    assert np.isfinite(np.delete(heights.ravel(), 2)).all()
    assert heights[0, 0] == heights[0, 1] == np.nanmax(heights)
    for chart in (surface, contours):
        assert "2 of 441 values above" in chart.caption
        assert "1 of 441 points have no value" in chart.caption
        matplotlib_backend.figure(chart)
        plotly_backend.figure(chart)


@pytest.mark.parametrize("known", [0, 1, 2, 5])
def test_an_interrupted_plane_is_drawn_as_far_as_it_went(tmp_path, known):
    folder = folders.start_run(tmp_path / "run")
    values, arrays = folders.plane()
    arrays["losses"][known:] = np.nan
    folder.write_probe("plane", "1", values | {"status": "nonfinite"}, arrays)
    charts = figures.charts(read(tmp_path / "run"))
    assert len(charts) == (2 if known >= 2 else 0)
    for chart in charts:
        matplotlib_backend.save(chart, tmp_path / "picture.png")
        assert len(plotly_backend.figure(chart).data) > 0


def test_a_flat_plane_can_be_drawn(tmp_path):
    values, arrays = folders.plane()
    folder = folders.start_run(tmp_path / "run")
    folder.write_probe("plane", "1", values, arrays | {"losses": np.zeros((21, 21))})
    for chart in figures.charts(read(tmp_path / "run")):
        matplotlib_backend.save(chart, tmp_path / "picture.png")
        plotly_backend.figure(chart)


def test_a_line_is_drawn(tmp_path):
    values, arrays = folders.plane()
    one = {"alphas": arrays["alphas"], "losses": arrays["losses"][10]}
    folders.start_run(tmp_path / "run").write_probe("line", "1", values, one)
    (chart,) = figures.charts(read(tmp_path / "run"))
    np.testing.assert_array_equal(chart.panels[0].series[0].y, arrays["losses"][10])


def test_interpolation_marks_the_ends_and_writes_the_barrier(charts):
    (panel,) = charts["interpolation"].panels
    lines = [series for series in panel.series if isinstance(series, Line)]
    ends = [series for series in panel.series if isinstance(series, Points)]
    values, arrays = folders.interpolation(0, 1)
    np.testing.assert_array_equal(lines[0].x, arrays["alphas"])
    np.testing.assert_array_equal(lines[0].y, arrays["losses"])
    assert lines[0].name == f"adamw → sgd: barrier {values['barrier']:.3g}"
    assert [(end.x[0], end.y[0]) for end in ends[:2]] == [(0.0, values["loss_a"]), (1.0, values["loss_b"])]
    assert panel.guides == (0.0, 1.0)
    assert panel.log_y


def test_sharpness_ends_at_the_value_and_noise_at_both_tops(charts):
    for index in range(3):
        values, _ = folders.sharpness(index)
        assert charts["sharpness"].panels[0].series[index].y[-1] == values["value"]
        values, _ = folders.noise(index)
        shown = charts["noise"].panels[0].series[index]
        assert shown.y.tolist() == [values["hessian_top"], values["covariance_top"]]
        assert shown.error.tolist() == [values["hessian_error"], values["covariance_error"]]


def test_plotly_carries_the_values(charts):
    figure = plotly_backend.figure(charts["spectrum"])
    top, errors = folders.spectrum(0)[1]["top"], folders.spectrum(0)[1]["top_errors"]
    np.testing.assert_array_equal(figure.data[0].y, top)
    np.testing.assert_array_equal(figure.data[0].error_y.array, errors)
    legend = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(legend) == sorted(folders.NAMES), "one entry a run, whatever the number of panels"
    surface = plotly_backend.figure(charts["surface-sgd"]).data[0]
    np.testing.assert_allclose(10**surface.z, folders.plane(1)[1]["losses"], rtol=1e-12)
    loss = folders.plane(1)[1]["losses"][3, 4]  # rows are β, columns α
    assert surface.text[3][4] == f"α -0.6<br>β -0.7<br>loss {loss:.4g}"


def test_matplotlib_carries_the_values_and_touches_no_global_state(charts):
    figure = matplotlib_backend.figure(charts["density"])
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), folders.spectrum(0)[1]["density.density"])
    assert figure.axes[0].get_yscale() == "log"
    assert matplotlib._pylab_helpers.Gcf.get_num_fig_managers() == 0


def test_names_are_not_markup(tmp_path):
    name = "<b>a$x$"
    folders.write_run(tmp_path / name)
    folders.write_run(tmp_path / "a-b")
    for chart in figures.charts(read(tmp_path)):
        assert set(chart.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._<>$") - set("<>$")
        matplotlib_backend.save(chart, tmp_path / "picture.png")
        assert "<b>" not in plotly_backend.figure(chart).to_json()


def test_two_names_never_share_a_file(tmp_path):
    for name in ("a b", "a+b"):
        folders.start_run(tmp_path / name).write_probe("plane", "1", *folders.plane())
    names = [chart.name for chart in figures.charts(read(tmp_path))]
    assert len(set(names)) == 4


def test_run_names_may_hold_the_separator_of_pairs(tmp_path):
    for name in ("a--b", "c"):
        folders.start_run(tmp_path / name)
    RunFolder(tmp_path).write_probe("interpolation", "a--b--c", *folders.interpolation())
    (pair,) = read(tmp_path).pairs
    assert (pair.first, pair.second) == ("a--b", "c")


@pytest.mark.parametrize(("low", "high"), [(1.0, 3.0), (0.5, 40.0), (1e-9, 1e9), (2.0, 2.1)])
def test_log_ticks_lie_within(low, high):
    ticks = log_ticks(low, high)
    assert len(ticks) <= 10
    assert ((ticks >= low * (1 - 1e-6)) & (ticks <= high * (1 + 1e-6))).all()


@pytest.mark.parametrize(("value", "label"), [(0.02, "0.02"), (500.0, "500"), (1e-5, "10⁻⁵"), (2e6, "2·10⁶")])
def test_tick_label(value, label):
    assert tick_label(value) == label


def test_contour_levels_are_equal_ratios_on_a_log_scale():
    z = np.array([[1.0, 10.0], [100.0, 1000.0]])
    levels = 10 ** Landscape(np.arange(2), np.arange(2), z, 1.0, 1000.0, log=True).levels()
    np.testing.assert_allclose(levels[1:] / levels[:-1], levels[1] / levels[0])


def test_records_are_read_as_probes_write_them(tmp_path):
    """The report sees what `to_record` and `RunFolder` make of a result."""
    from dataclasses import dataclass

    from losslab.status import Status

    @dataclass(frozen=True)
    class Sharpness:
        value: float
        increases: np.ndarray
        status: Status

    folder = folders.start_run(tmp_path / "run")
    result = Sharpness(float("inf"), np.array([1.0, np.inf]), Status.nonfinite)
    folder.write_probe("sharpness", "3", *to_record(result))
    run = read(tmp_path / "run").runs[0]
    assert run.get("sharpness.value") == np.inf
    assert run.get("sharpness.status") == "nonfinite"
    assert run.get("sharpness.radius") is None
