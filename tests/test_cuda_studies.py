"""Trainings on a GPU: every precision, killed and resumed bit for bit, moved to the CPU and back; the commands."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from devices import CUDA, DEVICE, equal, on_device, only_cuda
from losslab import cli
from losslab.studies import checkpoint
from losslab.studies import train as trainings
from losslab.studies.config import make_config
from losslab.studies.devices import make_fabric
from losslab.studies.optimizers import OPTIMIZERS
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.sections import RunConfig
from losslab.studies.train import train
from test_resume import TIMES, outcome, stopping_at

pytestmark = on_device
ACCELERATOR = "cuda" if CUDA else "cpu"
PRECISIONS = ["32-true", "bf16-mixed", *(["16-mixed"] if CUDA else [])]
CNN = {"name": "simple_cnn", "width": 4, "batch_norm": True}


def configure(training=None, **sections) -> RunConfig:
    values = {
        "seed": 3,
        "dataset": {"batch_size": 200},  # six batches in a pass
        "model": {"name": "mlp", "width": 12, "hidden": 1},
        "optimizer": {"name": "adamw", "lr": 0.02},
        "training": {"epochs": 3, "device": ACCELERATOR, **(training or {})},
    }
    return make_config({**values, **sections})


@pytest.fixture(autouse=True)
def _deterministic_kernels():
    """What people set to get the same bits on a GPU: losslab itself sets nothing."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", [CNN, {"name": "mlp", "width": 12}], ids=["cnn", "mlp"])
def test_every_precision_learns_digits(tmp_path, precision, model):
    folder = train(configure({"epochs": 4, "precision": precision}, model=model), RunFolder.create(tmp_path / "run"))
    final = folder.final
    assert final["status"] == "completed"
    assert final["test_accuracy"] > 0.3  # 24 steps; guessing gives 0.1
    lengths = [row["gradient_norm"] for row in folder.metrics() if row["kind"] == "epoch"]
    finite = [length for length in lengths if math.isfinite(length)]  # the first scale may be too large
    assert finite
    assert all(0 < length < 100 for length in finite)  # of the loss, not of the scaled one: 65,536 times as long
    assert all(t.dtype == torch.float32 for t in checkpoint.load(folder, "last").weights.values() if t.ndim)
    run = load_run(folder.path)
    x, y = run.dataset.test.inputs, run.dataset.test.targets
    accuracy = float((run.model(x).argmax(1) == y).float().mean())  # on the CPU in float32
    assert accuracy == pytest.approx(final["test_accuracy"], abs=0.02)


@pytest.mark.parametrize("clip", [None, 1e6])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradients_length_is_that_of_the_cpu(tmp_path, precision, clip):
    """After the first step, with clipping that never clips and without."""
    lengths = []
    for device, kind in (("cpu", "32-true"), (ACCELERATOR, precision)):
        settings = {"device": device, "precision": kind, "clip_norm": clip, "max_steps": 1}
        folder = train(configure(settings), RunFolder.create(tmp_path / f"{device}-{kind}-{len(lengths)}"))
        lengths.append(next(row["gradient_norm"] for row in folder.metrics() if row["kind"] == "epoch"))
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)


def test_float32_follows_the_cpu(tmp_path):
    found = []
    for device in ("cpu", ACCELERATOR):
        config = configure({"device": device, "epochs": 1}, optimizer={"name": "sgd", "lr": 0.1})
        folder = train(config, RunFolder.create(tmp_path / f"{device}{len(found)}"))
        found.append(checkpoint.load(folder, "last").weights)
    for name, tensor in found[0].items():
        equal(found[1][name], tensor, 1e-4)


@only_cuda
def test_memory_and_environment_are_the_gpus(tmp_path):
    before = torch.cuda.max_memory_allocated()
    folder = train(configure({"epochs": 1}), RunFolder.create(tmp_path / "run"))
    peak = folder.final["peak_memory_bytes"]
    assert before <= peak == torch.cuda.max_memory_allocated()
    assert 1 << 16 < peak < torch.cuda.get_device_properties(0).total_memory
    assert folder.environment["device"] == torch.cuda.get_device_name(0)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "muon" or hasattr(torch.optim, "Muon")])
