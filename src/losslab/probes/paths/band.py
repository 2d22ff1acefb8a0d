"""Relaxing an elastic band in any potential, cycle by cycle; interrupted and resumed it ends at the same bits."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losslab.probes.partial import PartialFile
from losslab.probes.paths.band_schedule import Cycle, ElasticBandOptions, Schedule
from losslab.probes.paths.path_profile import PathProfile, inserted, insertions, profile_of
from losslab.probes.paths.potential import Potential, Slope
from losslab.probes.paths.tangents import nudged, redistributed
from losslab.status import Progress, Status, StopRequested

_SEEDS = 1_000_003  # between the cycles' seeds: further than a cycle has passes over the data


@dataclass
class BandState:
    """All that the rest of the computation depends on.

    Attributes:
        path: Pivots, both ends among them, (n, P).
        targets: Distances that neighbours shall have, in any unit, (n−1,).
        cycle, step: What comes next. Cycle 0 is the judgement of the straight line.
        momentum: SGD's, (n−2, P); None before a cycle's first step.
        best_path, best_losses, best_cycle: The path with the lowest saddle so far (of equal ones, that of the lowest
            mean), and after which cycle it was.
        saddles: The saddle of the straight line and after each cycle.
        num_gradients, num_losses: Cost so far: gradients of pivots, losses of points over all data.
    """

    path: Tensor
    targets: np.ndarray
    cycle: int = 0
    step: int = 0
    momentum: Tensor | None = None
    best_path: Tensor | None = None
    best_losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    best_cycle: int = 0
    saddles: list[float] = field(default_factory=list)
    num_gradients: int = 0
    num_losses: int = 0

    def to_arrays(self) -> dict[str, np.ndarray]:
        """For a file."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return {n: v.cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for n, v in values.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], like: Tensor) -> "BandState":
        """What `to_arrays` made; tensors go where `like` is."""
        values: dict[str, Any] = {name: value for name, value in arrays.items() if name != "key"}
        for name in ("path", "momentum", "best_path"):
            if name in values:
                values[name] = torch.from_numpy(values[name]).to(like)
        for name in ("cycle", "step", "best_cycle", "num_gradients", "num_losses"):
            values[name] = int(values[name])
        return cls(**(values | {"saddles": values["saddles"].tolist()}))


def straight(start: Tensor, end: Tensor, num_nodes: int) -> BandState:
    """A band of `num_nodes` pivots, both ends among them, evenly on the line between two points (P,)."""
    fractions = torch.arange(num_nodes, dtype=start.dtype, device=start.device)[:, None] / (num_nodes - 1)
    return BandState(torch.lerp(start, end, fractions), np.ones(num_nodes - 1))


