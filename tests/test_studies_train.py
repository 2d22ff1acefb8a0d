"""Training learns, repeats itself, leaves a whole run folder behind and the process as it found it."""

import json
import logging
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from losslab.studies import checkpoint
from losslab.studies.config import load_config, make_config
from losslab.studies.data import Batches, Split
from losslab.studies.evaluation import evaluate
from losslab.studies.optimizer_section import OptimizerConfig
from losslab.studies.optimizers import build_optimizer
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run, probe_batches
from losslab.studies.schedules import rate_factor
from losslab.studies.sections import ScheduleConfig
from losslab.studies.train import train

CONFIGS = Path(__file__).parent.parent / "configs"


def configure(**sections):
    base = {
        "seed": 5,
        "dataset": {"batch_size": 100},
        "model": {"name": "mlp", "width": 16, "hidden": 1},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "training": {"epochs": 3, "device": "cpu"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return make_config(base)


@pytest.fixture
def new(tmp_path):
    return lambda name="run": RunFolder.create(tmp_path / name)


def weights(folder, which="last"):
    return parameters_to_vector(load_run(folder.path, which).model.parameters()).detach()


def test_run_folder_is_complete(new):
    folder = train(configure(), new())
    *epochs, final = folder.metrics()
    assert [row["step"] for row in epochs] == [11, 22, 33]  # 1,078 examples in batches of 100
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert list(epochs[0]) == [
        "step", "kind", "epoch", "seconds", "learning_rate",
        "train_loss", "train_accuracy", "samples_per_second", "validation_loss", "validation_accuracy",
        "parameter_norm", "gradient_norm",
    ]  # fmt: skip
    assert list(final) == [
        "step", "kind", "status", "test_loss", "test_accuracy", "step_seconds", "peak_memory_bytes",
    ]  # fmt: skip
    assert (final["step"], final["kind"], final["status"]) == (33, "final", "completed")
    assert 0 < 33 * final["step_seconds"] < 10 * epochs[-1]["seconds"]
    assert final["peak_memory_bytes"] > 1e7
    assert epochs[0]["seconds"] < epochs[1]["seconds"] < epochs[2]["seconds"]
    assert epochs[-1]["validation_accuracy"] > max(0.8, epochs[0]["validation_accuracy"])
    assert final["test_accuracy"] > 0.8
    assert folder.config == configure().model_dump(mode="json")
    assert {"losslab", "python", "torch", "numpy", "platform", "processor", "cpu_count", "threads"} <= set(
        folder.environment
    )
    assert {"device", "git_commit", "seed", "started"} <= set(folder.environment)
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == [
        "best.safetensors", "last.safetensors",
    ]  # fmt: skip


def test_loaded_runs_are_what_the_metrics_say(new):
    config = configure(optimizer={"lr": 0.1}, training={"epochs": 6})  # bumpy: the best epoch is not the last
    folder = train(config, new())
    *epochs, final = folder.metrics()
    best = max(epochs, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
    for which, row in (("last", epochs[-1]), ("best", best)):
        run = load_run(folder.path, which)
        assert (run.step, run.config, run.folder.path) == (row["step"], config, folder.path)
        assert not run.model.training
        loss, accuracy = evaluate(run.model, Batches(run.dataset.validation, 50))
        assert loss == pytest.approx(row["validation_loss"], rel=1e-4)
        assert accuracy == row["validation_accuracy"]
    last = load_run(folder.path)
    assert evaluate(last.model, Batches(last.dataset.test, 50))[1] == final["test_accuracy"]


@pytest.mark.parametrize("model", [{"name": "mlp"}, {"name": "simple_cnn", "width": 4, "batch_norm": True}])
def test_same_seed_same_weights(new, model):
    config = configure(model=model, training={"epochs": 1})
    first = weights(train(config, new("a")))
    torch.manual_seed(99)
    assert torch.equal(first, weights(train(config, new("b"))))
    other = config.model_copy(update={"seed": 6})
    assert not torch.equal(first, weights(train(other, new("c"))))


def test_process_is_left_as_found(new):
    def state():
        return (
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),  # noqa: NPY002  # the global state is what must not move
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
            torch.get_float32_matmul_precision(),
            torch.get_num_threads(),
            logging.getLogger("lightning_fabric").level,
            list(warnings.filters),
        )

    before = state()
    folder = train(configure(training={"epochs": 1}), new())
    load_run(folder.path)
    assert state() == before


def test_training_is_silent(new, capfd, caplog, recwarn):
    train(configure(training={"epochs": 1, "precision": "bf16-mixed"}), new())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


def test_sinks_get_the_rows_and_progress_every_step(new):
    class Sink:
        rows: list = []  # noqa: RUF012

        def log(self, step, values):
            self.rows.append({"step": step, **values})

    calls = []
    folder = train(configure(training={"epochs": 2}), new(), sinks=[Sink()], progress=lambda *call: calls.append(call))
    assert Sink.rows == folder.metrics()
    assert [(done, total) for done, total, _ in calls] == [(n, 22) for n in range(1, 23)]
    assert re.fullmatch(r"loss [\d.]+", calls[0][2])
    for call, row in ((calls[-2], folder.metrics()[0]), (calls[-1], folder.metrics()[1])):
        assert re.fullmatch(rf"loss [\d.]+  validation accuracy {row['validation_accuracy']:.1%}", call[2])


def test_max_steps_ends_inside_an_epoch(new):
    folder = train(configure(training={"epochs": 9, "max_steps": 15}), new())
    assert [row["step"] for row in folder.metrics()] == [11, 15, 15]
    assert load_run(folder.path).step == 15


def test_divergence_is_recorded(new):
    config = configure(optimizer={"name": "sgd", "lr": 1e20}, training={"epochs": 4})
    folder = train(config, new())
    *epochs, final = folder.metrics()
    assert final["status"] == "diverged"
    assert len(epochs) == 1
    assert not math.isfinite(epochs[0]["train_loss"])
    assert 0 < final["step"] < 11
    assert load_run(folder.path).step == final["step"]
    with pytest.raises(FileNotFoundError, match="no such checkpoint; there: last"):
        load_run(folder.path, "best")
    json.loads((folder.path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


def test_interrupt_writes_the_checkpoint_of_now(new):
    def interrupt(done, total, note):
        if done == 14:
            raise KeyboardInterrupt

    folder = new()
    with pytest.raises(KeyboardInterrupt):
        train(configure(), folder, progress=interrupt)
    assert [row["step"] for row in folder.metrics()] == [11]
    assert load_run(folder.path).step == 14
    assert load_run(folder.path, "best").step == 11
    short = train(configure(training={"max_steps": 14}), new("short"))
    assert torch.equal(weights(folder), weights(short))


@pytest.mark.parametrize(
    ("snapshots", "steps"),
    [
        ({"every": 5}, [0, 5, 10, 13]),
        ({"steps": [3, 0, 40]}, [0, 3]),
        ({"every": 9, "steps": [2]}, [0, 2, 9, 13]),
        ({}, []),
    ],
)
def test_snapshots_are_the_weights_on_the_way(new, snapshots, steps):
    """They change nothing, and the last one is the checkpoint."""
    schedule = {"name": "cosine", "warmup_steps": 4}
    options = {"schedule": schedule, "model": {"name": "simple_cnn", "width": 2, "batch_norm": True}}
    plain = train(configure(training={"max_steps": 13}, **options), new("plain"))
    config = configure(training={"max_steps": 13, "snapshots": snapshots}, **options)
    folder = train(config, new())
    assert torch.equal(weights(folder), weights(plain))
    kept = checkpoint.snapshots(folder)
    assert kept.steps == steps
    rates = [0.01 * rate_factor(config.schedule, max(step - 1, 0), 13) for step in steps]
    assert [snapshot.rule.learning_rate for snapshot in kept] == pytest.approx(rates)
    if 13 in steps:
        model = load_run(folder.path).model
        for name, tensor in model.state_dict().items():
            assert torch.equal(kept[-1].weights[name], tensor)
        name = next(iter(kept[0].weights))
        assert not torch.equal(kept[0].weights[name], kept[1].weights[name])


def test_snapshots_survive_an_interruption_and_go_with_an_overwritten_run(new):
    def interrupt(done, total, note):
        if done == 7:
            raise KeyboardInterrupt

    folder = new()
    with pytest.raises(KeyboardInterrupt):
        train(configure(training={"snapshots": {"every": 3}}), folder, progress=interrupt)
    assert checkpoint.snapshots(folder).steps == [0, 3, 6]
    assert checkpoint.snapshots(RunFolder.create(folder.path, overwrite=True)).steps == []


def test_a_diverged_run_keeps_its_last_snapshot(new):
    config = configure(optimizer={"name": "sgd", "lr": 1e20}, training={"epochs": 4, "snapshots": {"every": 100}})
    folder = train(config, new())
    assert checkpoint.snapshots(folder).steps == [0, folder.metrics()[-1]["step"]]


def test_clipping_bounds_the_step(new):
    config = configure(optimizer={"name": "sgd", "lr": 1.0}, training={"max_steps": 1, "clip_norm": 1e-3})
    zero = configure(optimizer={"name": "sgd", "lr": 1e-30}, training={"max_steps": 1})
    moved = weights(train(config, new("clipped"))) - weights(train(zero, new("start")))
    assert moved.norm() == pytest.approx(1e-3, rel=0.01)


def test_evaluation_weights_examples_equally_and_keeps_the_mode():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5))
    split = Split(torch.randn(10, 3), torch.arange(10) % 4)
    ragged, whole = evaluate(model, Batches(split, 4)), evaluate(model, Batches(split, 10))
    assert ragged == pytest.approx(whole)
    assert model.training


def test_probe_batches_follow_the_configuration(new):
    probes = {"split": "validation", "examples": 70, "batch_size": 30}
    run = load_run(train(configure(probes=probes, training={"epochs": 1}), new()).path)
    batches = probe_batches(run)
    assert [len(targets) for _, targets in batches] == [30, 30, 10]
    assert torch.equal(batches.split.inputs, run.dataset.validation.inputs[:70])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"device": "mps"}}, r"training.device: mps is not there; use auto or cpu"),
        ({"training": {"precision": "16-mixed"}}, r"training.precision: 16-mixed needs an accelerator"),
        ({"dataset": {"name": "digit"}}, "unknown data set 'digit', did you mean 'digits'"),
        ({"model": {"name": "mpl"}}, "unknown model 'mpl', did you mean 'mlp'"),
    ],
)
def test_refusals_leave_the_folder_empty(new, values, message):
    folder = new()
    with pytest.raises(ValueError, match=message):
        train(configure(**values), folder)
    assert not any(folder.path.iterdir())


