"""How far a run has come: the numbers that a checkpoint holds besides tensors."""

import math
from dataclasses import dataclass, field

from losslab.studies.stepping import Taken


@dataclass
class Position:
    """Steps, sums since the last row of the metrics, and what was reached.

    Attributes:
        step: Optimizer steps done.
        seconds: Of training, without evaluation.
        loss: Summed over the examples since the last row, and so on.
        correct: Examples classified correctly.
        examples: Examples.
        seconds_before: `seconds` at the last row.
        best: Validation accuracy and negative loss of the best evaluation.
        status: How the run ended; None while it has not.
        reached: When the target was, if it was.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    correct: int = 0
    examples: int = 0
    seconds_before: float = 0.0
    best: tuple[float, float] = (-math.inf, -math.inf)
    status: str | None = None
    reached: dict[str, float] = field(default_factory=dict)

    def add(self, taken: Taken, seconds: float) -> None:
        """Count a step."""
        self.seconds += seconds
        self.loss += taken.loss * taken.examples
        self.correct += taken.correct
        self.examples += taken.examples
        if math.isfinite(taken.loss):
            self.step += 1
        else:
            self.status = "diverged"

    def take_means(self) -> dict[str, float]:
        """The mean training loss and accuracy, and the speed, since the last call."""
        means = {
            "train_loss": self.loss / self.examples,
            "train_accuracy": self.correct / self.examples,
            "samples_per_second": self.examples / (self.seconds - self.seconds_before),
        }
        self.loss, self.correct, self.examples, self.seconds_before = 0.0, 0, 0, self.seconds
        return means
