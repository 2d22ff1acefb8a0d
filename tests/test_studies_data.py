"""Splits are fixed and disjoint; batches come again in the same order unless a generator shuffles them.

Augmentation is as random as it says; a download is whole or leaves nothing. Texts are in test_text.py.
"""

import gzip
import itertools
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import gen
from losslab.studies.data import Batches, Split, augmentation, load_dataset
from losslab.studies.data.download import download
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
    flat = {name: {tuple(x.flatten().tolist()) for x in getattr(digits, name).inputs} for name in ("train", "test")}
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
    with pytest.raises(ValueError, match=r"own\.npz: expected one class for each of 7 examples in y_test, got"):
        load_dataset(written(tmp_path, y_test=np.arange(3)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x_train": np.array([{}] * 40)}, "expected np.savez's file of numbers, got another (Object arrays cannot"),
        ({"x_train": np.array(["a"] * 40), "x_test": np.array(["a"] * 7)}, "x_train: expected numbers, got <U1"),
        ({"x_train": np.zeros((40, 2)), "x_test": np.zeros((7, 3))}, "x_test: expected examples of shape (2,) as in"),
        (
            {"x_train": np.diag(np.full(40, np.nan)), "x_test": np.zeros((7, 40))},
            "x_train: expected finite numbers, got",
        ),
        ({"x_test": np.zeros((0, 5, 6, 3))}, "x_test: expected examples, got none"),
        ({"y_train": np.arange(40) % 4 - 1}, "y_train: expected classes 0, 1, 2, …, got -1"),
        ({"y_test": np.arange(7) / 2}, "y_test: expected classes 0, 1, 2, …, got 0.5"),
        ({"y_train": np.array(["cat"] * 40)}, "y_train: expected classes 0, 1, 2, …, got <U3"),
        ({"y_train": np.arange(40)}, "expected at most 20 classes, two of 40 training examples each, got 40 with"),
        ({"y_train": np.arange(40) // 2 * 1000}, "got 19001 with labels up to 19000; number classes 0, 1, 2, …; quan"),
        ({"y_train": np.arange(40) == 0}, "y_train: expected classes 0, 1, 2, …, got bool"),
        ({"y_train": (np.arange(40) == 0).astype(int)}, "a tenth of y_train cannot be set apart: The"),
    ],
)
def test_data_of_ones_own_that_cannot_be_used_are_one_line(changes, says, tmp_path):
    with pytest.raises(ValueError, match=r"^dataset\.name: .*own\.npz: ") as caught:
        load_dataset(written(tmp_path, **changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text", None])
def test_a_file_that_numpy_did_not_write_is_one_line(content, tmp_path):
    path = tmp_path / "own.npz"
    if content is None:
        with path.open("wb") as file:
            np.save(file, np.zeros(3))  # one array, not four
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^dataset\.name: .*own\.npz: expected np\.savez's file of numbers, got"):
        load_dataset(DatasetConfig(name=f"arrays:{path}"))
    for name in ("cifar10", "cifar100", "mnist", "fashion_mnist"):
        with pytest.raises(ValueError, match=r"is not in .* with --set dataset\.download=true"):
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


def idx(values: np.ndarray) -> bytes:
    """MNIST's own file format."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes())


def archives(folder: Path) -> Path:
    """MNIST's four archives, small."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in (("train", 100), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return folder


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Torchvision, its network replaced by a folder and its md5 sums by none."""
    source, module = archives(tmp_path / "network"), torchvision().datasets.mnist

    def fetched(url, download_root, filename, md5=None):
        folder = Path(download_root)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / filename).exists():
            shutil.copy(source / filename, folder / filename)
        name = filename.removesuffix(".gz")
        (folder / name).write_bytes(gzip.decompress((folder / filename).read_bytes()))

    monkeypatch.setattr(module, "download_and_extract_archive", fetched)
    return source


def test_a_data_set_is_fetched_on_request_and_once(mnist, tmp_path):
    config = DatasetConfig(name="mnist", root=str(tmp_path / "root"), download=True)
    data = load_dataset(config)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [90, 10, 20]
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["MNIST"]
    shutil.rmtree(mnist)
    again = load_dataset(config.model_copy(update={"download": False}))
    assert torch.equal(again.train.inputs, data.train.inputs)
    load_dataset(config)


def test_archives_that_are_there_are_not_fetched_again(mnist, tmp_path):
    shutil.copytree(mnist, tmp_path / "root" / "MNIST" / "raw")
    shutil.rmtree(mnist)
    assert len(load_dataset(DatasetConfig(name="mnist", root=str(tmp_path / "root"), download=True)).test) == 20


@pytest.mark.parametrize("left", [0, 500])
def test_a_file_that_was_cut_off_is_refused_and_fetched_again(mnist, tmp_path, left):
    config = DatasetConfig(name="mnist", root=str(tmp_path / "root"), download=True)
    whole = load_dataset(config)
    torn = tmp_path / "root" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    torn.write_bytes(torn.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"mnist is not in .*, or not whole; fetch it with --set dataset\.download=tr"):
        load_dataset(config.model_copy(update={"download": False}))
    assert torch.equal(load_dataset(config).train.inputs, whole.train.inputs)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("broken", [RuntimeError("no route\nto host"), KeyboardInterrupt()])
def test_a_download_that_ends_early_leaves_nothing(tmp_path, broken):
    def fetch(folder):
        (folder / "half").write_text("written")
        raise broken

    kind = ValueError if isinstance(broken, RuntimeError) else KeyboardInterrupt
    for root in (tmp_path / "a" / "new", tmp_path / "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / "kept").touch()
        with pytest.raises(kind) as raised:
            download("mnist", root, fetch, reuse="kept")
        if kind is ValueError:
            assert str(raised.value).startswith("dataset.download: mnist could not be fetched into")
            assert "(no route to host); nothing was kept" in str(raised.value)
    assert everything(tmp_path) == ["a", "old", "old/kept"]


def test_a_download_replaces_what_was_broken(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "torn").touch()

    def fetch(folder):
        (folder / "set").mkdir()
        (folder / "set" / "whole").touch()

    download("mnist", tmp_path, fetch)
    assert everything(tmp_path) == ["set", "set/whole"]


def test_no_network_is_one_line_and_nothing_kept(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr(torchvision().datasets.cifar, "download_and_extract_archive", refused)
    with pytest.raises(ValueError, match=r"cifar10 could not be fetched into .* \(unreachable\); nothing was kept"):
        load_dataset(DatasetConfig(name="cifar10", root=str(tmp_path / "root"), download=True))
    assert everything(tmp_path) == []


def test_no_names_vary_nothing():
    assert augmentation(()) is None
    with pytest.raises(ValueError, match=r"dataset\.augment: expected crop or flip, got 'turn'"):
        augmentation(("crop", "turn"))


def test_a_crop_is_one_of_all_shifts_each_as_often():
    """8 × 16 pixels move by up to 1 and 2: 15 shifts, each expected n/15 times with deviation √(n·(1/15)(14/15))."""
    image = torch.arange(1.0, 2 * 8 * 16 + 1).reshape(1, 2, 8, 16)
    padded = torch.nn.functional.pad(image, (2, 2, 1, 1))
    shifts = {
        tuple(padded[0, :, y : y + 8, x : x + 16].flatten().tolist()): (y, x)
        for y, x in itertools.product(range(3), range(5))
    }
    assert len(shifts) == 15
    count = 3000
    moved = augmentation(("crop",))(image.expand(count, -1, -1, -1), gen(0))
    found = [shifts[tuple(one.flatten().tolist())] for one in moved]  # a KeyError is no shift
    deviation = (count / 15 * 14 / 15) ** 0.5
    for shift in shifts.values():
        assert abs(found.count(shift) - count / 15) < 4 * deviation, shift
    # Neighbours in a batch are independent: pairs agree as often as chance has it.
    agreed = sum(a == b for a, b in itertools.pairwise(found))
    assert abs(agreed - count / 15) < 4 * deviation


def test_half_the_images_are_mirrored():
    count = 4000
    images = torch.arange(count * 6.0).reshape(count, 1, 2, 3)
    flipped = augmentation(("flip",))(images, gen(0))
    mirrored = (flipped == images.flip(-1)).all((1, 2, 3))
    assert ((flipped == images).all((1, 2, 3)) ^ mirrored).all()
    assert abs(int(mirrored.sum()) - count / 2) < 4 * (count / 4) ** 0.5
    pairs = (mirrored[1:] == mirrored[:-1]).sum()
    assert abs(int(pairs) - count / 2) < 4 * (count / 4) ** 0.5


def test_a_generators_state_decides_and_others_are_left_alone():
    images = torch.randn(6, 3, 16, 16)
    state = torch.get_rng_state()
    vary = augmentation(("crop", "flip"))
    first, second = vary(images, gen(5)), vary(images, gen(5))
    assert torch.equal(first, second)
    assert not torch.equal(first, vary(images, gen(6)))
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert torch.equal(torch.get_rng_state(), state)
    small = torch.randn(5, 1, 4, 4)  # an eighth of four pixels is none
    assert torch.equal(augmentation(("crop",))(small, gen(0)), small)


def test_only_images_are_augmented(tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 9))
    config = written(tmp_path, x_train=rows, x_test=rows[:7]).model_copy(update={"augment": ("flip",)})
    with pytest.raises(ValueError, match=r"augment: expected images .* for flip, got inputs of shape \(9,\); leave"):
        load_dataset(config)
    assert load_dataset(DatasetConfig(augment=("crop", "flip"))).input_shape == (1, 8, 8)


def test_synthetic_images_are_patterns_in_noise():
    data = load_dataset(DatasetConfig(name="synthetic:examples=3000,classes=4,channels=2,side=8,noise=1"))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [1800, 600, 600]
    assert data.input_shape == (2, 8, 8)
    assert data.num_classes == 4
    assert torch.bincount(data.test.targets).tolist() == [150] * 4
    centres = torch.stack([data.train.inputs[data.train.targets == c].mean(0) for c in range(4)])
    noise = data.train.inputs - centres[data.train.targets]
    assert noise.std().item() == pytest.approx(0.5**0.5, rel=0.01)
    distances = (data.test.inputs[:, None] - centres).flatten(2).norm(dim=2)
    assert (distances.argmin(1) == data.test.targets).all()


def test_synthetic_images_depend_on_their_name_alone():
    def inputs(name):
        return load_dataset(DatasetConfig(name=name)).train.inputs

    torch.manual_seed(3)
    first = inputs("synthetic")
    assert first.shape == (1200, 3, 16, 16)
    assert torch.equal(first, inputs("synthetic:seed=0,side=16"))
    assert not torch.equal(first, inputs("synthetic:seed=1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("size=8", r"unknown setting 'size' in 'synthetic:size=8', did you mean 'side'"),
        ("side=big", r"expected an integer for side in .*, got 'big'"),
        ("noise", r"expected a number for noise in .*, got ''"),
        ("noise=nan", r"expected noise >= 0\.0 in .*, got nan"),
        ("classes=1", r"expected classes >= 2 in .*, got 1"),
        ("examples=49", r"expected examples >= 50 in .*, got 49"),
    ],
)
def test_impossible_synthetic_data_are_refused(settings, message):
    with pytest.raises(ValueError, match=rf"dataset\.name: {message}"):
        load_dataset(DatasetConfig(name=f"synthetic:{settings}"))