def test_load_run_refuses_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text('{"optimizer": {"rl": 1}}')
    with pytest.raises(ValueError, match=r"config.json: optimizer.rl: unknown key"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("values", "kind", "settings"),
    [
        (
            {"name": "sgd", "momentum": 0.9, "nesterov": True},
            torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True},
        ),
        ({"name": "adam", "betas": [0.8, 0.9]}, torch.optim.Adam, {"betas": (0.8, 0.9)}),
        ({"name": "adamw"}, torch.optim.AdamW, {"betas": (0.9, 0.999)}),
    ],
)
def test_optimizers_take_their_settings(values, kind, settings):
    config = OptimizerConfig.model_validate({"lr": 0.3, "weight_decay": 0.02, **values})
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in ("lr", "weight_decay", *settings)} == {
        "lr": 0.3,
        "weight_decay": 0.02,
        **settings,
    }


def test_schedules():
    constant, cosine = ScheduleConfig(), ScheduleConfig(name="cosine", warmup_steps=4)
    assert [rate_factor(constant, step, 10) for step in (0, 9)] == [1, 1]
    assert [rate_factor(cosine, step, 12) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert rate_factor(cosine, 8, 12) == pytest.approx(0.5)
    assert 0 < rate_factor(cosine, 11, 12) < 0.05
    assert rate_factor(ScheduleConfig(warmup_steps=50), 3, 10) == 0.08


def test_learning_rate_of_a_row_is_the_last_one_used(new):
    config = configure(schedule={"name": "cosine"}, training={"epochs": 2})
    rates = [row["learning_rate"] for row in train(config, new()).metrics()[:2]]
    assert rates == [pytest.approx(0.01 * rate_factor(config.schedule, step, 22)) for step in (10, 21)]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw"])
def test_shipped_configurations_reach_their_accuracy(new, name):
    config = load_config(CONFIGS / f"{name}.yaml")
    final = train(config, new()).metrics()[-1]
    assert final["test_accuracy"] >= 0.97
