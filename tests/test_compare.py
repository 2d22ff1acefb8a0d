"""The honest comparison: its plan, its protocol (played through with fakes), one small real one, its report."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from losslab import cli
from losslab.report import comparison_page
from losslab.report.charts.comparison import charts
from losslab.report.comparison import read
from losslab.report.comparison_table import pair_cells, remarks
from losslab.status import Status, StopRequested
from losslab.studies.compare import protocol
from losslab.studies.compare.measured import SeedRun, baseline_of, pairings
from losslab.studies.compare.plan import load_plan, make_plan
from losslab.studies.compare.protocol import compare
from losslab.studies.compare.result import UNKNOWN, Comparison, Contender, Pairing, load
from losslab.studies.compare.statistics import Estimate, holm, paired_test, smallest_p
from losslab.studies.compare.verdict import target_in_words, verdict
from losslab.studies.config import apply
from losslab.studies.config_file import ConfigError
from losslab.studies.engine.jobs import EngineOptions, Outcome
from losslab.studies.record import RunFolder
from losslab.studies.spaces import plain
from losslab.studies.train import train
from losslab.studies.tuning.result import Trial, Tuned

CONFIGS = Path(__file__).parents[1] / "configs" / "compare"
INF, NAN = math.inf, math.nan


def values(**changes) -> dict:
    """A small plan as a file has it."""
    plan = {
        "base": {
            "seed": 100,
            "dataset": {"batch_size": 256},
            "model": {"name": "mlp", "width": 16, "hidden": 1},
            "schedule": {"name": "cosine"},
            "training": {"epochs": 8, "device": "cpu"},
        },
        "optimizers": [
            {"name": "sgd", "changes": {"optimizer.name": "sgd", "optimizer.lr": 0.1}},
            {"name": "adamw", "changes": {"optimizer.name": "adamw", "optimizer.lr": 0.02}},
        ],
        "trials": 2,
        "seeds": [1, 2, 3, 4, 5],
        "target": {"metric": "validation_accuracy", "value": 0.9},
        "robustness": {"learning_rates": 3, "initialisations": 2, "scales": [0.5, 1, 2]},
    }
    return {**plan, **changes}


# The plan.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizers": values()["optimizers"][:1]}, r"optimizers: expected two or more, got 1"),
        ({"optimizers": [values()["optimizers"][0]] * 2}, r"optimizers: expected different names, got sgd, sgd"),
        ({"seeds": [1, 2, 3, 4]}, r"seeds: expected at least 5 different ones, got 4"),
        ({"seeds": [1, 2, 3, 4, 5, 5]}, r"seeds: expected different ones, got one twice"),
        ({"seeds": [1, 2, 3, 4, 100]}, r"seeds: expected none of the tuning's, got 100"),
        ({"target": {"metric": "test_accuracy"}}, r"target.metric: expected one of 'validation_accuracy', "),
        ({"target": {"metric": "validation_loss", "value": "low"}}, r"target.value: expected a number"),
        ({"target": {"value": 90}}, r"target.value: expected an accuracy > 0 and <= 1, got 90; 97 % is 0.97"),
        ({"baseline": "adam"}, r"baseline: unknown optimizer 'adam', did you mean 'adamw'"),
        ({"trials": 0}, r"trials: expected an integer >= 1, got 0"),
        ({"robustness": {"initialisations": 6}}, r"robustness.initialisations: expected at most as many as seeds"),
        (
            {"robustness": {"learning_rates": 4}},
            r"robustness.learning_rates: expected an odd number, the tuned rate in the middle, got 4; take 5",
        ),
        ({"robustness": {"scales": [0]}}, r"robustness.scales.0: expected a number > 0, got 0"),
        ({"trails": 3}, r"trails: unknown key, did you mean 'trials'"),
        ({"base": {"model": {"widht": 3}}}, r"base.model.widht: unknown key, did you mean 'width'"),
        (
            {"optimizers": [{"name": "a"}, {"name": "b", "changes": {"optimizer.name": "adamv"}}]},
            r"optimizers.1 \(b\): .*optimizer.name: .*adamv",
        ),
        (
            {"optimizers": [{"name": "a"}, {"name": "b", "space": {"optimizer.lr": {"low": 1, "hihg": 2}}}]},
            r"optimizers.1 \(b\): space: optimizer.lr: hihg: unknown key, did you mean 'high'",
        ),
        (
            {"optimizers": [{"name": "a"}, {"name": "b", "space": {"optimizer.rl": {"low": 1, "high": 2}}}]},
            r"optimizers.1 \(b\): .*optimizer.rl: unknown key, did you mean 'lr'",
        ),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        make_plan(values(**changes), source="plan.yaml")
    assert str(caught.value).startswith("plan.yaml: ")
    assert len(str(caught.value).splitlines()) == 1, caught.value


def test_words_for_what_is_left_open():
    plan = make_plan(values(target={"value": "auto"}, robustness=False, baseline="adamw"))
    assert (plan.target.value, plan.robustness, plan.baseline) == (None, None, ("adamw",))
    assert make_plan(json.loads(plan.model_dump_json())) == plan


def test_the_shipped_comparison_loads():
    plan = load_plan(CONFIGS / "digits.yaml")
    assert plan.names == ["sgd", "nesterov", "adamw", "talt"]
    assert 6 * smallest_p(len(plan.seeds)) < 0.05  # over six pairs
    assert plan.base.seed not in plan.seeds


# The protocol, with fakes for what trains: a run's accuracy rises by its rate in each epoch, adamw's twice as fast.


RATE = 0.002  # that the fake tuning finds for adamw; for sgd it finds the lowest


class Lab:
    """Takes the place of `tune` and `run_jobs`, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.tuned: list[tuple] = []
        self.jobs: list = []
        self.diverging: set[str] = set()
        self.failing: set[str] = set()
        self.stop_after: float = INF

    def tune(self, base, folder, options, progress=None):
        self.tuned.append((base, Path(folder), options))
        low = options.space["optimizer.lr"].low
        found = [
            Trial(i, "complete", 0.8 + 0.1 * i, {**dict.fromkeys(options.space), "optimizer.lr": rate}, 40, 1.0, 1.0)
            for i, rate in enumerate((0.05, low if base.name == "sgd" else RATE))
        ]
        best = apply(base, {"optimizer.lr": found[1].parameters["optimizer.lr"]})
        for trial in found:
            for key in trial.parameters.keys() - {"optimizer.lr"}:
                trial.parameters[key] = 0.9 if "momentum" in key else 1e-3
        return Tuned(
            best, 0.9, tuple(found), {}, Status.complete, options.metric, plain(options.space), 2, 0, options.pruner
        )

    def run_jobs(self, jobs, options, progress=None):
        outcomes = []
        for job in jobs:
            status, error = self.one(job)
            outcomes.append(Outcome(job.name, job.folder, status, 1, error, 1.0))
        return outcomes

    def one(self, job):
        folder = RunFolder(job.folder)
        if folder.is_run():
            return "skipped", None
        if len(self.jobs) >= self.stop_after:
            return "stopped", None
        self.jobs.append(job)
        if job.name in self.failing:
            return "failed", "the disk is full"
        write_run(folder, job.config, diverged=job.name in self.diverging)
        return "finished", None


