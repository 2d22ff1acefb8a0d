"""The table's columns: how each number is read from a run, how it is written, and what it means.

One entry of `COLUMNS` is a column of the table and a line of the glossary at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from losslab.report.contents import PROBES, Run
from losslab.status import Status, worst

ABSENT = "—"
WELL_KNOWN = 0.01  # relative error below which an eigenvalue stands, whatever became of the rest of the spectrum


@dataclass(frozen=True)
class Cell:
    """What stands in one place of the table. A `reason` says why the number is not to be trusted."""

    text: str
    note: str = ""
    reason: str = ""

    @property
    def suspect(self) -> bool:
        """Whether the number has to look different from one that converged."""
        return bool(self.reason)


@dataclass(frozen=True)
class Column:
    """A column and its line of the glossary: formula in plain text, what large and small mean, one caveat."""

    title: str
    formula: str
    meaning: str
    caveat: str
    cell: Callable[[Run], Cell]


def number(value: Any, digits: int = 4) -> str:
    """A number for people: `digits` significant ones, powers of ten only where they are shorter."""
    if value is None:
        return ABSENT
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    text = f"{value:.{digits - 1}e}" if size >= 1e6 or 0 < size < 1e-3 else f"{value:.{digits}g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def with_error(value: Any, error: Any) -> str:
    """A number and its error, written to the digits that the error leaves."""
    if value is None:
        return ABSENT
    if error is None or not math.isfinite(error) or not math.isfinite(value):
        return number(value) if error is None else f"{number(value)} ± {number(error, 2)}"
    decimals = 1 - math.floor(math.log10(error)) if error > 0 else 9
    in_value = decimals + (math.floor(math.log10(abs(value))) if value else 0) + 1
    if max(in_value, decimals - 1) > 5 or abs(value) >= 1e6 or 0 < abs(value) < 1e-3:  # more digits than anyone reads
        return f"{number(value, 5)} ± {number(error, 1)}"
    places = max(decimals, 0)
    return f"{value:.{places}f} ± {error:.{places}f}".replace("-", "−")


def percent(share: Any) -> str:
    """A fraction in per cent."""
    return ABSENT if share is None else f"{100 * share:.2f} %"


def status_of(run: Run, dotted: str) -> Status | None:
    """A record's status; None where there is no record, or it names none."""
    name = run.get(f"{dotted}.status")
    return Status(name) if name in Status.__members__ else None


def _measured(run: Run, probe: str, text: str, note: str = "", *, status: str = "") -> Cell:
    """A probe's number, marked if the probe, or the part of it that `status` names, did not converge."""
    if text == ABSENT:
        return Cell(ABSENT)
    known = status_of(run, status or probe)
    if known is None or known.ok:
        return Cell(text, note)
    return Cell(text, note, reason=f"{probe}: {known.message}")


def _eigenvalue(run: Run, text: str, *used: tuple[str, int]) -> Cell:
    """A number made of the eigenvalues `used`: it stands if those are well known, though others may not be."""
    for end, index in used:
        values, errors = run.array(f"spectrum.{end}"), run.array(f"spectrum.{end}_errors")
        if len(errors) <= index or not errors[index] <= WELL_KNOWN * abs(values[index]):
            return _measured(run, "spectrum", text)
    return Cell(text)


def _lambda_max(run: Run) -> Cell:
    return _end(run, "top")


def _lambda_min(run: Run) -> Cell:
    return _end(run, "smallest")


def _end(run: Run, end: str) -> Cell:
    values, errors = run.array(f"spectrum.{end}"), run.array(f"spectrum.{end}_errors")
    if not len(values):
        return Cell(ABSENT)
    text = with_error(float(values[0]), float(errors[0]) if len(errors) else None)
    return _eigenvalue(run, text, (end, 0))


def _condition_number(run: Run) -> Cell:
    text = with_error(run.get("spectrum.condition_number"), run.get("spectrum.condition_number_error"))
    return _eigenvalue(run, text, ("top", 0), ("smallest", 0))


def _gap(run: Run) -> Cell:
    errors = run.array("spectrum.top_errors")
    error = float(errors[:2].sum()) if len(errors) > 1 else None
    return _eigenvalue(run, with_error(run.get("spectrum.spectral_gap"), error), ("top", 0), ("top", 1))


def _optimizer(run: Run) -> Cell:
    made = run.config.get("optimizer")
    if not isinstance(made, dict):
        return Cell(str(made or ABSENT))
    used = {"lr": "lr {}", "momentum": "momentum {}", "weight_decay": "decay {}"}
    note = ", ".join(text.format(f"{made[key]:g}") for key, text in used.items() if made.get(key))
    return Cell(str(made.get("name", ABSENT)), note)


def _test_accuracy(run: Run) -> Cell:
    return Cell(percent(run.final.get("test_accuracy")) if run.final else ABSENT)


def _train_loss(run: Run) -> Cell:
    return Cell(number(run.epochs[-1].get("train_loss")) if run.epochs else ABSENT)


def _trace(run: Run) -> Cell:
    text = with_error(run.get("spectrum.trace.value"), run.get("spectrum.trace.standard_error"))
    return _measured(run, "spectrum", text, status="spectrum.trace")


def _negative(run: Run) -> Cell:
    count, mass = run.get("spectrum.num_negative"), run.get("spectrum.negative_mass")
    note = f"{100 * mass:.3g} % of all" if isinstance(mass, float) and math.isfinite(mass) else ""
    return _measured(run, "spectrum", number(count) if count is None else f"≥ {number(count)}", note)


