"""What every section of a configuration is: frozen and strict. Needs no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo

Positive = Annotated[int, Field(ge=1)]


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