def write_run(folder: RunFolder, config, *, diverged: bool = False) -> None:
    """A run of 8 epochs, 5 steps each. Its seed delays it by as many hundredths."""
    RunFolder.create(folder.path)
    folder.write_config(config.model_dump(mode="json"))
    folder.write_environment({"processor": "abacus", "cpu_count": 2, "threads": 1, "device": "cpu", "torch": "2"})
    speed = 0.2 if config.optimizer.name == "adamw" else 0.1
    seconds = 0.003 if config.optimizer.name == "adamw" else 0.001
    for epoch in range(1, 9):
        accuracy = min(0.95, speed * epoch + 0.16 - 0.01 * config.seed)
        row = {"kind": "epoch", "epoch": epoch, "seconds": 5 * epoch * seconds, "train_loss": 1.0}
        folder.log(5 * epoch, {**row, "validation_loss": 1 - accuracy, "validation_accuracy": accuracy})
    test = {"test_loss": 0.3, "test_accuracy": 0.9} if config.training.evaluate_test else {}
    status = {"status": "diverged"} if diverged else {"status": "completed"}
    folder.log(40, {"kind": "final", **test, **status, "step_seconds": 0.0005, "peak_memory_bytes": 2e8})


@pytest.fixture
def lab(monkeypatch) -> Lab:
    lab = Lab()
    monkeypatch.setattr(protocol, "tune", lab.tune)
    monkeypatch.setattr(protocol, "run_jobs", lab.run_jobs)
    return lab


