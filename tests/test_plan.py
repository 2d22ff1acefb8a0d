"""Costs before they are paid: products, seconds, memory, kept graphs; from Python and by --dry-run."""

import pytest
from torch import nn

from cases import classes, mlp, normal, split
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.plan import plan
from losslab.probes.spectrum import SpectrumOptions, spectrum
from untouched import assert_untouched

X, Y = normal(10, 4), classes(10)


def risk(**kwargs) -> EmpiricalRisk:
    return EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), split([3, 3, 3, 1], X, Y), **kwargs)


def test_what_it_says_is_what_happens():
    options = SpectrumOptions(num_nodes=30, max_basis=30, trace_tol=1e-12, trace_samples=10)
    found = plan(risk(), 3, options=options)
    assert found.products == spectrum(risk(), 3, options=options).matvecs == 40
    assert (found.graphs_kept, found.num_batches, found.num_examples, found.num_parameters) == (4, 4, 10, 43)
    assert found.basis_bytes == 30 * 43 * 8
    assert found.graph_bytes > 0
    assert found.peak_bytes > found.basis_bytes + found.graph_bytes
    assert found.seconds == pytest.approx(found.first_seconds + 39 * found.product_seconds)


def test_streamed_graphs_are_not_counted():
    found = plan(risk(graph_memory=0))
    assert (found.graphs_kept, found.graph_bytes) == (0, 0)
    assert "0 of 4 batches kept" in str(found)


def test_prints_products_seconds_memory_and_graphs():
    text = str(plan(risk()))
    for word in ("products  at most", "s each", "time", "MiB at the peak", "4 of 4 batches kept"):
        assert word in text


def test_touches_nothing():
    problem = risk()
    with assert_untouched(problem.model):
        plan(problem)


def test_k_out_of_range():
    with pytest.raises(ValueError, match="k: expected 1 <= k <= 21 for 43 parameters, got 22"):
        plan(risk(), 22)
