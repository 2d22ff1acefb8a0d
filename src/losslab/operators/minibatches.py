"""A risk's batches one after another without end: what is optimised on one batch at a time."""

import itertools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from losslab.operators.risk import EmpiricalRisk


def minibatches(risk: EmpiricalRisk, seed: int = 0, start: int = 0) -> Generator[tuple[Any, int], None, None]:
    """(batch on the risk's device, its number of examples), pass after pass, with the model in the risk's mode.

    A shuffling loader gives another order in each pass, since each begins from a seed of its own. Before each batch is
    handed out torch's global generator (dropout, augmentation) starts from a seed that only `seed` and the batch's
    number decide: a computation that went on from step `start` makes bit for bit what an uninterrupted one does.

    Use it inside `contextlib.closing(...)`: at the end, also of an interrupted computation, modes and random states of
    the model's owner come back.

    Args:
        risk: Whose batches.
        seed: Of their order, and of what is random in the model.
        start: Batches to pass over (they are read).
    """
    number = 0
    for epoch in itertools.count():
        with risk.evaluating(seed + epoch):
            for batch, count in risk.read():
                if number >= start:
                    _seed_globally((seed * 2**32 + number) % 2**63)
                    yield batch, count
                number += 1


def _seed_globally(seed: int) -> None:
    """As torch.manual_seed, which before CUDA's first use would leave a seed behind for it, a stack trace a call."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def minibatch_loss(risk: EmpiricalRisk, parameters: dict[str, Tensor], batch: Any, count: int) -> Tensor:
    """The mean loss of one batch of `count` examples at these parameters (and buffers); differentiable in them.

    To be called while `minibatches` hands out the batch.
    """
    return risk.batch_share(parameters, batch, count) * (risk.num_examples / count)
