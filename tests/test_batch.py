"""A batch file: read whole, every broken entry named, nothing started before; what is there is not made again."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fake_worker import use_fake_workers
from losslab import cli
from losslab.cli import batching
from losslab.optim import FIXES, TALTOptions
from losslab.status import StopRequested
from losslab.studies import batch as batches
from losslab.studies.batch import rehearsed, run_batch
from losslab.studies.batch_file import Batch, read_batch
from losslab.studies.config import apply
from losslab.studies.config_file import ConfigError
from losslab.studies.engine.following import RunRow
from losslab.studies.engine.jobs import EngineOptions, Outcome
from losslab.studies.lock import locked
from losslab.studies.record import RunFolder
from losslab.studies.shipped import find_config, shipped_configs
from losslab.studies.train import train

SMALL = {"model": {"name": "mlp", "width": 4}, "dataset": {"train_examples": 64}, "training": {"epochs": 1}}


def write(folder: Path, **values) -> Path:
    path = folder / "batch.json"
    path.write_text(json.dumps(values))
    return path


def by_name(batch: Batch) -> dict:
    return {entry.config.name: entry.config for entry in batch.entries}


@pytest.fixture
def trained(monkeypatch):
    """An engine that trains nothing: it notes its jobs, and ends those named in `failing` badly."""
    jobs: list = []

    def run_jobs(given, options, progress, *, table):
        jobs[:] = [*given, options]
        outcomes = []
        for job in given:
            bad = job.name.startswith("bad")
            folder = RunFolder.create(job.folder)
            folder.write_config(job.config.model_dump(mode="json"))
            ended = {"diverged": True, "status": "diverged"} if job.name.startswith("wild") else {"status": "completed"}
            folder.log(8, {"kind": "final", "test_accuracy": 0.875, "test_loss": 0.5, **ended})
            status, error = ("failed", "the disk is full") if bad else ("finished", None)
            outcomes.append(Outcome(job.name, job.folder, status, 1, error, 2.0))
        return outcomes

    monkeypatch.setattr(batches, "run_jobs", run_jobs)
    return jobs


def test_runs_are_laid_over_the_defaults(tmp_path):
    batch = read_batch(
        write(
            tmp_path,
            description="why",
            defaults={**SMALL, "optimizer": {"name": "sgd", "momentum": 0.9}, "seed": 3},
            runs=[
                {"name": "plain"},
                {"name": "faster", "optimizer": {"lr": 0.5}, "model": {"width": 8}},
                {"name": "other", "optimizer": {"name": "adamw", "lr": 0.01}},
            ],
        )
    )
    assert (batch.description, batch.problems) == ("why", ())
    runs = by_name(batch)
    assert list(runs) == ["plain", "faster", "other"]
    assert {config.seed for config in runs.values()} == {3}
    assert runs["plain"].optimizer.momentum == 0.9
    assert (runs["faster"].optimizer.momentum, runs["faster"].optimizer.lr) == (0.9, 0.5)
    assert (runs["faster"].model.name, runs["faster"].model.width) == ("mlp", 8)
    assert (runs["other"].optimizer.name, runs["other"].optimizer.momentum) == ("adamw", 0.0)  # nothing of SGD's


def test_an_entry_with_seeds_is_as_many_runs(tmp_path):
    entries = [{"name": "a"}, {"name": "b", "seeds": [5]}]
    runs = by_name(read_batch(write(tmp_path, defaults={**SMALL, "seeds": [0, 1]}, runs=entries)))
    assert {name: config.seed for name, config in runs.items()} == {"a-seed0": 0, "a-seed1": 1, "b-seed5": 5}


def test_the_founding_form_is_read_by_the_same_flags_as_train(tmp_path):
    experiment = {
        "name": "cnn", "architecture": "simplecnn", "dataset": "mnist", "optimizer": "adam", "lr": 0.001,
        "batch-size": 32, "epochs": 3, "weight_decay": 0.01, "mixed-precision": True, "seed": 4,
    }  # fmt: skip
    (entry,) = read_batch(write(tmp_path, description="d", experiments=[experiment])).entries
    config = entry.config
    assert (config.name, config.seed, config.model.name, config.dataset.name) == ("cnn", 4, "simple_cnn", "mnist")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adam", 0.001, 0.01)
    assert (config.dataset.batch_size, config.training.epochs) == (32, 3)
    assert config.training.precision == "bf16-mixed"


def test_yaml_is_read_too(tmp_path):
    path = tmp_path / "batch.yaml"
    path.write_text("runs:\n  - {name: a, optimizer: {lr: 5e-4}}\n")
    assert by_name(read_batch(path))["a"].optimizer.lr == 5e-4


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"name": "b", "optimizer": {"lr": "fast"}}, "runs[1] (b): optimizer.lr: expected a number > 0, got 'fast'"),
        ({"name": "b", "optimizr": {}}, "runs[1] (b): optimizr: unknown key, did you mean 'optimizer'?"),
        ("b", "runs[1]: expected a mapping, got 'b'"),
        ({"name": "A"}, "runs[1] (A): name: 'A' is taken by runs[0] (a)"),
        ({"name": "b", "seeds": 3}, "runs[1] (b): seeds: expected a list of integers such as [0, 1, 2], got 3"),
        ({"name": "b", "seeds": [0], "seed": 1}, "seeds: expected a list of integers such as [0, 1, 2], got both"),
        ({"name": "b", "seeds": [0, 0]}, "runs[1] (b): name: 'b-seed0' is taken by runs[1] (b)"),
        ({"name": "b", "seeds": [-1]}, "runs[1] (b): seed: expected an integer >= 0"),
    ],
)
def test_a_broken_entry_is_named_and_the_others_are_read(entry, says, tmp_path):
    batch = read_batch(write(tmp_path, runs=[{"name": "a"}, entry, {"name": "c"}]))
    (problem,) = batch.problems
    assert says in problem
    assert problem.startswith(str(tmp_path / "batch.json"))
    assert list(by_name(batch)) == ["a", "c"]


def test_a_broken_experiment_is_named_by_its_flag(tmp_path):
    (problem,) = read_batch(write(tmp_path, experiments=[{"name": "a", "learning-rte": 1}])).problems
    assert "experiments[0]: --learning-rte: no such flag" in problem


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "runs: expected a list of configurations, got null"),
        ({"runs": []}, r"runs: expected a list of configurations, got \[\]"),
        ({"runs": [{}], "default": {}}, "default: unknown key, did you mean 'defaults'"),
        ({"runs": [{}], "defaults": 3}, "defaults: expected a mapping, got 3"),
        ({"experiments": [{}], "defaults": {}}, "defaults: unknown key"),
    ],
)
def test_a_file_that_is_no_batch(values, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        read_batch(write(tmp_path, **{"description": "d", **values}))


def test_what_only_data_and_networks_can_tell_is_known_before(tmp_path):
    entries = [
        {"name": "model", "model": {"name": "mlpp"}},
        {"name": "data", "dataset": {"name": "digitz"}},
        {"name": "absent", "dataset": {"name": f"arrays:{tmp_path}/none.npz"}},
        {"name": "pair", "model": {"name": "bert_tiny"}},
        {"name": "good", **SMALL},
    ]
    batch = rehearsed(read_batch(write(tmp_path, runs=entries)))
    assert list(by_name(batch)) == ["good"]
    model, data, absent, pair = batch.problems
    assert "runs[0] (model): model.name: unknown model 'mlpp', did you mean 'mlp'?" in model
    assert "runs[1] (data): dataset.name: unknown data set 'digitz', did you mean 'digits'?" in data
    assert "runs[2] (absent)" in absent
    assert "none.npz" in absent
    assert "runs[3] (pair)" in pair


def test_nothing_is_started_where_an_entry_is_broken(tmp_path, trained):
    batch = read_batch(write(tmp_path, runs=[{"name": "a", **SMALL}, {"name": "b", "seed": -1}]))
    with pytest.raises(ConfigError, match=r"runs\[1\] \(b\): seed: [^\n]*\nnothing was started: .*--skip-invalid"):
        run_batch(batch, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (outcome,) = run_batch(batch, tmp_path / "out", skip_invalid=True)
    assert outcome.name == "a"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert ["runs[1] (b)" in problem for problem in summary["problems"]] == [True]


def test_where_no_entry_is_sound_nothing_can_be_skipped(tmp_path, trained):
    batch = read_batch(write(tmp_path, runs=[{"name": "b", "seed": -1}]))
    with pytest.raises(ConfigError, match=r"nothing was started: mend the file$"):
        run_batch(batch, tmp_path / "out", skip_invalid=True)


def test_what_was_asked_for_and_how_it_ended_is_written(tmp_path, trained):
    batch = read_batch(write(tmp_path, description="why", defaults=SMALL, runs=[{"name": "good"}, {"name": "bad"}]))
    options = EngineOptions(parallel=3)
    run_batch(batch, tmp_path / "out", options)
    *jobs, given = trained
    assert given is options
    assert [job.folder for job in jobs] == [tmp_path / "out" / "good", tmp_path / "out" / "bad"]
    resolved = json.loads((tmp_path / "out" / "batch.json").read_text())
    assert resolved["runs"] == [job.config.model_dump(mode="json") for job in jobs]
    assert by_name(read_batch(tmp_path / "out" / "batch.json")) == {job.name: job.config for job in jobs}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["description"] == "why"
    good, bad = summary["runs"]
    assert (good["folder"], good["status"], good["final"]["test_accuracy"]) == ("good", "finished", 0.875)
    assert (bad["status"], bad["error"], bad["final"]) == ("failed", "the disk is full", {})


def test_a_folder_is_one_batch_s(tmp_path, trained):
    first = read_batch(write(tmp_path, runs=[{"name": "a", **SMALL}]))
    run_batch(first, tmp_path / "out")
    with pytest.raises(FileExistsError, match="another batch is there"):
        run_batch(read_batch(write(tmp_path, runs=[{"name": "b", **SMALL}])), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "batch.json").write_text("[1]")
    with pytest.raises(FileExistsError, match="not a batch's"):
        run_batch(first, tmp_path / "mine")
    with locked(tmp_path / "busy"), pytest.raises(BlockingIOError, match="works here"):
        run_batch(first, tmp_path / "busy")


@pytest.fixture
def command(tmp_path, trained):
    """`losslab batch` on a file of these runs."""

    def run(names, *arguments: str):
        path = write(tmp_path, defaults=SMALL, runs=[{"name": name} for name in names])
        output = ["--output-dir", str(tmp_path / "out")]
        return CliRunner().invoke(cli.app, ["batch", "--config", str(path), *output, *arguments])

    return run


def test_the_command_prints_how_each_run_ended(command):
    done = command(["good", "wild"])
    assert done.exit_code == 0, done.output
    assert "87.50 %" in done.output
    assert "diverged" in done.output
    assert "2 finished" in done.output


def test_seeds_are_one_line_and_no_number_is_cut_off(tmp_path, trained, monkeypatch):
    """In 80 columns, with the longest names of the shipped batches."""
    monkeypatch.setattr(batching, "console", Console(width=80, file=(printed := io.StringIO())))
    outcomes = []
    for number, accuracy in enumerate((0.9, 0.95, 1.0)):
        folder = RunFolder.create(tmp_path / f"without_transformation_stability-seed{number}")
        folder.write_config({})
        status = "diverged" if number == 2 else "completed"
        loss = float("nan") if number == 2 else 0.25 + accuracy
        folder.log(8, {"kind": "final", "status": status, "test_accuracy": accuracy, "test_loss": loss})
        outcomes.append(Outcome(folder.path.name, folder.path, "finished", 1 + number, None, 7.0 + number))
    outcomes.append(Outcome("without_transformation_stability-seed3", tmp_path / "no", "failed", 1, "why", 1.0))
    outcomes.append(dataclasses.replace(outcomes[0], name="alone"))
    batching.console.print(batching._ends(outcomes))
    text = printed.getvalue()
    for shown in ("2 finished", "1 diverged", "1 failed", "3 attempts", "95.00 ± 5.00 %", "NaN", " 7.5 "):
        assert shown in text
    assert [cell.strip() for cell in text.splitlines()[-2].split("│")[1:-1]] == [
        "alone", "finished", "90.00 %", "1.15", "7.0",
    ]  # fmt: skip
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_command_fails_with_a_run(command):
    done = command(["good", "bad"])
    assert done.exit_code == 1
    assert "bad: the disk is full" in done.output
    assert "1 finished, 1 failed" in done.output


def test_stopped_the_command_ends_as_ctrl_c_does(command, monkeypatch):
    def stopped(jobs, options, progress, *, table):
        return [Outcome(job.name, job.folder, "stopped", 1, None, 1.0) for job in jobs]

    monkeypatch.setattr(batches, "run_jobs", stopped)
    assert command(["a"]).exit_code == 130


@pytest.mark.parametrize(
    ("arguments", "parallel"),
    [
        ([], None),
        (["--parallel", "3"], 3),
        (["--parallel"], len(batching.available_cpus())),
        (["--parallel", "--quiet"], len(batching.available_cpus())),
        (["--parallel=2"], 2),
    ],
)
def test_parallel_with_and_without_a_number(arguments, parallel, command, trained):
    assert command(["a"], *arguments).exit_code == 0
    assert trained[-1] == EngineOptions(parallel=parallel)


def test_all_options_reach_the_engine(command, trained):
    resources = ["--cpus", "2", "--gpus", "1", "--memory", "1.5"]
    ray = ["--engine", "ray", "--address", "auto", "--retries", "5"]
    assert command(["a"], "--parallel", *ray, *resources).exit_code == 0
    assert trained[-1] == EngineOptions(
        parallel=None, engine="ray", address="auto", retries=5, cpus=2, gpus=1, memory=3 << 29
    )


def test_a_broken_file_is_lines_and_exit_code_2(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, runs=[{"name": "a", **SMALL}, {"name": "b", "seed": -1}])
    monkeypatch.setattr(sys, "argv", ["losslab", "batch", "--config", str(path), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "runs[1] (b): seed: expected an integer >= 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_shows_who_is_at_work_first():
    rows = [RunRow(f"waiting-{number}", "waiting", 0, 0.0, None, {}) for number in range(3)]
    values = {"epoch": 2, "train_loss": 0.25, "validation_accuracy": 0.5, "learning_rate": 0.01}
    rows.append(RunRow("busy", "running", 2, 0.5, None, values))
    with batching.console.capture() as captured:
        batching.console.print(batching.progress_table(rows, room=2))
    text = captured.get()
    assert text.index("busy") < text.index("waiting-0")
    for shown in ("running #2", "50%", "0.25", "50.0%", "0.01", "and 2 more"):
        assert shown in text
    assert "waiting-1" not in text


def test_shipped_files_are_found_by_name():
    assert find_config("optimizers_digits", "batch") == shipped_configs("batch")["optimizers_digits"]
    assert "optimizers_digits" not in shipped_configs()
    assert find_config("mine.json", "batch") == Path("mine.json")


@pytest.mark.parametrize("name", shipped_configs("batch"))
def test_shipped_batches_are_sound(name):
    batch = read_batch(find_config(name, "batch"))
    assert batch.problems == ()
    assert batch.description


def test_the_ablation_of_talts_fixes_has_them_all_each_but_one_each_alone_and_none():
    batch = read_batch(find_config("theoretical_fixes_ablation", "batch"))
    found: dict[tuple[str, ...], set[int]] = {}
    for entry in batch.entries:
        talt = entry.config.optimizer.talt
        on = tuple(fix for fix in FIXES if getattr(talt, fix))
        found.setdefault(on, set()).add(entry.config.seed)
        # Raw gradients need another rate; nothing else differs but the switches.
        assert entry.config.optimizer.lr == (0.005 if talt.parameter_normalization else 1.0)
        assert entry.config.name.rpartition("-")[0] == {8: "full", 0: "none"}.get(
            len(on), f"only_{on[0]}" if len(on) == 1 else f"without_{min({*FIXES} - {*on}, default='')}"
        )
        rest = talt.options().with_fixes(())
        assert rest == TALTOptions(max_side=128, thresholds=(1e-7, 1e-6), near_fraction=0.2).with_fixes(())
    each = [(fix,) for fix in FIXES]
    but_one = [tuple(fix for fix in FIXES if fix != left_out) for left_out in FIXES]
    assert set(found) == {FIXES, *but_one, *each, ()}
    assert len(found) == 18
    assert set(map(frozenset, found.values())) == {frozenset(range(5))}


def test_an_entry_of_the_ablation_trains(tmp_path):
    """The one with fixed thresholds, which lie where some of its directions do."""
    batch = read_batch(find_config("theoretical_fixes_ablation", "batch"))
    config = by_name(batch)["without_statistical_thresholds-seed0"]
    final = train(apply(config, {"training.max_steps": 40}), RunFolder.create(tmp_path / "run")).final
    assert final["status"] == "completed"
    assert final["test_loss"] < 2.2  # chance is 2.3


def test_stopped_and_started_again_it_makes_what_is_missing(tmp_path, monkeypatch):
    """With the engine, and workers that train nothing."""
    use_fake_workers(monkeypatch)
    batch = read_batch(write(tmp_path, defaults=SMALL, runs=[{"name": "good"}, {"name": "clumsy"}, {"name": "broken"}]))

    def stop(rows):
        if rows[0].state == "finished":
            raise StopRequested

    def again(**arguments):
        outcomes = run_batch(batch, tmp_path / "out", **arguments)
        written = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
        assert [run["status"] for run in written] == [outcome.status for outcome in outcomes]
        return [outcome.status for outcome in outcomes]

    assert again(table=stop) == ["finished", "stopped", "stopped"]
    assert again() == ["skipped", "finished", "failed"]
