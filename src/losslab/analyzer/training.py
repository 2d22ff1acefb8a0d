"""A plain training loop that stops after each step: what the analyzer watches."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from losslab.operators import batches as kinds


def train_steps(
    model: nn.Module,
    criterion: kinds.LossFunction | None,
    batches: Iterable[Any],
    optimizer: Optimizer,
    num_steps: int,
) -> Iterator[int]:
    """Take `num_steps` steps; yields the steps done, 0 first. The data are read as often as that needs.

    The model is in training mode while a step is taken, and in its own between the steps and at the end.
    """
    device, done = next(model.parameters()).device, 0
    yield done
    while done < num_steps:
        for batch in batches:
            training = model.training
            model.train()
            try:
                moved = kinds.to_device(batch, device)
                loss = kinds.batch_loss(criterion, kinds.call_model(model, moved, model), kinds.targets_of(moved))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            finally:
                model.train(training)
            done += 1
            yield done
            if done == num_steps:
                return
