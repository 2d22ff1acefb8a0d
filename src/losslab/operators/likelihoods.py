"""Losses that are negative log-likelihoods: which labels the model expects, and the scatter of ∇log p over them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from losslab.operators.batches import LossFunction
from losslab.random import gaussian


class Likelihood(Protocol):
    """p(y|f), with −log p(y|f) the loss of one term up to a constant. r = ∂(−log p)/∂f is its residual."""

    def weights(self, outputs: Tensor, targets: Tensor, *, mean: bool) -> Tensor:
        """How often each term counts in the loss of a batch, which is their mean or sum; spreads over the outputs.

        Raises:
            ValueError: Outputs and targets do not fit.
        """
        ...

    def draw(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """What `scatter` needs of `num_samples` labels y ~ p(·|f) for each term; on the host."""
        ...

    def scatter(self, outputs: Tensor, drawn: Tensor) -> Callable[[Tensor], Tensor]:
        """The map u ↦ r⟨r, u⟩, averaged over the labels, for each term; in the shape of the outputs."""
        ...


@dataclass(frozen=True)
class Categorical:
    """Cross-entropy: outputs (B, C, …) are logits, a term is one position of (B, …), r = softmax(f) − e_y."""

    ignore_index: int

    def weights(self, outputs: Tensor, targets: Tensor, *, mean: bool) -> Tensor:
        """(B, 1, …): none for positions whose target is `ignore_index`."""
        positions = outputs.shape[:1] + outputs.shape[2:]
        if outputs.ndim < 2 or targets.shape != positions or targets.is_floating_point():
            raise _misfit("logits (B, C, …) and class indices (B, …)", outputs, targets)
        counted = (targets != self.ignore_index).unsqueeze(1)
        return counted.to(outputs.dtype) / (counted.sum() if mean else 1)

    def draw(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Classes, (B, num_samples, …)."""
        chances = outputs.double().softmax(1).movedim(1, -1).cpu()
        classes = torch.multinomial(chances.flatten(0, -2), num_samples, replacement=True, generator=generator)
        return classes.unflatten(0, chances.shape[:-1]).movedim(-1, 1).to(torch.int32)

    def scatter(self, outputs: Tensor, drawn: Tensor) -> Callable[[Tensor], Tensor]:
        """r⟨r, u⟩ = (p − e_y)(⟨p, u⟩ − u_y)."""
        chances, classes = outputs.softmax(1), drawn.to(outputs.device, torch.int64)

        def product(along: Tensor) -> Tensor:
            residuals = (chances * along).sum(1, keepdim=True) - along.gather(1, classes)
            summed = (chances * residuals.sum(1, keepdim=True)).scatter_add(1, classes, -residuals)
            return summed / classes.shape[1]

        return product


class _Entrywise:
    """Each output is a term of its own."""

    def weights(self, outputs: Tensor, targets: Tensor, *, mean: bool) -> Tensor:
        """One number, the same for all."""
        if targets.shape != outputs.shape:
            raise _misfit("targets in the outputs' shape", outputs, targets)
        return outputs.new_tensor(1 / outputs.numel() if mean else 1)


class Bernoulli(_Entrywise):
    """Binary cross-entropy: outputs are logits, r = σ(f) − y."""

    def draw(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """The fraction of ones."""
        chances = outputs.double().sigmoid().cpu()
        return torch.bernoulli(chances.expand(num_samples, *chances.shape), generator=generator).mean(0)

    def scatter(self, outputs: Tensor, drawn: Tensor) -> Callable[[Tensor], Tensor]:
        """E(σ − y)² = σ² − 2σȳ + ȳ, since y² = y; written as a sum of two terms ≥ 0."""
        chance, ones = outputs.sigmoid(), drawn.to(outputs.device, outputs.dtype)
        squares = ones * (1 - chance) ** 2 + (1 - ones) * chance**2
        return lambda along: squares * along


class Gaussian(_Entrywise):
    """Squared error (f − y)² = −log p + constant, y ~ N(f, ½): r = 2(f − y), and E[r²] = 2 = ∂²(f − y)²/∂f²."""

    def draw(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """The mean of (f − y)²."""
        return gaussian((num_samples, *outputs.shape), generator, dtype=torch.float64).square().mean(0) / 2

    def scatter(self, outputs: Tensor, drawn: Tensor) -> Callable[[Tensor], Tensor]:
        """E[r²] = 4 E(f − y)²."""
        squares = 4 * drawn.to(outputs.device, outputs.dtype)
        return lambda along: squares * along


_LIKELIHOODS: list[tuple[set[Any], Callable[[dict[str, Any]], Likelihood]]] = [
    ({nn.CrossEntropyLoss, functional.cross_entropy}, lambda options: Categorical(options.get("ignore_index", -100))),
    ({nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits}, lambda _: Bernoulli()),
    ({nn.MSELoss, functional.mse_loss}, lambda _: Gaussian()),
]
_HARMLESS = {"reduction", "ignore_index", "label_smoothing"}


def likelihood_of(loss_fn: LossFunction | None) -> Likelihood:
    """Which distribution of the labels a loss function stands for.

    Label smoothing changes the targets of a cross-entropy but not the model's p, and so nothing here.

    Raises:
        ValueError: Any loss function but the three losses of torch, or one of them with weights.
    """
    function, options = _taken_apart(loss_fn)
    make = next((make for losses, make in _LIKELIHOODS if any(function is loss for loss in losses)), None)
    if make is None:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            "loss_fn: expected CrossEntropyLoss, BCEWithLogitsLoss or MSELoss of torch.nn or their counterparts in "
            f"torch.nn.functional, got {name}, which does not say how labels are distributed; use GaussNewton, which "
            "takes any loss"
        )
    harmful = sorted(name for name, value in options.items() if name not in _HARMLESS and value is not None)
    if harmful:
        raise ValueError(
            f"loss_fn: expected no options but {', '.join(sorted(_HARMLESS))}, got {', '.join(harmful)}; "
            "use GaussNewton, which takes any loss"
        )
    return make(options)


def _taken_apart(loss_fn: LossFunction | None) -> tuple[Any, dict[str, Any]]:
    """The class or function, and the options that it was given."""
    if isinstance(loss_fn, partial) and not loss_fn.args:
        return loss_fn.func, loss_fn.keywords
    if type(loss_fn) in (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss):  # a subclass may compute anything
        return type(loss_fn), {name: getattr(loss_fn, name, None) for name in ("weight", "pos_weight", "ignore_index")}
    return loss_fn, {}


def _misfit(expected: str, outputs: Tensor, targets: Tensor) -> ValueError:
    got = f"{tuple(outputs.shape)} and {tuple(targets.shape)} of {targets.dtype}"
    return ValueError(f"batches: expected {expected}, got {got}; use GaussNewton, which takes any loss")
