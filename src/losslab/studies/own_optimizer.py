"""An optimizer of the user's own: module:path.to.Class, or a function that makes one."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from losslab.studies.imported import imported
from losslab.studies.optimizer_section import OptimizerConfig
from losslab.studies.section import suggestion


def own(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """An optimizer of one's own, with `optimizer.options` as keyword arguments.

    A subclass of `torch.optim.Optimizer` is called as `cls(model.parameters(), lr=lr, **options)`; anything else as
    `function(model, lr=lr, **options)`, so that it can make groups of parameters, each with a rate of its own.

    Raises:
        ValueError: There is no such thing; it takes no such options, or fails with them; what it makes is no
            optimizer, or has groups without a rate.
    """
    dotted = config.name.partition(":")[2]
    made_by = imported(config.name, setting="optimizer.name", kind="Class")
    if not callable(made_by) or (inspect.isclass(made_by) and not issubclass(made_by, Optimizer)):
        got = "another class" if inspect.isclass(made_by) else type(made_by).__name__
        wanted = "a torch.optim.Optimizer, or a function of the model that returns one,"
        raise ValueError(f"optimizer.name: expected {wanted} at {dotted}, got {got}")
    options = config.options or {}
    _refuse_unknown(made_by, dotted, options)
    try:
        optimizer = made_by(model.parameters() if inspect.isclass(made_by) else model, lr=config.lr, **options)
    except Exception as error:  # whatever a user's code raises: which of its settings is wrong is its to say
        why = " ".join(str(error).split())
        raise ValueError(f"optimizer.options: {dotted} failed with them: {type(error).__name__}: {why}") from error
    if not isinstance(optimizer, Optimizer):
        got = type(optimizer).__name__
        raise ValueError(f"optimizer.name: expected a torch.optim.Optimizer from {dotted}(model, lr=…), got {got}")
    if not all("lr" in group for group in optimizer.param_groups):
        raise ValueError(f"optimizer.name: expected 'lr' in each of {dotted}'s param_groups, which the schedule sets")
    return optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step takes no gradient that is there, but asks for as many as it likes, as LBFGS does."""
    arguments = list(inspect.signature(optimizer.step).parameters.values())
    return bool(arguments) and arguments[0].default is inspect.Parameter.empty and not _is_open(arguments[0])


def _refuse_unknown(made_by: Any, dotted: str, options: Iterable[str]) -> None:
    """What it would fail with, said with the names that it takes. One that takes **anything is asked itself."""
    arguments = list(inspect.signature(made_by).parameters.values())
    if any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments):
        return
    known = [argument.name for argument in arguments[1:] if not _is_open(argument)]
    if "lr" not in known:
        got = ", ".join(known) or "none"
        raise ValueError(f"optimizer.name: expected an argument lr of {dotted}, which the schedule sets, got {got}")
    known.remove("lr")
    for key in options:
        if key not in known:
            advice = suggestion(key, known) if known else "and no others"
            raise ValueError(f"optimizer.options.{key}: no argument of {dotted}, {advice}")


def _is_open(argument: inspect.Parameter) -> bool:
    """Whether it stands for any number of arguments."""
    return argument.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
