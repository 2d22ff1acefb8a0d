"""What every rate that follows estimates of curvature keeps of them."""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from losslab.optim.homotopy.curvature import Curvature, CurvatureEstimator
from losslab.optim.homotopy.history import Measured, export
from losslab.optim.homotopy.rate import RateRule


class Follower:
    """The rule, the estimator, the newest estimate, a row for each, and how many were not finite."""

    rule: RateRule
    estimator: CurvatureEstimator
    measured: Curvature | None
    history: list[Measured]
    skipped: int

    def _follow(self, rule: RateRule, estimator: CurvatureEstimator) -> None:
        self.rule, self.estimator = rule, estimator
        self.measured, self.history, self.skipped = None, [], 0

    @property
    def curvature(self) -> float:
        """κ averaged, or with "stable" the λ that is reckoned with; NaN before the first."""
        return self.rule.curvature

    def _take(self, found: Curvature, stacklevel: int) -> bool:
        """Take an estimate into account; False where it is not finite: passed over and counted, the first time told."""
        if found.finite:
            self.measured = found
            self.rule.take(found)
            return True
        self.skipped += 1
        if self.skipped == 1:
            text = f"{type(self).__name__}: curvature that is not finite was passed over; the rate stays"
            warnings.warn(text, stacklevel=stacklevel + 1)
        return False

    def _note(self, found: Curvature, *, step: int, lr: float, target: float, seconds: float) -> None:
        row = Measured(
            step=step,
            loss=found.loss,
            lr=lr,
            curvature=self.curvature,
            hessian_norm=found.hessian_norm,
            grad_norm=found.gradient_norm,
            trace=found.trace,
            target=target,
            seconds=seconds,
        )
        self.history.append(row)

    def export_metrics(self, path: str | Path) -> None:
        """Write the history as CSV, a row for each estimate; its columns are the fields of `Measured`.

        Raises:
            OSError: It cannot be written; an older file is still there.
        """
        export(self.history, Measured, path)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; what the next rate depends on, and the history."""
        return {
            "skipped": self.skipped,
            "measured": self.measured and self.measured.plain(),
            "rule": self.rule.state_dict(),
            "estimator": self.estimator.state_dict(),
            "history": [asdict(row) for row in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; a scheduler's rates themselves are in the optimizer's."""
        self.skipped, measured = state_dict["skipped"], state_dict["measured"]
        self.measured = measured and Curvature.of_plain(measured)
        self.rule.load_state_dict(state_dict["rule"])
        self.estimator.load_state_dict(state_dict["estimator"])
        self.history = [Measured(**row) for row in state_dict["history"]]
