"""The section of a configuration that says how a gradient becomes a step. Needs no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from losslab.studies.optimizer_rows import NAMES, OWN, acting, defaults, is_own, row_of
from losslab.studies.section import PlainValues, Section, suggestion
from losslab.studies.talt_section import TALTConfig


class OptimizerConfig(Section):
    """How a gradient becomes a step. Defaults other than those here are the row's (`optimizer_rows.ROWS`).

    Attributes:
        name: A row of `losslab.studies.optimizers.OPTIMIZERS`, or "module:path.to.Class" for one's own: a subclass of
            torch.optim.Optimizer, or a function of the model and `lr` that returns one.
        lr: Learning rate, at the height of the schedule.
        momentum: How much of the last step lives on in the next: SGD's, Muon's, and that of a base that is SGD.
        nesterov: Whether SGD looks ahead along the last step; the row "nesterov" always does.
        weight_decay: How strongly weights are pulled to zero: as a part of the gradient, or apart from it
            (docs/optimizers.md).
        betas: How much of the averages of the gradient and of its square, or of SOAP's covariances, is kept.
        base: What SAM and schedule-free are made of.
        rho: The distance at which SAM takes its gradient.
        talt: TALT's fixes and numbers.
        options: Of an optimizer of one's own, its keyword arguments besides `lr`; lists are passed as tuples.
    """

    name: str = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False
    )
    base: Literal["sgd", "adamw"] = "sgd"
    rho: float = Field(default=0.05, ge=0)
    talt: TALTConfig | None = None
    options: PlainValues | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_the_row_has_it(cls, values: Any) -> Any:
        """Fill in what is not given, so that config.json holds what was used."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None or key not in ("talt", "options")}
        return {**defaults(values.get("name", "sgd"), values.get("base")), **given}

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in NAMES and not is_own(name):
            near = suggestion(name, NAMES)
            hint = f"; {near}" if near.startswith("did you mean") else ""
            raise ValueError(f"expected one of {', '.join((*NAMES, OWN))}, got {name!r}{hint}")
        return name

    @field_validator("options")
    @classmethod
    def _without_the_rate(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        if options is not None and "lr" in options:
            raise ValueError("lr: write it beside them, as optimizer.lr, which the schedule multiplies")
        return options

    @model_validator(mode="after")
    def _only_what_acts(self) -> "OptimizerConfig":
        row, known = row_of(self.name, self.base), acting(self.name, self.base)
        for key, field in type(self).model_fields.items():
            if key not in known and getattr(self, key) != field.default:
                if row == OWN:
                    raise ValueError(f"{key!r} is not passed to {self.name}: write it under optimizer.options")
                raise ValueError(f"{key!r} does nothing in {row}: remove it")
        if (self.nesterov or self.name == "nesterov") and self.momentum == 0:
            raise ValueError("'nesterov' needs a momentum > 0")
        if row == "schedule_free on sgd" and self.momentum == 0:
            raise ValueError(f"{row} needs a momentum > 0")
        if row == "schedule_free on adamw" and self.betas[0] == 0:
            raise ValueError(f"{row} needs a first of the betas > 0")
        return self
