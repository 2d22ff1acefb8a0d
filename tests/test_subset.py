"""max_examples: a fixed seeded part of the data, each example with the same chance; and what the choice leaves open."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cases import CASES, classes, mlp, normal, split
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.subset import draw_subset
from losslab.probes.sampling import between_batches
from losslab.probes.spectrum import spectrum

X, Y = normal(40, 4), classes(40)
SIZES = [16, 16, 8]


def risk(batches=None, **kwargs) -> EmpiricalRisk:
    return EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), batches or split(SIZES, X, Y), **kwargs)


def counted(batches):
    return [(batch, len(batch[0])) for batch in batches]


def test_a_subset_is_that_many_examples_of_the_data_once_each():
    batches = draw_subset(counted(split(SIZES, X, Y)), 40, 13, seed=3)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    rows = [(x == X).all(1).nonzero().item() for x in inputs]
    assert len(set(rows)) == len(rows) == 13
    assert torch.equal(targets, Y[rows])


def test_every_example_has_the_same_chance():
    data = [(torch.arange(i, i + 5),) for i in (0, 5, 10)]
    seen = torch.zeros(15)
    for seed in range(600):
        for (numbers,) in draw_subset([(batch, 5) for batch in data], 15, 4, seed):
            seen[numbers] += 1
    expected, deviation = 600 * 4 / 15, (600 * 4 / 15 * 11 / 15) ** 0.5
    assert ((seen - expected).abs() < 4 * deviation).all()


def test_batches_are_joined_up_to_the_size_they_had():
    sizes = [len(batch[0]) for batch in draw_subset(counted(split([10] * 4, X, Y)), 40, 20, seed=0)]
    assert sum(sizes) == 20
    assert max(sizes) <= 10
    assert len(sizes) <= 4


@pytest.mark.parametrize(("drawn", "sizes"), [(24, [16, 16, 8]), (20, [40]), (5, [40])])
def test_enough_batches_for_a_standard_error(drawn, sizes):
    """Of one or two large batches too: the scatter of two would be small by chance."""
    few = risk(split(sizes, X, Y), max_examples=drawn)
    counts = [len(x) for x, _ in few.batches]
    assert sum(counts) == drawn
    assert len(counts) >= min(8, drawn)


def test_sequences_of_two_lengths_are_not_joined():
    batches = [({"ids": torch.zeros(4, length)}, 4) for length in (5, 5, 7)]
    shapes = [tuple(batch["ids"].shape) for batch in draw_subset(batches, 12, 11, seed=0)]
    assert sum(rows for rows, _ in shapes) == 11
    assert {columns for _, columns in shapes} == {5, 7}


def test_same_seed_same_examples_whatever_the_loader():
    loader = DataLoader(TensorDataset(X, Y), batch_size=16)
    a, b = (risk(data, max_examples=11, subset_seed=5, check=False) for data in (None, loader))
    other = risk(max_examples=11, subset_seed=6)
    assert a.loss() == b.loss() != other.loss()
    assert (a.num_examples, a.population, risk().population) == (11, 40, 40)


@pytest.mark.parametrize("name", ["dict batches", "dataclass batches", "sequence outputs"])
def test_every_kind_of_batch(name):
    case = CASES[name]()
    few = case.risk(max_examples=4)
    assert few.num_examples == 4
    assert len(Hessian(few).to_dense()) == few.space.size


def test_more_than_there_are_is_all_of_it():
    assert risk(max_examples=100).loss() == risk().loss()


@pytest.mark.parametrize("bad", [0, -1, 2.0, "5", True])
def test_bad_numbers(bad):
    with pytest.raises(ValueError, match="max_examples: expected a number >= 1 or None, got"):
        risk(max_examples=bad)


def test_examples_must_be_on_the_first_axis():
    batches = [(X.T.contiguous(), Y)]
    with pytest.raises(ValueError, match="max_examples: expected a tensor with the batch's 3 examples"):
        risk(batches, max_examples=2, count_examples=lambda _: 3, check=False)


def test_standard_errors_between_batches():
    """λ_max's is that of vᵀH_b v over batches, weighted by their examples."""
    whole = risk()
    values, vectors = torch.linalg.eigh(Hessian(whole).to_dense())
    top = vectors[:, -1]
    found = between_batches(Hessian(whole), top)
    forms = [top @ Hessian(risk([batch])).to_dense() @ top for batch in split(SIZES, X, Y)]
    shares = np.array(SIZES) / 40
    expected = np.sqrt(3 / 2 * (shares**2 * (np.array(forms) - float(values[-1])) ** 2).sum())
    assert found.top == pytest.approx(expected, rel=1e-9)
    assert (found.num_batches, found.matvecs) == (3, 9)
    assert np.isnan(between_batches(Hessian(risk([(X, Y)])), top).top)


def test_standard_error_of_lambda_max_is_the_scatter_between_draws_of_the_data():
    """z-test at the whole data's top vector: vᵀHv of each draw against that of a large population."""
    x, y = normal(4000, 4, seed=8), classes(4000, seed=9)
    model = mlp().double()
    population = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, y)])
    values, vectors = torch.linalg.eigh(Hessian(population).to_dense())
    top, scores = vectors[:, -1], []
    for seed in range(40):
        draw = EmpiricalRisk(
            model, nn.CrossEntropyLoss(), split([50] * 80, x, y), max_examples=500, subset_seed=seed, check=False
        )
        hessian = Hessian(draw)
        scores.append((float(top @ (hessian @ top)) - float(values[-1])) / between_batches(hessian, top).top)
    assert abs(np.mean(scores)) < 4 / np.sqrt(40) * 1.2
    assert 0.5 < np.var(scores) < 2.2


def test_the_spectrum_says_what_a_subset_leaves_open():
    few = risk(split([8] * 5, X, Y), max_examples=30)
    result = spectrum(few, 2)
    assert result.sampling is not None
    assert result.sampling.top > 0
    assert result.sampling.num_batches > 1
    assert spectrum(risk(), 2).sampling is None
