"""Splits are fixed and disjoint; batches come again in the same order unless a generator shuffles them."""

import pickle

import numpy as np
import pytest
import torch

from losslab.studies.data import Batches, Split, load_dataset
from losslab.studies.sections import DatasetConfig
from losslab.studies.vision import torchvision


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


def written(folder, name="own.npz", **changes):
    draw = np.random.default_rng(0)
    parts = {
        "x_train": draw.integers(0, 256, (40, 5, 6, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": draw.integers(0, 256, (7, 5, 6, 3), dtype=np.uint8),
        "y_test": np.arange(7) % 4,
    }
    parts = {key: value for key, value in (parts | changes).items() if value is not None}
    np.savez(folder / name, **parts)
    return DatasetConfig(name=f"arrays:{folder / name}")


def test_images_of_ones_own_are_channels_first_and_scaled_by_the_training_split(tmp_path):
    data = load_dataset(written(tmp_path))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [36, 4, 7]
    assert data.input_shape == (3, 5, 6)
    assert data.num_classes == 4
    torch.testing.assert_close(data.train.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.inputs.std((0, 2, 3)), torch.ones(3))
    assert torch.bincount(data.validation.targets).tolist() == [1, 1, 1, 1]


def test_grey_images_get_a_channel_and_numbers_stay(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (40, 5, 6), dtype=np.uint8)
    assert load_dataset(written(tmp_path, x_train=grey, x_test=grey[:7])).input_shape == (1, 5, 6)
    rows = np.random.default_rng(0).normal(3, 2, (40, 9))
    data = load_dataset(written(tmp_path, x_train=rows, x_test=rows[:7]))
    torch.testing.assert_close(data.test.inputs, torch.tensor(rows[:7], dtype=torch.float32))


def test_only_so_many_training_examples(tmp_path):
    config = written(tmp_path).model_copy(update={"train_examples": 5})
    assert len(load_dataset(config).train) == 5


def test_data_that_are_not_there_say_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"none\.npz is not there; expected arrays:FILE\.npz with x_train"):
        load_dataset(DatasetConfig(name=f"arrays:{tmp_path / 'none.npz'}"))
    with pytest.raises(ValueError, match=r"own\.npz lacks y_test"):
        load_dataset(written(tmp_path, y_test=None))
    for name in ("cifar10", "cifar100", "mnist", "fashion_mnist"):
        with pytest.raises(ValueError, match=r"is not in .* set dataset\.download=true"):
            load_dataset(DatasetConfig(name=name, root=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["own.npz"]


def test_torchvision_files_are_read(tmp_path):
    """CIFAR-10's own file format, written small; the checksums are torchvision's business."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, count in [*((f"data_batch_{i}", 20) for i in range(1, 6)), ("test_batch", 10)]:
        pixels = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    cls = torchvision().datasets.CIFAR10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "_check_integrity", lambda self: True)
        patch.setattr(torchvision().datasets.cifar, "check_integrity", lambda *_: True)
        data = load_dataset(DatasetConfig(name="cifar10", root=str(tmp_path)))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [90, 10, 10]
    assert data.input_shape == (3, 32, 32)
