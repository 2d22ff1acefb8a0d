"""The command line: what a user types, and what they see when it is wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from losslab import __version__, cli
from losslab.cli import measuring, training
from losslab.probes import PROBES
from losslab.studies.demo import RUNS
from losslab.studies.devices import find_device
from losslab.studies.record import RunFolder
from losslab.studies.shipped import purpose, shipped_configs

TRAIN = ["--set", "training.epochs=1", "--set", "model.width=4", "--set", "probes.examples=64", "--quiet"]


@pytest.fixture(scope="module")
def runner():
    return CliRunner()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, runner) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for name in ("sgd", "adamw"):
        result = runner.invoke(cli.app, ["train", name, *TRAIN, "--output", str(folder / name)])
        assert result.exit_code == 0, result.output
        assert "test accuracy" in result.output
    return folder


def error_of(arguments: list[str], monkeypatch, capsys) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["losslab", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_version(runner):
    assert runner.invoke(cli.app, ["--version"]).output.strip() == f"losslab {__version__}"


def test_list_names_every_table(runner):
    output = runner.invoke(cli.app, ["list"]).output
    for name in ("spectrum", "interpolation", "simple_cnn", "digits", "sgd_momentum"):
        assert name in output
    for kind, rows in {"configuration": shipped_configs(), "comparison": shipped_configs("compare")}.items():
        assert [line.split()[3] for line in output.splitlines() if line.startswith(f"│ {kind} ")] == list(rows)
        assert all(purpose(path)[-1] in ".?" for path in rows.values())  # a whole sentence


def test_probe_writes_what_it_prints(trained, runner):
    run = trained / "sgd"
    result = runner.invoke(cli.app, ["probe", "sharpness", "--run", str(run), "--set", "num_samples=3", "--quiet"])
    assert result.exit_code == 0, result.output
    record = RunFolder(run).read_probe("sharpness")
    assert record["num_samples"] == 3
    assert f"{record['value']:.6g}" in result.output


def test_where_a_probe_computes(trained, runner, monkeypatch):
    def find(name, there):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        return find_device(name).type

    assert [find("auto", True), find("auto", False), find("cpu", True), find("cuda", True)] == [
        "cuda",
        "cpu",
        "cpu",
        "cuda",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, said in (("cuda", "cuda is not there; use auto or cpu"), ("cudda", "did you mean 'cuda'?")):
        result = runner.invoke(cli.app, ["probe", "sharpness", "--run", str(trained / "sgd"), "--device", name])
        assert said in str(result.exception)


def test_probe_options_reach_the_options_object(trained, runner):
    changes = ["k=2", "num_nodes=12", "num_probes=1", "trace_samples=8"]
    arguments = [item for change in changes for item in ("--set", change)]
    result = runner.invoke(cli.app, ["probe", "spectrum", "--run", str(trained / "sgd"), *arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    record = RunFolder(trained / "sgd").read_probe("spectrum")
    assert len(record["top"]) == 2
    assert record["density"]["num_probes"] == 1


def test_probe_between_two_runs_lands_in_the_study(trained, runner):
    a, b = str(trained / "sgd"), str(trained / "adamw")
    result = runner.invoke(cli.app, ["probe", "interpolation", "--run", a, "--to", b, "--quiet"])
    assert result.exit_code == 0, result.output
    assert RunFolder(trained).probes() == {"interpolation": ["sgd--adamw"]}


def test_report_of_a_run_and_of_a_study(trained, runner):
    for folder in (trained / "sgd", trained):
        result = runner.invoke(cli.app, ["report", str(folder)])
        assert result.exit_code == 0, result.output
        assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nowhere.yaml"], "no such file"),
        (["train", "sgd", "--set", "optimizer.momentun=0.9"], "did you mean 'momentum'"),
        (["probe", "spectrun", "--run", "{run}"], "did you mean 'spectrum'"),
        (["probe", "plane", "--run", "{run}", "--set", "resolutoin=5"], "did you mean 'resolution'"),
        (["probe", "plane", "--run", "{run}", "--set", "resolution=4"], "odd number"),
        (["probe", "interpolation", "--run", "{run}"], "two runs"),
        (["probe", "plane", "--run", "{run}", "--to", "{run}"], "one run"),
        (["probe", "plane", "--run", "{run}", "--checkpoint", "frist"], "frist"),
        (["probe", "plane", "--run", "{run}", "--dry-run"], "expected the probe 'spectrum'"),
        (["report", "/nowhere"], "no such folder"),
        (["train", "sgd", "--output", "{run}"], "not empty"),
    ],
)
def test_errors_are_one_line(arguments, says, trained, monkeypatch, capsys):
    arguments = [a.replace("{run}", str(trained / "sgd")) for a in arguments]
    line = error_of(arguments, monkeypatch, capsys)
    assert says in line
    assert "Traceback" not in line


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["losslab", "--debug", "train", "nowhere.yaml"])
    with pytest.raises(ValueError, match="no such file"):
        cli.main()


def test_demo_quick_end_to_end(tmp_path):
    """The main job, as a user starts it; piped output shows no bar."""
    command = [sys.executable, "-m", "losslab", "demo", "--quick", "--output", str(tmp_path / "demo")]
    # Tests run side by side: a second thread would wait for the others' processes.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    study = tmp_path / "demo"
    assert (study / "report.html").stat().st_size > 1_000_000  # plotly inside
    assert len(list((study / "figures").glob("*.png"))) >= 10
    for name in RUNS:
        run = RunFolder(study / name)
        assert set(run.probes()) == {"spectrum", "sharpness", "plane", "noise"}
        assert run.metrics()[-1]["test_accuracy"] > 0.5
        spectrum = run.read_probe("spectrum")
        assert len(spectrum["top"]) == 5
        assert (spectrum["top"][:-1] >= spectrum["top"][1:]).all()
    assert len(RunFolder(study).probes()["interpolation"]) == 3
    for label in RunFolder(study).probes()["interpolation"]:
        record = RunFolder(study).read_probe("interpolation", label)
        assert record["alphas"][[0, -1]].tolist() == [-0.5, 1.5]
        assert record["barrier"] >= 0
    again = subprocess.run([sys.executable, "-m", "losslab", "report", str(study)], capture_output=True, check=False)
    assert again.returncode == 0


def test_demo_never_touches_a_foreign_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"mine": 1}))
    line = error_of(["demo", "--quick", "--output", str(tmp_path)], monkeypatch, capsys)
    assert "not empty" in line
    assert json.loads((tmp_path / "config.json").read_text()) == {"mine": 1}


def test_demo_never_replaces_runs_that_are_not_its_own(tmp_path, runner, monkeypatch, capsys):
    """`losslab train sgd --output runs/sgd`, then `losslab demo --output runs`."""
    result = runner.invoke(cli.app, ["train", "sgd", *TRAIN, "--output", str(tmp_path / "sgd")])
    assert result.exit_code == 0, result.output
    assert "not empty" in error_of(["demo", "--quick", "--output", str(tmp_path)], monkeypatch, capsys)
    assert RunFolder(tmp_path / "sgd").metrics()


def test_train_overwrites_only_when_told(tmp_path, runner, monkeypatch, capsys):
    command = ["train", "sgd", *TRAIN, "--output", str(tmp_path / "run")]
    assert runner.invoke(cli.app, command).exit_code == 0
    assert "--overwrite" in error_of(command, monkeypatch, capsys)
    assert runner.invoke(cli.app, [*command, "--overwrite"]).exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    foreign = ["train", "sgd", *TRAIN, "--output", str(tmp_path / "mine"), "--overwrite"]
    assert "not empty" in error_of(foreign, monkeypatch, capsys)


def test_line_is_in_the_report(trained, runner):
    run = trained / "adamw"
    assert runner.invoke(cli.app, ["probe", "line", "--run", str(run), "--quiet"]).exit_code == 0
    assert runner.invoke(cli.app, ["report", str(run)]).exit_code == 0
    assert (run / "figures" / "slices.png").is_file()


def test_demo_interrupted_still_reports(tmp_path, monkeypatch, capsys):
    """Ctrl-C after the first training: exit code 130, and a page of what was measured by then."""
    calls = []
    real = training.run_demo

    def stopped(folder, settings, *, progress):
        def tick(done, total, note):
            calls.append(note)
            if "spectrum" in note and done > 0:
                raise KeyboardInterrupt

        return real(folder, settings, progress=tick)

    monkeypatch.setattr(training, "run_demo", stopped)
    monkeypatch.setattr(sys, "argv", ["losslab", "demo", "--quick", "--output", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 130
    assert (tmp_path / "demo" / "report.html").is_file()
    assert "stopped" in capsys.readouterr().out


def test_dry_run_prints_the_costs_and_measures_nothing(trained, runner):
    run = trained / "adamw"
    before = RunFolder(run).probes().keys()
    result = runner.invoke(cli.app, ["probe", "spectrum", "--run", str(run), "--dry-run", "--set", "num_nodes=30"])
    assert result.exit_code == 0, result.output
    assert "products  at most 78" in result.output
    assert "graphs    1 of 1 batches kept" in result.output
    assert RunFolder(run).probes().keys() == before


def test_max_examples(trained, runner):
    arguments = ["probe", "noise", "--run", str(trained / "sgd"), "--max-examples", "20", "--quiet"]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert RunFolder(trained / "sgd").read_probe("noise")["num_examples"] == 20


def pressing(times: int, at: int):
    """A progress bar during whose `at`-th call somebody presses Ctrl-C."""
    calls = 0

    @contextlib.contextmanager
    def bar(quiet):
        def tick(done, total, note):
            nonlocal calls
            calls += 1
            if calls == at:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        yield tick

    return bar


def test_the_stop_key_ends_with_what_is_known(trained, runner, monkeypatch):
    run = trained / "sgd"
    monkeypatch.setattr(measuring, "progress_bar", pressing(1, at=12))
    before = signal.getsignal(signal.SIGINT)
    result = runner.invoke(cli.app, ["probe", "spectrum", "--run", str(run), "--set", "k=1"])
    assert result.exit_code == 0, result.output
    assert "it was told to stop" in result.output
    record = RunFolder(run).read_probe("spectrum")
    assert (record["status"], record["matvecs"]) == ("stopped", 12)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("probe", ["spectrum", "sharpness"])
def test_pressed_twice_it_ends_at_once(probe, trained, monkeypatch):
    monkeypatch.setattr(measuring, "progress_bar", pressing(2, at=2))
    monkeypatch.setattr(sys, "argv", ["losslab", "probe", probe, "--run", str(trained / "sgd")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 130


TINY = {  # settings under which each probe takes no time; what follows the run
    "spectrum": ["--k", "1", "--num-nodes", "8", "--trace-samples", "2"],
    "sharpness": ["--num-samples", "2", "--method", "ascent", "--steps", "2"],
    "perturbation": ["--k", "1", "--num-random", "1", "--resolution", "5"],
    "line": ["--resolution", "3"],
    "plane": ["--resolution", "3", "--directions", "layer"],
    "noise": ["--tol", "0.1"],
    "intrinsic_dimension": ["--dimension", "2", "--num-seeds", "1", "--steps", "2"],
    "interpolation": ["--steps", "3"],
    "alignment": ["--alphas", "[0.5]"],
    "curve": ["--steps", "2", "--num-points", "5"],
    "elastic_band": ["--num-nodes", "3", "--steps", "1"],
    "trajectory": ["--sharpness-samples", "1"],
    "generalization": ["--num-samples", "4", "--num-nodes", "5"],
    "implicit_bias": ["--learning-rate", "0.1"],
    "kernel": ["--num-examples", "4", "--num-steps", "3"],
    "convergence": ["--num-steps", "3", "--num-nodes", "4"],
}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory, runner) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "study"
    small = ["--set", "dataset.train_examples=64", "--set", "training.snapshots.every=1", "--set", "probes.examples=16"]
    for name in ("sgd", "adamw"):
        result = runner.invoke(cli.app, ["train", name, *TRAIN, *small, "--output", str(folder / name)])
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_runs_from_the_command_line(name, snapshots, runner):
    pair = ["--to", str(snapshots / "adamw")] if PROBES[name].num_solutions == 2 else []
    arguments = ["probe", name, "--run", str(snapshots / "sgd"), *pair, *TINY[name], "--quiet"]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert PROBES[name].question.split()[0] in result.output
    assert name in (RunFolder(snapshots) if pair else RunFolder(snapshots / "sgd")).probes()