class Relaxation:
    """A band on its way through a schedule.

    Each cycle inserts pivots where the path that was judged last asks for them, takes its steps, and judges the path.
    The straight line is judged first.

    Args:
        potential: What the band moves in.
        state: Where it begins, unless the file holds a state.
        schedule: The cycles.
        options: See `ElasticBandOptions`.
        seed: Decides which data each step takes.
        file: For the state.
        progress: Called after each step and each judgement.
    """

    def __init__(
        self,
        potential: Potential,
        state: BandState,
        schedule: Schedule,
        options: ElasticBandOptions,
        seed: int,
        file: PartialFile,
        progress: Progress | None,
    ):
        self.potential, self.schedule, self.options = potential, schedule, options
        self.seed, self.file, self.progress = seed, file, progress
        self._torn = False  # whether the state is between two steps
        stored = file.load()
        self.state = BandState.from_arrays(stored, state.path) if stored else state
        own = options.weight_decay
        self.weight_decay = schedule.weight_decay if own is None else own

    def run(self) -> Status:
        """To the schedule's end, or to where it is stopped or meets NaN."""
        try:
            status = self._cycles()
        except StopRequested:
            self.file.save(self.state.to_arrays())
            if self.state.step:
                self._judge()  # what it has become by now
            return Status.stopped
        except BaseException:
            if not self._torn:
                self.file.save(self.state.to_arrays())
            raise
        self.file.remove()
        return status

    def best(self) -> tuple[Tensor, PathProfile]:
        """The path with the lowest saddle that was met, and its losses."""
        assert self.state.best_path is not None
        path = self.state.best_path
        return path, PathProfile.of(path, self.state.best_losses, self.options.subdivisions)

    def _cycles(self) -> Status:
        state, cycles = self.state, self.schedule.cycles
        while state.cycle <= len(cycles):
            finite = not state.cycle or self._relax(cycles[state.cycle - 1])
            profile = self._judge()
            if not finite:
                return Status.nonfinite
            with self._changing():
                if state.cycle < len(cycles):
                    places = insertions(profile, self.options.threshold, cycles[state.cycle].insert)
                    state.path, state.targets = inserted(state.path, state.targets, places)
                state.cycle, state.step, state.momentum = state.cycle + 1, 0, None
            self._note(f"saddle {profile.saddle:.4g}, {len(state.path)} pivots", judged=state.cycle)
        return Status.complete

    def _relax(self, cycle: Cycle) -> bool:
        """A cycle's steps from the present one on; whether loss and gradients stayed finite."""
        state = self.state
        inner = state.path[1:-1]
        # No weight decay here: it must come before the projection.
        optimizer = torch.optim.SGD([inner], lr=cycle.lr, momentum=self.options.momentum)
        if state.momentum is not None:
            optimizer.state[inner]["momentum_buffer"] = state.momentum
        with contextlib.closing(self.potential.slopes(self.seed + _SEEDS * state.cycle, state.step)) as slopes:
            while state.step < cycle.steps:
                highest = self._step(next(slopes), cycle, inner, optimizer)
                if not math.isfinite(highest):
                    return False
                self._note(f"cycle {state.cycle}, step {state.step}: highest {highest:.4g}", judged=state.cycle)
        return True

    def _step(self, slope: Slope, cycle: Cycle, inner: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Move the inner pivots once; the highest loss before. NaN, and no move, where something is not finite."""
        state, options = self.state, self.options
        losses, gradients = slope(state.path)
        if not math.isfinite(float(losses.sum() + gradients.sum())):
            return math.nan
        if self.weight_decay:
            gradients = gradients.add(inner, alpha=self.weight_decay)
        climbing = int(losses[1:-1].argmax()) + 1 if cycle.climb else None
        inner.grad = nudged(
            state.path, losses, gradients, spring=options.spring, targets=state.targets, climbing=climbing
        )
        with self._changing():
            optimizer.step()
            if options.spring is None:
                state.path.copy_(redistributed(state.path, state.targets, [] if climbing is None else [climbing]))
            state.momentum = optimizer.state[inner].get("momentum_buffer")
            state.step += 1
            state.num_gradients += len(inner)
        return float(losses.max())

    def _judge(self) -> PathProfile:
        """Sample the path; remember it if it is the best so far."""
        state = self.state
        profile = profile_of(self.potential, state.path, self.options.subdivisions)
        with self._changing():
            state.num_losses += len(profile.losses)
            if state.best_path is None or _is_better(profile, self.best()[1]):
                state.best_path, state.best_losses = state.path.clone(), profile.losses
                state.best_cycle = state.cycle
            state.saddles.append(profile.saddle)
        return profile

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """The state is of no use if this block does not come to its end."""
        self._torn = True
        yield
        self._torn = False

    def _note(self, text: str, judged: int) -> None:
        """After each step and each judgement; `judged` of them are done."""
        if self.file.is_due():
            self.file.save(self.state.to_arrays())
        if self.progress is not None:
            cycles = self.schedule.cycles
            stepped = sum(cycle.steps for cycle in cycles[: max(self.state.cycle - 1, 0)]) + self.state.step
            self.progress(judged + stepped, self.schedule.steps + len(cycles) + 1, text)


def _is_better(profile: PathProfile, best: PathProfile) -> bool:
    """A lower saddle, or less on the way where both saddles are one and the same, such as an end's loss."""
    if math.isnan(profile.saddle) or math.isnan(best.saddle):
        return not math.isnan(profile.saddle)
    # 1e-6: float32's rounding, by which an end's loss may differ between a stack of points and one alone.
    same = math.isclose(profile.saddle, best.saddle, rel_tol=1e-6)
    return profile.mean < best.mean if same else profile.saddle < best.saddle
