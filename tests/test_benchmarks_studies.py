"""The studies of the evaluation framework run at their smallest settings: kills, loop, pruning, false verdicts."""

import multiprocessing
import os
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import processes
from losslab import cli
from losslab.studies.config import apply, make_config
from losslab.studies.record import RunFolder
from losslab.studies.train import train

SIZES = {"train": 40, "test": 8}


@pytest.fixture
def printed(load, monkeypatch, capsys):
    """Run a script's `main` with these arguments; the tables that it prints, as cells."""

    def run(name, *arguments):
        script = load(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        script.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    return run


def command(config, folder):
    """In a process that is forked from one with everything imported, for importing takes longer than all the rest."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=resumed, args=(config, folder))
    process.start()
    process.poll, process.wait = lambda: process.exitcode, process.join
    process.send_signal = lambda number: os.kill(process.pid, number)
    return process


def resumed(config, folder):
    arguments = ["train", str(config), "--output", str(folder), "--resume", "--quiet"]
    sys.exit(CliRunner().invoke(cli.app, arguments).exit_code)


def test_kills(load, monkeypatch, capsys):
    assert processes.multiprocessing is multiprocessing  # whose forkserver has imported the package
    script = load("kills")
    monkeypatch.setattr(script, "start", command)
    monkeypatch.setattr(sys, "argv", ["kills.py", "--kills", "1", "--epochs", "4"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert said.count("identical") == 2


def test_kills_sees_a_difference(load, tmp_path):
    """A run of another seed is no run that was resumed."""
    script = load("kills")
    config = make_config({**script.CONFIG, "training": {**script.CONFIG["training"], "max_steps": 12}})
    first, second = (
        script.outcome(train(apply(config, {"seed": seed}), RunFolder.create(tmp_path / str(seed)))) for seed in (0, 1)
    )
    assert first[0] != second[0]
    assert first[1].keys() == second[1].keys()
    assert first[1] != second[1]


def test_loop(printed):
    head, _, *rows = printed("loop", "--rounds=1")
    assert head[-2:] == ["ratio", "quartiles"]
    assert [row[0] for row in rows] == ["mlp, digits", "simple_cnn, digits", "simple_cnn, 32×32"]
    assert all(float(row[5]) > 0.2 for row in rows)


def test_tuning(printed, load):
    """Three trials of one epoch: none is long enough to be pruned, so all pruners find the same."""
    head, _, before, *rows = printed("tuning", "--trials=3", "--epochs=1", "--studies=1", "--seeds=2")
    assert [row[0] for row in rows] == [f"{pruner}, study 0" for pruner in load("tuning").PRUNERS]
    assert len(before) == len(head) == 7
    assert {tuple(row[1:]) for row in rows} == {tuple(rows[0][1:])}
    assert rows[0][1:3] == ["102", "0"]
    mean = [float(cell.split(" ± ")[0]) for cell in (before[5], rows[0][5], rows[0][6])]
    assert mean[1] - mean[0] == pytest.approx(mean[2], abs=2e-4)


def test_false_verdicts(printed, load):
    """Times that are far apart have a factor, in the right direction only."""
    script = load("false_verdicts")
    assert printed("false_verdicts", "--comparisons=1")[2][:2] == ["2 optimizers, 5 seeds", "1"]
    rng = np.random.default_rng(0)
    far = script.compared(rng, 3, 7, faster=20.0)
    assert script.found(far)
    assert script.in_steps(far)
    assert script.in_time(far)
    assert script.by_interval(far)
    assert not script.found(script.compared(rng, 3, 7, faster=0.05))
    assert script.rates(2, 2, 5, 20.0, script.found, script.in_time) == ["100.0 ± 0.0 %"] * 2


def test_founding_runs(printed, tmp_path):
    """On noise; the second run of a configuration has other settings, and a finished one is not made again."""
    draw = np.random.default_rng(0)
    images = {f"x_{half}": draw.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for half, n in SIZES.items()}
    labels = {f"y_{half}": np.arange(n) % 2 for half, n in SIZES.items()}
    np.savez(tmp_path / "cifar10.npz", **images, **labels)
    few = ["--set=training.epochs=1", "--set=model.width=2"]
    arguments = [f"--data={tmp_path}", f"--cache={tmp_path / 'runs'}", "--only", "cifar10_sgd", *few]
    head, _, first, second = printed("founding_runs", *arguments)
    assert len(first) == len(head) == 7
    assert first[0].startswith("cifar10_sgd, training")
    assert second[0].startswith("cifar10_sgd, optimizer.lr=0.05")
    assert first[1:3] == ["1", "63.6 (test)"]
    assert first[3] == first[5]
    assert printed("founding_runs", *arguments)[2:] == [first, second]
