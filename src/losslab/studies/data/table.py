"""The data sets by name, and how a configuration becomes one."""

from collections.abc import Callable
from dataclasses import replace

from losslab.studies.data import images, text
from losslab.studies.data.augmentation import refuse_unless_images
from losslab.studies.data.splits import Dataset
from losslab.studies.data.synthetic import synthetic
from losslab.studies.section import suggestion
from losslab.studies.sections import DatasetConfig

DATASETS: dict[str, Callable[[DatasetConfig], Dataset]] = {
    "digits": images.digits,
    "cifar10": images.cifar10,
    "cifar100": images.cifar100,
    "mnist": images.mnist,
    "fashion_mnist": images.fashion_mnist,
    "sst2": text.sst2,
    "arrays": images.arrays,
    "synthetic": synthetic,
}


def load_dataset(config: DatasetConfig) -> Dataset:
    """The data set that a configuration names.

    Raises:
        ValueError: If `DATASETS` has no such row, the data are not there (the message says how to get them), or
            `augment` asks for what these inputs cannot have.
    """
    kind = config.name.partition(":")[0]
    if kind not in DATASETS:
        advice = suggestion(config.name, DATASETS)
        raise ValueError(f"dataset.name: unknown data set {config.name!r}, {advice}")
    data = DATASETS[kind](config)
    if config.augment:
        refuse_unless_images(config.augment, data.input_shape)
    return replace(data, train=data.train.head(config.train_examples)) if config.train_examples else data
