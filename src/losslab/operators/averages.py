"""Does a loss function that states no reduction average over a batch's examples? Halves of one batch tell."""

from collections.abc import Callable, Iterator
from typing import Any

from losslab.operators import batches as kinds


def require_average(
    loss_fn: kinds.LossFunction | None,
    output_of: Callable[[Any], Any],
    batches: Iterator[tuple[Any, int]],
    tolerance: float,
) -> None:
    """Refuse a loss that adds up over a batch's examples where it counts as their mean.

    Every number made of it would be too large, by the batch size where all batches have one. What is neither a mean nor
    a sum (a penalty added, examples that act on each other) passes, and so does a model that takes no half of a batch.

    Args:
        loss_fn: As for EmpiricalRisk.
        output_of: A forward pass.
        batches: (batch, its number of examples); the first of several examples is looked at.
        tolerance: Relative differences up to which two losses are equal.

    Raises:
        ValueError: A batch's loss is the sum of its halves' losses, and not their mean.
    """
    batch, count = next(((batch, count) for batch, count in batches if count > 1), (None, 0))
    middle = count // 2

    def loss_of(part: Any) -> float:
        return float(kinds.batch_loss(loss_fn, output_of(part), kinds.targets_of(part)))

    try:
        halves = [kinds.rows_of(batch, count, rows, "") for rows in (slice(0, middle), slice(middle, count))]
        whole, first, second = map(loss_of, (batch, *halves))
    except (ValueError, RuntimeError):
        return
    scale = tolerance * (abs(first) + abs(second))
    mean = (middle * first + (count - middle) * second) / count
    if abs(whole - (first + second)) <= scale < abs(whole - mean):
        raise ValueError(
            f"loss_fn: expected the mean over a batch's examples, got their sum: {whole:.6g} for a batch, {first:.6g} "
            f"and {second:.6g} for its halves; average, or state the sum as an attribute: loss_fn.reduction = 'sum'"
        )
