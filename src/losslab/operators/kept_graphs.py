"""Graphs of batches, kept from product to product as long as a memory budget lasts; the others are built anew."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from losslab.memory import is_out_of_memory
from losslab.operators.determinism import fingerprint
from losslab.operators.risk import EmpiricalRisk


class Kept(Protocol):
    """What may be kept for a batch."""

    def num_bytes(self) -> int:
        """Memory that it keeps alive beside the parameters."""
        ...


class Graph(Kept, Protocol):
    """What is kept for a batch of `count` examples: its part A_b of a matrix."""

    count: int

    def __init__(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int): ...

    def add_products(self, rows: Tensor, out: Tensor) -> None:
        """Add A_b v to the row of `out` for each row v of `rows`, both (k, P)."""
        ...


AnyGraph = TypeVar("AnyGraph", bound=Kept)
_LEAST_BUDGET = 1 << 20


class KeptGraphs(Generic[AnyGraph]):
    """Iterates over one graph for each batch, at the parameters where this was made. To be used inside `evaluating()`.

    The first batches' graphs are kept; those beyond the budget are rebuilt on each pass, once for a block of vectors.
    """

    def __init__(self, risk: EmpiricalRisk, kind: Callable[[EmpiricalRisk, dict[str, Tensor], Any, int], AnyGraph]):
        self._risk, self._kind = risk, kind
        self._theta = risk.space.vector()
        self.kept: list[AnyGraph] = []
        self._fingerprints: list[float] = []
        self._budget = risk.graph_budget()
        self._keep_more, self._complete = self._budget > 0, False

    def __iter__(self) -> Iterator[AnyGraph]:
        kept = len(self.kept)
        yield from self.kept
        if self._complete:
            return
        leaves = self._risk.leaves(self._theta)
        for index, (batch, count) in enumerate(self._risk.read()):
            if index < kept:
                self._require_same(index, batch)
                continue
            graph = self._kind(self._risk, leaves, batch, count)
            yield graph
            self._keep(graph, batch)
            del graph  # one that is not kept is freed before the next is built
        self._complete = self._keep_more

    def retried(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` makes in passes over the graphs; made again with fewer of them kept if memory runs out.

        A failed attempt has let go of its graphs when the next one starts: they are local to `compute`.
        """
        while True:
            try:
                with self._risk.evaluating():
                    return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._make_room()

    def _make_room(self) -> None:
        budget = self.shrink()
        if budget is None:
            raise MemoryError(
                f"out of memory: one batch's graph does not fit on {self._risk.device} even with no graph kept; "
                "use smaller batches, fewer vectors at once, or params=… to choose fewer parameters"
            )
        warnings.warn(
            f"out of memory: kept graphs dropped, their budget is now {budget / 2**20:.0f} MiB, the product is made "
            "again; pass a smaller graph_memory=… to avoid this",
            stacklevel=2,
        )

    def shrink(self) -> int | None:
        """Drop all graphs and halve what the next ones may take, to nothing below a MiB; None where it was nothing."""
        held = sum(graph.num_bytes() for graph in self.kept)
        whole = held + self._budget if self._keep_more else held
        self.kept.clear()
        self._fingerprints.clear()
        if not whole:
            return None
        self._budget = whole // 2 if whole >= 2 * _LEAST_BUDGET else 0
        self._keep_more, self._complete = self._budget > 0, False
        return self._budget

    def _keep(self, graph: AnyGraph, batch: Any) -> None:
        if not self._keep_more:
            return
        size = graph.num_bytes()
        self._keep_more = size <= self._budget  # once one does not fit, none after it is kept: a prefix stays simple
        if self._keep_more:
            self._budget -= size
            self.kept.append(graph)
            self._fingerprints.append(fingerprint(batch))

    def _require_same(self, index: int, batch: Any) -> None:
        """Batches in another order would count some examples twice: once in a kept graph, once in a new one."""
        if fingerprint(batch) != self._fingerprints[index]:
            raise ValueError(
                f"batches: expected the same batches in the same order on every pass, got another batch {index}; "
                "pass list(batches) or a loader that does not shuffle"
            )


class KeepsGraphs:
    """What an operator tells of the graphs that it keeps in `_graphs`."""

    _graphs: KeptGraphs[Any]

    @property
    def num_kept(self) -> int:
        """How many batches' graphs are kept at present."""
        return len(self._graphs.kept)

    @property
    def kept_bytes(self) -> int:
        """Memory that they take."""
        return sum(graph.num_bytes() for graph in self._graphs.kept)
