"""The page: complete, self-contained, honest about what is missing or not converged, safe with any name."""

import json
import re
import subprocess
import sys

import pytest

import report_folders as folders
from losslab.report import page, table
from losslab.report.contents import read
from losslab.studies.record import RunFolder

EXTERNAL = re.compile(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return folders.write_study(tmp_path_factory.mktemp("studies") / "demo")


@pytest.fixture(scope="module")
def html(study):
    return page.build(study).read_text(encoding="utf-8")


def own(html: str) -> str:
    """The page without plotly.js."""
    return html.replace(page.get_plotlyjs(), "")


def plots(html: str) -> dict[str, dict]:
    """The embedded figures by name."""
    opening = r'<script type="application/json" class="figure" data-plot="([^"]*)">'
    return {name: json.loads(text) for name, text in re.findall(opening + "(.*?)</script>", html)}


def test_page_and_pictures_lie_in_the_folder(study, html):
    assert (study / "report.html").is_file()
    pictures = {path.stem for path in (study / "figures").glob("*.png")}
    assert pictures == plots(html).keys()
    for path in (study / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f'href="figures/{path.name}"' in html
    assert not list(study.glob(".*.tmp"))


def test_plotly_is_embedded_once_and_nothing_is_fetched(html):
    assert html.count("* plotly.js v") == 1
    assert not EXTERNAL.search(own(html))
    assert not re.search(r"@import|url\(|https?://", own(html))
    assert "mathjax" not in own(html).lower()


def test_every_figure_has_its_caption(html):
    assert len(plots(html)) == html.count("<figcaption>") == 12


def test_the_table_shows_the_numbers(html):
    text = own(html)
    for shown in (
        "98.50 %",
        "13 ± 1e−5",
        "3.5 ± 1e−4",  # the two errors together
        "51.2 ± 1.5",
        "43.5",
        "0.615 ± 0.030",
        "ε = 0.5 (5 %)",
        "31 % of all",
        "208",
    ):
        assert f">{shown}<" in text.replace("±\u00a0", "± "), shown
    assert "22 November 2025, 08:00 UTC" in text
    assert 'class="suspect"' not in text


def test_every_column_is_explained(html):
    glossary = own(html).split('id="glossary"')[1]
    for column in table.COLUMNS:
        assert f"<dt>{column.title}</dt>" in glossary
        assert column.formula
        assert column.meaning
        assert column.caveat


def test_summary_names_best_flattest_and_highest(study):
    text = page.summary(read(study))
    assert "adamw reached the best test accuracy, 98.50 %" in text
    assert "adamw ended in the flattest place (13)" in text
    assert "sgd-momentum in the sharpest (39)" in text
    assert "4, lies between sgd and sgd-momentum" in text


def test_a_number_that_did_not_converge_looks_different_and_says_why(tmp_path):
    folder = folders.write_run(tmp_path / "run")
    folder.write_probe("spectrum", folders.STEP, *folders.spectrum(status="budget_reached"))
    html = own(page.build(tmp_path / "run").read_text(encoding="utf-8"))
    # Not so λ max and the gap, whose eigenvalues are known well, nor the trace, which has a status of its own.
    assert html.count('class="suspect"') == 4
    assert "run, λ min, condition number, negative, status: spectrum: the budget of products was used up" in html


def test_an_eigenvalue_with_a_large_error_bar_is_not_trusted(tmp_path):
    folder = folders.write_run(tmp_path / "run")
    values, arrays = folders.spectrum(status="budget_reached")
    arrays["top_errors"][0] = 1.0
    folder.write_probe("spectrum", folders.STEP, values, arrays)
    html = own(page.build(tmp_path / "run").read_text(encoding="utf-8"))
    assert "run, λ max, λ min, condition number, gap, negative, status: spectrum: the budget" in html


def test_no_barrier_is_said_so(tmp_path):
    for name in ("a", "b"):
        folders.start_run(tmp_path / name)
    values, arrays = folders.interpolation()
    RunFolder(tmp_path).write_probe("interpolation", "a--b", values | {"barrier": 0.0}, arrays)
    assert "no straight line between two solutions has a barrier" in page.summary(read(tmp_path))


@pytest.mark.parametrize("missing", ["spectrum", "sharpness", "plane", "noise"])
def test_a_missing_probe_is_said_and_the_rest_reported(tmp_path, missing):
    folder = folders.write_run(tmp_path / "run")
    for path in (folder.path / "probes" / missing).iterdir():
        path.unlink()
    html = page.build(tmp_path / "run").read_text(encoding="utf-8")
    assert f"No {missing} in the folder for run." in html
    assert "not measured: " + missing in html
    shown = {name.split("-")[0] for name in plots(html)}
    gone = {"spectrum": {"spectrum", "density"}, "plane": {"surface", "map"}}.get(missing, {missing})
    everything = {"training", "spectrum", "density", "surface", "map", "sharpness", "noise"}
    assert shown == everything - gone


def test_an_interrupted_run_is_reported(tmp_path):
    folder = folders.start_run(tmp_path / "run")
    folder.log(23, folders.epoch_row(1))
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "ep')  # torn by a crash
    html = page.build(folder.path).read_text(encoding="utf-8")
    assert list(plots(html)) == ["training"]
    assert "training has not finished" in html
    assert "No test accuracy in the folder for run." in html


def test_a_run_that_has_nothing_but_its_configuration(tmp_path):
    RunFolder.create(tmp_path / "run").write_config({})
    html = page.build(tmp_path / "run").read_text(encoding="utf-8")
    assert plots(html) == {}
    assert "plotly.js v" not in html
    assert "not trained to the end yet" in html


def test_an_interrupted_study_is_reported(tmp_path):
    folders.write_run(tmp_path / "done")
    folders.start_run(tmp_path / "begun").path.joinpath("metrics.jsonl").touch()
    html = page.build(tmp_path).read_text(encoding="utf-8")
    assert "0 of 1 pairs of runs were interpolated." in html
    assert "surface-done" in plots(html)


def test_numbers_that_are_none_or_not_finite(tmp_path):
    folder = folders.write_run(tmp_path / "run")
    values, arrays = folders.spectrum()
    nothing = {"density": None, "trace": None, "negative_mass": None, "num_negative": None}
    arrays = {name: array for name, array in arrays.items() if "." not in name}
    folder.write_probe("spectrum", "700", values | nothing | {"condition_number": float("inf")}, arrays)
    html = page.build(folder.path).read_text(encoding="utf-8")
    assert "density" not in plots(html)
    assert ">∞<" in html


def test_names_and_configuration_cannot_break_out(tmp_path):
    study = tmp_path / "<script>alert(1)<script>"
    name = '"><img src=x onerror=alert(1)>'.replace("/", "")
    folder = folders.write_run(study / name)
    attack = "</script><script>alert(2)</script>"
    folder.write_config({"optimizer": {"name": attack}, "note": attack})
    folder.write_environment({"python": attack, "started": attack})
    html = own(page.build(study).read_text(encoding="utf-8"))
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "&lt;/script&gt;&lt;script&gt;alert(2)" in html
    assert html.count("</script>") == len(plots(html)) + 2  # plotly.js and the page's own
    legend = plots(html)["training"]["data"][0]["name"]
    assert legend == name.replace("<", "&lt;").replace(">", "&gt;")


def test_many_surfaces_spare_the_browser(tmp_path):
    for index in range(page.MAX_SOLID + 1):
        folders.start_run(tmp_path / f"run{index}").write_probe("plane", "1", *folders.plane())
    html = page.build(tmp_path).read_text(encoding="utf-8")
    assert sum(name.startswith("surface") for name in plots(html)) == page.MAX_SOLID
    assert html.count('<img class="still" src="data:image/png;base64,') == 1


def test_building_is_repeatable(study, html):
    assert page.build(study).read_text(encoding="utf-8") == html


def test_no_torch(study):
    program = (
        "import sys; from losslab.report.page import build; build(sys.argv[1]); "
        "assert 'torch' not in sys.modules, 'the report imported torch'"
    )
    subprocess.run([sys.executable, "-c", program, str(study)], check=True, timeout=120)


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder in it"):
        page.build(tmp_path)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (51.25, 1.5, "51.2 ± 1.5"),
        (1234.5, 87.0, "1234 ± 87"),
        (13.0, 1e-5, "13 ± 1e−5"),
        (-0.5, 0.01, "−0.500 ± 0.010"),
        (0.0, 0.0, "0 ± 0"),
        (2.5e-7, 1e-8, "2.5e−7 ± 1e−8"),
        (float("nan"), 1.0, "NaN ± 1"),
        (float("inf"), float("nan"), "∞ ± NaN"),
        (3.0, None, "3"),
        (None, None, "—"),
    ],
)
def test_with_error(value, error, text):
    assert table.with_error(value, error) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (92938, "92,938"),
        (0.12345, "0.1235"),
        (1.5e9, "1.5e9"),
        (-2.0, "−2"),
        (float("-inf"), "−∞"),
        (0.0, "0"),
    ],
)
def test_number(value, text):
    assert table.number(value) == text