def _sharpness(run: Run) -> Cell:
    radius, share = run.get("sharpness.radius"), run.get("sharpness.relative_radius")
    note = f"ε = {number(radius, 3)}" if radius else ""
    if note and isinstance(share, float) and math.isfinite(share):
        note += f" ({100 * share:.3g} %)"
    method = run.get("sharpness.method")
    if method not in (None, "ball"):
        note = f"{method}, {note}"
    return _measured(run, "sharpness", number(run.get("sharpness.value")), note)


def _noise_ratio(run: Run) -> Cell:
    return _measured(run, "noise", with_error(run.get("noise.ratio"), run.get("noise.ratio_error")))


def _products(run: Run) -> Cell:
    spent = [record["matvecs"] for record in run.probes.values() if isinstance(record.get("matvecs"), int)]
    return Cell(number(sum(spent))) if spent else Cell(ABSENT)


def _status(run: Run) -> Cell:
    missing = [probe for probe in PROBES if probe not in run.probes]
    if run.final is None:
        return Cell("interrupted", reason="training has not finished: there is no final row")
    if missing:
        return Cell("incomplete", reason=f"not measured: {', '.join(missing)}")
    statuses = {probe: status_of(run, probe) for probe in PROBES}
    failed = {probe: status for probe, status in statuses.items() if status is not None and not status.ok}
    if not failed:
        return Cell("complete")
    text = str(worst(*failed.values())).replace("_", " ")
    return Cell(text, reason="; ".join(f"{probe}: {status.message}" for probe, status in failed.items()))


COLUMNS = (
    Column(
        "optimizer",
        "the update rule and its settings",
        "The same network, data and starting point; only this differs between the runs of a comparison.",
        "A setting tuned for one rule is not tuned for another.",
        _optimizer,
    ),
    Column(
        "test accuracy",
        "correct predictions / examples, on data never trained on",
        "Large is good.",
        "On N test examples its standard error is about √(accuracy · (1 − accuracy) / N).",
        _test_accuracy,
    ),
    Column(
        "train loss",
        "mean of the loss over the training examples of the last epoch, each taken before its step",
        "Small means that the network fits what it has seen.",
        "Zero is no aim in itself: compare it with the validation loss.",
        _train_loss,
    ),
    Column(
        "λ max",
        "largest eigenvalue of the Hessian H of the loss; ± is the residual bound ‖Hv − λv‖",
        "Large means that one direction is sharply curved; gradient descent with step η needs λ max < 2/η.",
        "It depends on the parametrisation: rescaling layers changes it without changing the function.",
        _lambda_max,
    ),
    Column(
        "λ min",
        "smallest eigenvalue of H; ± is the residual bound",
        "Negative means that some direction still curves downwards: a saddle, or a slope not yet flat.",
        "Small beside λ max, so it is known to fewer digits.",
        _lambda_min,
    ),
    Column(
        "trace",
        "sum of all eigenvalues = E[zᵀHz] over random signs z; ± is one standard error",
        "Large means that the loss is curved on average, small that most directions are flat.",
        "An estimate from random vectors: traces within two standard errors are not told apart.",
        _trace,
    ),
    Column(
        "condition number",
        "|λ max / λ min|: strongest upward curvature over strongest downward (or weakest upward) curvature",
        "Where λ min > 0 it is the bowl's: large means a narrow valley, where plain gradient descent is slow. Where "
        "λ min < 0 it says how much the upward curvature outweighs the downward one.",
        "λ min is often known less well than λ max: read the ±.",
        _condition_number,
    ),
    Column(
        "gap",
        "first minus second largest eigenvalue",
        "Large means that one direction stands out; near zero, the top directions are interchangeable.",
        "The eigenvector of the top eigenvalue is well determined only if the gap is well above the errors.",
        _gap,
    ),
    Column(
        "negative",
        "how many eigenvalues are certainly negative: the negative Ritz values of the Krylov space",
        "More than none means that the point is not a minimum: some directions still lead downhill.",
        "A lower bound that grows with the Krylov space; the share of all, by the density, stands below it.",
        _negative,
    ),
    Column(
        "sharpness",
        "the largest L(θ + δ) − L(θ) met within ‖δ‖ ≤ ε: at random points, or as the second line says",
        "Large means that small changes of the weights hurt: a narrow minimum.",
        "Random points miss the worst one, so it is a lower bound; compare one method at one ε / ‖θ‖ (per cent) only.",
        _sharpness,
    ),
    Column(
        "noise ratio",
        "λ_C / λ_H: top eigenvalue of the per-example gradient covariance over that of the Hessian; ± is from the "
        "residual bounds of both",
        "Near 1 where the predicted probabilities are calibrated; near 0 where the examples are learnt by heart.",
        "It has the unit of the loss: compare it for one loss only. With batches of B examples noise is B times less.",
        _noise_ratio,
    ),
    Column(
        "products",
        "matrix-vector products that the probes used",
        "The cost: one product takes one to two gradients' time over the same data.",
        "Loss evaluations (sharpness, planes, lines) are not counted.",
        _products,
    ),
    Column(
        "status",
        "why the computations stopped",
        "“complete” means that every probe ran and met its tolerance.",
        "Numbers that did not are set in another style, with the reason below the table.",
        _status,
    ),
)
