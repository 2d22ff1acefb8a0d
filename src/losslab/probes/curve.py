"""A curve of low loss between two solutions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.integrate import trapezoid
from torch import Tensor

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution
from losslab.probes.base import ProbeResult, summary
from losslab.probes.interpolation import InterpolationResult, line_result
from losslab.probes.partial import PartialFile, checksum
from losslab.probes.paths.chain_training import ChainTraining, CurveOptions
from losslab.probes.paths.chains import CHAINS, Chain
from losslab.probes.paths.path_samples import PREVIEW, PathSamples, barrier, status_of
from losslab.status import Progress, Status, StopRequested, worst


@dataclass(frozen=True)
class Along:
    """A quantity over the sampled positions of a curve; both means by the trapezoidal rule."""

    minimum: float
    maximum: float
    mean: float
    mean_by_length: float


@dataclass(frozen=True)
class CurveResult(ProbeResult):
    """The curve φ that was found, and the loss on it.

    Attributes:
        kind: "bezier" or "polygon".
        control_points: (K, P), the two solutions first and last.
        ts: (T,) where the curve was measured.
        losses: (T,)
        accuracies: (T,); NaN where the targets are not classes.
        loss: Over the curve: `mean` over t ~ U(0, 1), `mean_by_length` over its arc length.
        accuracy: The same of the accuracy.
        barrier: max over the sampled t of L − max(L(a), L(b)): a lower bound of the true maximum.
        line: The straight line between the same two solutions, measured at the same positions in the same way.
        length: Of the curve.
        distance: ‖b − a‖, the length of the straight line.
        length_ratio: length/distance, 1 for a straight line; NaN from a solution to itself.
        steps: Steps of SGD taken.
        training_losses: The loss of each step's minibatch at its random t; the last is NaN or Inf where training
            ended by it.
        num_examples: N.
    """

    kind: str
    control_points: np.ndarray
    ts: np.ndarray
    losses: np.ndarray
    accuracies: np.ndarray
    loss: Along
    accuracy: Along
    barrier: float
    line: InterpolationResult
    length: float
    distance: float
    length_ratio: float
    steps: int
    training_losses: np.ndarray
    num_examples: int
    seed: int | None

    def __str__(self) -> str:
        rows = {
            "loss on the curve": f"at most {self.loss.maximum:.4g}, on average {self.loss.mean_by_length:.4g}",
            "barrier": f"{self.barrier:.4g}, on the straight line {self.line.barrier:.4g}",
            "length": f"{self.length_ratio:.3f} of the straight line's {self.distance:.4g} ({self.kind})",
            "cost and status": f"{self.steps} steps, {self.status}",
        }
        if np.isfinite(self.accuracy.mean):
            rows = {
                "accuracy on it": f"at least {self.accuracy.minimum:.2%}, on average {self.accuracy.mean:.2%}"
            } | rows
        return summary(rows)


def curve(
    risk: EmpiricalRisk,
    a: Solution,
    b: Solution,
    /,
    *,
    kind: str = "bezier",
    bends: int = 1,
    options: CurveOptions | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> CurveResult:
    """Is there a curve of low loss between two solutions?  min over φ of E_{t ~ U(0,1)} [L(φ(t)) + ½λ‖φ(t)‖²].

    φ(t) = Σₖ cₖ(t) wₖ is a Bezier curve or a polygonal chain whose ends are the two solutions; the control points
    between them start on the straight line and are trained by SGD with momentum, one minibatch and one t a step. The
    gradient with respect to wₖ is cₖ(t) times that of the loss at φ(t), so any module will do. In training BatchNorm
    normalises each minibatch by its own statistics; on the finished curve they are recomputed at every t, at the two
    ends too, whose losses may therefore differ from the given networks'. Garipov et al. 2018, section 3.1, equation 2.

    Args:
        risk: Whose loss; its batches are the minibatches. Its model gives the architecture and is not moved.
        a: One solution: a module, its state dict, or a vector of shape (P,).
        b: The other one.
        kind: "bezier" or "polygon".
        bends: Free control points; the paper has one, which its code counts as three with the ends.
        options: Steps, learning rate, L2 and points.
        seed: Of the positions t and of the minibatches' order.
        resume: A file for what is done so far. If it belongs to the same computation only the rest is computed, to the
            same bits; it is removed when all is done.
        progress: Called after each step and each measured point. A stop leaves the curve as it is by then, measured
            at nine positions at least, and the file.

    Returns:
        CurveResult; `complete` says that all steps were taken, not that no better curve exists. Cost: `steps`
        minibatch gradients, then 4·`num_points` forward passes (2·`num_points` without BatchNorm).

    Raises:
        ValueError: An unknown kind, bends below 1, solutions of another architecture, or several processes.
    """
    require_risk(risk)
    if kind not in CHAINS:
        raise ValueError(f"kind: expected one of {sorted(CHAINS)}, got {kind!r}")
    if type(bends) is not int or bends < 1:
        raise ValueError(f"bends: expected a number >= 1, got {bends!r}")
    if risk.ranks.count > 1:
        raise ValueError(f"ranks: expected one process, got {risk.ranks.count}; train the curve in one")
    options = options or CurveOptions()
    ts = np.linspace(0, 1, options.num_points)
    samples, line = (PathSamples(risk, a, b, ts, recalibrate=True) for _ in range(2))
    start, end = (solution.to(risk.accumulation_dtype) for solution in (samples.start, samples.end))
    training = ChainTraining(risk, Chain.straight(kind, start, end, bends), options, seed)
    search = _Search(training, samples, line, resume, progress)
    stopped = search.run()
    return search.result(stopped)


class _Search:
    """Training, then measuring the curve and the straight line, with a file for what is done."""

    def __init__(
        self,
        training: ChainTraining,
        samples: PathSamples,
        line: PathSamples,
        resume: str | Path | None,
        progress: Progress | None,
    ):
        self.training, self.samples, self.line, self.progress = training, samples, line, progress
        self.file = PartialFile(resume, self._key() if resume is not None else "")
        stored = self.file.load()
        if stored:
            training.restore(stored)
            samples.restore(stored, "curve")
            line.restore(stored, "line")

    def run(self) -> bool:
        """All that is not done yet; whether it was told to stop before."""
        try:
            self.training.run(self._after_step)
            for index, (samples, point) in enumerate(self._parts()):
                samples.measure(point, progress=self._after_points(index))
        except StopRequested:
            self.save()
            for samples, point in self._parts():
                samples.measure(point, PREVIEW)
            return True
        except BaseException:
            self.save()
            raise
        self.file.remove()
        return False

    def result(self, stopped: bool) -> CurveResult:
        """What is known."""
        training, samples = self.training, self.samples
        ts, losses, accuracies = samples.known()
        arc = training.chain.arc_lengths(ts)
        distance, length = samples.distance(), float(arc[-1])
        outcomes = [Status.stopped] * stopped + [Status.nonfinite] * (not training.finite)
        return CurveResult(
            status=worst(status_of(samples.losses, samples.done), *outcomes),
            kind=training.kind,
            control_points=training.chain.points.cpu().numpy(),
            ts=ts,
            losses=losses,
            accuracies=accuracies,
            loss=_along(losses, ts, arc),
            accuracy=_along(accuracies, ts, arc),
            barrier=barrier(ts, losses),
            line=line_result(self.line),
            length=length,
            distance=distance,
            length_ratio=length / distance if distance else math.nan,
            steps=training.step,
            training_losses=training.losses[: training.step + (not training.finite)],
            num_examples=training.risk.num_examples,
            seed=training.seed,
        )

    def save(self) -> None:
        """Keep what is done."""
        self.file.save(self.training.arrays() | self.samples.arrays("curve") | self.line.arrays("line"))

    def _parts(self) -> list[tuple[PathSamples, Callable[[float], Tensor]]]:
        return [(self.samples, self.training.chain.at), (self.line, self.line.on_line)]

    def _key(self) -> str:
        """What the computation depends on, as a checksum."""
        training, risk = self.training, self.training.risk
        plain = (training.kind, training.options, training.seed, risk.num_examples, risk.num_batches, risk.mode)
        return checksum((*plain, risk.space.names, risk.loss_at(self.samples.start)), training.chain.points)

    def _after_step(self, loss: float) -> None:
        self._report(self.training.step, f"training loss {loss:.4g}")

    def _after_points(self, part: int) -> Progress:
        """Progress of one of the two measurements; a point costs about as much as a pass of training."""
        count, batches = len(self.samples.positions), self.training.risk.num_batches

        def report(done: float, total: float, note: str) -> None:
            self._report(self.training.options.steps + batches * (part * count + done), note)

        return report

    def _report(self, done: float, note: str) -> None:
        if self.file.is_due():
            self.save()
        if self.progress is not None:
            total = self.training.options.steps + 2 * len(self.samples.positions) * self.training.risk.num_batches
            self.progress(done, total, note)


def _along(values: np.ndarray, ts: np.ndarray, arc: np.ndarray) -> Along:
    by_length = trapezoid(values, arc) / arc[-1] if arc[-1] > 0 else values.mean()
    return Along(float(values.min()), float(values.max()), float(trapezoid(values, ts)), float(by_length))
