"""The page of talt_gpu.py: what a step costs, what was tried, and steps and time to the target."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from table import markdown, spread
from talt_gpu_runs import Record, Records, Run
from talt_gpu_tasks import GPUTask

PROTOCOL = """\
- bf16 autocast, eager; learning rate up for a tenth of the horizon, then down to zero in a straight line, for all
- equally many learning rates for each optimizer, one seed, short runs, by the validation part; weight decay and other
  numbers are fixed. {light} takes TALT's rate
- horizons T·2^(k/2), each a run of its own with the best rate; to the target: the shortest horizon that reaches it on
  the test part, between it and the next shorter one by the logarithm; medians (smallest–largest) over the seeds
- seconds: forward, backward and optimizer with everything around them, the device waited for at both ends; evaluation
  excluded. A step's milliseconds: each half waited for, median of 20 steps; "renewed": the longest of these"""
BASELINE = "adamw"
FEWEST = "≤ "


@dataclass(frozen=True)
class Arrival:
    """Where one seed reaches the target.

    Attributes:
        steps: Between two horizons; infinite where none reached it.
        seconds: Likewise.
        longest: The longest horizon that was run.
        at_most: Whether the shortest horizon that was run reached it, so that fewer may do.
    """

    steps: float
    seconds: float
    longest: int
    at_most: bool = False


def arrival(runs: Sequence[tuple[int, float, float]], target: float) -> Arrival | None:
    """Of (steps, score, seconds) of one seed's horizons; None as long as nothing can be said."""
    ordered = sorted(runs)
    if not ordered:
        return None
    met = next((index for index, (_, score, _) in enumerate(ordered) if score <= target), None)
    longest = ordered[-1][0]
    if met is None:
        return Arrival(math.inf, math.inf, longest)
    steps, score, seconds = ordered[met]
    if met == 0:
        return Arrival(steps, seconds, longest, at_most=True)
    fewer, missed, shorter = ordered[met - 1]
    share = (missed - target) / (missed - score) if math.isfinite(missed) else 1.0
    return Arrival(fewer * (steps / fewer) ** share, shorter * (seconds / shorter) ** share, longest)


def page(tasks: Sequence[GPUTask], records: Records, contenders: Sequence[str]) -> list[str]:
    """All tasks."""
    about = [record["lines"] for _, record in records.of("", "about")]
    lines = ["# TALT on a GPU", "", *(about[-1] if about else []), *PROTOCOL.format(light=contenders[-1]).splitlines()]
    for task in tasks:
        lines += ["", f"## {task.title}", "", *_steps(task, records), "", *_tried(task, records), ""]
        lines += _finals(task, records, contenders)
    return lines


def _steps(task: GPUTask, records: Records) -> list[str]:
    """What a step costs."""
    head = [f"a step of {task.batch_size:,}", "forward, backward, ms", "optimizer, ms", "mean", "renewed", "first"]
    rows = []
    for run, record in records.of(task.name, "steps"):
        if "failure" in record:
            rows.append([run.contender, f"failed: {record['failure'][:80]}", *[""] * 6])
            continue
        times = [f"{record[f'optimizer{part}_ms']:.1f}" for part in ("", "_mean", "_most")]
        state = f"{record['state_numbers'] / record['parameters']:.1f}"
        peak = "–" if math.isnan(record["peak"]) else f"{record['peak'] / 2**30:.2f}"
        rows.append([run.contender, f"{record['model_ms']:.1f}", *times, f"{record['first_ms']:.0f}", state, peak])
    return markdown([*head, "state", "peak GiB"], rows)


def _tried(task: GPUTask, records: Records) -> list[str]:
    """Every learning rate, and what came of it."""
    found = records.of(task.name, "tune")
    if not found:
        return []
    rows = []
    for name in dict.fromkeys(run.contender for run, _ in found):
        own = [(run.settings["lr"], record["score"]) for run, record in found if run.contender == name]
        best = min(own, key=lambda pair: pair[1])
        rows.append([name, ", ".join(f"{rate:.3g}: {score:.4g}" for rate, score in own), f"{best[0]:.3g}"])
    what = "loss" if task.accuracy is None else "error"
    return markdown([f"learning rate: validation {what} after {found[0][0].steps} steps", "tried", "best"], rows)


