"""Batch normalisation's statistics are those of the weights that are evaluated, also under SAM and schedule-free."""

import pytest
import torch

from losslab.studies import averaging
from losslab.studies.config import make_config
from losslab.studies.data import Batches
from losslab.studies.evaluation import evaluate
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.train import train

SIZE = 50


def trained(folder, optimizer, **training):
    """The run of a small network with batch normalisation on a hundred digits: two batches a pass."""
    sections = {
        "dataset": {"train_examples": 2 * SIZE, "batch_size": SIZE},
        "model": {"name": "simple_cnn", "width": 2, "batch_norm": True},
        "training": {"device": "cpu", **training},
    }
    return load_run(train(make_config({"optimizer": optimizer, **sections}), RunFolder.create(folder)).path)


def statistics(run):
    return {name: buffer.clone() for name, buffer in run.model.named_buffers()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sams_second_pass_is_not_in_the_statistics(accumulate, tmp_path):
    """As in its authors' code: after a step they are those of the pass at the first point, which SGD makes too."""
    sam, momentum = (
        trained(tmp_path / name, {"name": name}, max_steps=1, accumulate=accumulate) for name in ("sam", "momentum")
    )
    assert not torch.equal(sam.model.features[0].weight, momentum.model.features[0].weight)
    assert [int(count) for name, count in statistics(sam).items() if "batches" in name] == 3 * [accumulate]
    assert all(torch.equal(value, statistics(momentum)[name]) for name, value in statistics(sam).items())


@pytest.mark.parametrize("ema", [None, 0.8])
def test_schedule_frees_statistics_are_those_at_its_average(ema, tmp_path):
    """What is evaluated and saved has the statistics that torch's `update_bn` finds at the same weights."""
    run = trained(tmp_path / "run", {"name": "schedule_free"}, max_steps=6, ema=ema)
    (*_, row, _) = run.folder.metrics()
    loss, _ = evaluate(run.model, Batches(run.dataset.validation, 512))
    assert row["validation_loss"] == pytest.approx(loss, rel=1e-5)
    saved = statistics(run)
    torch.optim.swa_utils.update_bn(list(Batches(run.dataset.train, SIZE)), run.model)
    for name, value in statistics(run).items():
        if "batches" not in name:
            torch.testing.assert_close(saved[name], value)


def test_so_many_batches_are_enough_for_the_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(averaging, "BATCHES", 1)
    run = trained(tmp_path / "run", {"name": "schedule_free"}, max_steps=3)
    saved = statistics(run)
    torch.optim.swa_utils.update_bn([run.dataset.train.inputs[:SIZE]], run.model)
    torch.testing.assert_close(saved["features.1.running_var"], statistics(run)["features.1.running_var"])
