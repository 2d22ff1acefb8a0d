"""What layers put out on given inputs, read without a trace: hooks are always removed, modes and states put back."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from losslab.operators.batches import call_model, to_device
from losslab.random import preserved_random_states
from losslab.status import Status
from losslab.studies.section import suggestion

Layers = str | Sequence[str]


@dataclass(frozen=True)
class Source:
    """Which network saw which examples.

    Attributes:
        checkpoint: Its name in the run folder.
        step: Optimizer steps done.
        split: Of the run's data set.
        examples: Places in the split, from 0.
        targets: The examples' classes.
    """

    checkpoint: str
    step: int
    split: str
    examples: tuple[int, ...]
    targets: tuple[int, ...]


class Recorder:
    """Takes what layers put out, in the order of their calls; a layer called again gets a numbered name of its own."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    def take(self, name: str, values: Tensor) -> None:
        """Keep a copy, on the host, in float32."""
        self._calls[name] = call = self._calls.get(name, 0) + 1
        self.found[name if call == 1 else f"{name}:{call}"] = values.detach().float().cpu().clone()

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What was kept, in order."""
        return tuple(values.numpy() for values in self.found.values())

    def status(self) -> Status:
        """Complete, or nonfinite where NaN or Inf is among it."""
        finite = all(bool(values.isfinite().all()) for values in self.found.values())
        return Status.complete if finite else Status.nonfinite


def chosen(modules: Mapping[str, nn.Module], layers: Layers, what: str, remedy: str) -> dict[str, nn.Module]:
    """The modules whose names match a pattern, in the model's order.

    Args:
        modules: All that could be looked at, by name.
        layers: Shell-style pattern or patterns, such as `"layer1.*"`.
        what: They are, in one word or two, for error lines.
        remedy: What to do where there is none at all.

    Raises:
        ValueError: There is none, or a pattern matches none (the nearest name is suggested).
    """
    if not modules:
        raise ValueError(f"model: expected {what}, got a model without any; {remedy}")
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not fnmatch.filter(modules, pattern):
            raise ValueError(f"layers: {pattern!r} matches no {what}; {suggestion(pattern, modules)}")
    found = {name: m for name, m in modules.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    if not found:
        raise ValueError(f"layers: expected a pattern, got none; {suggestion('', modules)}")
    return found


def observe(model: nn.Module, inputs: Any, attach: Callable[[], Sequence[Any]]) -> Any:
    """The model's output on the inputs, in eval mode and without gradients, with hooks attached for that one call.

    Args:
        model: Parameters, buffers, `.grad`, modes and random states are afterwards as they were.
        inputs: A tensor, or a mapping or tuple of arguments of `forward`; moved to the model's device and precision.
        attach: Registers the hooks and returns their handles; they are removed whatever happens.
    """
    parameters = list(model.parameters())
    if parameters:
        inputs = to_device(inputs, parameters[0].device, parameters[0].dtype)
    with undisturbed(model), ExitStack() as hooks:
        for handle in attach():
            hooks.callback(handle.remove)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, buffers, args, kwargs)

        return call_model(call, (inputs, None), model)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside, random numbers from one fixed seed; then all as it was, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    with preserved_random_states(0), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
