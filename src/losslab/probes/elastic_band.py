"""The path of least loss between two solutions: nudged elastic bands."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution
from losslab.probes.base import ProbeResult, summary
from losslab.probes.partial import PartialFile, checksum
from losslab.probes.paths.band import Relaxation, straight
from losslab.probes.paths.band_schedule import ElasticBandOptions, Schedule, schedule_of
from losslab.probes.paths.potential import NetworkPotential
from losslab.status import Progress, Status, worst


@dataclass(frozen=True)
class ElasticBandResult(ProbeResult):
    """The best path that was met, sampled at D points, n of them its pivots.

    Attributes:
        positions: Distance along the path, (D,).
        losses: (D,)
        pivot_positions: (n,)
        pivot_losses: (n,)
        pivots: The path itself: pivots in their order, both solutions among them, (n, P); straight lines between them.
        saddle: The largest of `losses`. Between two samples the loss may be higher.
        barrier: saddle − max(L(a), L(b)).
        path_loss: The mean loss along the path, by length.
        loss_a: L(a).
        loss_b: L(b).
        length: Of the path.
        distance: ‖b − a‖.
        straight_saddle: The largest loss on the straight line, sampled like the band's first pivots.
        straight_barrier: straight_saddle − max(L(a), L(b)).
        saddles: The straight line's saddle, then the path's after each cycle.
        best_cycle: The cycle after which the path was as it is here; 0: the straight line.
        subdivisions: Samples inside each gap between two pivots.
        num_gradients: Gradients of single pivots, each over one batch (over all data with `whole`).
        num_losses: Losses over all data.
    """

    positions: np.ndarray
    losses: np.ndarray
    pivot_positions: np.ndarray
    pivot_losses: np.ndarray
    pivots: np.ndarray
    saddle: float
    barrier: float
    path_loss: float
    loss_a: float
    loss_b: float
    length: float
    distance: float
    straight_saddle: float
    straight_barrier: float
    saddles: np.ndarray
    best_cycle: int
    subdivisions: int
    num_gradients: int
    num_losses: int
    num_examples: int
    seed: int

    def __str__(self) -> str:
        rows = {
            "barrier": f"{self.barrier:.4g}, on the straight line {self.straight_barrier:.4g}",
            "saddle": f"{self.saddle:.4g}, the ends {self.loss_a:.4g} and {self.loss_b:.4g}",
            "path": f"{len(self.pivots)} pivots, length {self.length:.4g}, the straight line's {self.distance:.4g}; "
            f"mean loss {self.path_loss:.4g}",
            "cost and status": f"{self.num_gradients} gradients of pivots and {self.num_losses} losses, {self.status}",
        }
        return summary(rows)


def elastic_band(
    risk: EmpiricalRisk,
    a: Solution,
    b: Solution,
    /,
    *,
    schedule: str | Schedule | Sequence[Any] = "quick",
    num_nodes: int = 5,
    steps: int | None = None,
    options: ElasticBandOptions | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> ElasticBandResult:
    """Must the loss rise on the way from one solution to another?  The path of least loss between them.

    A chain of pivots θ₀ = a, θ₁, …, θₙ₋₁ = b begins on the straight line. At each step every inner pivot descends along
    its gradient without the part along the path (improved tangents, `tangents.tangents`), and pivots are spread along
    the path again (or held apart by springs): the nudged elastic band. With a schedule that inserts pivots where the
    loss exceeds its linear interpolation, it is AutoNEB (Draxler et al. 2018, "Essentially no barriers in neural
    network energy landscape", sec. 3). Barrier = the path's largest loss − max(L(a), L(b)).

    The path is judged over all data at `subdivisions` points inside each gap as well as at the pivots: for the straight
    line and after each cycle. The result is the one with the lowest saddle among them (of equal ones, the lowest mean),
    so never worse than the straight line by these samples. Its barrier bounds the lowest pass from above, up to the
    sampling: another path may have a lower one. BatchNorm statistics are no coordinates and are recomputed at every
    point, the two ends included (`potential.NetworkPotential`); other buffers are those of the risk's model.

    Args:
        risk: Whose loss and data; its batches are the minibatches. Its model gives the architecture and is not moved.
        a: One solution: a module, its state dict, or a vector of shape (P,).
        b: The other one.
        schedule: "quick": one cycle of 20 steps at learning rate 0.1. "paper": 14 cycles, 16,000 steps, up to 29 inner
            pivots. Or a list of cycles [steps, lr, insert, climb]: pivots to insert before it at most (0), and whether
            the highest pivot climbs to the saddle (False).
        num_nodes: Pivots at the start, both ends among them.
        steps: Replaces the number of steps in each cycle.
        options: Momentum, weight decay, springs, sampling.
        seed: Decides with which batch each cycle begins, and the batches' order where they shuffle.
        resume: A file for what is done so far. Interrupted and resumed is the same, bit for bit. It is removed at the
            end; one of another computation is ignored.
        progress: Called after each step, and after each judgement of the path.

    Returns:
        ElasticBandResult. Cost: (n−2) gradients and 2 forward passes on one batch a step (n gradients where pivots go
        as a stack); (n−1)·10 + 1 forward passes over all data for the straight line and after each cycle, twice as many
        with BatchNorm. Memory: about 8 n·P numbers.

    Raises:
        ValueError: Other shapes or names than the risk's model; num_nodes below 3; an unknown schedule, or one with
            numbers out of range.
    """
    require_risk(risk)
    options, plan = options or ElasticBandOptions(), schedule_of(schedule, steps)
    if type(num_nodes) is not int or num_nodes < 3:
        raise ValueError(f"num_nodes: expected at least 3, both solutions and one between them; got {num_nodes!r}")
    start, end = (
        risk.space.vector_of(solution, name).detach().to(risk.accumulation_dtype)
        for solution, name in ((a, "a"), (b, "b"))
    )
    key = _key(risk, start, end, plan, num_nodes, options, seed) if resume is not None else ""
    potential = NetworkPotential(risk, whole=options.whole)
    file = PartialFile(resume, key)
    band = Relaxation(potential, straight(start, end, num_nodes), plan, options, seed, file, progress)
    status = band.run()
    return _result(risk, band, status)


def _result(risk: EmpiricalRisk, band: Relaxation, status: Status) -> ElasticBandResult:
    path, profile = band.best()
    positions, losses, pivots = profile.positions, profile.losses, profile.pivots
    state = band.state
    worse_end = float(max(losses[0], losses[-1]))
    if not np.isfinite(losses).all():
        status = worst(status, Status.nonfinite)
    return ElasticBandResult(
        status=status,
        positions=positions,
        losses=losses,
        pivot_positions=positions[pivots].copy(),
        pivot_losses=losses[pivots].copy(),
        pivots=path.cpu().numpy(),
        saddle=profile.saddle,
        barrier=profile.saddle - worse_end,
        path_loss=profile.mean,
        loss_a=float(losses[0]),
        loss_b=float(losses[-1]),
        length=float(positions[-1]),
        distance=float((path[-1] - path[0]).double().norm()),
        straight_saddle=state.saddles[0],
        straight_barrier=state.saddles[0] - worse_end,
        saddles=np.array(state.saddles),
        best_cycle=state.best_cycle,
        subdivisions=profile.subdivisions,
        num_gradients=state.num_gradients,
        num_losses=state.num_losses,
        num_examples=risk.num_examples,
        seed=band.seed,
    )


def _key(risk: EmpiricalRisk, start: Tensor, end: Tensor, *settings: Any) -> str:
    """What the band depends on, as a checksum. Cost: a forward pass."""
    plain = risk.num_examples, risk.mode, risk.space.names, risk.loss_at(start.to(risk.dtype)), settings
    return checksum(plain, start, end)
