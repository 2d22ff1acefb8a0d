"""What every section of a configuration is: frozen and strict. Needs no torch."""

import difflib
import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo


def plain(value: Any) -> Any:
    """A value that JSON can hold and give back, lists as tuples.

    Raises:
        ValueError: It holds something else.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"expected texts as names, got {key!r}")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {value}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"expected numbers, texts, true, false, null, and lists and mappings of these, got {value!r}")


Positive = Annotated[int, Field(ge=1)]
PlainValues = Annotated[dict[str, Any], BeforeValidator(plain)]


class Section(BaseModel):
    """Frozen; a key that it does not know is an error."""

    # Strict: 1.5 epochs, a width of True or a rate of "fast" is a mistake, not a number to be made of it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def reachable(value: float, info: ValidationInfo) -> float:
    """A target that the field `metric` before it can reach.

    Raises:
        ValueError: An accuracy of nothing, or of more than everything, which would mean hours for no answer.
    """
    if str(info.data.get("metric")).endswith("accuracy") and not 0 < value <= 1:
        raise ValueError(f"expected an accuracy > 0 and <= 1, got {value:g}; 97 % is 0.97")
    return value


def reaches(metric: str, value: float, target: float) -> bool:
    """Whether a value of a metric is good enough: accuracies are reached from below, losses from above."""
    return value >= target if metric.endswith("accuracy") else value <= target


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name: the nearest one, or all there are."""
    known = list(known)
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
