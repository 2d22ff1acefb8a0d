"""What an elastic band goes through: cycles of steps, with pivots inserted between them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cycle:
    """A stretch of steps with an optimizer of its own.

    Attributes:
        steps: How many.
        lr: The learning rate of SGD with momentum.
        insert: Pivots to insert before it, at most.
        climb: The highest pivot climbs to the saddle (climbing image).
    """

    steps: int
    lr: float
    insert: int = 0
    climb: bool = False

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps: expected a number >= 1 in each cycle, got {self.steps!r}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a number > 0 in each cycle, got {self.lr!r}")
        if type(self.insert) is not int or self.insert < 0:
            raise ValueError(f"insert: expected a number >= 0 in each cycle, got {self.insert!r}")


@dataclass(frozen=True)
class Schedule:
    """Cycles one after another, and the weight decay that pulls on the pivots in all of them."""

    cycles: tuple[Cycle, ...]
    weight_decay: float = 0.0

    @property
    def steps(self) -> int:
        """Steps in all."""
        return sum(cycle.steps for cycle in self.cycles)


def _paper() -> Schedule:
    # Draxler et al. 2018, sec. 3.1, with the numbers of the ResNet-20 configuration that its authors published.
    early = [Cycle(1000, 0.1), *(Cycle(1000, 0.1, 2) for _ in range(3)), *(Cycle(2000, 0.1, 2) for _ in range(2))]
    late = [Cycle(1000, lr, 2) for lr in (0.01, 0.001) for _ in range(4)]
    return Schedule((*early, *late), weight_decay=1e-4)


SCHEDULES = {"quick": Schedule((Cycle(20, 0.1),)), "paper": _paper()}


def schedule_of(schedule: str | Schedule | Sequence[Any], steps: int | None = None) -> Schedule:
    """A schedule by its name, or from a list of cycles, each a `Cycle` or [steps, lr, insert, climb].

    `steps` replaces the number of steps in each cycle.

    Raises:
        ValueError: An unknown name, no cycle, or numbers out of range.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)} or a list of cycles, got {schedule!r}")
        schedule = SCHEDULES[schedule]
    if not isinstance(schedule, Schedule):
        schedule = Schedule(tuple(cycle if isinstance(cycle, Cycle) else _cycle(cycle) for cycle in schedule))
    if not schedule.cycles:
        raise ValueError("schedule: expected at least one cycle [steps, lr, insert, climb], got none")
    if steps is None:
        return schedule
    return dataclasses.replace(schedule, cycles=tuple(dataclasses.replace(c, steps=steps) for c in schedule.cycles))


def _cycle(values: Any) -> Cycle:
    if not isinstance(values, Sequence) or isinstance(values, str) or not 2 <= len(values) <= 4:
        raise ValueError(f"schedule: expected cycles [steps, lr, insert, climb], the last two optional; got {values!r}")
    return Cycle(*values)


@dataclass(frozen=True)
class ElasticBandOptions:
    """How the band moves and how it is judged.

    Attributes:
        momentum: Of SGD.
        weight_decay: Adds weight_decay·θ to the gradients; None: as the schedule has it (`paper`: 1e-4).
        spring: The springs' constant; None: pivots are redistributed to their distances after each step.
        whole: Gradients over all data; else one batch a step, the same for all pivots.
        subdivisions: Points sampled inside each gap between two pivots, when the path is judged.
        threshold: A gap may get a pivot where the loss exceeds its linear interpolation by more than this share of the
            range of the pivots' losses.
    """

    momentum: float = 0.9
    weight_decay: float | None = None
    spring: float | None = None
    whole: bool = False
    subdivisions: int = 9
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected 0 <= momentum < 1, got {self.momentum!r}")
        for name in ("weight_decay", "threshold"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
        if self.spring is not None and not self.spring > 0:
            raise ValueError(f"spring: expected a number > 0, or None to redistribute the pivots; got {self.spring!r}")
        if type(self.subdivisions) is not int or self.subdivisions < 1:
            raise ValueError(f"subdivisions: expected a number >= 1, got {self.subdivisions!r}")
