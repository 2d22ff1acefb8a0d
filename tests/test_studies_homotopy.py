"""The homotopy learning rate in a run: its settings, what it looks at, what it leaves behind."""

import csv
import dataclasses
import inspect
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from losslab.optim.homotopy.curvature import CurvatureEstimator
from losslab.optim.homotopy.options import HomotopyOptions
from losslab.optim.homotopy.preconditioner import limit
from losslab.studies import checkpoint
from losslab.studies.batch_file import read_batch
from losslab.studies.config import apply, from_assignments, load_config, make_config
from losslab.studies.config_file import ConfigError
from losslab.studies.data import Batches, load_dataset
from losslab.studies.homotopy import scalars
from losslab.studies.models import build_model
from losslab.studies.optimizer_rows import BOUNDED
from losslab.studies.optimizers import OPTIMIZERS, build_optimizer
from losslab.studies.record import RunFolder
from losslab.studies.schedule_section import ScheduleConfig
from losslab.studies.tensorboard import TensorBoard
from losslab.studies.train import train

HOMOTOPY = {"name": "homotopy"}


def test_the_section_has_all_that_the_options_have_with_their_defaults():
    schedule = ScheduleConfig(name="homotopy")
    assert schedule.homotopy(total_steps=70) == HomotopyOptions(total_steps=70)
    own = {field.name for field in dataclasses.fields(HomotopyOptions)} - {"total_steps"}
    more = {"name", "per_layer", "examples", "power_iterations", "num_samples"}
    assert set(ScheduleConfig.model_fields) == own | more
    estimator = inspect.signature(CurvatureEstimator).parameters
    for name in ("power_iterations", "num_samples"):
        assert getattr(schedule, name) == estimator[name].default
    founders = {"rule": "seed", "warmup_steps": 5, "max_lr": 0.5, "target_window": "p2", "target_curvature": 7.0}
    changed = ScheduleConfig(name="homotopy", **founders)
    assert changed.homotopy(9) == HomotopyOptions(**founders, total_steps=9)


def test_it_is_kept_in_the_configuration_and_other_schedules_are_without_it():
    config = make_config({"schedule": {**HOMOTOPY, "rule": "seed", "alpha": 2.0, "examples": 8}})
    plain = json.loads(json.dumps(config.model_dump(mode="json")))
    assert (plain["schedule"]["alpha"], plain["schedule"]["max_lr"]) == (2.0, None)
    assert make_config(plain) == config
    assert make_config({}).model_dump()["schedule"] == {"name": "constant", "warmup_steps": 0}
    back = apply(apply(config, {"schedule.warmup_steps": 3}), {"schedule.name": "cosine"})
    assert back.schedule == ScheduleConfig(name="cosine", warmup_steps=3)


def test_scheduler_is_another_name_of_the_section(tmp_path):
    path, batch = tmp_path / "run.yaml", tmp_path / "batch.yaml"
    path.write_text("scheduler: {name: homotopy, frequency: 20}")
    config = load_config(path, ["scheduler.release=1.5", "schedule.ema=0.5"])
    assert config.schedule == ScheduleConfig(name="homotopy", frequency=20, release=1.5, ema=0.5)
    assert from_assignments(["scheduler.name=homotopy"]).schedule.name == "homotopy"
    assert apply(config, {"scheduler.frequency": 5}).schedule.frequency == 5
    batch.write_text("{defaults: {schedule: {name: cosine}}, runs: [{name: a, scheduler: {name: homotopy}}]}")
    assert read_batch(batch).entries[0].config.schedule.name == "homotopy"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule": {"name": "cosine", "alpha": 2.0}}, "schedule: 'alpha' does nothing in cosine: remove it"),
        ({"schedule": {"examples": 8}}, "schedule: 'examples' does nothing in constant: remove it"),
        ({"schedule": {**HOMOTOPY, "frequenzy": 8}}, "schedule.frequenzy: unknown key, did you mean 'frequency'?"),
        ({"schedule": {**HOMOTOPY, "alpha": 2.0}}, "schedule: alpha: does nothing with rule='stable'"),
        ({"schedule": {**HOMOTOPY, "fraction": 0}}, "schedule: fraction: expected None or a finite number above 0"),
        (
            {"schedule": {**HOMOTOPY, "target_curvature": "adaptif"}},
            "schedule.target_curvature: expected a number or 'adaptive', got 'adaptif'",
        ),
        (
            {"schedule": {**HOMOTOPY, "per_layer": True, "num_samples": 1}},
            "schedule: num_samples: expected 0 with",
        ),
        (
            {"schedule": {**HOMOTOPY, "rule": "seed", "per_layer": True}, "optimizer": {"name": "muon"}},
            "schedule.per_layer: expected one of the optimizers sgd, momentum",
        ),
        ({"schedule": {}, "scheduler": HOMOTOPY}, "scheduler: unknown key, did you mean 'schedule'?"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(values, expected):
    with pytest.raises(ConfigError) as caught:
        make_config(values)
    assert str(caught.value).startswith(f"configuration: {expected}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lion", "sam", "schedule_free", "muon"])
