"""TALT's diagnostics as rows of a run: small ones for metrics.jsonl, and their numbers under TensorBoard's tags."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.diagnostics.recorder import TALTDiagnostics
from losslab.optim.diagnostics.sample import OF_ALL, TALTSample

KIND = "talt"  # of the rows
DIGITS = 4  # that a row keeps of a number: diagnostics need no more, and the file stays small


class TALTMonitor:
    """Samples of a training by TALT, as rows that any sink takes.

    Args:
        optimizer: A `TALT`, not Fabric's wrapper of it.
        names: `model.named_parameters()`.
        every: Steps from one sample to the next.

    Raises:
        ValueError: The optimizer is none, or no tensor has an eigenspace.
    """

    def __init__(self, optimizer: Optimizer, names: Iterable[tuple[str, Tensor]], every: int = 100) -> None:
        try:
            self._diagnostics = TALTDiagnostics(optimizer, names=names, every=every)
        except TypeError:
            raise ValueError(
                f"training.monitor_talt: expected the optimizer talt, got {type(optimizer).__name__}; remove it"
            ) from None

    def rows(self) -> list[dict[str, Any]]:
        """The samples since the last call, a row for each step."""
        records = self._diagnostics.records()
        self._diagnostics.clear()
        return [_row(list(step)) for _, step in itertools.groupby(records, key=lambda sample: sample.step)]

    def close(self) -> None:
        """Take the hooks off."""
        self._diagnostics.close()

    def state_dict(self) -> dict[str, Any]:
        """What the next sample is compared with."""
        return self._diagnostics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._diagnostics.load_state_dict(state)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under TensorBoard's tags, a page for each of the eight fixes; none of rows of another kind."""
    if row.get("kind") != KIND:
        return {}
    of_all = {name: row[name] for name in OF_ALL if name in row}
    return {
        tag: value
        for name, values in row["tensors"].items()
        for tag, value in TALTSample(name=name, step=0, **values, **of_all).scalars().items()
    }


def _row(samples: list[TALTSample]) -> dict[str, Any]:
    """One step's samples, tensor by tensor; what a tensor does not have is left out."""
    tensors = {}
    for sample in samples:
        values = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
        own = {name: _short(value) for name, value in values.items() if name not in ("step", "name", *OF_ALL)}
        tensors[sample.name] = {name: value for name, value in own.items() if value is not None}
    of_all = {name: _short(getattr(samples[0], name)) for name in OF_ALL}
    return {"kind": KIND, **{name: value for name, value in of_all.items() if value is not None}, "tensors": tensors}


def _short(value: Any) -> Any:
    """Without digits that nobody reads; None for NaN and for an empty series."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")
    if isinstance(value, tuple):
        return [_short(item) for item in value] or None
    return value
