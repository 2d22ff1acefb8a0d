"""A run as TensorBoard shows it: curves, norms, the network's graph, histograms, and the settings beside the results.

TensorBoard is optional, and imported here only.
"""

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from losslab.random import preserved_random_states
from losslab.studies import homotopy, talt_monitor
from losslab.studies.monitor import histograms
from losslab.studies.optional import optional

FOLDER = "tensorboard"  # in a run folder
# A column of the metrics -> its curve. Curves with the same first part stand side by side. Others keep their name.
TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "test_loss": "loss/test",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "test_accuracy": "accuracy/test",
    "parameter_norm": "norm/parameters",
    "gradient_norm": "norm/gradient",
    "learning_rate": "training/learning_rate",
    "seconds": "training/seconds",
    "samples_per_second": "training/samples_per_second",
    "epoch": "training/epoch",
}
RESULTS = ("loss", "accuracy")  # the curves that the table of settings shows


class TensorBoard:
    """A sink that writes TensorBoard's event files into a folder; see `ModelSink` for the order of its calls.

    Every number of a row becomes a point. Where the run went on from a checkpoint, points after it are void:
    TensorBoard shows none twice.

    Args:
        path: The folder, `<run folder>/tensorboard`.
        config: The run's configuration as plain values, for the table of settings and results.
        with_histograms: Whether the distribution of each parameter and its gradient is written at each row.

    Raises:
        ValueError: The package is not installed.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, with_histograms: bool = False) -> None:
        self.path, self.config, self.with_histograms = Path(path), config, with_histograms
        self._package = package("torch.utils.tensorboard")
        self._writer: Any = None
        self._network: nn.Module | None = None
        self._last: dict[str, float] = {}

    def open(self, network: nn.Module, example: Any, step: int) -> None:
        """Write the graph of the network, which computes once on `example`; void what was written after `step`."""
        is_new = not any(self.path.glob("events.*"))
        self.rewind(step)
        self._network = network
        if is_new:
            self._graph(network, example)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write a row's numbers, with the last one the settings too."""
        if self._writer is None:
            self.rewind(0)
        numbers = {tag: value for tag, value in _curves(values).items() if _is_number(value)}
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)
        if self._network is not None and self.with_histograms and values.get("kind") == "epoch":
            for tag, tensor in histograms(self._network):
                self._writer.add_histogram(tag, tensor, step)
        self._last |= {tag: value for tag, value in numbers.items() if tag.startswith(RESULTS)}
        if values.get("kind") == "final":
            self._settings()
        self._writer.flush()  # a killed run keeps its points

    def rewind(self, step: int) -> None:
        """Start a file that makes void what earlier ones say of steps after this one."""
        self.close()
        self._writer = self._package.SummaryWriter(str(self.path), purge_step=step + 1)

    def close(self) -> None:
        """Close the file; a further row would open another."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._network = None

    def _graph(self, network: nn.Module, example: Any) -> None:
        """The graph, where the tracer understands the network; a note where it does not."""
        said = io.StringIO()  # torch prints the tracer's errors as well as it raises them
        modes = [(module, module.training) for module in network.modules()]  # the tracer gives all the first one's
        try:
            with contextlib.redirect_stdout(said), warnings.catch_warnings(), preserved_random_states():
                warnings.simplefilter("ignore")  # of what a trace cannot know: it is only drawn
                self._writer.add_graph(network, example[:1] if isinstance(example, Tensor) else example)
        except Exception as error:  # a user's network may raise anything here
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._writer.add_text("graph", f"The network could not be traced: {reason[0]}")
        finally:
            for module, mode in modes:
                module.training = mode

    def _settings(self) -> None:
        """The hyperparameters and the last value of each loss and accuracy, for TensorBoard's HPARAMS page."""
        # SummaryWriter.add_hparams would make a run of its own for them; these are the parts it is made of.
        summary = importlib.import_module("torch.utils.tensorboard.summary")
        for part in summary.hparams(dict(_flat(self.config)), self._last):
            self._writer.file_writer.add_summary(part)


def package(name: str) -> ModuleType:
    """TensorBoard, or torch's writer for it.

    Raises:
        ValueError: It is not installed.
    """
    return optional(name, "losslab[board]")


def _curves(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's values under their curves' names."""
    if row.get("kind") == homotopy.KIND:
        return homotopy.scalars(row)
    return {TAGS.get(key, key): value for key, value in {**row, **talt_monitor.scalars(row)}.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Settings under dotted names; lists as text, null left out: what the page can show."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield prefix + key, ", ".join(map(str, value))
        elif value is not None:
            yield prefix + key, value
