"""Tuning: as many trials as asked for, whoever works on them and whoever is killed; pruned, resumed, judged."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tuning_cases as cases
from losslab import cli
from losslab.report import tuning as page
from losslab.status import Status, StopRequested
from losslab.studies import tune as tune_module
from losslab.studies.config import apply, load_config
from losslab.studies.config_file import ConfigError
from losslab.studies.record import RunFolder
from losslab.studies.spaces import SPACES, Choice, Range
from losslab.studies.tune import TuneOptions, tune
from losslab.studies.tuning import trial as trial_module
from losslab.studies.tuning import workers
from losslab.studies.tuning.journal import Journal
from losslab.studies.tuning.result import Trial, Tuned, best_of, ranking, warnings_about
from losslab.studies.tuning.sampling import importances, next_parameters
from losslab.studies.tuning.workers import Worker
from tuning_cases import BASE, EPOCHS, KILLED, PER_EPOCH, TRIALS, options

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Tuned]:
    """A study that nobody disturbed, with real training."""
    folder = tmp_path_factory.mktemp("tune") / "whole"
    return folder, tune(BASE, folder, options())


@pytest.fixture
def quick(monkeypatch):
    """Trials that take no time, on a disk that is as fast, with no forest fitted at the end."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(tune_module, "importances", lambda *arguments, **options: {})
    monkeypatch.setattr(trial_module, "train", cases.stand_in)


def test_every_trial_is_a_run_folder_and_the_best_is_the_best_of_the_whole_ones(whole):
    folder, tuned = whole
    assert [trial.number for trial in tuned.trials] == list(range(TRIALS))
    assert sorted(path.name for path in (folder / "trials").iterdir()) == [f"{n:03}" for n in range(TRIALS)]
    assert len({trial.parameters["optimizer.lr"] for trial in tuned.trials}) == TRIALS
    assert tuned.status is Status.complete
    assert tuned.trials[0].parameters == {"optimizer.lr": BASE.optimizer.lr, "optimizer.momentum": 0.0}
    complete = [trial for trial in tuned.trials if trial.status == "complete"]
    assert tuned.value == min(trial.value for trial in complete)
    for trial in complete:
        rows = RunFolder(folder / "trials" / f"{trial.number:03}").metrics()
        assert trial.value == rows[-2]["validation_loss"]
        assert trial.steps == EPOCHS * PER_EPOCH


def test_pruning_saves_steps(whole):
    folder, tuned = whole
    pruned = [trial for trial in tuned.trials if trial.status == "pruned"]
    assert pruned
    for trial in pruned:
        rows = RunFolder(folder / "trials" / f"{trial.number:03}").metrics()
        assert trial.steps in (PER_EPOCH, 3 * PER_EPOCH)
        assert rows[-1] == {**rows[-1], "kind": "epoch", "step": trial.steps, "validation_loss": trial.value}


def test_the_test_split_is_never_looked_at(whole):
    folder, _ = whole
    assert not [key for row in cases.rows_of(folder) for key in row if key.startswith("test_")]


def test_the_best_configuration_is_one_that_train_takes(whole):
    folder, tuned = whole
    best = load_config(folder / "best.yaml")
    assert best == tuned.best == apply(BASE, tuned.best_trial.parameters)
    assert best.training.evaluate_test
    assert Tuned.read(folder) == tuned


def test_no_checkpoints_and_no_workers_are_left(whole):
    folder, _ = whole
    assert not list(folder.glob("trials/*/checkpoints"))
    assert not list(folder.glob("workers/*"))


