"""Optimizers and learning-rate schedules by name. To add one: a function and a row in `OPTIMIZERS`."""

import math
from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from losslab.studies.sections import OptimizerConfig, ScheduleConfig


def build_optimizer(config: OptimizerConfig, params: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer that a configuration names."""
    return OPTIMIZERS[config.name](config, params)


def _sgd(config: OptimizerConfig, params: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(
        params,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _adam(config: OptimizerConfig, params: Iterable[nn.Parameter]) -> Optimizer:
    return Adam(params, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def _adamw(config: OptimizerConfig, params: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(params, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
}


def rate_factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """What the learning rate is multiplied by in step number `step`, counted from 0, of `total`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - schedule.warmup_steps) / (total - schedule.warmup_steps))
