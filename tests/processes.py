"""Several processes on this machine that compute together, as torchrun starts them.

They are forked from one that has imported the package, and nothing else: importing it takes longer than all they do.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from losslab.ranks import Ranks

multiprocessing.set_forkserver_preload(["pytest", "losslab.analyzer.landscape", "losslab.cli"])


def run_ranks(function: Callable[..., Any], count: int, folder: Path, *args: Any) -> list[Any]:
    """What `function(ranks, *args)` returns in each of `count` gloo processes."""
    settings = (function, count, free_port(), folder, args)
    mp.start_processes(_start, args=settings, nprocs=count, start_method="forkserver")
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
