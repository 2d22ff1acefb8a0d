"""Optimizers by name. To add one: a function here, a row in `OPTIMIZERS`, one in `optimizer_rows` and one in `spaces`.

What torch does not have comes from pytorch_optimizer: optional, and imported here only, where it is needed.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from lightning_utilities.core.imports import RequirementCache
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from losslab.optim.groups import excluded, talt_param_groups
from losslab.optim.talt import TALT
from losslab.studies.combined import Combined
from losslab.studies.muon import muon
from losslab.studies.optimizer_rows import is_own
from losslab.studies.optimizer_section import OptimizerConfig
from losslab.studies.own_optimizer import needs_closure, own
from losslab.studies.talt_section import TALTConfig

# Earlier ones take other powers in Shampoo. Tests compare every step of 4.1.0 with its paper's.
REQUIRED = "pytorch_optimizer>=4.1,<5"
EVERY = 10  # SOAP's steps from one basis to the next, as in its paper
LONGEST_SOAP = 2048  # side of a covariance whose basis is computed: 0.7 s of a CPU core, the first time 2 s
# Shampoo's authors' own implementation has these, in TensorFlow.
LONGEST_SHAMPOO = 768
EPSILON = 1e-4  # times the identity: the covariances' first value


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimizer that a configuration names, for all parameters of a network.

    Args:
        config: Which one, and its settings.
        model: Muon and TALT ask it which parameters are hidden weights.

    Raises:
        ValueError: A package that it needs is not there, or the network is not one for it; or one of the user's own
            that cannot be used.
    """
    return (_own if is_own(config.name) else OPTIMIZERS[config.name])(config, model)


def _own(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    optimizer = own(config, model)
    if needs_closure(optimizer) and not second_gradient(optimizer):
        dotted = config.name.partition(":")[2]
        raise ValueError(
            f"optimizer.name: expected a step() that takes the gradient that is there, got {dotted}'s, which needs a "
            "closure to compute others; only SAM's form of it, with first_step and second_step, is known here"
        )
    if keeps_an_average(optimizer):
        optimizer.train()  # type: ignore[attr-defined]  # schedule-free ones by their authors refuse to step before
    return optimizer


def _sgd(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    nesterov = config.nesterov or config.name == "nesterov"
    return SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=nesterov)


def _adam(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay)


def _adamw(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay)


def _muon(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    settings = {"momentum": config.momentum, "betas": config.betas, "weight_decay": config.weight_decay}
    return muon(model, config.lr, **settings)  # type: ignore[arg-type]


def _talt(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    talt = config.talt or TALTConfig()
    settings = {"betas": config.betas, "weight_decay": config.weight_decay, "structure": talt.structure}
    groups = talt_param_groups(model, excluded(talt.structure))
    return TALT(groups, config.lr, options=talt.options(), **settings)  # type: ignore[arg-type]


def _sam(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    base, own = (
        (SGD, {"momentum": config.momentum, "nesterov": config.nesterov})
        if config.base == "sgd"
        else (AdamW, {"betas": config.betas})
    )
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, **own}
    return _library(config).SAM(model.parameters(), base, rho=config.rho, **settings)


def _soap(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    return _library(config).SOAP(
        model.parameters(),
        config.lr,
        config.betas,
        weight_decay=config.weight_decay,
        precondition_frequency=EVERY,
        max_precondition_dim=LONGEST_SOAP,
    )


def _shampoo(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """Shampoo, and for tensors with a side that is too long AdaGrad, which is its diagonal.

    Without momentum: the library's would average raw gradients and preconditioned ones. Covariances are decomposed in
    each step, since with older decompositions a gradient in a new direction makes a huge step: 1/ε^¼ times itself.
    """
    short: list[nn.Parameter] = []
    long: list[nn.Parameter] = []
    for parameter in model.parameters():
        (long if max(parameter.shape, default=0) > LONGEST_SHAMPOO else short).append(parameter)
    parts: list[Optimizer] = [Adagrad(long, config.lr, weight_decay=config.weight_decay)] if long else []
    if short:
        settings = {"weight_decay": config.weight_decay, "matrix_eps": EPSILON}
        parts.insert(0, _library(config).Shampoo(short, config.lr, **settings))
    return Combined(*parts)


def _lion(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    return _library(config).Lion(model.parameters(), config.lr, config.betas, config.weight_decay)


def _schedule_free(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.base == "sgd":
        return _library(config).ScheduleFreeSGD(model.parameters(), momentum=config.momentum, **settings)
    return _library(config).ScheduleFreeAdamW(model.parameters(), betas=config.betas, **settings)


def _library(config: OptimizerConfig) -> Any:
    """pytorch_optimizer, which takes seconds to import."""
    if not RequirementCache(REQUIRED):
        try:
            found = f"version {metadata.version('pytorch_optimizer')}"
        except metadata.PackageNotFoundError:
            found = "no such package"
        wanted = f"expected {REQUIRED} installed, got {found}; pip install '{REQUIRED}'"
        raise ValueError(f"optimizer.name: {config.name}: {wanted}")
    return importlib.import_module("pytorch_optimizer")


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, nn.Module], Optimizer]] = {
    "sgd": _sgd,
    "momentum": _sgd,
    "nesterov": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "muon": _muon,
    "talt": _talt,
    "sam": _sam,
    "soap": _soap,
    "shampoo": _shampoo,
    "lion": _lion,
    "schedule_free": _schedule_free,
}


def second_gradient(optimizer: Optimizer) -> bool:
    """Whether its step asks for the gradient at a second point, through a closure: SAM's does.

    The gradient at the first point stands in `.grad` before; the closure sets it to zero and computes it anew.
    """
    return hasattr(optimizer, "second_step")


def keeps_an_average(optimizer: Optimizer) -> bool:
    """Whether it evaluates at other weights than those where it takes gradients: schedule-free ones do."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


@contextmanager
def evaluating(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters are the ones to evaluate and to save; afterwards they are as before, to the last bit.

    The optimizer's state is at all times that of the training, and no step may be taken inside: `eval()` moves the
    parameters and, if it has one, the groups' "train_mode".
    """
    if not keeps_an_average(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["train_mode"] = True  # else its train() would bring the weights back, with rounding errors
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