def test_the_stable_rule_needs_an_optimizer_whose_limit_is_known(name):
    with pytest.raises(ConfigError, match=rf"schedule.rule: stable needs .*; got {name}; take another .* rule: seed$"):
        make_config({"schedule": HOMOTOPY, "optimizer": {"name": name}})
    assert make_config({"schedule": {**HOMOTOPY, "rule": "seed"}, "optimizer": {"name": name}})


def test_these_are_the_optimizers_whose_limit_is_known():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    for name in set(OPTIMIZERS) - {"sam", "soap", "shampoo", "lion", "schedule_free"}:  # another package's
        optimizer = build_optimizer(make_config({"optimizer": {"name": name}}).optimizer, network)
        assert math.isfinite(limit(optimizer)) == (name in BOUNDED), name


@pytest.mark.parametrize(
    ("given", "batch", "parts", "expected"),
    [
        (None, 512, 1, 64),
        (None, 64, 1, 16),
        (None, 8, 1, 8),
        (None, 512, 16, 32),
        (100, 512, 16, 100),
        (100, 64, 1, 64),
    ],
)
def test_an_eighth_of_the_batch_is_measured(given, batch, parts, expected):
    assert ScheduleConfig(name="homotopy", examples=given).examples_of(batch, parts) == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Passes of two steps, of which the second has three examples."""
    config = make_config({
        "seed": 5,
        "dataset": {"batch_size": 200, "train_examples": 203},
        "model": {"name": "simple_cnn", "width": 3, "batch_norm": True},
        "optimizer": {"name": "momentum", "lr": 0.3},
        "schedule": {**HOMOTOPY, "num_samples": 2, "warmup_steps": 3},
        "training": {"epochs": 20, "device": "cpu", "max_steps": 6, "eval_every": 1, "checkpoints": {"keep": 1}},
    })  # fmt: skip
    return config, train(config, RunFolder.create(tmp_path_factory.mktemp("runs") / "run"))


def rows(folder, kind):
    return [row for row in folder.metrics() if row["kind"] == kind]


def test_each_estimate_is_of_the_step_s_first_examples_at_its_weights(run):
    config, folder = run
    data = load_dataset(config.dataset)
    order = torch.Generator().manual_seed(config.seed)
    network = build_model(config.model, data.input_shape, data.num_classes).train()
    network.to(memory_format=torch.channels_last)
    for step, (images, classes) in enumerate(Batches(data.train, 200, order).one_pass(), start=1):
        checkpoint.load(folder, f"step-{step}").put_into(network)
        missing = max(25 - len(classes), 0)
        inputs = torch.cat([images[:25], data.train.inputs[:missing]])
        targets = torch.cat([classes[:25], data.train.targets[:missing]])
        loss = cross_entropy(network(inputs), targets)
        gradient = torch.autograd.grad(loss, list(network.parameters()))
        row = rows(folder, "homotopy")[step - 1]
        assert row["step"] == step
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradient)), rel=1e-4)
        assert row["kappa"] == pytest.approx(row["hessian_norm"] / row["grad_norm"] ** 2)
        assert row["factor"] == pytest.approx(row["lr"] / 0.3)
    assert step == 2


def test_a_row_s_learning_rate_is_that_of_its_step(run):
    _, folder = run
    estimates = rows(folder, "homotopy")
    assert [row["step"] for row in estimates] == [1, 2, 3, 4, 5, 6]
    used = [row["learning_rate"] for row in rows(folder, "epoch")]
    assert used == [pytest.approx(0.3 * 0.01), *(row["lr"] for row in estimates[:-1])]
    assert used[1] > used[0]


def test_the_network_s_statistics_do_not_see_the_estimates(run):
    _, folder = run
    counts = [t for name, t in checkpoint.load(folder, "last").weights.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(int(count) == 6 for count in counts)


def test_the_rows_are_there_as_a_table_too_and_what_was_skipped_is_counted(run):
    _, folder = run
    with (folder.path / "homotopy.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    columns = ["step", "loss", "lr", "curvature", "hessian_norm", "grad_norm", "trace", "target", "seconds"]
    assert list(table[0]) == columns
    found = rows(folder, "homotopy")
    assert [[float(line[name]) for name in columns] for line in table] == [
        [row[name] for name in columns] for row in found
    ]
    assert folder.final["skipped_estimates"] == found[-1]["skipped"] == 0


def test_checkpoints_do_not_grow_with_the_run(run):
    _, folder = run
    assert checkpoint.load(folder, "last").training["homotopy"]["history"] == []


def test_with_rates_of_layers_there_is_a_row_for_each(run, tmp_path):
    config = apply(run[0], {"schedule.per_layer": True, "schedule.num_samples": 0, "optimizer.lr": 30.0})
    folder = train(config, RunFolder.create(tmp_path / "run"))
    found = rows(folder, "homotopy")
    layers = [row["layer"] for row in found if row["step"] == 1]
    assert len(layers) == len(set(layers)) > 3
    assert [(row["step"], row["layer"]) for row in found] == [(step, name) for step in range(1, 7) for name in layers]
    assert len({row["lr"] for row in found if row["step"] == 4}) > 1
    assert all(row["kappa"] == pytest.approx(row["hessian_norm"] / row["grad_norm"] ** 2) for row in found)
    assert all(row["factor"] == pytest.approx(row["lr"] / 30) for row in found)
    used = [row["learning_rate"] for row in rows(folder, "epoch")]
    assert used[1:] == pytest.approx([row["lr"] for row in found if row["layer"] == layers[0]][:-1])
    with (folder.path / "homotopy.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["layer"] for line in table] == layers * 6
    assert [float(line["lr"]) for line in table] == [row["lr"] for row in found]
    assert scalars(found[0])[f"homotopy/eta/{layers[0]}"] == found[0]["lr"]
    assert checkpoint.load(folder, "last").training["homotopy"]["rates"]["history"] == []


def test_tensorboard_has_the_curves_and_no_other(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoard(tmp_path, {})
    row = {"kind": "homotopy", "loss": 2.0, "lr": 0.1, "curvature": 4.0, "hessian_norm": 3.0, "grad_norm": 0.5,
           "target": 9.0, "seconds": 0.1, "kappa": 12.0, "factor": 0.25, "skipped": 0}  # fmt: skip
    sink.log(7, row)
    sink.close()
    found = events.EventAccumulator(str(tmp_path)).Reload()
    values = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    names = ("kappa", "lambda", "curvature", "eta", "eta_over_eta0", "loss", "gradient_norm")
    expected = dict(zip(names, (12.0, 3.0, 4.0, 0.1, 0.25, 2.0, 0.5), strict=True))
    assert values == {f"homotopy/{name}": pytest.approx(value) for name, value in expected.items()}
