"""What a run is made of: the sections of its configuration, each frozen and strict, with their defaults.

Needs no torch, so that a wrong configuration is refused at once.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from losslab.studies.optimizer_rows import BOUNDED
from losslab.studies.optimizer_section import OptimizerConfig
from losslab.studies.schedule_section import ScheduleConfig, named
from losslab.studies.section import Positive, Section, reachable, reaches


class DatasetConfig(Section):
    """Which data, in batches of how many examples.

    Attributes:
        name: A row of `losslab.studies.data.DATASETS`, or "arrays:FILE.npz", "sst2:FOLDER" for data of one's own.
        root: Folder of data sets that are files.
        download: Whether to fetch a data set that is not there.
        train_examples: Only so many of the training split; None takes all.
        batch_size: Examples in one optimizer step.
        eval_batch_size: Examples in one batch where no gradient is taken.
        augment: How training images are varied: "crop" shifts by up to an eighth of a side, "flip" mirrors half.
        max_length: Longest text, in tokens; the rest is cut off.
        vocabulary: Of texts. A number: so many tokens of a WordPiece vocabulary that is trained on the training split.
            A folder: the vocabulary in it, tokenizer.json or vocab.txt, as a checkpoint's.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = False
    train_examples: Positive | None = None
    batch_size: Positive = 64
    eval_batch_size: Positive = 512
    augment: tuple[Literal["crop", "flip"], ...] = Field(default=(), strict=False)
    max_length: Positive = 64
    vocabulary: Positive | str = 8000


class ModelConfig(Section):
    """Which network, how large.

    Attributes:
        name: A row of `losslab.studies.models.MODELS`, or "module:path.to.function" for a network of one's own.
        width: Channels of the first convolution, or units of a hidden layer.
        hidden: Number of hidden layers, for networks that can have any.
        batch_norm: Whether batch normalisation follows each convolution.
        pretrained: Weights to start from, for networks that can (BERT): a folder, or a name in transformers' cache;
            None starts from chance.
        init_scale: What the first weights are multiplied by, those of normalisation layers and biases excepted.
    """

    name: str = "simple_cnn"
    width: Positive = 64
    hidden: Positive = 2
    batch_norm: bool = False
    pretrained: str | None = None
    init_scale: float = Field(default=1.0, gt=0)


class SnapshotsConfig(Section):
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


class CheckpointsConfig(Section):
    """When a run writes what it needs to go on.

    Attributes:
        every: After so many steps the checkpoint "last" is written, besides at each evaluation.
        keep: After so many steps a checkpoint is kept for good, as "step-<number>".
    """

    every: Positive | None = None
    keep: Positive | None = None


class TargetConfig(Section):
    """What a run is trained for: the first evaluation that reaches `value`.

    Attributes:
        metric: A column of the metrics; accuracies are reached from below, losses from above.
        value: What it must be; accuracies are shares: 0.97 is 97 %.
        stop: Whether training ends there.
    """

    metric: Literal["validation_accuracy", "validation_loss", "train_loss", "train_accuracy"] = "validation_accuracy"
    value: float
    stop: bool = True

    @field_validator("value")
    @classmethod
    def _can_be(cls, value: float, info: ValidationInfo) -> float:
        return reachable(value, info)

    def reached(self, value: float) -> bool:
        """Whether a value of the metric is good enough."""
        return reaches(self.metric, value, self.value)


class TrainingConfig(Section):
    """How long and on what.

    Attributes:
        epochs: Passes over the training split.
        device: "auto" takes the accelerator that is there.
        precision: Fabric's name. The weights are float32 in all of them.
        accumulate: In how many parts a batch is passed through the network, to fit into memory.
        clip_norm: Largest norm of the gradient; longer ones are shortened to it. None never does.
        ema: Decay of an exponential average of the weights, which is then what is evaluated and saved; None has none.
        max_steps: Stops sooner, after so many steps. None does not.
        eval_every: Steps from one evaluation to the next, besides at the end of each epoch.
        target: What the training is for; None trains to the end.
        monitor_talt: Steps from one sample of TALT's diagnostics to the next; None takes none.
        evaluate_test: Whether the test split is looked at, once, at the end. Tuning does not.
        checkpoints: When the state is written.
        snapshots: Which weights on the way are kept.
    """

    epochs: Positive = 20
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    accumulate: Positive = 1
    clip_norm: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    max_steps: Positive | None = None
    eval_every: Positive | None = None
    target: TargetConfig | None = None
    monitor_talt: Positive | None = None
    evaluate_test: bool = True
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()


class ProbesConfig(Section):
    """What probes measure on: the first `examples` of a split, in batches of `batch_size`."""

    split: Literal["train", "validation", "test"] = "train"
    examples: Positive = 512
    batch_size: Positive = 256


class RunConfig(Section):
    """Everything that decides a run's outcome, and nothing else."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    probes: ProbesConfig = ProbesConfig()

    @model_validator(mode="before")
    @classmethod
    def _under_their_names(cls, values: Any) -> Any:
        return named(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _possible_together(self) -> "RunConfig":
        if self.optimizer.name == "sam" and self.training.precision == "16-mixed":
            # torch's GradScaler takes no closure, and SAM's step needs one.
            raise ValueError("training.precision: sam cannot scale its two gradients; expected bf16-mixed or 32-true")
        if self.training.monitor_talt is not None and self.optimizer.name != "talt":
            raise ValueError(
                f"training.monitor_talt: expected the optimizer talt, got {self.optimizer.name}; remove it"
            )
        if (self.schedule.name, self.schedule.rule) == ("homotopy", "stable") and self.optimizer.name not in BOUNDED:
            raise ValueError(
                f"schedule.rule: stable needs the curvature that the optimizer can bear, which is known for "
                f"{', '.join(BOUNDED)}; got {self.optimizer.name}; take another optimizer, or rule: seed"
            )
        if self.schedule.per_layer and self.optimizer.name not in BOUNDED:
            raise ValueError(
                f"schedule.per_layer: expected one of the optimizers {', '.join(BOUNDED)}, whose groups can be split; "
                f"got {self.optimizer.name}"
            )
        return self
