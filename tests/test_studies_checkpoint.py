"""Checkpoints come back exactly, tied weights, odd layouts and optimizers' states too, and damage is noticed."""

import json
import math
import os

import pytest
import safetensors.torch
import torch
from torch import nn

from losslab.studies import checkpoint
from losslab.studies.packing import pack, unpack
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


def path_of(folder, name="last"):
    return folder.path / "checkpoints" / f"{name}.safetensors"


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


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
    checkpoint.save(folder, "last", model, {"metrics": {"loss": float("nan")}}, step=7)
    found = checkpoint.load(folder, "last")
    found.put_into(other)
    assert (found.step, found.training) == (7, None)
    assert math.isnan(found.state["metrics"]["loss"])
    assert same(model, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [p.stride() for p in other.parameters()] == [p.stride() for p in model.parameters()]


def test_tied_weights_stay_tied(folder):
    checkpoint.save(folder, "last", Tied(), {})
    model = Tied()
    checkpoint.load(folder, "last").put_into(model)
    assert model.output.weight is model.embedding.weight


def test_any_reader_of_safetensors_finds_the_weights(folder):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    checkpoint.save(folder, "last", model, {}, {"momentum": torch.ones(3)})
    tensors = safetensors.torch.load_file(path_of(folder))
    assert {name for name in tensors if not name.startswith("training/")} == model.state_dict().keys()


def test_a_training_state_comes_back_to_the_last_bit(folder):
    strided = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "average": strided, "lists": [torch.arange(3), None, []]}},
        "groups": [{"lr": 0.1, "betas": (0.9, 1e-320), "nesterov": True, "name": "nan", 5: -0.0}],
        "odd": [math.inf, -math.inf, math.nan, 2**200, (), {}],
        "half": torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
    }
    checkpoint.save(folder, "last", nn.Linear(1, 1), {}, tree)
    back = checkpoint.load(folder, "last").training

    def equal(one, other):
        if isinstance(one, torch.Tensor):
            assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        elif isinstance(one, dict):
            assert list(one) == list(other)
            assert type(next(iter(one), 0)) is type(next(iter(other), 0))
            all(equal(one[key], other[key]) for key in one)
        elif isinstance(one, list | tuple):
            assert type(one) is type(other)
            assert len(one) == len(other)
            all(equal(*pair) for pair in zip(one, other, strict=True))
        else:
            assert (type(one), repr(one)) == (type(other), repr(other))
        return True

    assert equal(tree, back)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0])
def test_what_only_a_pickle_could_hold_is_refused(value):
    with pytest.raises(TypeError, match=r"state.1: expected tensors and plain values, got"):
        pack([1, value], "state")


def test_packing_is_plain_json():
    tree = {"a": [1, 2.5, (True, None)], 3: torch.eye(2)}
    packed, tensors = pack(tree)
    back = unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors)
    assert back["a"] == tree["a"]
    assert torch.equal(back[3], torch.eye(2))


def test_missing_checkpoint_says_what_is_there(folder):
    with pytest.raises(FileNotFoundError, match=r"last.safetensors: no such checkpoint; there: none"):
        checkpoint.load(folder, "last")
    for name in ("last", "step-100", "step-20"):
        checkpoint.save(folder, name, nn.Linear(2, 2), {})
    with pytest.raises(FileNotFoundError, match="no such checkpoint; there: last, step-20, step-100"):
        checkpoint.load(folder, "best")


def bit(position):
    def flip(content):
        spot = position if position >= 0 else len(content) + position
        return content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :]

    return flip


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], bit(-1), bit(3), bit(40), bit(300), lambda b: b"", lambda b: b"{}"]
)
def test_damage_is_noticed(folder, damage):
    checkpoint.save(folder, "last", nn.Linear(2, 2), {"epoch": 1}, {"step": [torch.ones(2), 3]}, step=4)
    path_of(folder).write_bytes(damage(path_of(folder).read_bytes()))
    with pytest.raises(ValueError, match=r"last.safetensors: damaged") as caught:
        checkpoint.load(folder, "last")
    assert "\n" not in str(caught.value)


def test_a_file_of_somebody_else_is_no_checkpoint(folder):
    path_of(folder).parent.mkdir()
    safetensors.torch.save_file({"weight": torch.ones(2)}, path_of(folder))
    with pytest.raises(ValueError, match="damaged, or no checkpoint of a run"):
        checkpoint.load(folder, "last")


@pytest.mark.parametrize(
    "other", [lambda: nn.Linear(3, 2), lambda: nn.Conv2d(2, 2, 3), lambda: nn.Sequential(nn.Linear(2, 2))]
)
def test_another_models_weights_are_refused(folder, other):
    checkpoint.save(folder, "last", nn.Linear(2, 2), {})
    model = other()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="not this model's weights") as caught:
        checkpoint.load(folder, "last").put_into(model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_failed_save_keeps_the_old_checkpoint(folder, monkeypatch):
    old = nn.Linear(2, 2)
    checkpoint.save(folder, "last", old, {}, step=1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        message = r"cannot write the checkpoint of step 2 \(No space left on device\); the one of before is kept"
        with pytest.raises(OSError, match=message):
            checkpoint.save(folder, "last", nn.Linear(2, 2), {}, step=2)
    model = nn.Linear(2, 2)
    found = checkpoint.load(folder, "last")
    found.put_into(model)
    assert found.step == 1
    assert same(model, old)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["last.safetensors"]
