"""Where a run computes: Fabric's device, precision and processes; and the random states that belong to it."""

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from losslab.ranks import Ranks
from losslab.studies.section import suggestion
from losslab.studies.sections import TrainingConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(training: TrainingConfig) -> "Fabric":
    """Fabric without its remarks; what it would replace silently is refused.

    On one device, or on all the processes that `torchrun` started, by DistributedDataParallel.

    Raises:
        ValueError: A device that is not there, or a precision that it does not have.
    """
    # Here, since it brings torch's compiler along: two seconds, which only a training should wait for.
    from lightning_fabric import Fabric  # noqa: PLC0415

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    many: dict[str, Any] = {"strategy": "ddp", "num_nodes": processes // local} if processes > 1 else {}
    logger, level = logging.getLogger("lightning_fabric"), logging.getLogger("lightning_fabric").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fabric = Fabric(accelerator=training.device, devices=local, precision=training.precision, **many)
            fabric.launch()
    except RuntimeError:
        raise ValueError(f"training.device: {training.device} is not there; use auto or cpu") from None
    finally:
        logger.setLevel(level)
    if training.precision == "16-mixed" and fabric.device.type == "cpu":
        raise ValueError("training.precision: 16-mixed needs an accelerator; use bf16-mixed on a CPU")
    return fabric


def find_device(name: str) -> torch.device:
    """Where to measure: "auto" is a CUDA device if there is one, else the CPU, since MPS has no float64.

    Raises:
        ValueError: An unknown name, or a device that is not there.
    """
    there = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name not in there:
        raise ValueError(f"--device: unknown name {name!r}, {suggestion(name, there)}")
    if not there[name]:
        raise ValueError(f"--device: {name} is not there; use auto or cpu")
    return torch.device(("cuda" if there["cuda"] else "cpu") if name == "auto" else name)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators inside, and put them back afterwards; torch.manual_seed would reach every device's."""
    gpus = [device] if device.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  # a user's network may draw
    try:
        with torch.random.fork_rng(devices=gpus):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            if gpus:
                torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def random_states(fabric: "Fabric") -> dict[str, Any]:
    """The global generators' states, torch's of every process, as a tree that `packing` takes."""
    numpy_state: tuple = np.random.get_state()  # type: ignore[assignment]  # noqa: NPY002
    states = {"torch": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(fabric.device)
    ranks = Ranks.world()
    every = {name: [part.cpu() for part in ranks.all_gather(state.to(ranks.device))] for name, state in states.items()}
    return {
        "generators": every,
        "python": random.getstate(),
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
    }


def restore_random_states(fabric: "Fabric", states: dict[str, Any]) -> None:
    """Put back what `random_states` gave; a device that was not there then keeps its own state."""
    generators = {name: each[fabric.global_rank % len(each)] for name, each in states["generators"].items()}
    torch.set_rng_state(generators["torch"])
    if "cuda" in generators and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"], fabric.device)
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
