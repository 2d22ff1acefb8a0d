"""A file for what a long computation has done so far."""

import hashlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losslab.records import write_atomically

_SECONDS, _SHARE = 2.0, 0.05  # it is written no more often than that, and in no more than this share of the time


def checksum(*parts: Any) -> str:
    """One name for all that a computation depends on: tensors and arrays by their bytes, the rest by its repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


class PartialFile:
    """Arrays under names, written whole or not at all; a file that belongs to another computation is ignored.

    Args:
        path: Where; None: nowhere, and nothing is kept.
        key: The `checksum` of all that the computation depends on.
    """

    def __init__(self, path: str | Path | None, key: str):
        self.path, self.key = Path(path) if path is not None else None, key
        self._due = time.monotonic() + _SECONDS

    def load(self) -> dict[str, np.ndarray]:
        """What was written last under this key; empty where there is nothing."""
        if self.path is None or not self.path.is_file():
            return {}
        with np.load(self.path, allow_pickle=False) as stored:
            return dict(stored) if str(stored["key"]) == self.key else {}

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return self.path is not None and time.monotonic() > self._due

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Write all arrays now."""
        if self.path is None:
            return
        began = time.monotonic()
        buffer = io.BytesIO()
        np.savez(buffer, **(arrays | {"key": np.array(self.key)}))  # type: ignore[arg-type]  # allow_pickle's type
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, buffer.getvalue())
        ended = time.monotonic()
        self._due = ended + max(_SECONDS, (ended - began) / _SHARE)

    def remove(self) -> None:
        """The computation is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
