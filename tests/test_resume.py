"""A run that was stopped or killed goes on to the same numbers, bit for bit, as one that never was."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from losslab.status import StopRequested
from losslab.studies import checkpoint
from losslab.studies.config import make_config
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.train import train

# What no two runs share.
TIMES = ("seconds", "samples_per_second", "step_seconds", "peak_memory_bytes", "reached_seconds")
CNN = {"name": "simple_cnn", "width": 3, "batch_norm": True}


def configure(training=None, **sections):
    values = {
        "seed": 3,
        "dataset": {"batch_size": 200},  # six batches in a pass
        "model": {"name": "mlp", "width": 12, "hidden": 1},
        "optimizer": {"name": "adamw", "lr": 0.02},
        "schedule": {"name": "cosine", "warmup_steps": 4},
        "training": {"epochs": 3, "device": "cpu", **(training or {})},
    }
    return make_config({**values, **sections})


def outcome(folder):
    """The metrics without times, and all weights."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in folder.metrics()]
    tensors = {}
    for name in checkpoint.names(folder):
        found = checkpoint.load(folder, name)
        tensors |= {f"{name}/{key}": tensor.tolist() for key, tensor in found.weights.items()}
    snapshots = {s.step: {k: t.tolist() for k, t in s.weights.items()} for s in checkpoint.snapshots(folder)}
    return rows, tensors, snapshots


def stopping_at(step, error):
    def progress(done, total, note):
        if done == step:
            raise error

    return progress


def killed_and_resumed(config, folder, steps):
    """Die at each of these steps, as suddenly as an exception that nobody catches, and go on."""
    for step in steps:
        with pytest.raises(ZeroDivisionError):
            train(config, folder, progress=stopping_at(step, ZeroDivisionError()), resume=True)
    return train(config, folder, resume=True)


