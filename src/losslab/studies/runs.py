"""A trained network back from its run folder, with what it was trained on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from losslab.studies import checkpoint
from losslab.studies.config import make_config
from losslab.studies.data import Batches, Dataset, load_dataset
from losslab.studies.devices import seeded
from losslab.studies.models import build_model
from losslab.studies.record import RunFolder
from losslab.studies.sections import RunConfig


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with what it was trained on, on the CPU, in eval mode."""

    config: RunConfig
    model: nn.Module
    dataset: Dataset
    folder: RunFolder
    step: int


def load_run(path: str | Path, which: str = "last") -> LoadedRun:
    """Rebuild the trained model of a run folder.

    Args:
        path: The run folder.
        which: The checkpoint: "last", "best", or "step-<number>".

    Raises:
        FileNotFoundError: If there is no run, or no such checkpoint.
        ValueError: If the configuration or the checkpoint is damaged.
    """
    folder = RunFolder.open(path)
    config = make_config(folder.config, source=str(folder.path / "config.json"))
    dataset = load_dataset(config.dataset)
    with seeded(config.seed, torch.device("cpu")):  # the weights are overwritten, the global generator is not
        model = build_model(config.model, dataset.input_shape, dataset.num_classes, dataset.vocabulary).eval()
    found = checkpoint.load(folder, which)
    try:
        found.put_into(model)
    except ValueError as error:
        raise ValueError(f"{folder.path}: checkpoint {which!r}: {error}") from None
    return LoadedRun(config=config, model=model, dataset=dataset, folder=folder, step=found.step)


def probe_batches(run: LoadedRun, split: str | None = None) -> Batches:
    """The examples that the run's configuration sets aside for probes, or as many of another split; always the same."""
    probes = run.config.probes
    examples = getattr(run.dataset, split or probes.split).head(probes.examples)
    return Batches(examples, probes.batch_size)
