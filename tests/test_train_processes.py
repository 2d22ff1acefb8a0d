"""Under torchrun the processes share each batch: the run is that of one process, up to rounding."""

import pytest
import torch

from losslab.status import StopRequested
from losslab.studies import checkpoint
from losslab.studies.config import make_config
from losslab.studies.record import RunFolder
from losslab.studies.train import train
from processes import run_ranks


def configure(**training):
    return make_config({
        "seed": 3,
        "dataset": {"batch_size": 359},  # of 1,078 examples: the last batch has one, and a process none
        "model": {"name": "mlp", "width": 12, "hidden": 1},
        "optimizer": {"name": "momentum", "lr": 0.05},  # in whose steps a wrong scale of the gradient shows
        "schedule": {"name": "homotopy", "warmup_steps": 2},
        "training": {"epochs": 2, "device": "cpu", "clip_norm": 1.0, "accumulate": 2, "eval_every": 3, **training},
    })  # fmt: skip


def in_each_process(ranks, path):
    whole = train(configure(), RunFolder(path / "whole"), resume=True)

    def stop(done, total, note):
        if done == 5 and ranks.rank == 0:
            raise StopRequested

    resumed = RunFolder(path / "resumed")
    train(configure(), resumed, resume=True, progress=stop)
    stopped_at = checkpoint.load(resumed, "last").step
    train(configure(), resumed, resume=True)
    return whole.metrics(), stopped_at, resumed.metrics()


def without_times(rows):
    times = ("seconds", "samples_per_second", "step_seconds", "peak_memory_bytes")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def test_two_processes_train_as_one(tmp_path):
    alone = train(configure(), RunFolder.create(tmp_path / "alone"))
    first, second = run_ranks(in_each_process, 2, tmp_path, tmp_path)
    whole, stopped_at, resumed = first
    assert [row["kind"] for row in whole].count("homotopy") == 8
    assert len(whole) == len(alone.metrics()) == 5 + 8
    for row, expected in zip(without_times(whole), without_times(alone.metrics()), strict=True):
        words = ("kind", "status")
        assert [row.pop(word, None) for word in words] == [expected.pop(word, None) for word in words]
        assert row == pytest.approx(expected, rel=1e-4)
    assert stopped_at == 5
    assert without_times(resumed) == without_times(whole)
    assert without_times(second[0]) == without_times(whole)  # they wrote once, into one folder
    weights = [checkpoint.load(RunFolder(tmp_path / name), "last").weights for name in ("alone", "whole")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
