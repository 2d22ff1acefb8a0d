"""How several solutions hang together: the tree of the lowest paths between them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from torch import Tensor

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution
from losslab.probes.base import ProbeResult, span, summary
from losslab.probes.elastic_band import elastic_band
from losslab.probes.partial import PartialFile, checksum
from losslab.probes.paths.potential import NetworkPotential
from losslab.status import Progress, Status, StopRequested, worst


@dataclass(frozen=True)
class SpanningTreeResult(ProbeResult):
    """m solutions, and the paths tried between them.

    Attributes:
        losses: L at each, (m,).
        saddles: The saddle of the path tried between two, (m, m), symmetric; Inf where none was tried.
        edges: The pairs that make up the minimum spanning tree, lowest saddle first, (m−1, 2).
        passes: The highest saddle that the tree has on the way from one to another, (m, m); its own loss on the
            diagonal. No sequence of the paths tried has a lower one.
        num_paths: Pairs tried.
    """

    losses: np.ndarray
    saddles: np.ndarray
    edges: np.ndarray
    passes: np.ndarray
    num_paths: int
    num_examples: int
    seed: int

    def __str__(self) -> str:
        highest = [self.saddles[i, j] for i, j in self.edges]
        rows = {
            "solutions": f"{len(self.losses)}, of loss {span(self.losses)}",
            "saddles": f"of the tree's {len(self.edges)} paths: {span(np.array(highest))}",
            "cost and status": f"{self.num_paths} paths tried, {self.status}",
        }
        return summary(rows)


def spanning_tree(
    risk: EmpiricalRisk,
    minima: Sequence[Solution],
    *,
    max_paths: int | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    **band: Any,
) -> SpanningTreeResult:
    """Which solutions lie in one valley, and over which passes does the way lead from each to each?

    Paths are found with `elastic_band`, pair by pair (after Draxler et al. 2018, sec. 3.2): first from every solution
    to the one of lowest loss; then, again and again, the tree's edge of the highest saddle is cut, and of the pairs
    not yet tried that join the two parts the one of lowest losses is tried, if they lie below that saddle; where there
    is none, the next lower edge is cut. So a path that stayed above an obstacle is replaced by others around it. The
    tree of the lowest saddles holds a lowest way between any two solutions.

    Args:
        risk: Whose loss and data.
        minima: Two or more solutions: modules, state dicts or vectors of shape (P,).
        max_paths: Pairs to try at most; default: all that may still lower a saddle of the tree.
        seed: Of each path.
        resume: A folder for what is done so far: the pairs tried, and the path that was interrupted.
        progress: Called after each step of a path.
        band: Further arguments of `elastic_band`: schedule, num_nodes, steps, options.

    Returns:
        SpanningTreeResult; its status is that of the weakest path, and `stopped` where the search was stopped before
        its end. Cost: m−1 to m(m−1)/2 paths.

    Raises:
        ValueError: Fewer than two solutions, fewer paths than a tree has edges, or what `elastic_band` refuses.
    """
    require_risk(risk)
    m = len(minima)
    if m < 2:
        raise ValueError(f"minima: expected at least two solutions, got {m}")
    if max_paths is not None and max_paths < m - 1:
        raise ValueError(f"max_paths: expected at least {m - 1}, a tree's edges, got {max_paths!r}")
    points = [risk.space.vector_of(solution, f"minima[{i}]").detach() for i, solution in enumerate(minima)]
    folder = Path(resume) if resume is not None else None
    search = _Search(risk, points, band, seed, folder, progress, m * (m - 1) // 2 if max_paths is None else max_paths)
    status = search.run()
    edges = tree_edges(search.saddles)
    passes = passes_of(search.losses, search.saddles, edges)
    return SpanningTreeResult(
        status, search.losses, search.saddles, edges, passes, num_paths(search.saddles), risk.num_examples, seed
    )


class _Search:
    """The pairs tried so far, in a file if there is a folder, and the paths between them."""

    def __init__(
        self,
        risk: EmpiricalRisk,
        points: list[Tensor],
        band: dict[str, Any],
        seed: int,
        folder: Path | None,
        progress: Progress | None,
        limit: int,
    ):
        self.risk, self.points, self.band, self.seed = risk, points, band, seed
        self.folder, self.progress, self.limit = folder, progress, limit
        self.file = PartialFile(folder / "pairs.npz", _key(risk, points, seed, band)) if folder else None
        done = self.file.load() if self.file else {}
        m = len(points)
        potential = NetworkPotential(risk)
        self.losses = done["losses"] if done else np.array([float(potential.losses(p[None])) for p in points])
        self.saddles = done["saddles"] if done else np.full((m, m), np.inf)
        self.statuses = [Status(str(name)) for name in done["statuses"]] if done else [Status.complete]

    def run(self) -> Status:
        """Explore; why it ended."""
        try:
            explore(self.losses, self.saddles, self.connect, self.limit)
        except StopRequested:
            return worst(*self.statuses, Status.stopped)
        if self.file:
            self.file.remove()
        return worst(*self.statuses)

    def connect(self, i: int, j: int) -> float:
        """The saddle of the path between two solutions."""
        part = self.folder / f"path-{i}-{j}.npz" if self.folder else None
        tick = _scaled(self.progress, num_paths(self.saddles), self.limit, f"{i}–{j}: ")
        ends = self.points[i], self.points[j]
        found = elastic_band(self.risk, *ends, seed=self.seed, resume=part, progress=tick, **self.band)
        if found.status is Status.stopped:
            raise StopRequested
        saddle = found.saddle if math.isfinite(found.saddle) else math.nan  # Inf means: not tried
        self.saddles[i, j] = self.saddles[j, i] = saddle
        self.statuses.append(found.status)
        if self.file:
            names = np.array([status.value for status in self.statuses])
            self.file.save({"losses": self.losses, "saddles": self.saddles, "statuses": names})
        return saddle


def explore(losses: np.ndarray, saddles: np.ndarray, connect: Callable[[int, int], float], limit: int) -> None:
    """Try pairs until `limit` are tried or none is left that may help; `connect` writes what it finds into `saddles`.

    Args:
        losses: Of the m minima.
        saddles: (m, m), Inf where a pair is not tried.
        connect: (i, j) → saddle.
        limit: Pairs at most.
    """
    lowest = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
    for i in np.argsort(losses, kind="stable"):
        if i != lowest and num_paths(saddles) < limit and np.isposinf(saddles[i, lowest]):
            connect(int(i), lowest)
    while num_paths(saddles) < limit and (pair := next_pair(losses, saddles)) is not None:
        connect(*pair)


def next_pair(losses: np.ndarray, saddles: np.ndarray) -> tuple[int, int] | None:
    """The pair to try next, where all minima are joined already; None where no pair can lower the tree."""
    edges = tree_edges(saddles)
    for cut in reversed(range(len(edges))):
        rest = np.delete(edges, cut, axis=0)
        graph = csr_array((np.ones(len(rest)), (rest[:, 0], rest[:, 1])), shape=saddles.shape)
        _, part = connected_components(graph, directed=False)
        first, second = np.nonzero((part[:, None] < part[None, :]) & np.isposinf(saddles))
        height = np.maximum(losses[first], losses[second])
        order = np.lexsort((np.minimum(losses[first], losses[second]), height))
        # A path is at least as high as its ends. A NaN saddle is one that any path may improve.
        if len(order) and not height[order[0]] >= saddles[tuple(edges[cut])]:
            return int(first[order[0]]), int(second[order[0]])
    return None


def tree_edges(saddles: np.ndarray) -> np.ndarray:
    """The minimum spanning tree's pairs (i < j), lowest saddle first; NaN counts as the highest."""
    first, second = np.nonzero(np.triu(~np.isposinf(saddles), 1))
    order = np.argsort(saddles[first, second], kind="stable")
    # Ranks instead of saddles: only their order matters, and to scipy a weight of zero is no edge.
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    tree = minimum_spanning_tree(csr_array((ranks, (first, second)), shape=saddles.shape)).tocoo()
    by_rank = np.argsort(tree.data)
    return np.stack([tree.row[by_rank], tree.col[by_rank]], axis=1).astype(np.int64)


def passes_of(losses: np.ndarray, saddles: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The highest saddle on the tree's way between any two, (m, m); Inf between what is not joined."""
    passes = np.full(saddles.shape, np.inf)
    np.fill_diagonal(passes, losses)
    part = np.arange(len(losses))
    for i, j in edges:  # lowest first, so the edge that joins two parts is the highest between them
        here, there = part == part[i], part == part[j]
        passes[np.ix_(here, there)] = passes[np.ix_(there, here)] = saddles[i, j]
        part[there] = part[i]
    return passes


def num_paths(saddles: np.ndarray) -> int:
    """Pairs tried."""
    return int(np.triu(~np.isposinf(saddles), 1).sum())


def _scaled(progress: Progress | None, before: int, total: int, prefix: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, of, note: progress(before + done / of, total, prefix + note)


def _key(risk: EmpiricalRisk, points: list[Tensor], *settings: Any) -> str:
    """What the search depends on, as a checksum."""
    return checksum((risk.num_examples, risk.mode, risk.space.names, settings), *points)
