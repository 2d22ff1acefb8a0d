"""The second of two solutions with its units in the order that brings it closest to the first."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution
from losslab.probes.base import ProbeResult, summary
from losslab.probes.paths.path_samples import PREVIEW, PathSamples, barrier, status_of
from losslab.probes.permutations.activations import match_activations
from losslab.probes.permutations.full_state import full_state, tied
from losslab.probes.permutations.matching import State, match_weights
from losslab.probes.permutations.permutations import Permutations, PermutationSpec
from losslab.probes.permutations.repair import Repair
from losslab.probes.permutations.tracing import permutation_spec, running_statistics
from losslab.status import Progress, Status, StopRequested, worst


@dataclass(frozen=True)
class AlignmentResult(ProbeResult):
    """b and πb seen from a; `permuted` applies π.

    Attributes:
        method: "weights" or "activations".
        alphas: (A,), on [0, 1].
        losses_before: L((1−α)a + αb), (A,).
        losses_after: L((1−α)a + απb), (A,).
        losses_repaired: The same with each channel's mean and deviation repaired, (A,); empty if not asked for.
        barrier_before: max L − max(L(a), L(b)) over the sampled α.
        barrier_after: The same with πb.
        barrier_repaired: The same repaired, NaN if not asked for.
        distance_before: ‖a − b‖.
        distance_after: ‖a − πb‖.
        groups: The groups of units that can change places, by name ("0.weight:0": axis 0 of that parameter first).
        sizes: How many units each has.
        moved: How many of them changed places, in each; of groups within others summed over the outer units.
        permutations: All groups' permutations one after another, new place -> old one; a group within another has one
            for each of the outer units.
        similarity: ⟨a, πb⟩ at each start of the matching and at its end, (starts, 2).
        recalibrated: Whether BatchNorm's statistics were recomputed at each α: where there is BatchNorm.
        unknown: "module: operation" for what is not understood, so that the units it touches kept their places.
        seed: Of the order of the matching and of its random starts.
    """

    method: str
    alphas: np.ndarray
    losses_before: np.ndarray
    losses_after: np.ndarray
    losses_repaired: np.ndarray
    barrier_before: float
    barrier_after: float
    barrier_repaired: float
    distance_before: float
    distance_after: float
    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    moved: tuple[int, ...]
    permutations: np.ndarray
    similarity: np.ndarray
    recalibrated: bool
    unknown: tuple[str, ...]
    seed: int

    def __str__(self) -> str:
        rows = {
            "barrier": f"{self.barrier_before:.4g}, {self.barrier_after:.4g} after alignment",
            "distance": f"{self.distance_before:.4g}, {self.distance_after:.4g} after alignment",
            "units": f"{sum(self.moved)} changed places, by {self.method}",
        }
        if self.losses_repaired.size:
            rows["barrier"] += f", {self.barrier_repaired:.4g} with the activations repaired"
        if self.unknown:
            rows["not understood"] = f"{', '.join(self.unknown[:3])}: these units kept their places"
        rows["status"] = str(self.status)
        return summary(rows)


def align(
    risk: EmpiricalRisk,
    a: Solution,
    b: Solution,
    /,
    *,
    method: Literal["weights", "activations"] = "weights",
    alphas: Sequence[float] | np.ndarray | None = None,
    repair: bool = False,
    starts: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> AlignmentResult:
    """Are two solutions the same but for the order of their units?  The barrier between a and b, and a and πb.

    Units of a hidden layer can change places without changing the function, so independent solutions differ by an
    arbitrary permutation π at least. It is found by coordinate ascent on ⟨a, πb⟩ (`matching.match_weights`) or from
    the correlation of activations (`activations.match_activations`); which units can change places is found by
    following the network's operations (`tracing.permutation_spec`) and checked on the first batch. Class outputs and
    inputs are never permuted. Sources: Ainsworth, Hayase & Srinivasa 2023, "Git Re-Basin", sections 3.1 and 3.2; Jordan
    et al. 2023, "REPAIR".

    Args:
        risk: Whose loss and data; its model gives the architecture and is not moved.
        a: One solution: a module, its state dict, or a vector of shape (P,).
        b: The other one, whose units are permuted.
        method: What is compared: "weights", or "activations" on the risk's data.
        alphas: Where to look on [0, 1]; default 25 points. Both solutions are added where they are not among them.
        repair: Measure the repaired networks too (`repair.Repair`).
        starts: Of the matching of weights: the first from b as it is, others from random permutations; best one counts.
        seed: Of the order of the matching and of its random starts.
        progress: Called after each start (or batch, where activations are matched) and each α. A stop leaves what is
            known by then: nine points, or few more.

    Returns:
        AlignmentResult. Cost: for each α two forward passes, twice that with BatchNorm, and with `repair` two or three
        more; the matching as in `match_weights` or `match_activations`; three passes over one batch to follow it.

    Raises:
        ValueError: Other shapes or names than the risk's model; method, alphas or starts outside what is said above; a
            network that cannot be followed, or one of which nothing is left to permute since an operation is unknown
            (the message names the module).
    """
    require_risk(risk)
    if method not in ("weights", "activations"):
        raise ValueError(f"method: expected 'weights' or 'activations', got {method!r}")
    if type(starts) is not int or starts < 1:
        raise ValueError(f"starts: expected a number >= 1, got {starts!r}")
    grid, states = _grid(alphas), [full_state(risk, x, name) for x, name in ((a, "a"), (b, "b"))]
    spec = permutation_spec(risk)
    if not spec.groups and spec.unknown:
        where = spec.unknown[0]
        raise ValueError(f"risk: expected a network with units to permute, got an unknown operation in {where}")
    count = risk.num_batches if method == "activations" else starts
    clock = _Clock(progress, count + (3 if repair else 2) * len(grid))
    permutations, similarity, converged = _match(risk, spec, states, method, starts, seed, clock)
    aligned = tied(risk.model, spec.apply(states[1], permutations))
    recalibrate = any(True for _ in running_statistics(risk.model))
    lines = [PathSamples(risk, states[0], end, grid, recalibrate=recalibrate) for end in (states[1], aligned)]
    points = [line.on_line for line in lines]
    if repair:
        lines.append(PathSamples(risk, states[0], aligned, grid, recalibrate=recalibrate))
        points.append(Repair(risk, spec, states[0], aligned).point)
    for line, point in zip(lines, points, strict=True):
        clock.measure(line, point)
    done = np.logical_and.reduce([line.done for line in lines])
    losses = [line.losses[done] for line in lines] + [np.empty(0)] * (3 - len(lines))
    barriers = [barrier(grid[done], curve) if curve.size else float("nan") for curve in losses]
    ended = Status.complete if converged else Status.budget_reached
    return AlignmentResult(
        status=worst(ended, *(status_of(line.losses, line.done) for line in lines)),
        method=method,
        alphas=grid[done],
        losses_before=losses[0],
        losses_after=losses[1],
        losses_repaired=losses[2],
        barrier_before=barriers[0],
        barrier_after=barriers[1],
        barrier_repaired=barriers[2],
        distance_before=lines[0].distance(),
        distance_after=lines[1].distance(),
        groups=tuple(group.name for group in spec.groups),
        sizes=tuple(group.size for group in spec.groups),
        moved=tuple(spec.moved(permutations)),
        permutations=np.concatenate([np.empty(0, dtype=np.int64), *(order.ravel() for order in permutations)]),
        similarity=similarity,
        recalibrated=recalibrate,
        unknown=spec.unknown,
        seed=seed,
    )


def permuted(risk: EmpiricalRisk, b: Solution, result: AlignmentResult) -> dict[str, Tensor]:
    """The state dict of πb: the second solution with its units in the order that `align` found.

    Its function is that of b; `interpolate(risk, a, permuted(risk, b, result))` looks between it and the first one.

    Args:
        risk: The one that was aligned with, or another of the same model and parameters.
        b: The second solution, as it was given to `align`.
        result: What `align` returned, also if it comes from a record.

    Raises:
        ValueError: The result belongs to another network.
    """
    require_risk(risk)
    spec = permutation_spec(risk)
    if tuple((group.name, group.size) for group in spec.groups) != tuple(zip(result.groups, result.sizes, strict=True)):
        raise ValueError(
            f"result: expected one of a network with {len(spec.groups)} groups of units like the risk's, got one with "
            f"{len(result.groups)} of other names or sizes; use the same model and parameters"
        )
    shapes = [spec.shape(group) for group in spec.groups]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(result.permutations, ends[:-1]) if shapes else []
    permutations = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return tied(risk.model, spec.apply(full_state(risk, b, "b"), permutations))


def _match(
    risk: EmpiricalRisk,
    spec: PermutationSpec,
    states: list[State],
    method: str,
    starts: int,
    seed: int,
    clock: "_Clock",
) -> tuple[Permutations, np.ndarray, bool]:
    """The permutation, ⟨a, πb⟩ before and after, and whether the matching ended by itself."""
    chosen = [{name: state[name] for name in risk.space.names} for state in states]
    before = _similarity(*chosen)
    if not np.isfinite([before, *(_similarity(state, state) for state in chosen)]).all():
        return spec.identity(), np.full((1, 2), before), True  # no order is best among NaN
    if method == "weights":
        found = match_weights(spec, *chosen, starts=starts, seed=seed, progress=clock.tick)
        return found.permutations, found.similarity, found.converged
    permutations, converged = match_activations(risk, spec, *states, seed=seed, progress=clock.tick)
    after = _similarity(chosen[0], spec.apply(chosen[1], permutations))
    return permutations, np.array([[before, after]]), converged


def _similarity(a: State, b: State) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


class _Clock:
    """Progress over the parts of the whole; remembers that it was told to stop."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done, self.stopped = progress, total, 0, False

    def tick(self, note: str = "matching units") -> bool:
        """One more unit of work is done; whether to go on."""
        self.done += 1
        if self.progress is not None and not self.stopped:
            try:
                self.progress(self.done, self.total, note)
            except StopRequested:
                self.stopped = True
        return not self.stopped

    def measure(self, line: PathSamples, point: Callable[[float], Tensor]) -> None:
        """All losses on a line; after a stop the first few, which every line then has."""

        def each(done: float, total: float, note: str) -> None:
            if not self.tick(note):
                raise StopRequested

        if not self.stopped:
            with contextlib.suppress(StopRequested):
                line.measure(point, progress=each)
        if self.stopped:
            line.measure(point, PREVIEW)


def _grid(alphas: Sequence[float] | np.ndarray | None) -> np.ndarray:
    grid = np.linspace(0, 1, 25) if alphas is None else np.asarray(alphas, dtype=np.float64)
    if grid.ndim != 1 or not len(grid) or not ((grid >= 0) & (grid <= 1)).all():
        raise ValueError(f"alphas: expected a list of numbers in [0, 1], got {alphas!r}; interpolate looks beyond")
    return np.unique(np.concatenate([grid, [0.0, 1.0]]))
