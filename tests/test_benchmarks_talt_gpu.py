"""The GPU benchmark of TALT runs at its smallest size, on the CPU, and its own arithmetic is right."""

import json
import math
import sys

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def bench(load, tmp_path, monkeypatch):
    """The GPT at smoke size with two optimizers and one seed, and the file of its runs."""
    script, runs, tasks = load("talt_gpu"), load("talt_gpu_runs"), load("talt_gpu_tasks")
    monkeypatch.setattr(script, "OPTIMIZERS", ("adamw", "talt"))
    monkeypatch.setattr(
        script, "CONTENDERS", {name: script.CONTENDERS[name] for name in ("adamw", "talt", "talt-light")}
    )
    monkeypatch.setattr(script, "OTHER_STEPS", {})
    task = tasks.tasks(smoke=True)["gpt"]
    data = task.data(None, CPU)

    def make(deadline=math.inf):
        return script.Bench(task, data, CPU, runs.Records(tmp_path / "runs.jsonl"), deadline, seeds=(100,))

    return make


def test_the_next_learning_rate_goes_on_beyond_the_best_or_between_two(load):
    rate = load("talt_gpu").next_rate
    assert [rate(1.0, {}), rate(1.0, {1.0: 3}), rate(1.0, {1.0: 3, 2.0: 4})] == [1.0, 2.0, 0.5]
    assert rate(1.0, {0.5: 3, 1.0: 2, 2.0: 1}) == 4.0
    assert rate(1.0, {0.5: 1, 1.0: 2, 2.0: 3}) == 0.25
    assert rate(1.0, {0.5: 2, 1.0: 1, 2.0: 3}) == pytest.approx(0.5**0.5)
    assert rate(1.0, {0.5: math.inf, 1.0: 1, 2.0: 3}) == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("needed", "looked_at"), [(-9, [0, -1, -2]), (-1, [0, -1, -2]), (1, [0, 1]), (9, [0, 1, 2, 3])]
)
def test_horizons_are_tried_until_the_shortest_that_reaches_the_target_is_known(load, needed, looked_at):
    next_k, scores = load("talt_gpu").next_k, {}
    while (k := next_k(scores, 1.0, 0, (-2, 3))) is not None:
        scores[k] = 1.0 if k >= needed else 1.5
    assert list(scores) == looked_at


def test_the_arrival_lies_between_two_horizons_by_the_logarithm(load):
    arrival = load("talt_gpu_report").arrival
    found = arrival([(100, 3.0, 8.0), (1600, 1.0, 128.0)], 2.5)  # a quarter of the way: 16^¼ = 2
    assert (found.steps, found.seconds, found.at_most) == (pytest.approx(200), pytest.approx(16), False)
    assert arrival([(400, 2.0, 32.0), (100, math.inf, 8.0)], 2.0).steps == 400
    assert arrival([(100, 1.0, 8.0)], 2.0).at_most
    missed = arrival([(100, 3.0, 8.0), (200, 2.5, 9.0)], 2.0)
    assert math.isinf(missed.steps)
    assert missed.longest == 200
    assert arrival([], 2.0) is None


def test_a_whole_study_is_done_once_and_reported(bench, load):
    first = bench()
    first.work()
    done = [(run.stage, run.contender) for run, _ in first.records.all]
    assert [done.count(("steps", name)) for name in ("adamw", "talt", "talt-light")] == [1, 1, 1]
    assert [done.count(("tune", name)) for name in ("adamw", "talt", "talt-light")] == [6, 6, 0]
    assert not any("failure" in record for _, record in first.records.all)
    assert first.target() == first.records.find(first.final("adamw", 0, 100))["score"]
    light = first.final("talt-light", 0, 100).settings
    assert light["lr"] == first.final("talt", 0, 100).settings["lr"]
    assert light["one_sided"] is True
    again = bench()
    again.work()
    assert again.records.path.read_text().count("\n") == len(done) == len(again.records.all)
    lines = load("talt_gpu_report").page([again.task], again.records, ["adamw", "talt", "talt-light"])
    rows = {line.split("|")[1].strip(): line for line in lines[-3:]}
    assert set(rows) == {"adamw", "talt", "talt-light"}
    assert rows["adamw"].rstrip(" |").endswith("1.00")