def test_killed_in_a_trial_it_goes_on_to_the_same_result(whole, tmp_path):
    """kill −9 in the middle of a trial, in another process; here it is taken up from its checkpoint."""
    folder, seen = tmp_path / "killed", []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cases.__file__).parent)}
    killed = subprocess.run([sys.executable, cases.__file__, str(folder)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(Tuned.read(folder).trials) == KILLED[0]
    tuned = tune(BASE, folder, options(), progress=lambda done, total, note: seen.append(done))
    assert cases.without_times(tuned) == cases.without_times(whole[1])
    assert tuned.best == whole[1].best
    # Its last checkpoint is that of the second epoch.
    assert seen[0] == pytest.approx(KILLED[0] + (2 * PER_EPOCH + 1) / (EPOCHS * PER_EPOCH))


def test_two_processes_share_the_trials(tmp_path):
    """The first one waits in its first trial until the other has begun one."""
    deadline = time.monotonic() + 120

    def wait(done: float, total: float, note: str) -> None:
        while not (tmp_path / "study" / "trials" / "001").exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    tuned = tune(BASE, tmp_path / "study", options(trials=5, pruner="none", parallel=2), progress=wait)
    assert [trial.number for trial in tuned.trials] == list(range(5))
    assert len(list((tmp_path / "study" / "trials").iterdir())) == 5
    log = (tmp_path / "study" / "study.log").read_text().splitlines()
    owners = [entry["user_attrs"]["worker"] for entry in map(json.loads, log) if "distributions" in entry]
    assert len(owners) == 5
    assert len(set(owners)) == 2


def test_stopped_at_every_evaluation_it_ends_as_if_it_had_not_been(quick, tmp_path):
    whole = tune(BASE, tmp_path / "whole", options())
    assert {trial.status for trial in whole.trials} == {"complete", "pruned", "diverged"}
    for _ in range(1000):
        calls = iter(range(PER_EPOCH))

        def stop(done: float, total: float, note: str, calls=calls) -> None:
            if next(calls, None) is None:
                raise StopRequested

        tuned = tune(BASE, tmp_path / "stopped", options(), progress=stop)
        if tuned.status is Status.complete:
            break
        assert Tuned.read(tmp_path / "stopped") == tuned
    assert cases.without_times(tuned) == cases.without_times(whole)


def test_killed_between_the_last_notes_of_a_trial_it_is_only_counted(quick, tmp_path, monkeypatch):
    whole = tune(BASE, tmp_path / "whole", options())
    for status in ("complete", "pruned"):
        folder = tmp_path / status

        def killed(journal, number, outcome, status=status, close=Journal.close):
            if outcome.status == status:
                journal.decide(number, outcome)
                raise KeyboardInterrupt
            close(journal, number, outcome)

        monkeypatch.setattr(Journal, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(BASE, folder, options())
        monkeypatch.undo()
        monkeypatch.setattr(trial_module, "train", cases.stand_in)
        before = len(Tuned.read(folder).trials) if (folder / "tuning.json").exists() else 0
        rows = len(cases.rows_of(folder))
        assert tune(BASE, folder, options(trials=before + 1)).trials == whole.trials[: before + 1]
        assert len(cases.rows_of(folder)) == rows  # nothing was trained again


def test_more_trials_go_on_with_the_same_study(quick, tmp_path):
    first = tune(BASE, tmp_path, options(trials=3))
    again = tune(BASE, tmp_path, options(trials=3))
    assert again == first
    more = tune(BASE, tmp_path, options(trials=5))
    assert more.trials[:3] == first.trials
    assert len(more.trials) == 5
    assert tune(BASE, tmp_path, options(trials=2)).trials == more.trials  # what is there stays


def test_a_trial_that_diverges_has_the_worst_value(quick, tmp_path):
    for metric, worst in (("validation_loss", math.inf), ("validation_accuracy", -math.inf)):
        base = apply(BASE, {"optimizer.lr": 8.0})
        tuned = tune(base, tmp_path / metric, options(trials=3, metric=metric))
        assert (tuned.trials[0].status, tuned.trials[0].value) == ("diverged", worst)
        assert tuned.best_trial.status == "complete"
        assert math.isfinite(tuned.value)
        only = tune(base, tmp_path / "only" / metric, options(trials=1, metric=metric))
        assert only.best == base
        assert only.value == worst
        assert "diverging" in only.warnings[0]


def test_accuracies_are_made_large(quick, tmp_path):
    tuned = tune(BASE, tmp_path, options(metric="validation_accuracy", pruner="none"))
    assert tuned.value == max(trial.value for trial in tuned.trials)
    best = tune(BASE, tmp_path / "loss", options(pruner="none")).best_trial.number
    assert tuned.best_trial.number == best  # the accuracy falls where the loss rises


def test_pruners(quick, tmp_path):
    """Hyperband gives some trials more time than successive halving does; without one all end."""
    steps = {
        name: sum(trial.steps for trial in tune(BASE, tmp_path / name, options(trials=12, pruner=name)).trials)
        for name in ("asha", "hyperband", "none")
    }
    assert steps["asha"] < steps["hyperband"] < steps["none"]


def test_a_target_ends_no_trial(quick, tmp_path, monkeypatch):
    trained = []

    def remember(config, *args, **keywords):
        trained.append(config)
        return cases.stand_in(config, *args, **keywords)

    monkeypatch.setattr(trial_module, "train", remember)
    base = apply(BASE, {"training.target.value": 0.5})
    tuned = tune(base, tmp_path, options(trials=1))
    assert not trained[0].training.target.stop
    assert tuned.best.training.target.stop


def test_one_that_was_taken_for_dead_gives_its_trial_up(quick, tmp_path, monkeypatch):
    """Another worker gets the trial; this one ends it without a word and goes on with the next."""
    taken = []

    def robbed(config, run, **keywords):
        if not taken:
            taken.append(config.name)
            journal = Journal(tmp_path, BASE, options(trials=2).fitted(BASE))
            with Worker(tmp_path) as other:
                monkeypatch.setattr(Worker, "is_dead", lambda self, name: True)
                claim = journal.claim(other)
                monkeypatch.undo()
                assert claim.number == 0
                cases.stand_in(config, run, **keywords)  # finds out at its first evaluation
                assert run.metrics()[-1]["epoch"] == 1
            monkeypatch.setattr(trial_module, "train", cases.stand_in)
            return run
        return cases.stand_in(config, run, **keywords)

    monkeypatch.setattr(trial_module, "train", robbed)
    tuned = tune(BASE, tmp_path, options(trials=2))
    assert [(trial.number, trial.status) for trial in tuned.trials] == [(0, "complete"), (1, tuned.trials[1].status)]


def test_who_is_dead(tmp_path, monkeypatch):
    def write(name: str, **changes) -> str:
        (tmp_path / "workers" / f"{name}.json").write_text(json.dumps(alive | changes))
        return name

    with Worker(tmp_path) as worker, Worker(tmp_path) as other:
        alive = json.loads((tmp_path / "workers" / f"{other.id}.json").read_text())
        assert not worker.is_dead(other.id)
        assert worker.is_dead("nobody")
        assert worker.is_dead(write("reused", started=alive["started"] - 100))
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        assert worker.is_dead(write("ended", pid=ended.pid))
        elsewhere = write("elsewhere", machine="another")
        assert not worker.is_dead(elsewhere)
        monkeypatch.setattr(workers, "SILENCE", -1.0)
        assert worker.is_dead(elsewhere)
        os.utime(tmp_path / "workers" / "elsewhere.json", (1, 1))  # a sign of life, on a clock that is far behind
        assert not worker.is_dead(elsewhere)
    assert worker.is_dead(other.id)


def test_a_worker_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "BEAT", 0.01)
    with Worker(tmp_path) as worker:
        path = tmp_path / "workers" / f"{worker.id}.json"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1


def test_a_torn_line_of_the_journal_was_never_said(quick, tmp_path):
    first = tune(BASE, tmp_path, options(trials=2))
    with (tmp_path / "study.log").open("a") as file:
        file.write('{"op_code":4,"worker')
    assert tune(BASE, tmp_path, options(trials=3)).trials[:2] == first.trials
    text = (tmp_path / "study.log").read_text().splitlines()
    (tmp_path / "study.log").write_text("\n".join([text[0], "{", *text[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"study\.log: damaged"):
        tune(BASE, tmp_path, options(trials=3))


@pytest.mark.parametrize(
    ("changes", "base", "says"),
    [
        ({"space": {"optimizer.lr": Range(1e-3, 1.0, log=True)}}, BASE, "another space"),
        ({"metric": "validation_accuracy"}, BASE, "another metric"),
        ({"seed": 1}, BASE, "another seed"),
        ({"pruner": "none"}, BASE, "another pruner"),
        ({}, apply(BASE, {"model.width": 9}), "another configuration"),
    ],
)
def test_a_study_of_something_else_is_refused(quick, tmp_path, changes, base, says):
    tune(BASE, tmp_path, options(trials=1))
    before = (tmp_path / "study.log").read_text()
    with pytest.raises(ValueError, match=says):
        tune(base, tmp_path, options(trials=1, **changes))
    assert (tmp_path / "study.log").read_text() == before


def test_what_is_no_study_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no study"):
        tune(BASE, tmp_path, options())
    with pytest.raises(FileExistsError, match="a file is there"):
        tune(BASE, tmp_path / "mine.txt", options())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {}}, "space: expected at least one"),
        ({"trials": 0}, "trials: expected an integer >= 1, got 0"),
        ({"parallel": 0}, "parallel: expected"),
        ({"metric": "validation_los"}, "did you mean 'validation_loss'"),
        ({"pruner": "ahsa"}, "did you mean 'asha'"),
        ({"space": {"optimizer.lrr": Range(0.1, 1.0)}}, "space: optimizer.lrr: unknown key, did you mean 'lr'"),
        ({"space": {"optimizer.momentum": Range(0.5, 1.0)}}, "space: optimizer.momentum: expected a number"),
        ({"space": {"model.width": Range(0.5, 8.0)}}, "space: model.width: expected an integer"),
        ({"space": {"model.width": Choice((8, "wide"))}}, "space: model.width: expected an integer >= 1, got 'wide'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises((ValueError, ConfigError), match=says.replace("(", r"\(")):
        tune(BASE, tmp_path / "study", options(**changes))
    assert not (tmp_path / "study").exists()


def test_under_torchrun_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="got one of torchrun's"):
        tune(BASE, tmp_path / "study", options())


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="pip install 'losslab\\[tune\\]'"):
        tune(BASE, tmp_path / "study", options())


def some_trials(count: int, space, value, seed: int = 0) -> list[Trial]:
    """Trials at random places."""
    trials: list[Trial] = []
    for number in range(count):
        drawn = next_parameters(space, [], [{}] * 0, maximize=False, seed=seed + number)
        trials.append(Trial(number, "complete", value(drawn), drawn, 10, 1.0, 1.0))
    return trials


def test_the_sampler_keeps_to_the_space_and_to_its_seed():
    space = {"a": Range(1, 9), "b": Range(1e-4, 1e-1, log=True), "c": Choice(((0.9, 0.99), (0.9, 0.999), None))}
    drawn = [next_parameters(space, [], [], maximize=False, seed=seed) for seed in range(40)]
    assert {type(values["a"]) for values in drawn} == {int}
    assert all(1 <= values["a"] <= 9 and 1e-4 <= values["b"] <= 1e-1 for values in drawn)
    assert {values["c"] for values in drawn} == set(space["c"].values)
    below = sum(values["b"] < 10**-2.5 for values in drawn)  # half of the decades
    assert 10 <= below <= 30  # 40 fair coins: 99.9 %
    assert drawn[7] == next_parameters(space, [], [], maximize=False, seed=7)


def test_the_sampler_goes_where_it_is_good_and_not_where_others_are():
    space = {"optimizer.lr": Range(1e-3, 1e3, log=True)}
    trials = some_trials(20, space, lambda values: abs(math.log10(values["optimizer.lr"]) - 1))
    for maximize, shown in ((False, trials), (True, [dataclasses.replace(t, value=-t.value) for t in trials])):
        next_ones = [next_parameters(space, shown, [], maximize=maximize, seed=seed) for seed in range(20)]
        distances = [abs(math.log10(values["optimizer.lr"]) - 1) for values in next_ones]
        assert np.median(distances) < 0.5  # at random: 1.7
    alone = next_parameters(space, trials, [], maximize=False, seed=0)
    assert next_parameters(space, trials, [alone] * 5, maximize=False, seed=0) != alone


def test_importances_see_what_decides_on_the_scale_of_the_range():
    """Only the decade of the rate matters, and losses at large ones are huge; the choice does nothing."""
    space = {"lr": Range(1e-5, 1.0, log=True), "other": Range(0.0, 1.0), "kind": Choice(("x", "y"))}
    trials = some_trials(40, space, lambda values: 10.0 ** abs(math.log10(values["lr"]) + 3))
    found = importances(space, trials, maximize=False)
    assert sum(found.values()) == pytest.approx(1)
    assert next(iter(found)) == "lr"
    assert found["lr"] > 0.8
    assert found == importances(space, trials, maximize=False)
    assert importances(space, trials[:3], maximize=False) == {}


def test_the_order_of_trials():
    trials = [
        Trial(0, "diverged", math.inf, {}, 1, 0.1, 1.0),
        Trial(1, "pruned", 0.1, {}, 1, 0.1, 1.0),
        Trial(2, "pruned", 0.3, {}, 3, 0.3, 1.0),
        Trial(3, "complete", 0.5, {}, 9, 1.0, 1.0),
        Trial(4, "complete", 0.4, {}, 9, 1.0, 1.0),
        Trial(5, "complete", 0.4, {}, 9, 1.0, 1.0),
    ]
    assert [trial.number for trial in ranking(trials, maximize=False)] == [4, 5, 3, 2, 1, 0]
    assert best_of(trials, maximize=False).number == 4
    assert best_of(trials[:3], maximize=False).number == 0  # an unfinished training is no result
    assert best_of([], maximize=False) is None


def test_the_first_at_the_target_is_the_best():
    reached = {0: math.inf, 1: 0.5, 2: 0.25, 3: 0.25}
    values = {0: 0.99, 1: 0.98, 2: 0.96, 3: 0.97}
    trials = [Trial(i, "complete", values[i], {}, 9, 1.0, 1.0, reached[i]) for i in range(4)]
    assert [trial.number for trial in ranking(trials, maximize=True)] == [3, 2, 1, 0]
    assert best_of(trials, maximize=True).number == 3


def test_a_study_with_a_target_takes_whoever_is_there_first(quick, tmp_path):
    """Each trial notes after which part of its steps it was there: ∞ where it never was, or without a target."""
    wanted = options(metric="validation_accuracy", pruner="none", target=0.3)
    found = tune(BASE, tmp_path / "soon", wanted)
    for trial in found.trials:
        rows = RunFolder(tmp_path / "soon" / "trials" / f"{trial.number:03}").metrics()
        epochs = [row["epoch"] for row in rows if row["kind"] == "epoch" and row["validation_accuracy"] >= 0.3]
        assert trial.reached == (min(epochs) / EPOCHS if epochs and trial.status == "complete" else math.inf)
    first = min(trial.reached for trial in found.trials)
    assert 0 < first < max(trial.reached for trial in found.trials)
    assert found.best_trial.reached == first
    assert Tuned.read(tmp_path / "soon").best_trial == found.best_trial
    with pytest.raises(ValueError, match="another target"):
        tune(BASE, tmp_path / "soon", dataclasses.replace(wanted, target=0.4))
    unasked = tune(BASE, tmp_path / "end", options(pruner="none"))
    assert {trial.reached for trial in unasked.trials} == {math.inf}


@pytest.mark.parametrize(
    ("value", "says"), [(1.1e-3, "lower end"), (0.9, "upper end"), (0.03, ""), (3e-3, ""), (0.4, "")]
)
def test_a_best_value_at_an_end_of_its_range_is_told(value, says):
    space = {"optimizer.lr": Range(1e-3, 1.0, log=True), "model.width": Choice((8, 16))}
    best = Trial(0, "complete", 0.1, {"optimizer.lr": value, "model.width": 8}, 9, 1.0, 1.0)
    found = warnings_about([best], best, space, {})
    assert [says in line and "optimizer.lr" in line for line in found] == [True] * bool(says)


def test_all_shipped_spaces_can_be_drawn_from():
    for name, space in SPACES.items():
        base = apply(BASE, {"optimizer": {"name": name}})
        asked = TuneOptions(space=space)
        asked.check(base)
        apply(base, next_parameters(asked.fitted(base).space, [], [], maximize=False, seed=0))


def test_changes_by_dotted_names():
    changed = apply(BASE, {"optimizer.lr": 0.5, "training.target.value": 0.9, "optimizer.betas": (0.9, 0.999)})
    assert changed.optimizer.lr == 0.5
    assert changed.training.target.value == 0.9
    assert apply(changed, {"training.target": None, "optimizer.lr": BASE.optimizer.lr}) == BASE
    with pytest.raises(ConfigError, match="changes: optimiser: unknown key, did you mean 'optimizer'"):
        apply(BASE, {"optimiser.lr": 0.1})
    with pytest.raises(ConfigError, match=r"seed\.x: 'seed' is not a section"):
        apply(BASE, {"seed.x": 1})


COMMAND = [
    *("tune", "sgd", "--set", "model.name=mlp", "--set", "optimizer.weight_decay=0.0", "--quiet"),
    *("--set-space", "optimizer.lr=1e-3:10:log", "--set-space", "optimizer.momentum=0.0,0.9"),
]


def test_the_command_ends_with_the_picture(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_module, "importances", importances)
    folder = tmp_path / "study"
    result = CliRunner().invoke(cli.app, [*COMMAND, "--n-trials", "6", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    tuned = Tuned.read(folder)
    assert len(tuned.trials) == 6
    assert tuned.space["optimizer.lr"] == {"low": 1e-3, "high": 10.0, "log": True}
    assert tuned.space["optimizer.momentum"] == {"choices": [0.0, 0.9]}
    assert f"trial {tuned.best_trial.number}, has lr" in result.output
    assert "importances, from 6 trials" in result.output
    assert f"losslab train {folder / 'best.yaml'}" in result.output.replace("\n", "")
    assert {path.stem for path in (folder / "figures").iterdir()} == {"trials", "importances", "parameters"}
    (folder / "report.html").unlink()
    again = CliRunner().invoke(cli.app, ["report", str(folder)])
    assert again.exit_code == 0, again.output
    html = (folder / "report.html").read_text()
    assert "losslab · tuning" in html
    assert "optimizer" in html
    assert not page.is_tuning(folder / "trials")


def test_ctrl_c_shows_what_is_known_and_can_be_gone_on_with(quick, tmp_path, monkeypatch):
    folder = tmp_path / "study"

    def interrupted(config, run, *, progress, **keywords):
        def tick(done, total, note):
            if config.name.endswith("-002") and done == 12:
                os.kill(os.getpid(), signal.SIGINT)
            progress(done, total, note)

        return cases.stand_in(config, run, progress=tick, **keywords)

    monkeypatch.setattr(trial_module, "train", interrupted)
    command = [*COMMAND, "--pruner", "none", "--trials", "4", "--output", str(folder)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 130, result.output
    assert "2 of 4 trials" in result.output
    assert "goes on" in result.output
    assert json.loads((folder / "trials" / "002" / "checkpoints" / "last.json").read_text())["step"] == 12
    monkeypatch.setattr(trial_module, "train", cases.stand_in)
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert len(Tuned.read(folder).trials) == 4


def test_a_space_from_a_file(quick, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("optimizer.lr: {low: 1e-3, high: 1.0, log: true}\nmodel.width: {low: 4, high: 8}\n")
    command = [*COMMAND[:7], "--space", str(space), "--set-space", "optimizer.lr=0.1:0.2"]
    result = CliRunner().invoke(cli.app, [*command, "--trials", "2", "--output", str(tmp_path / "study")])
    assert result.exit_code == 0, result.output
    tuned = Tuned.read(tmp_path / "study")
    assert tuned.space["optimizer.lr"] == {"low": 0.1, "high": 0.2, "log": False}
    assert all(isinstance(trial.parameters["model.width"], int) for trial in tuned.trials)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set-space", "optimizer.lr"], "expected KEY=LOW:HIGH"),
        (["--set-space", "optimizer.lr=1:2:lgo"], "expected LOW:HIGH or LOW:HIGH:log"),
        (["--set-space", "optimizer.lr=2:1"], "optimizer.lr: low: expected a number < high"),
        (["--set-space", "optimizer.lr=a:b"], "optimizer.lr: low: expected a finite number"),
        (["--set-space", "optimizer.lr=[1:2"], "--set-space optimizer.lr="),
        (["--space", "nowhere.yaml"], "no such file"),
        (["--metric", "test_loss"], "metric: 'test_loss' is not known"),
    ],
)
def test_errors_of_the_command_are_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    command = ["losslab", *COMMAND[:7], *arguments, "--output", str(tmp_path / "study")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert says in line
    assert len(line.strip().splitlines()) == 1
    assert not (tmp_path / "study").exists()
