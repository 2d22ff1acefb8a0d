"""What every section of a configuration is: frozen and strict. Needs no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Frozen; a key that it does not know is an error."""

    # Strict: 1.5 epochs, a width of True or a rate of "fast" is a mistake, not a number to be made of it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
