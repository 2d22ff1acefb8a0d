"""Random vectors, always from a generator that the caller names; and leaving everybody's random state as it was."""

import contextlib
import random as python_random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def make_generator(seed: int | torch.Generator = 0) -> torch.Generator:
    """A generator on the host from a seed; a generator given is used, and advanced, as it is.

    Vectors are drawn on the host in float64 or float32 and moved, so that one seed means the same vector on every
    device.
    """
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or a torch.Generator on the CPU, got {type(seed).__name__}")
    return torch.Generator().manual_seed(seed)


def rademacher(shape: tuple[int, ...], generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries −1 and +1 with equal probability: E[zzᵀ] = I with the least variance of zᵀAz (Hutchinson 1990).

    >>> rademacher((6,), make_generator(0)).abs().tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).to(dtype).mul_(2).sub_(1)


def gaussian(shape: tuple[int, ...], generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent standard normal entries."""
    return torch.randn(shape, generator=generator, dtype=dtype)


def ball(size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A point uniform in the unit ball of R^size: a direction uniform on the sphere times U^(1/size)."""
    direction = gaussian((size,), generator, dtype=dtype)
    radius = torch.rand((), generator=generator, dtype=torch.float64) ** (1.0 / size)
    return direction.mul_(float(radius) / float(direction.double().norm()))


@contextlib.contextmanager
def preserved_random_states(seed: int | None = None, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Put the states of Python's, NumPy's and torch's generators (CUDA's too) back at the end, whatever happens.

    Iterating a DataLoader draws from torch's global generator even when it does not shuffle. `generators` are further
    ones to put back. With `seed` the block itself starts all of them from that seed.
    """
    python_state, numpy_state = python_random.getstate(), np.random.get_state()  # noqa: NPY002
    states = [generator.get_state() for generator in generators]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            if seed is not None:
                python_random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                # Not torch.manual_seed: before CUDA's first use that would leave a seed behind for it.
                for generator in (torch.default_generator, *generators):
                    generator.manual_seed(seed)
                if devices:
                    torch.cuda.manual_seed_all(seed)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            python_random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