def test_the_protocol(lab, tmp_path):
    plan = make_plan(values())
    found = compare(plan, tmp_path / "study", EngineOptions(parallel=2))
    # Tuning: equal trials, none of them pruned, with the tuning seed, on validation.
    assert [(base.name, base.seed) for base, *_ in lab.tuned] == [("sgd", 100), ("adamw", 100)]
    assert {(o.trials, o.pruner, o.metric, o.target, o.parallel) for *_, o in lab.tuned} == {
        (2, "none", "validation_accuracy", plan.target.value, 2)
    }
    # Seeds: the same for both, in turn; they alone look at the test split.
    seeds = [job for job in lab.jobs if job.folder.name.startswith("seed")]
    assert [(job.config.optimizer.name, job.config.seed) for job in seeds[:4]] == [
        ("sgd", 1), ("adamw", 1), ("sgd", 2), ("adamw", 2)
    ]  # fmt: skip
    assert len(seeds) == 10
    for job in lab.jobs:
        assert job.config.training.evaluate_test == (job in seeds)
        assert job.config.seed in plan.seeds
    # Around the tuned settings: three rates over three decades, two starts at each other scale.
    rates = [job.config.optimizer.lr for job in lab.jobs if job.folder.match("adamw/rate-*")]
    assert rates == pytest.approx([RATE * 10**-1.5, RATE, RATE * 10**1.5])
    scales = [(job.config.model.init_scale, job.config.seed) for job in lab.jobs if job.folder.match("adamw/scale-*")]
    assert scales == [(0.5, 1), (0.5, 2), (2.0, 1), (2.0, 2)]
    # Numbers: seed s reaches 0.9 where 0.1 e + 0.16 - 0.01 s does, and twice as fast with adamw.
    sgd, adamw = found.contender("sgd"), found.contender("adamw")
    assert sgd.steps == (40, 40, 40, 40, 40)
    assert adamw.steps == (20, 20, 20, 20, 20)
    assert adamw.epochs == (4, 4, 4, 4, 4)
    assert adamw.seconds == pytest.approx([20 * 0.003] * 5)
    assert adamw.final == adamw.best == (0.95,) * 5
    assert (adamw.rate_share, adamw.scale_share) == (1.0, 1.0)
    assert (found.status, found.validation_examples) == (Status.complete, 359)
    assert any("no p below 0.062 is possible" in text for text in remarks(found))
    (pair,) = found.pairs
    assert (pair.first, pair.second, pair.n) == ("adamw", "sgd", 5)
    assert pair.steps_ratio == Estimate(0.5, 0.5, 0.5)
    assert (pair.p, pair.p_corrected, pair.smallest_p) == (0.0625, 0.0625, 0.0625)
    assert (pair.seconds_p, pair.seconds_p_corrected) == (0.0625, 0.0625)
    assert found.verdicts == (
        "adamw reached 90 % validation accuracy in 0.50× [0.50, 0.50] of sgd's steps but 1.50× [1.50, 1.50] of its "
        "time, n = 5.",
    )
    assert load(tmp_path / "study") == found


