"""How good is a network on a split?  Loss and accuracy over all its examples."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over all examples, in eval mode; the mode is left as found."""
    loss, correct, examples = sums(model, batches)
    return loss / examples, correct / examples


@torch.no_grad()
def sums(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int, int]:
    """The cross-entropies' sum, how many examples are classified correctly, and how many there are."""
    was_training = model.training
    model.eval()
    try:
        loss, correct, examples = 0.0, 0, 0
        for inputs, targets in batches:
            logits = model(inputs)
            loss += cross_entropy(logits, targets, reduction="sum").item()
            correct += num_correct(logits, targets)
            examples += len(targets)
    finally:
        model.train(was_training)
    return loss, correct, examples


def num_correct(logits: Tensor, targets: Tensor) -> int:
    """How many examples have their largest logit at their target."""
    return int((logits.argmax(1) == targets).sum())
