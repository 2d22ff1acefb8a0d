"""What every probe is and returns: one question, one frozen result that goes to a run folder and comes back exactly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from losslab.operators.risk import EmpiricalRisk
from losslab.records import from_record, to_record
from losslab.status import Progress, Status

Result = TypeVar("Result", bound="ProbeResult")


@dataclass(frozen=True)
class ProbeResult:
    """A measurement. `status` says whether to trust it; every random result carries its `seed`."""

    status: Status

    def to_record(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """JSON values and NumPy arrays, as a run folder stores them."""
        return to_record(self)

    @classmethod
    def from_record(cls: type[Result], values: dict[str, Any], arrays: dict[str, np.ndarray]) -> Result:
        """The result that `to_record` split."""
        return from_record(cls, values, arrays)


def summary(rows: Mapping[str, str]) -> str:
    """How results print: a line for each thing found, its name in a column of its own."""
    return "\n".join(f"{name:<20}  {text}" for name, text in rows.items())


def span(values: np.ndarray) -> str:
    """An array in a few words: its smallest and largest finite entry."""
    finite = values[np.isfinite(values)]
    return f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else "nothing finite"


class Measure(Protocol):
    """A probe's function. Probes of two solutions take both after the risk.

    Of a run folder the arguments `validation` and `test`, where a probe has them, are the risks on the run's other
    splits, `snapshots` are those that were kept while it trained, and `resume` is a file for what is done so far.
    """

    def __call__(
        self, risk: EmpiricalRisk, /, *solutions: Any, progress: Progress | None = None, **options: Any
    ) -> Any:
        """Measure at the point where the risk's model is; return a ProbeResult."""


@dataclass(frozen=True)
class Probe:
    """A row of the table PROBES.

    Attributes:
        name: As in `losslab probe NAME` and `probes/<name>/`.
        question: What it answers, in one sentence.
        measure: The function.
        result: The type of what it returns.
        num_solutions: 1, or 2 for what lies between two.
        options: The type of its `options` argument, if it has one.
    """

    name: str
    question: str
    measure: Measure | Callable[..., Any]
    result: type[ProbeResult]
    num_solutions: int = 1
    options: type[Any] | None = None