# -- the final runs -----------------------------------------------------------------------------------------


def _finals(task: GPUTask, records: Records, contenders: Sequence[str]) -> list[str]:
    """Scores by horizon, then steps and time to the target."""
    found = {name: records.of(task.name, "final", name) for name in contenders}
    horizons = sorted({run.steps for runs in found.values() for run, _ in runs})
    target = _target(task, found[BASELINE])
    if not horizons or target is None:
        return ["No final runs yet."]
    rows = [[name, *(_score(task, runs, steps) for steps in horizons)] for name, runs in found.items() if runs]
    what = "test loss" if task.accuracy is None else "test accuracy, %"
    lines = markdown([f"{what}, and seconds, by steps", *map(str, horizons)], rows)
    reached = f"a test loss of {target:.4f}" if task.accuracy is None else f"{task.accuracy:.0%} test accuracy"
    arrived = {name: _arrivals(runs, target) for name, runs in found.items() if runs}
    base = arrived.get(BASELINE, [])
    head = [f"to {reached}", "seeds", "steps", "passes", "seconds", "steps × AdamW's", "time × AdamW's"]
    return [*lines, "", *markdown(head, [_row(task, name, own, base) for name, own in arrived.items()])]


def _target(task: GPUTask, baseline: Sequence[tuple[Run, Record]]) -> float | None:
    if task.accuracy is not None:
        return 1 - task.accuracy
    at_T = [record["score"] for run, record in baseline if run.steps == task.horizon]
    return statistics.median(at_T) if at_T else None


def _score(task: GPUTask, runs: Sequence[tuple[Run, Record]], steps: int) -> str:
    own = [record for run, record in runs if run.steps == steps]
    if not own:
        return ""
    if any("failure" in record for record in own):
        return "failed"
    values = [record["score"] if task.accuracy is None else 100 * (1 - record["score"]) for record in own]
    seconds = statistics.median(record["seconds"] for record in own)
    return f"{spread(values, '.4f' if task.accuracy is None else '.2f')}, {seconds:.1f} s"


def _arrivals(runs: Sequence[tuple[Run, Record]], target: float) -> list[Arrival]:
    """Of each seed of which a run reached the target, or several did not."""
    found = []
    for seed in sorted({run.seed for run, _ in runs}):
        own = [
            (run.steps, record["score"], record.get("seconds", math.inf)) for run, record in runs if run.seed == seed
        ]
        one = arrival(own, target)
        if one is not None:
            found.append(one)
    return found


def _row(task: GPUTask, name: str, own: Sequence[Arrival], base: Sequence[Arrival]) -> list[str]:
    steps, seconds = (statistics.median(getattr(one, what) for one in own) for what in ("steps", "seconds"))
    if math.isinf(steps):
        return [name, str(len(own)), f"> {max(one.longest for one in own)}", *["–"] * 4]
    sign = FEWEST if any(one.at_most for one in own) else ""
    passes = f"{sign}{steps * task.batch_size / task.epoch:.1f}" if task.epoch else "–"
    ratios = []
    for value, what in ((steps, "steps"), (seconds, "seconds")):
        unit = statistics.median(getattr(one, what) for one in base) if base else math.inf
        ratios.append("–" if math.isinf(unit) else f"{sign}{value / unit:.2f}")
    finite = [one for one in own if math.isfinite(one.steps)]
    said = [sign + spread([getattr(one, what) for one in finite], form) for what, form in
            (("steps", ".0f"), ("seconds", ".1f"))]  # fmt: skip
    missed = f" ({len(own) - len(finite)} missed)" if len(finite) < len(own) else ""
    return [name, f"{len(own)}{missed}", said[0], passes, said[1], *ratios]