def test_every_optimizer_trains_and_resumes(tmp_path, name):
    if name in ("sam", "soap", "shampoo", "lion", "schedule_free"):
        pytest.importorskip("pytorch_optimizer")
    lr = {"sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "sam": 0.05, "shampoo": 0.02, "lion": 1e-3}.get(name, 0.01)
    # Width 12 and kernels of 3x3: covariances of every shape.
    config = configure(
        {"epochs": 1, "checkpoints": {"every": 2}},
        model={"name": "simple_cnn", "width": 3},
        optimizer={"name": name, "lr": lr},
    )
    whole = outcome(train(config, RunFolder.create(tmp_path / "whole")))
    assert math.isfinite(whole[0][-1]["test_loss"])
    assert outcome(killed(config, tmp_path / "killed", [3])) == whole


def killed(config, path, steps):
    """Die at these steps, as suddenly as an exception that nobody catches, and go on."""
    folder = RunFolder(path)
    for at in steps:
        with pytest.raises(ZeroDivisionError):
            train(config, folder, progress=stopping_at(at, ZeroDivisionError()), resume=True)
    return train(config, folder, resume=True)


RESUMED = {
    "batch norm, average, parts": {
        "model": CNN,
        "training": {"ema": 0.9, "accumulate": 2, "clip_norm": 0.5, "checkpoints": {"every": 2, "keep": 7}},
    },
    "talt, watched": {
        "model": CNN,
        "optimizer": {"name": "talt", "lr": 0.02},
        "training": {"monitor_talt": 4, "checkpoints": {"every": 3}},
    },
    "talt, another thread": {
        "optimizer": {"name": "talt", "lr": 0.02, "talt": {"asynchronous": True, "update_interval": 4}},
        "training": {"checkpoints": {"every": 3}},
    },
    "bfloat16": {"training": {"precision": "bf16-mixed", "checkpoints": {"every": 2}}},
    "augmented": {"model": CNN, "dataset": {"batch_size": 200, "augment": ["crop", "flip"]}},
    "dropout": {"model": {"name": "module:drawing.network"}, "training": {"checkpoints": {"every": 1}}},
    **({"float16": {"training": {"precision": "16-mixed", "checkpoints": {"every": 2}}}} if CUDA else {}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_killed_and_resumed_is_bit_identical(tmp_path, case):
    """With cuDNN's deterministic kernels; cuBLAS repeats itself on one stream of one kind of GPU."""
    config = configure(**{"training": {}, **RESUMED[case]})
    whole = outcome(train(config, RunFolder.create(tmp_path / "whole")))
    assert outcome(killed(config, tmp_path / "killed", [4, 11])) == whole


@pytest.mark.parametrize("way", [("cpu", ACCELERATOR), (ACCELERATOR, "cpu")], ids="-".join)
@pytest.mark.parametrize("optimizer", ["adamw", "talt"])
def test_a_checkpoint_goes_on_elsewhere(tmp_path, monkeypatch, way, optimizer):
    """With `device: auto` a folder may be carried to another machine: the same run, up to rounding."""
    settings = {"device": "auto", "ema": 0.9, "checkpoints": {"every": 1}, "epochs": 1}
    config = configure(settings, optimizer={"name": optimizer, "lr": 0.01})
    now = [way[0]]

    def elsewhere(training):
        return make_fabric(training.model_copy(update={"device": now[0]}))

    monkeypatch.setattr(trainings, "make_fabric", elsewhere)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train(config, folder, progress=stopping_at(3, ZeroDivisionError()), resume=True)
    now[0] = way[1]
    moved = train(config, folder, resume=True)
    now[0] = way[0]
    whole = train(config, RunFolder(tmp_path / "whole"))
    assert moved.final["status"] == "completed"
    for ours, theirs in zip(moved.metrics(), whole.metrics(), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - set(TIMES):
            assert isinstance(theirs[key], str) or ours[key] == pytest.approx(theirs[key], rel=0.05, abs=0.02), key


def test_random_states_are_left_as_found(tmp_path):
    config = configure(model={"name": "module:drawing.network"})
    torch.rand(3, device=DEVICE)
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if CUDA else [])]
    train(config, RunFolder.create(tmp_path / "run"))
    after = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if CUDA else [])]
    assert all(map(torch.equal, states, after))


# Commands.


SMALL = ["--set", f"training.device={ACCELERATOR}", "--set", "training.epochs=1", "--set", "model.width=4", "--quiet"]


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_train_probe_and_report(tmp_path):
    for name in ("adamw", "talt"):
        invoke("train", name, *SMALL, "--set", "probes.examples=64", "--output", tmp_path / name)
    assert RunFolder(tmp_path / "adamw").config["training"]["device"] == ACCELERATOR
    invoke("probe", "sharpness", "--run", tmp_path / "adamw", "--num-samples", "2", "--quiet")
    invoke("probe", "interpolation", "--run", tmp_path / "adamw", "--to", tmp_path / "talt", "--steps", "3", "--quiet")
    invoke("report", tmp_path)
    assert list(tmp_path.rglob("*.html"))


def test_batch_gives_each_run_its_gpu(tmp_path):
    """Forked workers: CUDA must not have been started in the process that they are forked from."""
    training = {"epochs": 1, "device": ACCELERATOR}
    entry = {"name": "one", "model": {"name": "mlp", "width": 8}, "training": training}
    runs = [entry, {**entry, "name": "two", "seed": 1}]
    (tmp_path / "batch.json").write_text(json.dumps({"runs": runs}))
    gpus = ["--gpus", "1"] if CUDA else []
    invoke("batch", "--config", tmp_path / "batch.json", "--output", tmp_path / "study", *gpus, "--quiet")
    for name in ("one", "two"):
        assert RunFolder(tmp_path / "study" / name).final["status"] == "completed"
    if CUDA:
        found = {RunFolder(tmp_path / "study" / name).environment["device"] for name in ("one", "two")}
        assert found == {torch.cuda.get_device_name(0)}


def test_tune(tmp_path):
    pytest.importorskip("optuna")
    arguments = ["--trials", "2", "--pruner", "none", "--set-space", "optimizer.lr=0.001:0.1:log"]
    invoke("tune", "adamw", *SMALL, *arguments, "--output", tmp_path / "study")
    assert list((tmp_path / "study").rglob("*.json*"))


def test_analyze(tmp_path):
    invoke("analyze", *SMALL, "--set", "probes.examples=32", "--save-dir", tmp_path)
    assert [path for path in tmp_path.rglob("config.json") if RunFolder(path.parent).final]