def test_a_tuned_value_at_the_edge_is_flagged(lab, tmp_path):
    found = compare(make_plan(values(robustness=False)), tmp_path / "study")
    (warning,) = found.contender("sgd").warnings
    assert "optimizer.lr = 0.01 lies at the lower end of its range 0.01 to 10" in warning
    assert not any("optimizer.lr" in text for text in found.contender("adamw").warnings)
    assert any("sgd: optimizer.lr" in text for text in remarks(found))


def test_a_second_start_does_what_is_missing(lab, tmp_path):
    plan, study = make_plan(values()), tmp_path / "study"
    lab.stop_after = 13
    stopped = compare(plan, study)
    assert stopped.status is Status.stopped
    assert stopped.contender("sgd").runs == 5
    assert any("was stopped" in text for text in remarks(stopped))
    assert stopped.contender("sgd").rates  # as far as it got
    lab.stop_after, first = INF, [job.folder for job in lab.jobs]
    whole = compare(plan, study)
    later = [job.folder for job in lab.jobs[13:]]
    assert whole.status is Status.complete
    assert not set(first) & set(later)
    assert len(first) + len(later) == 2 * (5 + 3 + 4)
    assert compare(plan, tmp_path / "in one go") == whole


def test_stopped_before_the_seeds_there_is_no_verdict(lab, tmp_path):
    lab.stop_after = 5
    found = compare(make_plan(values()), tmp_path / "given")
    assert found.verdicts == ("No verdict on adamw yet: 2 of 5 seeds are done.",)
    lab.jobs.clear()
    found = compare(make_plan(values(target={"value": "auto"})), tmp_path / "auto")
    assert found.verdicts == ("No verdict on adamw yet: the target, the median of sgd's runs, needs them all.",)
    assert math.isnan(found.target)
    assert [contender.runs for contender in found.contenders] == [3, 2]


