"""Seeds are taken together in a batch's report: the table, the first sentence, the curves, the terminal."""

import numpy as np
import pytest

import report_folders as folders
from losslab.cli import terminal
from losslab.report import page, seeds
from losslab.report.charts import charts
from losslab.report.contents import read
from losslab.studies.record import RunFolder

ACCURACIES = {"careful": [0.90, 0.92, 0.94, 0.92], "lucky": [0.99, 0.50, 0.60, 0.55]}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Two entries of four seeds each, of which one run was stopped and one diverged."""
    study = tmp_path_factory.mktemp("studies") / "batch"
    for name, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            folder = RunFolder.create(study / f"{name}-seed{seed}")
            folder.write_config({"name": folder.path.name, "seed": seed})
            for epoch in range(1, 4):
                folder.log(5 * epoch, {**folders.epoch_row(epoch), "train_loss": (1 + seed) ** 2 / epoch})
            if (name, seed) != ("careful", 3):
                status = "diverged" if (name, seed) == ("lucky", 3) else "completed"
                folder.log(
                    15, {"kind": "final", "status": status, "test_accuracy": accuracy, "test_loss": 1 - accuracy}
                )
    return study


def test_a_row_for_all_seeds(batch):
    assert seeds.rows(read(batch).runs) == [
        ["careful", "3 of 4", "92.00 ± 2.00 %", "90.00 %", "0.080 ± 0.020"],
        ["lucky", "4, 1 diverged", "66.00 ± 22.38 %", "50.00 %", "0.34 ± 0.22"],
    ]


def test_the_page_has_the_rows_and_praises_no_lucky_seed(batch):
    html = page.build(batch).read_text(encoding="utf-8")
    assert "<td>92.00 ± 2.00 %</td>" in html
    assert "8 runs; over its seeds careful has the best mean test accuracy, 92.00 ± 2.00 %." in html
    assert "No spectrum in the folder for 8 runs." in html
    assert "pairs of runs were interpolated" not in html
    assert "7 runs, status: not measured" in html


def test_a_curve_is_the_median_of_the_seeds(batch):
    (chart, *_) = charts(read(batch))
    loss = chart.panels[0]
    assert [line.name for line in loss.series] == ["careful", "careful, validation", "lucky", "lucky, validation"]
    np.testing.assert_allclose(loss.series[0].y, 6.5 / np.arange(1, 4))
    assert loss.series[0].colour == loss.series[1].colour != loss.series[2].colour
    assert "the median" in chart.caption


def test_the_terminal_shows_all_of_it(batch, capsys):
    terminal.finish(batch)
    assert "92.00 ± 2.00 %" in capsys.readouterr().out


def test_without_seeds_nothing_is_taken_together(tmp_path):
    study = folders.write_study(tmp_path / "study")
    assert "standard deviation over the seeds" not in page.build(study).read_text(encoding="utf-8")
