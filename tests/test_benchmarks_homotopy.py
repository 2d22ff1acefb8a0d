"""The study of the homotopy learning rate runs, at its smallest settings, and its own arithmetic is right."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from losslab.optim.homotopy.rules import is_due


@pytest.fixture
def run(load, monkeypatch, capsys):
    """Run the study's `main` with these arguments; what it prints."""

    def main(*arguments):
        script = load("homotopy")
        monkeypatch.setattr(sys, "argv", ["homotopy.py", "--quick", *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return main


# -- the script -------------------------------------------------------------------------------------------


def test_a_study_from_grid_to_page_is_resumed_and_read_back(run, load, tmp_path, monkeypatch):
    few = ("--tasks", "mlp", "--cache", tmp_path, "--output", tmp_path / "page" / "homotopy.md")
    runs = load("homotopy_runs")
    text = run(*few, "--stages", "grid", "final", "report")
    assert "Missing: step times of Ten overlapping clusters" in text
    grid = next(line for line in text.splitlines() if line.startswith("| founders' code | "))
    assert len(grid.split("|")) == 8  # its name, three η₀, two ranges
    goals = [line for line in text.splitlines() if line.startswith("| Ten overlapping clusters")]
    assert goals[0].endswith("| – | – |")
    assert goals[1].count("met") == 2
    assert all("×" in line for line in goals[2:4])
    assert "## The founders' two experiments" in text
    assert (tmp_path / "page" / "homotopy.md").read_text().strip() in text
    done = sorted((tmp_path / "mlp").glob("*.json"))
    monkeypatch.setattr(runs, "train", None)  # nothing is done twice
    assert run(*few, "--stages", "grid", "final", "report").count("|") == text.count("|")
    assert sorted((tmp_path / "mlp").glob("*.json")) == done
    record = json.loads(done[0].read_text())["record"]
    assert record["steps"] == len(record["curve"]) == 6
    assert record["device"] == "cpu"


def test_a_report_says_what_is_missing(run, tmp_path):
    text = run("--tasks", "quadratic", "--cache", tmp_path, "--stages", "report")
    assert "Missing: 5 of 5 runs of sgd at 4 steps" in text


def test_a_plan_counts_what_is_left(run, tmp_path):
    text = run("--tasks", "mlp", "--cache", tmp_path, "--plan")
    assert "; SGD: grid | 42 |" in text  # 14 methods at three η₀
    assert "; SGD: final | about 24 |" in text
    assert list(tmp_path.rglob("*.json")) == []


# -- runs -------------------------------------------------------------------------------------------------


def training(load, method, task="mlp", optimizer="sgd", horizon=20, **more):
    """One that has not begun."""
    runs = load("homotopy_runs")
    settings = {"lr": 0.1, **load("homotopy_methods").METHODS[method], **more}
    data = runs.HomotopyRuns(Path(), None).data_of(task)
    return runs.Training(runs.Run(task, optimizer, settings, 0, horizon), data, torch.device("cpu"))


def rates(load, method, **more):
    """η/η₀ of each of twenty steps."""
    found, one = [], training(load, method, **more)
    while one.steps < one.run.horizon:
        found.append(one.optimizer.param_groups[0]["lr"] / 0.1)
        one.step()
    return found, one


def test_every_method_has_its_rates(load):
    assert rates(load, "constant")[0] == pytest.approx([1.0] * 20)
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 20) for step in range(20)]
    assert rates(load, "cosine")[0] == pytest.approx(cosine)
    warm = rates(load, "warm-up 10%, cosine")[0]
    assert warm[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert warm[-1] < 0.02
    stable = rates(load, "stable")[0]
    assert stable[0] == pytest.approx(0.01)
    assert stable[1] == pytest.approx(0.1)
    assert stable[8:13] == pytest.approx([1.0] * 5)
    assert stable[-1] == pytest.approx(1 / 8)
    assert rates(load, "warm-up 10%, cooldown")[0][2:] == pytest.approx([1.0] * 11 + [1 - k / 8 for k in range(1, 8)])
    assert rates(load, "stable, without total_steps")[0][-1] > 0.1
    seed, one = rates(load, "founders' text")
    assert seed[0] == 1.0
    assert max(seed[2:]) < 0.8
    assert sum(one.due) == sum(is_due(step, 100) for step in range(20))


def test_an_estimate_sees_as_many_examples_as_are_asked_for(load):
    one = training(load, "stable", examples=8)
    counts = []
    whole = one.loss_of
    one.scheduler.loss = lambda count: counts.append(count) or whole(count)
    one.step()
    assert counts == [8]
    assert training(load, "stable", examples=None).scheduler.examples == 64


def test_the_number_of_estimates_is_that_of_a_run(load):
    methods = load("homotopy_methods")
    for frequency in (5, 20):
        _, one = rates(load, "stable", horizon=60, frequency=frequency)
        assert sum(one.due) == methods.estimates(60, frequency)


def test_a_run_that_diverges_is_recorded_as_one(load):
    runs, methods = load("homotopy_runs"), load("homotopy_methods")
    one = runs.Run("quadratic", "sgd", {"lr": 10.0, **methods.METHODS["constant"]}, 0, 100)
    record = runs.train(one, runs.HomotopyRuns(Path(), None).data_of("quadratic"), torch.device("cpu"))
    assert record["diverged"]
    assert record["loss"] == math.inf
    assert record["steps"] < 100


def test_final_seeds_alone_see_the_test_split(load):
    runs, methods = load("homotopy_runs"), load("homotopy_methods")
    data = runs.HomotopyRuns(Path(), None).data_of("mlp")
    for seed, seen in ((0, False), (100, True)):
        one = runs.Run("mlp", "sgd", {"lr": 0.1, **methods.METHODS["constant"]}, seed, 2)
        assert ("test_loss" in runs.train(one, data, torch.device("cpu"))) == seen


def test_a_run_is_named_after_all_that_decides_it(load):
    runs = load("homotopy_runs")
    settings = {"lr": 0.1, "schedule": "cosine", "warmup": 0.1}
    base = runs.Run("mlp", "sgd", settings, 0, 20)
    others = [
        runs.Run("mlp", "sgd", {**settings, "warmup": 0.2}, 0, 20),
        runs.Run("mlp", "sgd", settings, 1, 20),
        runs.Run("mlp", "sgd", settings, 0, 21),
        runs.Run("mlp", "sgd", settings, 0, 20, scale=2.0),
        runs.Run("mnist", "sgd", settings, 0, 20),
    ]
    assert len({each.key for each in (base, *others)}) == 6
    assert base.key == runs.Run("mlp", "sgd", dict(reversed(settings.items())), 0, 20).key


def test_the_quadratic_is_the_founders(load):
    tasks = load("homotopy_tasks")
    torch.manual_seed(0)
    model = tasks.Quadratic()
    loss = tasks.TASKS["quadratic"].loss(model(torch.zeros(1, 1)), torch.zeros(1))
    (gradient,) = torch.autograd.grad(loss, model.theta)
    assert gradient == pytest.approx(model.eigenvalues * model.theta.detach())
    assert float(model.eigenvalues.max() / model.eigenvalues.min()) == pytest.approx(100)


# -- arithmetic -------------------------------------------------------------------------------------------


def test_the_width_ends_where_the_line_between_two_rates_crosses(load):
    width = load("homotopy_study").width
    found = width([0.01, 0.1, 1.0, 10.0], [4.0, 1.0, 1.0, 4.0], limit=2.0, worst=9.0)
    assert (found.low, found.high) == pytest.approx((0.1 / 10**0.5, 10**0.5))
    assert (found.open_low, found.open_high) == (False, False)
    assert found.ratio == pytest.approx(100)


def test_the_width_is_open_at_the_grids_ends_and_stops_at_the_first_that_is_worse(load):
    width = load("homotopy_study").width
    found = width([0.01, 0.1, 1.0, 10.0], [1.0, 1.0, 3.0, 1.0], limit=1.5, worst=9.0)
    assert (found.low, found.open_low, found.open_high) == (0.01, True, False)
    assert 0.1 < found.high < 1.0
    assert width([0.1, 1.0], [3.0, 4.0], limit=2.0, worst=9.0) is None


def test_a_run_that_diverged_counts_as_one_that_knows_nothing(load):
    width = load("homotopy_study").width
    losses = ([1.0, math.inf], [1.0, 1e9], [1.0, 4.0])
    assert len({width([0.1, 1.0], each, limit=2.0, worst=4.0).high for each in losses}) == 1


def test_intervals(load):
    study = load("homotopy_study")
    found = study.mean_estimate([1.0, 2.0, 3.0])
    assert (found.value, found.high) == pytest.approx((2.0, 2.0 + 4.302653 / 3**0.5))
    ratio = study.ratio_estimate([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_verdicts(load):
    goals, study = load("homotopy_goals"), load("homotopy_study")

    def wide(low, high, open_high=False):
        return study.Width(low, high, False, open_high)

    assert goals.wider(wide(1, 2), wide(1, 8)) == "met: 4×"
    assert goals.wider(wide(1, 2), wide(1, 4)) == "not met: 2×"
    assert goals.wider(wide(1, 2), wide(1, 4, True)) == "not known: ≥ 2×"
    assert goals.wider(wide(1, 2), None) == "not met"
    assert goals.wider(None, wide(1, 2)) == "met: constant nowhere"


def test_overhead_is_that_of_the_estimates_and_of_the_steps_between(load):
    cost = load("homotopy_times").Cost(plain=[11.0], due=[31.0], base=[10.0], share=[1.0], device="")
    assert cost.overhead(1000, 10, steady=True) == pytest.approx(0.1 + 0.1 * 2.0)
    part = load("homotopy_methods").estimates(300, 10) / 300
    assert cost.overhead(300, 10) == pytest.approx(0.1 + 2.0 * part)
    assert cost.alone


def test_step_times_are_kept_with_their_device(load, tmp_path):
    times, study, tasks, runs = (load(f"homotopy_{name}") for name in ("times", "study", "tasks", "runs"))
    setting = next(each for each in tasks.SETTINGS if each.task == "mlp")
    one = study.Study(setting, runs.HomotopyRuns(tmp_path, None), study.Protocol())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(times, "STEPS", 24)
        patch.setattr(times, "DENSE", 12)
        times.measure(one, rounds=1)
    found = times.known(one)
    assert list(found) == [load("homotopy_methods").LAYERS, *(times.name_of(count) for count in study.COUNTS)]
    assert all(cost.device.startswith("one core") and cost.due[0] > cost.plain[0] > 0 for cost in found.values())


def test_what_emerges_is_told_by_the_rates_alone(load, tmp_path):
    figure = load("homotopy_figure")
    steps = np.arange(1, 101)
    grown = {"step": steps, "lr": np.where(steps <= 5, 0.1, 0.2), "hessian_norm": np.full(100, 3.0)}
    grown["grad_norm"] = np.where(steps <= 5, 1.0, 2.0)
    assert figure.rises(grown) == ["2", "1", "0.25", "6", "yes"]
    assert figure.rises({**grown, "lr": np.full(100, 0.1)})[-1] == "no"
    figure.draw({"a task; SGD": [grown] * 2}, tmp_path / "warmup.png")
    assert (tmp_path / "warmup.png").stat().st_size > 10_000


def test_arrival(load):
    arrival = load("homotopy_report").arrival
    assert arrival([3.0, 2.0, 1.0, 0.5], 1.5) == 2
    assert arrival([3.0, 2.0], 1.5) == math.inf


def test_numbers_in_words(load):
    text, estimate = load("homotopy_text"), load("homotopy_study").mean_estimate
    assert text.interval(estimate([1.0]), ".2f") == "1.00"
    assert text.said(math.inf, ".2f") == "diverged"
    wide = types.SimpleNamespace(low=0.1, high=1.0, ratio=10.0, open_low=False, open_high=True)
    assert text.between(wide) == "≥ 10× (0.1 to ≥ 1)"
    assert text.between(None) == "nowhere"


def test_tuning_online_is_measured_at_its_smallest(load, tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    images = {
        name: generator.integers(0, 256, (n, 28, 28), dtype=np.uint8) for name, n in (("x_train", 2300), ("x_test", 9))
    }
    digits = {name: generator.integers(0, 10, n) for name, n in (("y_train", 2300), ("y_test", 9))}
    np.savez(tmp_path / "mnist.npz", **images, **digits)
    script = load("homotopy_online")
    monkeypatch.setattr(sys, "argv", ["homotopy_online.py", "--data", str(tmp_path), "--seeds", "1", "--steps", "3"])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| seed")]
    assert len(rows) == len(script.RULES) * 3
    slow = {"rule": "seed", "target_curvature": 0.03, "examples": 32, "frequency": 10}
    plain, tuned = (script.final_loss(slow, rate, 0, tmp_path, 8) for rate in (0.0, 0.5))
    assert plain != tuned  # it is attached


def test_the_part_at_first_is_the_optimizers(load):
    """The default's settings are said, so that a cached run is of this part; the other row has the other one."""
    methods = load("homotopy_methods")
    found = {
        (name, optimizer): methods.settings_of(name, optimizer).get("fraction")
        for name in (methods.DEFAULT, methods.OTHER, "stable, without total_steps", "constant")
        for optimizer in ("momentum", "adamw")
    }
    assert list(found.values()) == [0.2, 0.3, 0.3, 0.2, 0.2, 0.3, None, None]


def test_losses_are_compared_with_the_usual_schedules_and_with_all(load):
    goals, estimate = load("homotopy_goals"), load("homotopy_study").ratio_estimate
    ratios = [estimate([1.0, 2.0, 4.0], other) for other in ([1.0, 2.0, 4.0], [0.5, 1.0, 2.0])]
    study = types.SimpleNamespace(setting=types.SimpleNamespace(title="a task"))
    lines = goals.goal_lines(
        [goals.Goals("stable", study, None, ratios, ["cosine", "cooldown"], [None] * 3, [None] * 3)]
    )
    row = [line for line in lines if line.startswith("| a task")][1]
    assert row == "| a task | 1.000 [1.000, 1.000] (cosine) | met | 2.000 [2.000, 2.000] (cooldown) | not met |"


def test_the_ablations_raw_gradients_have_a_rate_of_their_own_and_no_decay(load):
    variants = load("optimizer_ablation").VARIANTS
    raw = [name for name, own in variants.items() if own.get("parameter_normalization") is False]
    assert len(raw) == 10
    assert all((variants[name]["lr"], variants[name]["weight_decay"]) == (1.0, 0.0) for name in raw)
    assert not any("lr" in own for name, own in variants.items() if name not in raw)


def test_the_profile_s_parts_are_those_of_an_estimate(load, monkeypatch, capsys, tmp_path):
    script = load("homotopy_profile")
    monkeypatch.setattr(script, "BEFORE", 20)
    monkeypatch.setattr(script, "BURST", 4)
    arguments = ["--data", str(tmp_path), "--tasks", "mlp", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["homotopy_profile.py", *arguments])
    script.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Ten")]
    step, _, gradient, graph, product, _, estimate, least = map(float, row.split(" | ")[1:-2])
    assert min(step, gradient, graph, product, estimate) > 0
    assert least == pytest.approx(2 * gradient / step, abs=0.3)  # of numbers with two digits
