"""What a run is made of: one frozen configuration, read from YAML or JSON, with errors that say what to do.

Needs no torch, so that a wrong configuration is refused at once.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from losslab.studies.config_file import ConfigError, assign, read_mapping, shown

Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    # Strict: 1.5 epochs, a width of True or a rate of "fast" is a mistake, not a number to be made of it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DatasetConfig(_Section):
    """Which data, in batches of how many examples.

    Attributes:
        name: A row of `losslab.studies.data.DATASETS`, or "arrays:FILE.npz" for data of one's own.
        root: Folder of data sets that are files.
        download: Whether to fetch a data set that is not there.
        train_examples: Only so many of the training split; None takes all.
        batch_size: Examples in one optimizer step.
        eval_batch_size: Examples in one batch where no gradient is taken.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = False
    train_examples: Positive | None = None
    batch_size: Positive = 64
    eval_batch_size: Positive = 512


class ModelConfig(_Section):
    """Which network, how large.

    Attributes:
        name: A row of `losslab.studies.models.MODELS`.
        width: Channels of the first convolution, or units of a hidden layer.
        hidden: Number of hidden layers, for networks that can have any.
        batch_norm: Whether batch normalisation follows each convolution.
    """

    name: str = "simple_cnn"
    width: Positive = 64
    hidden: Positive = 2
    batch_norm: bool = False


class OptimizerConfig(_Section):
    """How a gradient becomes a step. `momentum` and `nesterov` are SGD's, `betas` are Adam's and AdamW's."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False
    )

    @model_validator(mode="after")
    def _only_what_acts(self) -> "OptimizerConfig":
        foreign = ("betas",) if self.name == "sgd" else ("momentum", "nesterov")
        for key in foreign:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key!r} does nothing in {self.name}: remove it")
        if self.nesterov and self.momentum == 0:
            raise ValueError("'nesterov' needs a momentum > 0")
        return self


class ScheduleConfig(_Section):
    """The learning rate by step: rises over `warmup_steps`, then stays, or falls to zero as a cosine."""

    name: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)


class SnapshotsConfig(_Section):
    """After which steps the weights are kept, for the probe `trajectory`; none by default.

    Attributes:
        every: After so many steps again and again, with the start and the last step.
        steps: After these steps; 0 is the start.
    """

    every: Positive | None = None
    steps: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False)

    def include(self, step: int, *, last: bool) -> bool:
        """Whether the weights are kept after `step` steps."""
        return step in self.steps or (self.every is not None and (last or step % self.every == 0))


class TrainingConfig(_Section):
    """How long and on what.

    Attributes:
        epochs: Passes over the training split.
        device: "auto" takes the accelerator that is there.
        precision: Fabric's name. The weights are float32 in all of them.
        clip_norm: Largest norm of the gradient; longer ones are shortened to it. None never does.
        max_steps: Stops sooner, after so many steps. None does not.
        snapshots: Which weights on the way are kept.
    """

    epochs: Positive = 20
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    clip_norm: float | None = Field(default=None, gt=0)
    max_steps: Positive | None = None
    snapshots: SnapshotsConfig = SnapshotsConfig()


class ProbesConfig(_Section):
    """What probes measure on: the first `examples` of a split, in batches of `batch_size`."""

    split: Literal["train", "validation", "test"] = "train"
    examples: Positive = 512
    batch_size: Positive = 256


class RunConfig(_Section):
    """Everything that decides a run's outcome, and nothing else."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    probes: ProbesConfig = ProbesConfig()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration from a YAML or JSON file.

    Args:
        path: The file. What it leaves out takes the defaults above.
        overrides: Assignments such as "optimizer.lr=5e-4", applied in order; the values are YAML.

    Raises:
        ConfigError: With one line for each problem: where, what was expected, what came.
    """
    values = read_mapping(Path(path))
    for assignment in overrides:
        assign(values, assignment)
    return make_config(values, source=str(path))


def make_config(values: Mapping[str, Any], *, source: str = "configuration") -> RunConfig:
    """Check plain values and make them a configuration; `source` opens the error lines.

    Raises:
        ConfigError: With one line for each problem.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"{source}: {_explain(problem)}" for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def _explain(problem: ErrorDetails) -> str:
    """One of pydantic's errors as `path: expected ..., got ...`."""
    location = problem["loc"]
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        *sections, unknown = location
        known = list(_schema_at(sections)["properties"])
        return f"{_dotted(location)}: unknown key, {suggestion(str(unknown), known)}"
    if problem["type"] == "value_error":
        return f"{_dotted(location)}: {problem['ctx']['error']}"
    if problem["type"] == "missing":  # no key is required: only a list can be too short
        location = location[:-1]
    expected = _described(_schema_at(location))
    if problem["type"] == "finite_number":
        expected = expected.replace("a number", "a finite number")
    return f"{_dotted(location)}: expected {expected}, got {shown(problem['input'])}"


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name: the nearest one, or all there are."""
    known = list(known)
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"


def _schema_at(location: Iterable[int | str]) -> dict[str, Any]:
    """The JSON schema of one field: it knows type and bounds where only one was violated."""
    whole = RunConfig.model_json_schema()
    schema = whole
    for part in location:
        if isinstance(part, str):
            schema = schema["properties"][part]
        else:
            schema = schema["prefixItems"][part] if "prefixItems" in schema else schema["items"]
        if "$ref" in schema:
            schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _described(schema: dict[str, Any]) -> str:
    """A schema in words, such as "an integer >= 1"."""
    if "anyOf" in schema:
        return " or ".join(_described(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(repr(choice) for choice in schema["enum"])
    if "pattern" in schema:
        return "a name of letters, digits, '.', '_' and '-'"
    if "items" in schema:
        return f"a list of numbers, each {_described(schema['items'])}"
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([_NOUNS[schema["type"]], " and ".join(bounds)]).strip()


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list of two numbers",
    "object": "a mapping",
    "null": "null",
}


def _dotted(location: Iterable[int | str]) -> str:
    return ".".join(str(part) for part in location)
