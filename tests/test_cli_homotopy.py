"""`--schedule homotopy` in train, tune and compare, and `losslab demo homotopy`."""

import csv
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from losslab import cli
from losslab.cli import tuning
from losslab.studies.compare.plan import load_plan
from losslab.studies.config import from_assignments
from losslab.studies.devices import seeded
from losslab.studies.homotopy_demo import HomotopyDemo, homotopy_demo
from losslab.studies.record import RunFolder
from losslab.studies.shipped import shipped_configs
from losslab.studies.spaces import SPACES, space_of

SMALL = ["--set", "dataset.train_examples=64", "--set", "training.max_steps=3", "--set", "model.width=2"]


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def error_of(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["losslab", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr().err


def test_train_takes_it_as_a_flag(tmp_path):
    flags = ["--architecture", "mlp", "--optimizer", "momentum", "--schedule", "homotopy", "--warmup-steps", "2"]
    invoke("train", *flags, *SMALL, "--set", "scheduler.frequency=7", "--output", tmp_path / "run", "--quiet")
    folder = RunFolder(tmp_path / "run")
    schedule = folder.config["schedule"]
    assert (schedule["name"], schedule["warmup_steps"], schedule["frequency"]) == ("homotopy", 2, 7)
    assert [row["kind"] for row in folder.metrics()].count("homotopy") == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--schedule", "homotpy"], "did you mean 'homotopy'?"),
        (["--schedul", "homotopy"], "--schedul: no such flag, did you mean 'schedule'?"),
        (["--set", "schedule.name=homotopy", "--set", "schedule.frac=1"], "did you mean 'fraction'?"),
    ],
)
def test_misspelt_names_get_a_suggestion(arguments, expected, monkeypatch, capsys):
    assert expected in error_of(["train", *arguments], monkeypatch, capsys)


def test_its_tuning_is_of_the_rate_alone():
    base = from_assignments(["optimizer.name=adamw", "schedule.name=homotopy"])
    rate = {"optimizer.lr": SPACES["adamw"]["optimizer.lr"]}
    assert tuning.searched(base, None, []) == rate
    assert space_of("adamw", "cosine") == SPACES["adamw"]
    assert set(space_of("talt", "homotopy", with_fixes=True)) > {"optimizer.lr"}


def test_the_shipped_comparison_tunes_all_schedules_alike():
    plan = load_plan(shipped_configs("compare")["homotopy"])
    assert plan.names == ["constant", "cosine", "warmup-cosine", "warmup-cooldown", "homotopy", "founders-rule"]
    spaces = [plan.space(name) for name in plan.names]
    assert all(space == spaces[0] and set(space) == {"optimizer.lr"} for space in spaces)
    assert [plan.start(name).schedule.name for name in plan.names[-2:]] == ["homotopy", "homotopy"]
    without = plan.model_copy(
        update={"optimizers": tuple(each.model_copy(update={"space": None}) for each in plan.optimizers)}
    )
    assert set(without.space("homotopy")) == {"optimizer.lr"} < set(without.space("cosine"))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Ten classes of 8×8 bytes, each with a bright pixel of its own."""
    generator = np.random.default_rng(0)
    classes = np.arange(400) % 10
    images = generator.integers(0, 80, (400, 8, 8), dtype=np.uint8)
    images[np.arange(400), classes % 8, classes // 2] = 255
    path = tmp_path_factory.mktemp("arrays") / "mnist.npz"
    np.savez(path, x_train=images[:300], y_train=classes[:300], x_test=images[300:], y_test=classes[300:])
    return path


def test_the_demo_runs_the_three_experiments(arrays, tmp_path):
    output = tmp_path / "demo"
    said = invoke("demo", "homotopy", "--quick", "--set", f"dataset.name=arrays:{arrays}", "--output", output, "-q")
    with (output / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for name in ("quadratic", "mlp", "mnist"):
        own = [row for row in found if row["experiment"] == name]
        methods = ["constant", "founders' rule", "constant", "founders' rule", "warm-up + cosine", "homotopy"]
        assert [row["method"] for row in own] == methods
        assert [row["tuned"] for row in own] == ["False"] * 2 + ["True"] * 4
        assert (output / "figures" / f"{name}.png").is_file()
        with (output / f"{name}.csv").open(newline="") as file:
            points = list(csv.DictReader(file))
        assert len(points) == 6 * 20
        assert len({row["method"] for row in points}) == 6
        constant, tuned = (next(row for row in own if row["tuned"] == kind) for kind in ("False", "True"))
        assert float(tuned["loss"]) <= float(constant["loss"])
    assert "loss 0.089, 78 steps" in said.replace("\n", " ") or "0.089" in said


def test_the_demo_s_quadratic_is_what_gradient_descent_does(tmp_path):
    """θᵢ ← (1 − ηλᵢ)θᵢ: the constant rate's last loss from its first."""
    outcomes, left_out = homotopy_demo(tmp_path / "demo", HomotopyDemo(rates=(0.05,), steps={"quadratic": 15}))
    assert left_out == []
    first, second = (outcomes[0], outcomes[2])
    assert (first.base_lr, second.base_lr, first.steps, second.steps) == (0.01, 0.05, 15, 15)
    with seeded(0, torch.device("cpu")):
        theta = torch.randn(10)
    eigenvalues = torch.logspace(-1, 1, 10)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(100)
    for outcome in (first, second):
        end = (1 - outcome.base_lr * eigenvalues) ** 15 * theta
        assert outcome.loss == pytest.approx(float((eigenvalues * end**2).sum() / 2), rel=1e-4)


def test_without_the_data_it_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes, left_out = homotopy_demo(tmp_path / "demo", HomotopyDemo(steps={"mnist": 2}))
    assert outcomes == []
    (sentence,) = left_out
    assert sentence.startswith("mnist: left out: dataset.")
    assert "--set dataset.download=true" in sentence or "torchvision" in sentence


def test_the_demo_leaves_a_foreign_folder_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in error_of(["demo", "homotopy", "--quick", "--output", str(tmp_path)], monkeypatch, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
