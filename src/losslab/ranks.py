"""The processes that compute together, and how vectors lie over them. Alone, everything here does nothing.

Each process ("rank") holds its part of the data, and of every Krylov vector. Sums over processes are one flat
all-reduce. All processes make the same calls in the same order; what differs is only the data that each holds.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK = 4096  # numbers of a vector whose norm is taken in one go
_STRETCH = 1 << 14  # numbers of vectors whose dot products are; as fast as all at once (measured)
_SAFE = 1e-15, 1e15  # norms outside may hide squares that float32 cannot hold


class Ranks:
    """A group of processes; without one, this process alone.

    Args:
        group: As `torch.distributed` makes it; `Ranks.world()` takes the default one.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def world(cls) -> "Ranks":
        """All processes of `torch.distributed`, which must be initialised; else this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.group.WORLD)
        return cls()

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator["Ranks"]:
        """The processes that `torchrun` started, this one alone without it; they part at the end.

        nccl where there are GPUs, each process its own; gloo elsewhere.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
            yield cls.world()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield cls.world()
        finally:
            dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place, the same bits on each."""
        if self.count > 1:
            with answered(self):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def total(self, *numbers: float) -> tuple[float, ...]:
        """The sums of a few numbers, in float64."""
        return tuple(self.sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist())

    def each(self, number: float) -> list[float]:
        """Every process's number, in their order."""
        return list(self.total(*(number if rank == self.rank else 0.0 for rank in range(self.count))))

    def any(self, flag: bool) -> bool:
        """Whether it holds on some process: what all must decide alike."""
        return flag if self.count == 1 else self.total(float(flag))[0] > 0

    def all_gather(self, part: Tensor) -> list[Tensor]:
        """Every process's part, in their order; the parts have one shape."""
        if self.count == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.count)]
        with answered(self):
            dist.all_gather(parts, part.contiguous(), group=self.group)
        return parts

    @property
    def device(self) -> torch.device:
        """Where a tensor must lie to be sent."""
        nccl = self.count > 1 and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.count})"


ALONE = Ranks()


class Split:
    """How a vector of `size` numbers lies over the processes, one stretch each.

    Args:
        size: n.
        ranks: The processes.
        sizes: How many numbers each holds; default: even parts, the last ones shorter.

    >>> split = Split(5)
    >>> split.local_size, split.whole(split.part(torch.arange(5.0))).tolist()
    (5, [0.0, 1.0, 2.0, 3.0, 4.0])
    """

    def __init__(self, size: int, ranks: Ranks = ALONE, sizes: Sequence[int] | None = None):
        self.size, self.ranks = size, ranks
        width = math.ceil(size / ranks.count)
        self._sizes = sizes or [min(width, max(size - rank * width, 0)) for rank in range(ranks.count)]
        first = sum(self._sizes[: ranks.rank])
        self._own = slice(first, first + self._sizes[ranks.rank])

    @property
    def local_size(self) -> int:
        """How many numbers of a vector are here."""
        return self._own.stop - self._own.start

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of the last axis, sharing memory."""
        return whole[..., self._own]

    def whole(self, part: Tensor) -> Tensor:
        """The whole last axis on every process, from everyone's part."""
        if self.ranks.count == 1:
            return part
        padded = torch.nn.functional.pad(part, (0, max(self._sizes) - self.local_size))
        parts = self.ranks.all_gather(padded)
        return torch.cat([part[..., :size] for part, size in zip(parts, self._sizes, strict=True)], dim=-1)

    def sum(self, numbers: Tensor) -> Tensor:
        """Dot products from the parts' dot products, in place."""
        return self.ranks.sum(numbers)

    def dots(self, rows: Tensor, others: Tensor) -> Tensor:
        """V Wᵀ, (p, j) in float64, of the parts V (p, n) and W (j, n).

        By stretches: one float32 sum drops what is small beside its largest term (errors of 3e-3 between unit vectors
        with a few large entries among 5·10⁶, measured; by stretches 1e-5).
        """
        with _as_precise_as_given(rows.device.type):
            products = ((row @ other.mT).double() for row, other in _stretches(rows, others))
            found = functools.reduce(torch.add, products)
        return self.ranks.sum(found)

    @staticmethod
    def take_out(rows: Tensor, coefficients: Tensor, others: Tensor) -> None:
        """V ← V − CW in place."""
        weights = coefficients.to(rows)
        with _as_precise_as_given(rows.device.type):
            for row, other in _stretches(rows, others):
                if row.is_cuda:  # cuBLASLt refuses addmm_ into a single row (torch 2.11)
                    row.sub_(weights @ other)
                else:
                    row.addmm_(weights, other, alpha=-1)

    def norm(self, part: Tensor) -> float:
        """‖v‖ summed in float64: torch's float32 sum is off by 1e-6 at n = 2·10⁵, by 3e-5 at 2·10⁶, and T with it."""
        own = _norm(part)
        return own if self.ranks.count == 1 else math.sqrt(self.ranks.total(own**2)[0])


def _as_precise_as_given(device: str) -> contextlib.AbstractContextManager[None]:
    """Not in the half precision of a training loop that measures inside of its autocast."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _stretches(rows: Tensor, others: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    if rows.shape[1] <= _STRETCH:  # small problems make many calls, and splitting takes longer than their products
        return [(rows, others)]
    return zip(rows.split(_STRETCH, dim=1), others.split(_STRETCH, dim=1), strict=True)


def _norm(vector: Tensor) -> float:
    """Short blocks in the vector's own type, which rounds them to 1e-8, and their norms in float64.

    Many times faster than a sum in float64 throughout.
    """
    if len(vector) <= _BLOCK:
        return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    whole = len(vector) - len(vector) % _BLOCK
    blocks = torch.linalg.vector_norm(vector[:whole].reshape(-1, _BLOCK), dim=1)
    tail = torch.linalg.vector_norm(vector[whole:], dtype=torch.float64)
    norm = math.hypot(float(torch.linalg.vector_norm(blocks, dtype=torch.float64)), float(tail))
    return norm if _SAFE[0] < norm < _SAFE[1] else float(torch.linalg.vector_norm(vector, dtype=torch.float64))


@contextlib.contextmanager
def answered(ranks: Ranks) -> Iterator[None]:
    """Turn the backend's complaint about a lost process into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"process {ranks.rank} of {ranks.count}: another process ended or does not answer, so there is no result; "
            f"its own message says why ({str(error).splitlines()[0][:200]})"
        ) from error
