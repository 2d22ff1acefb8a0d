"""How does the learning rate change from step to step?  A pure function of the step, so that a resumed run knows it.

Of all schedules but "homotopy", whose rate the run itself finds: `losslab.studies.homotopy`.
"""

import math

from losslab.optim.homotopy.rules import decayed
from losslab.studies.sections import ScheduleConfig

# One cycle, as torch's OneCycleLR has it by default (Smith & Topin 2018): where it starts and ends, where its top is.
START = 1 / 25
END = START / 1e4
TOP = 0.3


def rate_factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """What the learning rate is multiplied by in one step.

    Args:
        schedule: Which one; not "homotopy".
        step: Counted from 0.
        total: Steps of the whole run.
    """
    if schedule.name == "one_cycle":
        return _one_cycle(step, total, schedule.warmup_steps or TOP * total)
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "cooldown":
        return decayed(step, schedule.warmup_steps, total, "cooldown")
    done = (step - schedule.warmup_steps) / (total - schedule.warmup_steps)
    return _cosine(1.0, 0.0, done) if schedule.name == "cosine" else 1.0 - done


def _one_cycle(step: int, total: int, rise: float) -> float:
    top = rise - 1  # the step with the largest rate; between two steps where `rise` is no integer
    if step <= top:
        return _cosine(START, 1.0, step / top) if top > 0 else 1.0
    return _cosine(1.0, END, (step - top) / (total - 1 - top))


def _cosine(start: float, end: float, done: float) -> float:
    """From `start` to `end` along half a wave."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * done))
