"""Where everything of a comparison lies in its study folder, and what each run there is."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from losslab.studies.compare.plan import CompareConfig
from losslab.studies.config import apply
from losslab.studies.sections import RunConfig

DECADES = 3  # of learning rates
PLAN = "plan.json"


@dataclass(frozen=True)
class Layout:
    """The folders below a study folder.

        plan.json  comparison.json  tuning/<optimizer>/  runs/<optimizer>/seed-<s>, rate-<i>, scale-<i>-seed-<s>

    Attributes:
        path: The study folder.
        plan: What is compared.
    """

    path: Path
    plan: CompareConfig

    def tuning(self, name: str) -> Path:
        """The tuning study of an optimizer."""
        return self.path / "tuning" / name

    def seed_run(self, name: str, seed: int) -> Path:
        """The run of a seed with the tuned settings."""
        return self.path / "runs" / name / f"seed-{seed}"

    def rate_runs(self, name: str) -> list[Path]:
        """The runs with other learning rates, in order."""
        assert self.plan.robustness is not None
        return [self.path / "runs" / name / f"rate-{i}" for i in range(self.plan.robustness.learning_rates)]

    def scale_runs(self, name: str) -> list[list[Path]]:
        """For each scale of the first weights the runs of the initialisations. Scale 1 is what the seeds' runs have."""
        assert self.plan.robustness is not None
        seeds = self.plan.seeds[: self.plan.robustness.initialisations]
        return [
            [
                self.seed_run(name, seed) if scale == 1 else self.path / "runs" / name / f"scale-{i}-seed-{seed}"
                for seed in seeds
            ]
            for i, scale in enumerate(self.plan.robustness.scales)
        ]

    def rates(self, best: RunConfig) -> tuple[float, ...]:
        """The learning rates tried: over three decades, evenly in the logarithm, the tuned one in the middle."""
        assert self.plan.robustness is not None
        powers = np.linspace(-DECADES / 2, DECADES / 2, self.plan.robustness.learning_rates)
        return tuple(float(best.optimizer.lr * 10**power) for power in powers)

    def seed_configs(self, name: str, best: RunConfig) -> dict[Path, RunConfig]:
        """The runs that count: the only ones to look at the test split."""
        return {self.seed_run(name, seed): apply(best, _run(name, seed, test=True)) for seed in self.plan.seeds}

    def robustness_configs(self, name: str, best: RunConfig) -> dict[Path, RunConfig]:
        """The runs around the tuned settings; they see the validation split only."""
        if self.plan.robustness is None:
            return {}
        first = self.plan.seeds[0]
        found = {
            path: apply(best, {**_run(name, first, test=False), "optimizer.lr": rate})
            for path, rate in zip(self.rate_runs(name), self.rates(best), strict=True)
        }
        for scale, paths in zip(self.plan.robustness.scales, self.scale_runs(name), strict=True):
            for seed, path in zip(self.plan.seeds, paths, strict=False):
                if scale != 1:
                    changes = {"model.init_scale": best.model.init_scale * scale}
                    found[path] = apply(best, {**_run(name, seed, test=False), **changes})
        return found


def _run(name: str, seed: int, *, test: bool) -> dict[str, object]:
    """What sets a run apart from the tuned configuration."""
    return {"name": name, "seed": seed, "training.evaluate_test": test}
