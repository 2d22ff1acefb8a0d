"""How much worse is the network on new data, and what can be said about that from the training data alone?"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from losslab.operators.accuracy import guessing_accuracy
from losslab.operators.finite_difference import hessian_of
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution
from losslab.probes.base import ProbeResult, summary
from losslab.probes.effective_dimension import effective_dimension
from losslab.probes.pac_bayes import PacBayes, Posterior, pac_bayes
from losslab.probes.split_score import SplitScore, score_split
from losslab.solvers.budget import Budget
from losslab.solvers.estimate import Estimate
from losslab.status import Progress, Status, StopRequested


@dataclass(frozen=True)
class GeneralizationResult(ProbeResult):
    """Train against test, and bounds from the training data; NaN where there is no test data, or no classes.

    Attributes:
        train: On the risk's examples.
        test: On the test risk's.
        loss_gap: Test less train, with its standard error `loss_gap_error`.
        loss_gap_error: See above.
        accuracy_gap: Train less test, with its standard error `accuracy_gap_error`.
        accuracy_gap_error: See above.
        pac_bayes: The Gaussian around the solution and its bound.
        allowed_rise: What the expected rise was allowed to be, of `rise_of`.
        rise_of: "error rate" or "loss".
        guessing_error: The training error of always naming the most frequent class.
        vacuous: Whether the bound is no better than that guess, and so says nothing; None without a bound.
        caveat: Why the bound does not strictly hold; empty where it does.
        sharpness_term: √(sharpness/n), of the largest rise of the loss among the drawn weights: a scale, without
            constants, and no bound.
        effective_dimension: Σ λ/(λ + z) over the positive eigenvalues of the Hessian, sampled; `ridge` is z.
        ridge: See above.
        predicted_loss_rise: ½σ² tr H, what the quadratic model says `pac_bayes.loss_rise` is.
        matvecs: Products used.
    """

    train: SplitScore
    test: SplitScore
    loss_gap: float
    loss_gap_error: float
    accuracy_gap: float
    accuracy_gap_error: float
    pac_bayes: PacBayes
    allowed_rise: float
    rise_of: str
    guessing_error: float
    vacuous: bool | None
    caveat: str
    sharpness_term: float
    effective_dimension: Estimate
    ridge: float
    predicted_loss_rise: float
    num_parameters: int
    matvecs: int
    seed: int | None

    def __str__(self) -> str:
        bound, dimension = self.pac_bayes, self.effective_dimension
        promise = "none: the targets are no classes"
        if self.vacuous is not None:
            promise = (
                f"error at most {bound.bound:.4f} at {bound.confidence:.0%}, for weights drawn from N(θ, σ²I), "
                f"whose training error is {bound.gibbs_error:.4f}: "
                + ("vacuous: no better than guessing" if self.vacuous else "better than guessing")
            )
        reach = "the largest tried, before" if math.isinf(bound.next_sigma) else "where"
        rows = {
            "train": str(self.train),
            "test": str(self.test),
            "gap": str(SplitScore(self.loss_gap, self.loss_gap_error, self.accuracy_gap, self.accuracy_gap_error, 0)),
            "σ": f"{bound.sigma:.4g}, {reach} the {self.rise_of} rises by {self.allowed_rise:g}",
            "PAC-Bayes bound": promise,
            "effective dimension": f"{dimension.value:.4g} ± {dimension.standard_error:.1g} of {self.num_parameters} "
            f"(z = {self.ridge:.3g})",
            "cost and status": f"{self.matvecs} products, {self.status}",
        }
        if not self.test.num_examples:
            del rows["test"], rows["gap"]
        if self.caveat:
            rows["caveat"] = self.caveat
        return summary(rows)


@dataclass(frozen=True)
class GeneralizationOptions:
    """How much to spend.

    Attributes:
        num_samples: Weights drawn at each σ of the search, and again for the bound.
        confidence: Of the bound.
        num_nodes: Lanczos steps for the effective dimension, a run. What they cannot resolve near z is not in its
            error: far too few give another number (docs/generalization.md).
        num_probes: Runs for the part of the spectrum that the first does not locate.
    """

    num_samples: int = 30
    confidence: float = 0.95
    num_nodes: int = 40
    num_probes: int = 4

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_nodes", "num_probes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 2:
                raise ValueError(f"{name}: expected a number >= 2, got {value!r}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence: expected a number between 0 and 1, got {self.confidence!r}")


def generalization(
    risk: EmpiricalRisk,
    *,
    test: EmpiricalRisk | None = None,
    prior: Solution | None = None,
    allowed_rise: float = 0.1,
    ridge: float | None = None,
    options: GeneralizationOptions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> GeneralizationResult:
    """How much worse is the network on new data, and what does flatness alone promise?  Gap, PAC-Bayes, dimension.

    **Gap.** Test less train, each a mean over n examples with its standard error.

    **PAC-Bayes.** A flat solution can be told with few bits: its weights may be blurred. Let σ be the largest with
    E[error(θ + σz)] ≤ error(θ) + allowed_rise on the training data, z ~ N(0, I) (the measure of Jiang et al. 2020; the
    loss instead of the error where there are no classes). With probability `confidence` over n training examples,
    weights drawn from the posterior N(θ, σ²I) then have an error e on new data with

        kl(ê‖e) ≤ (‖θ − θ₀‖²/(2σ²) + ln(2√n·J/δ))/n,

    ê their training error (McAllester 1999; Langford & Seeger 2001; Maurer 2004; for networks Dziugaite & Roy 2017).
    The prior is N(θ₀, σ²I); since σ was chosen by the data, the bound pays for all J = 101 values that it might have
    taken, and for ê being a mean over samples. It is solved for e numerically. For ordinary networks it is vacuous, and
    the result says so: ‖θ − θ₀‖²/(2σ²) grows with P, n does not. A bound below 1 is a statement about the blurred
    network, not about θ itself.

    **Effective dimension.** Σ λ/(λ + z): the number of directions that the data determines more than a prior of
    precision n·z does (MacKay 1992), equal to weight decay z in L + ½z‖θ‖².

    Args:
        risk: The training data.
        test: The same loss on examples not trained on. From a run folder: its test split.
        prior: θ₀: the initial weights, or others that were chosen without these examples; default zero.
        allowed_rise: Of the training error (a share of the examples) or the loss, in expectation.
        ridge: z; default 1/n, a prior of variance one on the weights.
        options: Numbers of samples and products.
        seed: Of all random vectors.
        progress: Called after each forward pass and product. A stop leaves what is known by then, the rest NaN.

    Returns:
        GeneralizationResult. Cost: 8·num_samples forward passes and (num_probes + 1)·num_nodes products: 240 and 200.

    Raises:
        ValueError: allowed_rise or ridge not above 0; a loss that mixes examples; a prior of another shape.
    """
    require_risk(risk)
    options = options or GeneralizationOptions()
    ridge = 1 / risk.num_examples if ridge is None else ridge
    for name, value in (("allowed_rise", allowed_rise), ("ridge", ridge)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
    theta = risk.space.vector()
    centre = torch.zeros_like(theta) if prior is None else risk.space.vector_of(prior, "prior")
    train, held_out = score_split(risk), SplitScore.unknown() if test is None else score_split(test)
    count = _Count(progress, 8 * options.num_samples + (options.num_probes + 1) * options.num_nodes)
    posterior = Posterior(risk, train.loss, train.accuracy, options.num_samples, seed, count)
    bound = pac_bayes(posterior, allowed_rise, centre, options.confidence)
    budget = Budget(count.total, progress=count.after, ranks=risk.ranks)
    dimension = trace = Estimate.unknown(Status.stopped, 0, seed)
    status = Status.stopped
    if not posterior.stopped:
        dimension, trace, status = effective_dimension(
            hessian_of(risk), ridge, options.num_nodes, options.num_probes, budget, seed
        )
    guess = 1 - guessing_accuracy(risk)
    if not (np.isfinite([train.loss, *bound.rises]).all() and (posterior.stopped or math.isfinite(bound.loss_rise))):
        status = Status.nonfinite
    return GeneralizationResult(
        status=Status.complete if status.ok else status,
        train=train,
        test=held_out,
        loss_gap=held_out.loss - train.loss,
        loss_gap_error=math.hypot(held_out.loss_error, train.loss_error),
        accuracy_gap=train.accuracy - held_out.accuracy,
        accuracy_gap_error=math.hypot(held_out.accuracy_error, train.accuracy_error),
        pac_bayes=bound,
        allowed_rise=float(allowed_rise),
        rise_of="error rate" if posterior.by_error else "loss",
        guessing_error=guess,
        vacuous=bool(bound.bound >= guess) if math.isfinite(bound.bound) else None,
        caveat=_caveat(risk),
        sharpness_term=math.sqrt(max(bound.largest_rise, 0.0) / risk.num_examples),
        effective_dimension=dimension,
        ridge=float(ridge),
        predicted_loss_rise=0.5 * bound.sigma**2 * trace.value,
        num_parameters=risk.space.size,
        matvecs=budget.used,
        seed=seed,
    )


class _Count:
    """Forward passes, then products, on one progress callback."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, note: str) -> bool:
        """A forward pass was made; whether to go on."""
        self.done += 1
        try:
            self.after(0, self.total, note)
        except StopRequested:
            return False
        return True

    def after(self, products: float, total: float, note: str) -> None:
        """So many products were made after the forward passes."""
        if self.progress is not None:
            self.progress(min(self.done + products, self.total), self.total, note)


def _caveat(risk: EmpiricalRisk) -> str:
    """What the posterior keeps fixed although it came from the training data."""
    kept = [name for name, module in risk.model.named_modules() if isinstance(module, _BatchNorm)]
    if kept and any(risk.model.get_submodule(name).track_running_stats for name in kept):
        return "BatchNorm's statistics came from the training data and are kept: the bound does not count them"
    trainable = sum(p.numel() for p in risk.model.parameters() if p.requires_grad)
    if risk.space.size < trainable:
        return "parameters that were not chosen are kept: the bound holds if they did not come from these examples"
    return ""
