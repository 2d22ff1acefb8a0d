"""A loss function -> how it reduces over a batch's examples, and the one number that it gives for a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

LossFunction = Callable[..., Tensor]


def stated_reduction(loss_fn: LossFunction | None) -> str | None:
    """The `reduction` attribute (torch's loss modules) or keyword (`functools.partial`) of a loss function, if any."""
    function, keywords = (loss_fn.func, loss_fn.keywords) if isinstance(loss_fn, functools.partial) else (loss_fn, {})
    return keywords.get("reduction", getattr(function, "reduction", None))


def reduction_of(loss_fn: LossFunction | None) -> str:
    """`"mean"` or `"sum"`: how the loss function reduces over the examples of a batch; "mean" where it does not say.

    Raises:
        TypeError: Something that cannot be called, or a class, whose call would make a loss function and no loss.
        ValueError: Any other reduction.
    """
    if isinstance(loss_fn, type):
        raise TypeError(
            f"loss_fn: expected a function, got the class {loss_fn.__name__}; make one: {loss_fn.__name__}()"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function or None, got {type(loss_fn).__name__}")
    reduction = stated_reduction(loss_fn) or "mean"
    if reduction not in ("mean", "sum"):
        raise ValueError(f"loss_fn: expected reduction 'mean' or 'sum', got {reduction!r}; a risk is one number")
    return reduction


def require_equal_weights(loss_fn: LossFunction | None, reduction: str) -> None:
    """Refuse a class-weighted mean, which torch divides by the weights in the batch instead of its examples.

    The mean over batches of such means would depend on how the examples are batched.
    """
    weighted = isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss) and loss_fn.weight is not None
    if weighted and reduction == "mean":
        raise ValueError(
            "loss_fn: expected examples of equal weight, got class weights with reduction='mean'; use reduction='sum', "
            "or pass count_examples=… that returns the sum of a batch's weights"
        )


def batch_loss(loss_fn: LossFunction | None, output: Any, targets: Any) -> Tensor:
    """The scalar loss of one batch, or a ValueError that says what came instead."""
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(output, targets)
    else:
        loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"loss_fn: got None, so the model's output must carry .loss; it is a {type(output).__name__} without. "
                "Pass a loss_fn, or labels in the batch"
            )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected one scalar tensor a batch, got {got}; use reduction='mean' or 'sum'")
    return loss.reshape(())
