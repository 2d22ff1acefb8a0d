"""What a homotopy learning rate has met on its way: a row for each estimate, and the CSV file of them."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from losslab.records import write_atomically


@dataclass(frozen=True)
class Measured:
    """One row of a `HomotopyLR`'s history.

    Attributes:
        step: Optimizer steps before it.
        loss: Of the batch.
        lr: The first group's rate for the next step.
        curvature: κ = ‖H‖/‖∇L‖²; with the rule "stable" the λ of P^(−½)HP^(−½) that is reckoned with.
        hessian_norm: As it was measured.
        grad_norm: ‖∇L‖.
        trace: NaN where it was not asked for.
        target: κ*; with "stable" the λ at which η₀ would be as near to instability as is allowed.
        seconds: What the estimate took.
    """

    step: int
    loss: float
    lr: float
    curvature: float
    hessian_norm: float
    grad_norm: float
    trace: float
    target: float
    seconds: float


@dataclass(frozen=True)
class MeasuredLayer(Measured):
    """The same of one layer of a `PerLayerHomotopyLR`: its own rate, curvature, part of the gradient and target.

    Attributes:
        layer: Its name.
    """

    layer: str


def export(rows: Iterable[Any], kind: type, path: str | Path) -> None:
    """Write rows as CSV, whole or not at all. Numbers are spelled so that `float` reads the same number back.

    Args:
        rows: Instances of `kind`.
        kind: A dataclass; its fields are the columns, also where there is no row.
        path: Of the file; an older one is replaced.

    Raises:
        OSError: It cannot be written; an older file is still there.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue().encode())
