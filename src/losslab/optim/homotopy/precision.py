"""How many bits does a loss this curved ask for?  The founders' Theorem 4.7: p ≥ log₂(c·κ·D²/ε)."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from losslab.optim.homotopy.checks import number

TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # by bits: 8, 11, 24, 53


def required_precision(kappa: float, diameter: float, eps: float, c: float = 1.0) -> float:
    """log₂(c·κ·D²/ε), at least 0: the founders' bound on the bits of a mantissa.

    It is no pure number: κ and 1/ε are both in units of 1/loss, D in the parameters'. Measuring the loss in another
    unit, which no rounding notices, changes it. Differences mean something: κ four times as large asks for two bits
    more. See docs/homotopy_tools.md for how far it is from what training reaches.

    Args:
        kappa: κ = ‖H‖/‖∇L‖².
        diameter: D, how far the parameters move, as ‖θ − θ₀‖.
        eps: ε, how exactly the loss is to be met.
        c: Theorem 4.7 has some constant and does not say which.

    Raises:
        ValueError: A number out of range.

    >>> required_precision(kappa=2.0, diameter=8.0, eps=0.5)
    8.0
    """
    for name, value, above in (
        ("kappa", kappa, False),
        ("diameter", diameter, False),
        ("eps", eps, True),
        ("c", c, True),
    ):
        number(name, value, 0, open_low=above, finite=name != "kappa")
    if kappa == 0 or diameter == 0:
        return 0.0
    bits = math.log2(c) + math.log2(kappa) + 2 * math.log2(diameter) - math.log2(eps)
    return max(bits, 0.0)


def mantissa_bits(dtype: torch.dtype) -> int:
    """Bits of a floating type's mantissa, the leading one counted.

    >>> [mantissa_bits(dtype) for dtype in TYPES]
    [8, 11, 24, 53]
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating torch.dtype, got {dtype!r}")
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def precision_advice(kappa: float, diameter: float, eps: float, dtype: torch.dtype, c: float = 1.0) -> str | None:
    """One line for a training whose type has fewer bits than `required_precision`; None where it has enough.

    Also None where κ is not finite: at a stationary point the bound is infinite for every type, and says nothing.

    Args:
        kappa: As in `required_precision`.
        diameter: Likewise.
        eps: Likewise.
        dtype: That of the arithmetic: under autocast bfloat16 or float16, though the weights are float32.
        c: As in `required_precision`.

    Raises:
        ValueError: A number out of range, a type that is not floating.

    >>> print(precision_advice(kappa=1e4, diameter=10.0, eps=1e-3, dtype=torch.bfloat16))
    precision: κ 1e+04, D 10, ε 0.001 ask for 29.9 bits and bfloat16 has 8; use float64, or expect ε of 3.91e+03
    """
    have = mantissa_bits(dtype)
    bits = required_precision(kappa if math.isfinite(kappa) else 0.0, diameter, eps, c)
    if bits <= have:
        return None
    wider = next((f"use {_name(other)}, or" for other in TYPES if mantissa_bits(other) >= bits), "no type has so many:")
    return (
        f"precision: κ {kappa:.3g}, D {diameter:.3g}, ε {eps:.3g} ask for {bits:.1f} bits and "
        f"{_name(dtype)} has {have}; {wider} expect ε of {c * kappa * diameter * diameter / 2**have:.3g}"
    )


class PrecisionWatch:
    """Gives the advice while a training goes on: once, when curvature and way first ask for more bits than there are.

    Args:
        parameters: Of the training; D is how far they are from where they are now.
        eps: As in `precision_advice`.
        dtype: That of the arithmetic; None: the parameters' own.
    """

    def __init__(self, parameters: Sequence[Tensor], eps: float, dtype: torch.dtype | None = None) -> None:
        number("precise_to", eps, 0, open_low=True, finite=True)
        self.parameters, self.eps = list(parameters), eps
        self.dtype = dtype or min((p.dtype for p in parameters), key=mantissa_bits)
        self.start, self.told = [p.detach().clone() for p in parameters], False

    @torch.no_grad()
    def look(self, kappa: float) -> None:
        """Warn, should it be time."""
        if self.told or not math.isfinite(kappa):
            return
        moved = torch._foreach_norm(torch._foreach_sub(self.parameters, self.start))
        said = precision_advice(kappa, math.hypot(*map(float, moved)), self.eps, self.dtype)
        if said is not None:
            self.told = True
            warnings.warn(said, stacklevel=4)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
