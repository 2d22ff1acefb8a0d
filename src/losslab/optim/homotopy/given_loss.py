"""A loss that is there already, with its graph, in place of a function that computes it: the founders' way."""

import contextlib
from collections.abc import Iterator

from torch import Tensor

from losslab.optim.homotopy.batch_hessian import Loss

_CAUSES = (
    ("backward through the graph a second time", "one that backward() has freed"),
    ("modified by an inplace operation", "one whose parameters have changed since"),
)


def given(loss: Tensor) -> Loss:
    """A function that returns it, once: it cannot be computed at other parameters, which differences would need.

    Raises:
        ValueError: It is not one number, or has no graph.
    """
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"loss: expected one number with its graph, got shape {tuple(loss.shape)} and requires_grad="
            f"{loss.requires_grad}; give what backward() is called on, or a function that computes it"
        )
    left = [loss.reshape(())]

    def once() -> Tensor:
        if not left:
            raise ValueError(
                "loss: expected second derivatives, got an operation that has none; give a function that computes the "
                "loss: its gradients can be compared"
            )
        return left.pop()

    return once


@contextlib.contextmanager
def whole_graph() -> Iterator[None]:
    """Turn autograd's complaint about a graph that is gone into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        for sign, what in _CAUSES:
            if sign in str(error):
                raise ValueError(
                    f"loss: expected its whole graph, got {what}; call step before backward() and before parameters "
                    "change, or use backward(retain_graph=True), or give a function that computes the loss"
                ) from error
        raise
