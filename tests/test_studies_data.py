"""Splits are fixed and disjoint; batches come again in the same order unless a generator shuffles them."""

import pytest
import torch

from losslab.studies.config import DatasetConfig
from losslab.studies.data import Batches, Split, load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DatasetConfig())


def test_digits_are_split_and_scaled(digits):
    assert [len(split) for split in (digits.train, digits.validation, digits.test)] == [1078, 359, 360]
    assert digits.input_shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert digits.train.inputs.dtype == torch.float32
    assert digits.train.targets.dtype == torch.int64
    assert digits.train.inputs.mean().abs() < 1e-5
    assert digits.train.inputs.std() == pytest.approx(1, abs=1e-5)
    for split in (digits.train, digits.validation, digits.test):
        shares = torch.bincount(split.targets, minlength=10) / len(split)
        assert shares.min() > 0.09  # stratified: the rarest digit is 9.7 % of all


def test_splits_share_no_image_and_never_change(digits):
    flat = {
        name: {tuple(x.flatten().tolist()) for x in getattr(digits, name).inputs}
        for name in ("train", "test")
    }
    flat["validation"] = {tuple(x.flatten().tolist()) for x in digits.validation.inputs}
    assert not flat["train"] & flat["test"]
    assert not flat["train"] & flat["validation"]
    assert not flat["validation"] & flat["test"]
    torch.manual_seed(1)
    again = load_dataset(DatasetConfig(batch_size=3))
    assert torch.equal(again.test.inputs, digits.test.inputs)
    assert torch.equal(again.train.targets, digits.train.targets)


def test_unknown_data_set_gets_a_suggestion():
    with pytest.raises(ValueError, match="unknown data set 'digit', did you mean 'digits'"):
        load_dataset(DatasetConfig(name="digit"))


@pytest.fixture
def split():
    return Split(torch.arange(10.0)[:, None], torch.arange(10))


def test_batches_are_re_iterable_and_ragged(split):
    batches = Batches(split, 4)
    assert len(batches) == 3
    for _ in range(2):
        assert [targets.tolist() for _, targets in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(Batches(split, 100)) == len(list(Batches(split, 100))) == 1


def test_shuffling_is_seeded_and_leaves_the_global_generator_alone(split):
    state = torch.get_rng_state()
    shuffled = Batches(split, 4, torch.Generator().manual_seed(3))
    passes = [torch.cat([targets for _, targets in shuffled]) for _ in range(2)]
    assert not torch.equal(*passes)
    assert all(sorted(order.tolist()) == list(range(10)) for order in passes)
    again = Batches(split, 4, torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([targets for _, targets in again]), passes[0])
    assert all(torch.equal(inputs[:, 0].long(), targets) for inputs, targets in shuffled)
    assert torch.equal(torch.get_rng_state(), state)


def test_head_takes_the_first_or_all(split):
    assert split.head(3).targets.tolist() == [0, 1, 2]
    assert len(split.head(99)) == 10


def test_moving_keeps_everything(digits):
    moved = digits.to("meta")
    assert moved.test.inputs.device.type == "meta"
    assert (moved.num_classes, moved.input_shape) == (10, (1, 8, 8))