def test_a_stop_during_tuning_leaves_a_report(monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise StopRequested

    monkeypatch.setattr(protocol, "tune", stop)
    found = compare(make_plan(values()), tmp_path / "study")
    assert found.status is Status.stopped
    assert found.verdicts == ("No verdict on adamw yet: 0 of 5 seeds are done.",)
    assert load(tmp_path / "study").contender("sgd").runs == 0
    assert comparison_page.build(tmp_path / "study").is_file()


def test_another_plan_or_foreign_files_are_refused(lab, tmp_path):
    compare(make_plan(values(robustness=False)), tmp_path / "study")
    before = sorted((tmp_path / "study").rglob("*"))
    with pytest.raises(FileExistsError, match="another plan"):
        compare(make_plan(values(robustness=False, seeds=[1, 2, 3, 4, 5, 6])), tmp_path / "study")
    assert sorted((tmp_path / "study").rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty, and no comparison"):
        compare(make_plan(values()), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_diverged_runs_missed_the_target_and_failed_ones_are_missing(lab, tmp_path):
    lab.diverging, lab.failing = {"adamw-seed-1"}, {"adamw-seed-3"}
    found = compare(make_plan(values(robustness=False)), tmp_path / "study")
    adamw = found.contender("adamw")
    assert adamw.steps[0] == INF
    assert math.isnan(adamw.steps[2])
    assert (adamw.runs, adamw.reached, found.pairs[0].n) == (4, 3, 4)
    assert adamw.final[0] == 0.0
    assert found.failures == ("adamw-seed-3: the disk is full",)
    assert found.verdicts == ("No verdict on adamw yet: 4 of 5 seeds are done.",)
    more = compare(make_plan(values(robustness=False, seeds=[1, 2, 3, 4, 5, 6])), tmp_path / "with one to spare")
    assert more.verdicts[0].endswith("n = 5; 1 of 5 runs of adamw missed it and count as slowest.")


def test_auto_is_the_baselines_median_at_the_end(lab, tmp_path):
    target = {"metric": "validation_loss", "value": "auto"}
    found = compare(make_plan(values(target=target, baseline="adamw", robustness=False)), tmp_path / "study")
    assert found.target == pytest.approx(0.05)
    assert found.automatic
    assert found.baseline == "adamw"
    assert [(pair.first, pair.second) for pair in found.pairs] == [("sgd", "adamw")]


def test_time_to_target_holds_what_is_done_now_and_then(tmp_path):
    """A step of 1 ms, and every fifth one 101 ms: a median knows nothing of those."""
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config({})
    for step in (5, 10, 15):
        row = {"kind": "epoch", "epoch": step / 5, "seconds": step / 5 * 0.105, "validation_accuracy": step / 20}
        folder.log(step, row)
    folder.log(15, {"kind": "final", "status": "completed", "step_seconds": 0.001})
    run = SeedRun.read(folder.path, make_plan(values()).target)
    assert run.until(0.5, "seconds") == pytest.approx(0.21)
    assert run.step_seconds() == pytest.approx(0.021)


def test_there_is_no_target_where_half_of_the_baseline_diverged(lab, tmp_path):
    lab.diverging = {f"sgd-seed-{seed}" for seed in (1, 2, 3)}
    seeds = [1, 2, 3, 4, 5, 6]
    for metric in ("validation_accuracy", "validation_loss"):
        target = {"metric": metric, "value": "auto"}
        plan = make_plan(values(target=target, robustness=False, seeds=seeds))
        found = compare(plan, tmp_path / metric)
        assert math.isnan(found.target)
        assert found.verdicts == (
            "No verdict on adamw: too many of sgd's runs diverged or failed, so that the median of their values at "
            "the end, the target, is not known.",
        )
    lab.diverging.pop()
    assert 0 < compare(plan, tmp_path / "two").target < 1


def test_of_several_baselines_the_best_tuned_counts():
    plan = make_plan(values(baseline=["sgd", "adamw"]))

    def tuned(value: float, reached: float | None = None) -> Tuned:
        trials = () if reached is None else (Trial(0, "complete", value, {}, 40, 1.0, 1.0, reached),)
        return Tuned(plan.base, value, trials, {}, Status.complete, "validation_accuracy", {}, 2, 0, "none")

    assert baseline_of(plan, {"sgd": tuned(0.8), "adamw": tuned(0.9)}) == "adamw"
    assert baseline_of(plan, {"sgd": tuned(0.8), "adamw": tuned(NAN)}) == "sgd"
    losses = make_plan(values(baseline=["sgd", "adamw"], target={"metric": "validation_loss"}))
    assert baseline_of(losses, {"sgd": tuned(0.8), "adamw": tuned(0.9)}) == "sgd"
    assert baseline_of(make_plan(values()), {}) == "sgd"
    # Who reaches the target sooner is better, whatever it ends at; who never does is after all who do.
    assert baseline_of(plan, {"sgd": tuned(0.8, 0.5), "adamw": tuned(0.9, 0.75)}) == "sgd"
    assert baseline_of(plan, {"sgd": tuned(0.8, 0.5), "adamw": tuned(0.9, math.inf)}) == "sgd"


# The verdict.


def comparison(
    first: tuple, second: tuple, ratio: Estimate, time: Estimate, p: float = 0.0625, time_p: float = 0.0625
) -> tuple:
    contenders = []
    for name, steps in (("adamw", first), ("sgd", second)):
        middle = sorted(steps)[len(steps) // 2]
        estimate = Estimate(middle, min(steps), max(steps))
        contenders.append(Contender(name, steps=steps, final=steps, median_steps=estimate))
    pair = Pairing("adamw", "sgd", len(first), ratio, time, UNKNOWN, p, p, 0.0625, time_p, time_p)
    found = Comparison(
        Status.complete, "validation_accuracy", 0.97, False, "sgd", 1000, (1, 2, 3, 4, 5), 0, 16, "",
        contenders=tuple(contenders), pairs=(pair,),
    )  # fmt: skip
    return found, pair


FAST, SLOW, LATE = (38.0,) * 5, (100.0,) * 5, (38.0, 38.0, INF, INF, INF)
NEVER = (INF,) * 5
CLEAR, SAME = Estimate(0.38, 0.31, 0.47), Estimate(0.93, 0.80, 1.20)


@pytest.mark.parametrize(
    ("first", "second", "ratio", "time", "p", "says"),
    [
        (
            FAST, SLOW, CLEAR, Estimate(0.55, 0.41, 0.7), 0.0625,
            "adamw reached 97 % validation accuracy in 0.38× [0.31, 0.47] of sgd's steps and 0.55× [0.41, 0.70] of its "
            "time, n = 5.",
        ),
        (
            FAST, SLOW, CLEAR, SAME, 0.0625,
            "adamw reached 97 % validation accuracy in 0.38× [0.31, 0.47] of sgd's steps with no significant "
            "difference in time (0.93× [0.80, 1.20]), n = 5.",
        ),
        (
            FAST, SLOW, CLEAR, Estimate(1.5, 1.2, 2.0), 0.0625,
            "adamw reached 97 % validation accuracy in 0.38× [0.31, 0.47] of sgd's steps but 1.50× [1.20, 2.00] of its "
            "time, n = 5.",
        ),
        (
            FAST, SLOW, SAME, SAME, 0.5,
            "No significant difference between adamw and sgd in the steps to 97 % validation accuracy: "
            "0.93× [0.80, 1.20], n = 5.",
        ),
        (  # the interval alone does not suffice
            FAST, SLOW, CLEAR, SAME, 0.125,
            "No significant difference between adamw and sgd in the steps to 97 % validation accuracy: "
            "0.38× [0.31, 0.47], n = 5.",
        ),
        (
            (*FAST[:4], INF), SLOW, CLEAR, Estimate(0.55, 0.41, 0.7), 0.0625,
            "adamw reached 97 % validation accuracy in 0.38× [0.31, 0.47] of sgd's steps and 0.55× [0.41, 0.70] of its "
            "time, n = 5; 1 of 5 runs of adamw missed it and count as slowest.",
        ),
        (
            NEVER, SLOW, Estimate(INF, INF, INF), Estimate(INF, INF, INF), 0.0625,
            "adamw never reached 97 % validation accuracy within 1000 steps; sgd did with 5 of 5 seeds, n = 5.",
        ),
        (
            FAST, NEVER, Estimate(0.0, 0.0, 0.0), Estimate(0.0, 0.0, 0.0), 0.0625,
            "sgd never reached 97 % validation accuracy within 1000 steps; adamw did with 5 of 5 seeds, n = 5.",
        ),
        (
            NEVER, NEVER, Estimate(NAN, 0.0, INF), Estimate(NAN, 0.0, INF), 1.0,
            "Neither adamw nor sgd reached 97 % validation accuracy within 1000 steps, n = 5.",
        ),
        (
            LATE, SLOW, Estimate(INF, 0.38, INF), Estimate(INF, 0.38, INF), 0.5,
            "Too few runs reached 97 % validation accuracy within 1000 steps to state a factor: "
            "adamw with 2 of 5 seeds and sgd with 5 of 5 seeds.",
        ),
    ],
)  # fmt: skip
def test_every_verdict_claims_no_more_than_it_may(first, second, ratio, time, p, says):
    assert verdict(*comparison(first, second, ratio, time, p)) == says


def test_where_seeds_are_few_all_must_agree():
    """Four optimizers, six seeds: Holm gives the sixth pair the others' 6/32, though its own seeds disagree."""
    smallest = 6 * smallest_p(6)
    assert holm([2 / 64] * 5 + [8 / 64])[-1] == smallest == 0.1875

    def claimed(p: float) -> bool:
        return Pairing("a", "b", 6, CLEAR, CLEAR, UNKNOWN, p, smallest, smallest).significant

    assert claimed(2 / 64)
    assert not claimed(8 / 64)


def test_a_factor_in_time_needs_the_test_too():
    """Its interval excludes 1, but one seed of five was slower."""
    found, pair = comparison(FAST, SLOW, CLEAR, Estimate(0.55, 0.41, 0.7), time_p=0.125)
    assert pair.significant
    assert not pair.significant_in_time
    assert "steps with no significant difference in time (0.55× [0.41, 0.70]), n = 5." in verdict(found, pair)
    assert [cell.reason != "" for cell in pair_cells(found, pair)[:2]] == [False, True]


def test_steps_and_times_are_two_families_of_tests():
    """Three optimizers, seven seeds: all agree on the steps; two of the three pairs differ in time."""
    seeds = np.arange(7.0)
    steps = {"a": 10 + seeds, "b": 30 + seeds, "c": 60 + seeds}
    price = {"a": np.full(7, 3.0), "b": np.ones(7), "c": np.ones(7)}
    price["a"][3:] = 1.0  # a's steps are dearer in three seeds: there it is not sooner than b
    contenders = [
        Contender(name, steps=tuple(row), seconds=tuple(row * price[name]), final=tuple(row))
        for name, row in steps.items()
    ]
    pairs = pairings(contenders, "b")
    assert [pair.p for pair in pairs] == [smallest_p(7)] * 3
    alone = [paired_test(one.seconds, other.seconds) for one, other in itertools.combinations(contenders, 2)]
    assert [pair.seconds_p for pair in pairs] == alone
    assert alone[0] > 0.05 > max(alone[1:]) == smallest_p(7)
    assert [pair.p_corrected for pair in pairs] == [3 * smallest_p(7)] * 3
    assert [pair.seconds_p_corrected for pair in pairs] == holm(alone)
    assert [pair.significant for pair in pairs] == [True] * 3
    assert [pair.significant_in_time for pair in pairs] == [False, True, True]


@pytest.mark.parametrize(
    ("metric", "target", "examples", "says"),
    [
        ("validation_accuracy", 1.0, 30, ["The target is 100 %, the most there is: "]),
        ("validation_accuracy", 0.9, 100, ["The target rests on 100 validation examples: one of them is 1 pp, and"]),
        ("validation_accuracy", 0.97, 359, []),  # a standard error of 0.9 points
        ("validation_accuracy", 0.9, 0, []),  # a record from before they were counted
        ("validation_accuracy", NAN, 100, []),
        ("validation_loss", 1.0, 30, []),
    ],
)
def test_a_target_on_few_examples_is_told(metric, target, examples, says):
    found, _ = comparison(FAST, SLOW, CLEAR, SAME)
    found = dataclasses.replace(found, metric=metric, target=target, validation_examples=examples)
    told = [text for text in remarks(found) if text.startswith("The target")]
    assert [text.startswith(start) for text, start in zip(told, says, strict=True)] == [True] * len(says)
    if examples == 100 and says:
        assert "off by 3 pp (standard error)" in told[0]


def test_a_factor_needs_finite_medians_over_the_pairs():
    """Of the seeds that both have most missed, though the median of all that it has is finite."""
    found, pair = comparison(FAST, SLOW, Estimate(INF, 0.4, INF), SAME)
    assert verdict(found, pair).startswith("Too few runs reached 97 % validation accuracy")


def test_targets_in_words():
    assert target_in_words("validation_accuracy", 0.97) == "97 % validation accuracy"
    assert target_in_words("validation_loss", 0.05) == "a validation loss of 0.05"


# A real one, and what is shown of it. The runs are made in this process: starting one takes longer than training.


def in_this_process(jobs, options, progress=None):
    for job in jobs:
        train(job.config, RunFolder(job.folder), resume=True)
    return [Outcome(job.name, job.folder, "finished", 1, None, 0.0) for job in jobs]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "run_jobs", in_this_process)
        compare(make_plan(values(robustness=False)), path)
    return path


def test_a_real_comparison(study):
    found = load(study)
    assert found.status is Status.complete
    for contender in found.contenders:
        assert contender.trials == 2
        assert contender.runs == 5
        assert all(0 < value <= 1 for value in (*contender.final, *contender.test_accuracy))
        assert all(math.isfinite(value) for value in contender.step_seconds)
        for seed, steps in zip(found.seeds, contender.steps, strict=True):
            rows = RunFolder(study / "runs" / contender.name / f"seed-{seed}").metrics()
            reached = [r["step"] for r in rows if r["kind"] == "epoch" and r["validation_accuracy"] >= 0.9]
            assert steps == (min(reached) if reached else INF)
    assert len(found.verdicts) == 1
    trials = (study / "tuning" / "sgd" / "trials").iterdir()
    assert all("test_loss" not in RunFolder(trial).final for trial in trials)
    assert found.machine


def test_the_page_and_the_pictures(study):
    html = comparison_page.build(study).read_text(encoding="utf-8")
    found = read(study)
    assert found.comparison.verdicts[0].replace("'", "&#39;") in html
    assert "landscape report" not in html
    names = [chart.name for chart in charts(found)]
    assert "curves" in names
    for name in names:
        assert (study / "figures" / f"{name}.png").is_file()
        assert f'id="{name}"' in html


def test_the_pictures_show_the_record(lab, tmp_path):
    compare(make_plan(values()), tmp_path / "study")
    drawn = {chart.name: chart for chart in charts(read(tmp_path / "study"))}
    assert list(drawn) == ["curves", "times", "profiles", "learning-rates", "initialisations"]
    loss, loss_in_time, accuracy, _ = drawn["curves"].panels
    assert loss.series[1].x.tolist() == [5 * epoch for epoch in range(1, 9)]
    assert loss_in_time.series[1].x == pytest.approx(0.003 * loss.series[1].x)
    assert accuracy.series[0].y[0] == pytest.approx(100 * (0.26 - 0.03))  # the mean of five seeds
    assert accuracy.series[-1].y.tolist() == [90, 90]
    steps, time = drawn["profiles"].panels
    assert [line.y[0] for line in steps.series] == [0, 1]
    assert [line.y[0] for line in time.series] == [1, 0]  # twice the steps at a third of the price
    medians = [series for series in drawn["times"].panels[0].series if series.legend]
    assert [(series.name, series.y.tolist()) for series in medians] == [("sgd", [40]), ("adamw", [20])]


def test_the_command(lab, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(values(robustness=False)), encoding="utf-8")
    arguments = ["compare", str(file), "--output", str(tmp_path / "study"), "--parallel", "2", "--quiet"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "adamw reached 90 % validation accuracy in 0.50× [0.50, 0.50] of sgd's steps" in result.output
    assert str(tmp_path / "study" / "report.html") in result.output.replace("\n", "")
    assert "steps to target" in result.output


def test_the_command_stopped_says_how_to_go_on(lab, tmp_path, monkeypatch):
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(values()), encoding="utf-8")
    lab.stop_after = 0
    result = CliRunner().invoke(cli.app, ["compare", str(file), "--output", str(tmp_path / "study"), "--quiet"])
    assert result.exit_code == 1
    assert "No verdict on adamw yet" in result.output
    assert "goes on" in result.output
    again = CliRunner().invoke(cli.app, ["report", str(tmp_path / "study")])
    assert "No verdict on adamw yet" in again.output
    assert (tmp_path / "study" / "report.html").is_file()
    (tmp_path / "study" / "comparison.json").unlink()  # as if it had been killed
    again = CliRunner().invoke(cli.app, ["report", str(tmp_path / "study")])
    assert "writes it when it ends or is stopped: start it again" in str(again.exception)
