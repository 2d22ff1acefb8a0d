"""spanning_tree: the search on known saddles, against all pairs; then on networks, stopped and resumed."""

import itertools
import math

import numpy as np
import pytest
import torch

from cases import normal
from losslab.probes import spanning_tree as module
from losslab.probes.elastic_band import ElasticBandOptions, elastic_band
from losslab.probes.spanning_tree import explore, next_pair, num_paths, passes_of, spanning_tree, tree_edges
from losslab.records import from_record, to_record
from losslab.status import Status, StopRequested
from potentials import trained_pair


def landscape(m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses of m minima, and saddles no lower than their ends."""
    losses = normal(m, seed=seed).numpy()
    raw = np.maximum(normal(m, m, seed=seed + 1).numpy() + 1, np.maximum(losses[:, None], losses[None, :]))
    return losses, np.triu(raw, 1) + np.triu(raw, 1).T


def search(losses, known, limit):
    """What `explore` tries, in order, and the saddles it then knows."""
    saddles, tried = np.full(known.shape, np.inf), []

    def connect(i, j):
        tried.append((i, j))
        saddles[i, j] = saddles[j, i] = known[i, j]
        return known[i, j]

    explore(losses, saddles, connect, limit)
    return tried, saddles


def minimax(saddles: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The lowest pass between any two over all ways, by Floyd and Warshall."""
    best = saddles.copy()
    np.fill_diagonal(best, losses)
    for k in range(len(best)):
        best = np.minimum(best, np.maximum(best[:, k, None], best[None, k, :]))
    np.fill_diagonal(best, losses)
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("m", [2, 3, 6, 9])
def test_finds_the_lowest_passes_without_trying_all(m, seed):
    losses, known = landscape(m, 10 * seed)
    tried, saddles = search(losses, known, m * (m - 1) // 2)
    edges = tree_edges(saddles)
    assert len(edges) == m - 1
    np.testing.assert_allclose(passes_of(losses, saddles, edges), minimax(known, losses))
    assert len({frozenset(pair) for pair in tried}) == len(tried) == num_paths(saddles)
    heights = [saddles[i, j] for i, j in edges]
    assert heights == sorted(heights)


def test_first_all_to_the_lowest_then_around_the_highest():
    losses = np.array([0.3, 0.0, 0.1, 0.2])
    known = np.full((4, 4), 1.0)
    known[1, 3] = known[3, 1] = 5.0
    known[0, 3] = known[3, 0] = 4.0
    known[2, 3] = known[3, 2] = 3.0
    tried, _ = search(losses, known, 6)
    assert tried[:3] == [(2, 1), (3, 1), (0, 1)]
    assert tried[3:5] == [(2, 3), (0, 3)], "minimum 3 hangs on the highest saddle; of its untried, 2 lies lowest"
    assert search(losses, known, 4)[0] == tried[:4]


def test_pairs_that_cannot_help_are_not_tried():
    losses, flat = np.array([0.0, 1.0, 2.0]), np.array([[0, 1, 2], [1, 0, 9], [2, 9, 0]], dtype=float)
    tried, _ = search(losses, flat, 3)
    assert tried == [(1, 0), (2, 0)], "both paths are as low as their ends"


def test_zero_and_negative_and_nan_saddles():
    """scipy takes a weight of zero for a missing edge."""
    known = np.array([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    assert tree_edges(known).tolist() == [[0, 2], [0, 1]]
    known[0, 1] = known[1, 0] = math.nan
    assert tree_edges(known).tolist() == [[0, 2], [1, 2]]
    known[1, 2] = known[2, 1] = np.inf
    assert tree_edges(known).tolist() == [[0, 2], [0, 1]]
    assert set(next_pair(np.array([-2.0, -2.0, -2.0]), known)) == {1, 2}
    assert num_paths(known) == 2


SETTINGS = {"schedule": [[5, 0.1]], "num_nodes": 4, "options": ElasticBandOptions(subdivisions=2)}


def three():
    risk, (a, b) = trained_pair()
    middle = (risk.space.vector_of(a) + risk.space.vector_of(b)) / 2
    return risk, [a, b.state_dict(), middle]


def test_networks():
    risk, minima = three()
    seen = []
    result = spanning_tree(risk, minima, progress=lambda *call: seen.append(call), **SETTINGS)
    np.testing.assert_allclose(result.losses, [risk.loss_at(risk.space.vector_of(m)) for m in minima], rtol=1e-12)
    for i, j in itertools.combinations(range(3), 2):
        if np.isfinite(result.saddles[i, j]):
            order = (i, j) if result.losses[i] > result.losses[j] else (j, i)
            path = elastic_band(risk, *(minima[k] for k in order), **SETTINGS)
            assert result.saddles[i, j] == pytest.approx(path.saddle, rel=0.05)
    assert result.edges.shape == (2, 2)
    assert result.status is Status.complete
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {total for _, total, _ in seen} == {3}
    assert seen[-1][0] == result.num_paths
    values, arrays = to_record(result)
    again = from_record(type(result), values, arrays)
    np.testing.assert_array_equal(again.passes, result.passes)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopRequested])
@pytest.mark.parametrize("after", [3, 7, 9])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, after, stop):
    risk, minima = three()
    expected = spanning_tree(risk, minima, **SETTINGS)
    calls = []

    def interrupt(*call):
        calls.append(call)
        if len(calls) == after:
            raise stop

    def first():
        return spanning_tree(risk, minima, resume=tmp_path / "tree", progress=interrupt, **SETTINGS)

    if stop is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            first()
    else:
        stopped = first()
        assert stopped.status is Status.stopped
        assert stopped.num_paths == (after - 1) // 7
    found = spanning_tree(risk, minima, resume=tmp_path / "tree", progress=lambda *c: calls.append(c), **SETTINGS)
    assert len(calls) == 7 * expected.num_paths, "a path was found twice"
    for name in ("losses", "saddles", "edges", "passes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.status, found.num_paths) == (expected.status, expected.num_paths)
    assert not list((tmp_path / "tree").iterdir())


def test_a_path_without_a_finite_saddle_is_tried_once(monkeypatch):
    risk, minima = three()
    real = elastic_band

    def overflowing(*args, **kwargs):
        found = real(*args, **kwargs)
        object.__setattr__(found, "saddle", math.inf)
        return found

    monkeypatch.setattr(module, "elastic_band", overflowing)
    result = spanning_tree(risk, minima, **SETTINGS)
    assert result.num_paths == 3
    assert np.isnan(result.passes[0, 1])


def test_refusals():
    risk, minima = three()
    with pytest.raises(ValueError, match="minima: expected at least two solutions, got 1"):
        spanning_tree(risk, minima[:1])
    with pytest.raises(ValueError, match="max_paths: expected at least 2, a tree's edges, got 1"):
        spanning_tree(risk, minima, max_paths=1)
    with pytest.raises(ValueError, match=r"minima\[1\]: expected a tensor of shape"):
        spanning_tree(risk, [minima[0], torch.ones(3)])
