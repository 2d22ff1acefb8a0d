"""Checkpoints come back exactly, tied weights and odd layouts too, and damage is noticed."""

import os

import pytest
import torch
from torch import nn

from losslab.studies import checkpoint
from losslab.studies.record import RunFolder


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run")


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)),
        lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
        lambda: nn.Linear(2, 2).double(),
        Tied,
    ],
)
def test_round_trip(folder, make):
    model, other = make(), make()
    assert not same(model, other)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint.save(folder, "last", model, {"step": 7, "metrics": {"loss": float("nan")}})
    state = checkpoint.load(folder, "last", other)
    assert state["step"] == 7
    assert state["metrics"]["loss"] != state["metrics"]["loss"]
    assert same(model, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_weights_stay_tied(folder):
    checkpoint.save(folder, "last", Tied(), {})
    model = Tied()
    checkpoint.load(folder, "last", model)
    assert model.output.weight is model.embedding.weight


def test_missing_checkpoint_says_what_is_there(folder):
    with pytest.raises(FileNotFoundError, match=r"last.safetensors: no such checkpoint; there: none"):
        checkpoint.load(folder, "last", nn.Linear(2, 2))
    checkpoint.save(folder, "last", nn.Linear(2, 2), {})
    with pytest.raises(FileNotFoundError, match="no such checkpoint; there: last"):
        checkpoint.load(folder, "best", nn.Linear(2, 2))


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_damaged_weights_are_noticed(folder, damage):
    checkpoint.save(folder, "last", nn.Linear(2, 2), {})
    path = folder.path / "checkpoints" / "last.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"last.safetensors: damaged: its sha256 differs from last.json's"
    ) as caught:
        checkpoint.load(folder, "last", nn.Linear(2, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_damaged_state_is_noticed(folder, text):
    checkpoint.save(folder, "last", nn.Linear(2, 2), {})
    (folder.path / "checkpoints" / "last.json").write_text(text)
    with pytest.raises(ValueError, match=r"last.json: damaged: expected JSON with the weights' sha256"):
        checkpoint.load(folder, "last", nn.Linear(2, 2))


@pytest.mark.parametrize(
    "other", [lambda: nn.Linear(3, 2), lambda: nn.Conv2d(2, 2, 3), lambda: nn.Sequential(nn.Linear(2, 2))]
)
def test_another_models_weights_are_refused(folder, other):
    checkpoint.save(folder, "last", nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="not this model's weights") as caught:
        checkpoint.load(folder, "last", other())
    assert "\n" not in str(caught.value)


def test_failed_save_keeps_the_old_checkpoint(folder, monkeypatch):
    old = nn.Linear(2, 2)
    checkpoint.save(folder, "last", old, {"step": 1})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(folder, "last", nn.Linear(2, 2), {"step": 2})
    model = nn.Linear(2, 2)
    assert checkpoint.load(folder, "last", model)["step"] == 1
    assert same(model, old)
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == [
        "last.json",
        "last.safetensors",
    ]