CASES = {
    "plain": {},
    "momentum, batch norm": {"model": CNN, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
    "all at once": {
        "model": CNN,
        "training": {
            "ema": 0.9, "accumulate": 2, "clip_norm": 0.5, "eval_every": 4, "snapshots": {"every": 5},
            "checkpoints": {"every": 3, "keep": 7}, "target": {"value": 0.5, "stop": False},
        },
    },
    "schedule-free, batch norm": {
        "model": CNN,
        "optimizer": {"name": "schedule_free"},
        "training": {"eval_every": 4, "checkpoints": {"every": 3}},
    },
    "target": {"training": {"eval_every": 2, "target": {"value": 0.6}, "checkpoints": {"every": 1}}},
    "talt, watched": {
        "optimizer": {"name": "talt", "lr": 0.02},
        "training": {"monitor_talt": 4, "checkpoints": {"every": 3}},
    },
    "homotopy, batch norm, averaged": {
        "model": CNN,
        "schedule": {"name": "homotopy", "frequency": 3, "num_samples": 1},
        "training": {"ema": 0.9, "checkpoints": {"every": 3}},
    },
    "homotopy, a rate for each layer": {
        "model": CNN,
        "optimizer": {"name": "talt", "lr": 0.02},
        "schedule": {"name": "homotopy", "frequency": 3, "per_layer": True},
        "training": {"checkpoints": {"every": 3}},
    },
    "bfloat16": {"training": {"precision": "bf16-mixed", "checkpoints": {"every": 2}}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_and_resumed_is_bit_identical(tmp_path, case):
    config = configure(**CASES[case])
    whole = outcome(train(config, RunFolder.create(tmp_path / "whole")))
    last = whole[0][-1]["step"]
    kills = random.Random(case).sample(range(1, last), min(4, last - 1))
    folder = RunFolder(tmp_path / "killed")
    assert outcome(killed_and_resumed(config, folder, sorted(kills))) == whole


def test_a_watched_run_has_talts_rows(tmp_path):
    config = configure(**CASES["talt, watched"])
    rows = [row for row in train(config, RunFolder.create(tmp_path / "run")).metrics() if row["kind"] == "talt"]
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    assert all(row["tensors"] for row in rows)


def test_stopped_run_has_no_end_and_goes_on_from_that_step(tmp_path):
    config = configure()
    folder = train(config, RunFolder.create(tmp_path / "run"), progress=stopping_at(8, StopRequested()))
    assert folder.final is None
    assert checkpoint.load(folder, "last").step == 8
    seen = []
    train(config, folder, resume=True, progress=lambda done, total, note: seen.append(done))
    assert seen == list(range(9, 19))
    assert outcome(folder) == outcome(train(config, RunFolder.create(tmp_path / "whole")))


def test_a_sink_may_stop_the_run(tmp_path):
    class Sink:
        def log(self, step, values):
            if step == 12:
                raise StopRequested

    folder = train(configure(), RunFolder.create(tmp_path / "run"), sinks=[Sink()])
    assert (folder.final, checkpoint.load(folder, "last").step) == (None, 12)
    assert [row["step"] for row in folder.metrics()] == [6, 12]


def test_resuming_what_is_finished_does_nothing(tmp_path):
    folder = train(configure(), RunFolder.create(tmp_path / "run"))
    before = (folder.path / "metrics.jsonl").read_bytes()
    train(configure(), folder, resume=True, progress=stopping_at(1, AssertionError()))
    assert (folder.path / "metrics.jsonl").read_bytes() == before


def test_resuming_where_nothing_is_starts(tmp_path):
    folder = train(configure(), RunFolder(tmp_path / "new" / "run"), resume=True)
    assert folder.final["status"] == "completed"


def test_killed_between_the_last_row_and_the_end(tmp_path):
    config = configure(training={"target": {"value": 0.5}})
    folder = train(config, RunFolder.create(tmp_path / "run"))
    whole = outcome(folder)
    folder.rewind(folder.final["step"])
    assert folder.final is None
    assert outcome(train(config, folder, resume=True)) == whole
    assert whole[0][-1]["status"] == "reached"


def test_another_configuration_is_refused_and_nothing_changes(tmp_path):
    folder = train(configure(), RunFolder.create(tmp_path / "run"), progress=stopping_at(8, StopRequested()))
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    other = configure(optimizer={"name": "adamw", "lr": 0.5})
    with pytest.raises(ValueError, match=r"resume: .* another configuration: optimizer.lr: 0.02 there, 0.5 now$"):
        train(other, folder, resume=True)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_damaged_checkpoint_is_refused(tmp_path):
    folder = train(configure(), RunFolder.create(tmp_path / "run"), progress=stopping_at(8, StopRequested()))
    path = folder.path / "checkpoints" / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        train(configure(), folder, resume=True)


def test_all_global_generators_go_on(tmp_path):
    """Dropout, and a network of the user's that draws from Python's and NumPy's generators; all are left as found."""
    config = configure(model={"name": "module:drawing.network"}, training={"checkpoints": {"every": 1}})
    before = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    whole = outcome(train(config, RunFolder.create(tmp_path / "whole")))
    assert outcome(killed_and_resumed(config, RunFolder(tmp_path / "killed"), [1, 5, 12])) == whole
    assert (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())) == before  # noqa: NPY002


def test_kill_nine_in_the_middle(tmp_path):
    """A real process, killed twice wherever it is; fifty times in benchmarks/kills.py."""
    config = configure(model=CNN, training={"epochs": 12, "checkpoints": {"every": 1}})
    whole = outcome(train(config, RunFolder.create(tmp_path / "whole")))
    folder = RunFolder(tmp_path / "killed")
    code = (
        "import sys; from losslab.studies.config import make_config; from losslab.studies.record import RunFolder;"
        "from losslab.studies.train import train; import json;"
        f"train(make_config(json.loads({config.model_dump_json()!r})), RunFolder({str(folder.path)!r}), resume=True)"
    )
    last = folder.path / "checkpoints" / "last.safetensors"
    for _ in range(2):
        seen = last.stat().st_mtime_ns if last.exists() else 0
        worker = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
        while worker.poll() is None and (last.stat().st_mtime_ns if last.exists() else 0) == seen:
            time.sleep(0.001)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert folder.final is None
    assert outcome(train(config, folder, resume=True)) == whole
    assert load_run(folder.path).step == 72
