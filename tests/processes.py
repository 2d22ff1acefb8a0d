"""Several processes on this machine that compute together, as torchrun starts them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from losslab.ranks import Ranks


def run_ranks(function: Callable[..., Any], count: int, folder: Path, *args: Any) -> list[Any]:
    """What `function(ranks, *args)` returns in each of `count` gloo processes."""
    mp.spawn(_start, args=(function, count, free_port(), folder, args), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _start(rank: int, function: Callable[..., Any], count: int, port: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    with Ranks.joined() as ranks:
        torch.save(function(ranks, *args), folder / f"{rank}.pt")
