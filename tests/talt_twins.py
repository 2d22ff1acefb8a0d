"""TALT beside its equations, on gradients drawn beforehand."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losslab.optim import TALT, TALTOptions
from losslab.optim.eigenspace.options import plain
from losslab.optim.talt_reference import TALTReference

Gradients = list[list[Tensor]]


class Paths(NamedTuple):
    """Parameters after each step (steps, options, numbers), of both; what was watched of TALT's state."""

    fast: Tensor
    slow: Tensor
    watched: dict[str, Tensor]

    @property
    def apart(self) -> list[float]:
        """The largest difference, for each of the options."""
        return (self.fast - self.slow).abs().amax((0, 2)).tolist()


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def drawn(shapes: Sequence[tuple[int, ...]], steps: int, seed: int = 0, decay: float = 0.95) -> Gradients:
    """For each step the gradient of each shape: entries of many sizes, none of mean zero, smaller from step to step."""
    generator = torch.Generator().manual_seed(seed)
    sizes, means = ([normal(*shape, generator=generator) for shape in shapes] for _ in range(2))
    return [
        [
            decay**t * s.exp() * (normal(*s.shape, generator=generator) + mean)
            for s, mean in zip(sizes, means, strict=True)
        ]
        for t in range(steps)
    ]


def placed(shapes: Sequence[Sequence[int]], seed: int = 1) -> list[Tensor]:
    """Parameters to begin with."""
    generator = torch.Generator().manual_seed(seed)
    return [normal(*shape, generator=generator) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """One step at these gradients."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.inference_mode()  # a third quicker
def both(
    gradients: Gradients, structure: str, options: Sequence[TALTOptions], watch: Sequence[str] = (), **settings
) -> Paths:
    """TALT and its equations side by side.

    Args:
        gradients: As `drawn` gives them.
        structure: Of both.
        options: Each is a parameter group of one optimizer, and a reference of its own.
        watch: Names of state tensors: their values after each step, for the first parameter of each group.
        settings: Of both.
    """
    start = placed([g.shape for g in gradients[0]])
    settings = {"lr": 0.01, "structure": structure, "weight_decay": 0.1, **settings}
    fast, slow = ([[p.clone() for p in start] for _ in options] for _ in range(2))
    optimizer = TALT([{"params": ps, **plain(o)} for ps, o in zip(fast, options, strict=True)], **settings)
    references = [TALTReference(ps, options=o, **settings) for ps, o in zip(slow, options, strict=True)]
    paths, watched = [], {name: [] for name in watch}
    for now in gradients:
        step(optimizer, now * len(options))
        for reference in references:
            reference.step(now)
        paths.append(torch.stack([torch.cat([p.flatten() for ps in side for p in ps]) for side in (fast, slow)]))
        for name in watch:
            watched[name].append(torch.stack([optimizer.state[ps[0]][name] for ps in fast]))
    found = torch.stack(paths).unflatten(2, (len(options), -1))
    return Paths(found[:, 0], found[:, 1], {name: torch.stack(values) for name, values in watched.items()})
