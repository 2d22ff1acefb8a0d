"""The founders' configuration of the homotopy rate: their names, their defaults. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from losslab.optim.homotopy.checks import count, number, one_of
from losslab.optim.homotopy.options import HomotopyOptions


@dataclass(slots=True)  # so that a misspelt field is refused
class HutchinsonConfig:
    """How curvature is estimated, and how often. The defaults are the founders': 30 Hessian products every 10 steps.

    Attributes:
        num_samples: Random vectors for tr H, which is written down only; 0 saves their products.
        power_iterations: Products for ‖H‖, at most; each estimate goes on from the last one's vector.
        power_iter_tol: Relative residual at which fewer are enough.
        use_rademacher: Random signs for tr H; otherwise normal numbers.
        estimation_frequency: Steps from one estimate to the next.
        ema_decay: How much of the average κ before stays in it.
    """

    num_samples: int = 10
    power_iterations: int = 20
    power_iter_tol: float = 1e-6
    use_rademacher: bool = True
    estimation_frequency: int = 10
    ema_decay: float = 0.9


@dataclass(slots=True)  # so that a misspelt field is refused
class SeedConfig:
    """The rule's numbers; `HomotopyLRScheduler.Config` is this.

    Attributes:
        base_lr: η₀.
        target_curvature: κ*, where it is not adaptive, and in the first `warmup_steps`.
        min_lr: The rate is never below.
        max_lr: Nor above.
        alpha: α.
        warmup_steps: From this step on, the target is adaptive. The rate is not warmed up.
        adaptive_target: Whether κ* is a percentile of the last 1,000 κ.
        target_percentile: Which one.
        rule: "seed" is their document's η₀/(1 + α·κ/κ*), "seed_threshold" their code's
            η₀/(1 + α·max(0, κ/κ* − 1)).
    """

    base_lr: float = 1e-3
    target_curvature: float = 1e4
    min_lr: float = 1e-7
    max_lr: float = 1.0
    alpha: float = 1.0
    warmup_steps: int = 100
    adaptive_target: bool = True
    target_percentile: float = 0.75
    rule: Literal["seed", "seed_threshold"] = "seed"


def options_of(config: SeedConfig, hvp: HutchinsonConfig) -> HomotopyOptions:
    """The same rule as `HomotopyLR`'s. Fields are checked here, since the founders set them one by one.

    Raises:
        ValueError: A number out of range, an unknown rule.
    """
    number("base_lr", config.base_lr, 0, open_low=True, finite=True)
    number("target_curvature", config.target_curvature, 0, open_low=True)
    one_of("rule", config.rule, ("seed", "seed_threshold"))
    number("ema_decay", hvp.ema_decay, 0, 1)
    number("power_iter_tol", hvp.power_iter_tol, 0, 1, open_low=True)
    for name, value, least in (
        ("warmup_steps", config.warmup_steps, 0),
        ("estimation_frequency", hvp.estimation_frequency, 1),
        ("num_samples", hvp.num_samples, 0),
        ("power_iterations", hvp.power_iterations, 1),
    ):
        count(name, value, least)
    return HomotopyOptions(
        rule=config.rule,
        alpha=config.alpha,
        target_percentile=config.target_percentile,
        target_window=1000,  # the founders' too
        ema=hvp.ema_decay,
        min_lr=config.min_lr,
        max_lr=config.max_lr,
    )