def test_a_run_that_repeats_itself_gives_the_same_score(bench, load):
    own, runs = bench(), load("talt_gpu_runs")
    run = runs.Run("gpt", "final", "talt", own.task.settings["talt"], 100, 3)
    first, second = (runs.train(run, own.task, own.data, CPU) for _ in range(2))
    assert first["score"] == second["score"] == first["loss"]
    assert first["steps"] == 3


def test_no_run_is_begun_that_would_not_end_in_time(bench, load, capsys):
    own = bench(deadline=-math.inf)
    run = load("talt_gpu_runs").Run("gpt", "tune", "adamw", own.task.settings["adamw"], 0, 2)
    assert not own.do(run, 1.0)
    assert "no time" in capsys.readouterr().out
    own.work()
    assert own.records.all == []


def test_one_optimizer_that_fails_does_not_end_the_others(bench, load, monkeypatch):
    script, runs = load("talt_gpu"), load("talt_gpu_runs")
    whole = runs.make_optimizer

    def failing(name, settings, model):
        if name == "talt":
            raise RuntimeError("cusolver error")
        return whole(name, settings, model)

    monkeypatch.setattr(runs, "make_optimizer", failing)
    own = bench()
    own.work()
    assert len(own.tried("adamw")) == script.TRIALS
    assert own.records.of("gpt", "steps", "talt")[0][1]["failure"] == "RuntimeError: cusolver error"
    assert own.records.of("gpt", "final", "talt") == []
    assert own.records.of("gpt", "final", "adamw")
    assert load("talt_gpu_report").page([own.task], own.records, ["adamw", "talt", "talt-light"])


def test_a_line_that_was_cut_off_is_left_out(load, tmp_path):
    runs = load("talt_gpu_runs")
    records = runs.Records(tmp_path / "runs.jsonl")
    run = runs.Run("gpt", "final", "soap", {"lr": 0.1}, 1, 2)
    records.add(run, {"score": math.inf})
    records.path.write_text(records.path.read_text() + json.dumps({"run": {}})[:5])
    assert runs.Records(records.path).all == [(run, {"score": math.inf})]


def test_images_that_validate_are_trained_on_only_in_the_end(load):
    data = load("talt_gpu_tasks").Images(None, CPU, 8, 16, 80)
    held, test = (torch.cat([y for _, y in data.scored(final=final)]) for final in (False, True))
    assert torch.equal(held, data.y[-16:])
    assert torch.equal(test, data.test_y)
    data.y = torch.arange(80)  # each image's own number
    for final, count in ((False, 64), (True, 80)):
        batches = data.batches(3, final=final)
        seen = torch.cat([next(batches)[1] for _ in range(count // 8)])
        assert sorted(seen.tolist()) == list(range(count))


def test_each_character_is_followed_by_its_target(load):
    data = load("talt_gpu_tasks").Text(CPU, 4, 16, 8, 20_000)
    assert len(data.train) == 20_000
    x, y = next(data.batches(0, final=True))
    assert x.shape == y.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert sum(len(x) for x, _ in data.scored(final=True)) == 8
    assert not torch.equal(data.validation, data.test)


def test_without_a_gpu_or_without_data_nothing_is_begun(load, monkeypatch, capsys, tmp_path):
    script = load("talt_gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["talt_gpu.py", f"--records={tmp_path / 'runs.jsonl'}"])
    script.main()
    assert "no CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_network_with_batch_normalisation_is_scored_by_its_error(load):
    tasks, runs = load("talt_gpu_tasks"), load("talt_gpu_runs")
    task = tasks.tasks(smoke=True)["resnet"]
    run = runs.Run("resnet", "tune", "nesterov", task.settings["nesterov"], 0, 2)
    record = runs.train(run, task, task.data(None, CPU), CPU)
    assert record["score"] == record["error"]
    assert 0 <= record["error"] <= 1
