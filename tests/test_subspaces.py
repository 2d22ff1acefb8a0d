"""Random projections: the fast transform against scipy's matrix, adjoints, unit and nearly orthogonal columns."""

import math

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

from cases import conv_batchnorm, gen, mlp, normal, seeded
from losslab.params import ParameterSpace
from losslab.probes.subspaces import subspaces
from losslab.probes.subspaces.fastfood import Fastfood, hadamard_transform
from losslab.probes.subspaces.subspaces import random_subspace

KINDS = ["fastfood", "sparse", "dense"]


def net(width: int = 30) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(20, width), nn.Linear(width, 11))).double()


def matrix(subspace, dtype=torch.float64) -> torch.Tensor:
    """P as it stands: (P, d)."""
    return torch.stack([subspace.matvec(e) for e in torch.eye(subspace.dimension, dtype=dtype)], dim=1)


@pytest.mark.parametrize("log_size", range(13))
def test_fast_transform_is_the_matrix(log_size):
    x = normal(2**log_size)
    expected = torch.tensor(hadamard(2**log_size), dtype=torch.float64) @ x
    torch.testing.assert_close(hadamard_transform(x), expected)
    assert torch.equal(x, normal(2**log_size))  # and x is as it was


def test_transform_twice_is_n_times_the_vector():
    x = normal(2**17).float()
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)) / 2**17, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0, 3, 24])
def test_transform_of_other_lengths_is_refused(size):
    with pytest.raises(ValueError, match=f"vector: expected a power of two as length, got {size}; pad"):
        hadamard_transform(torch.zeros(size))


@pytest.mark.parametrize(("size", "dimension"), [(971, 7), (971, 971), (64, 33), (37, 1), (2, 2), (1, 1)])
def test_fastfood_is_its_five_factors(size, dimension):
    """The same draws, written as dense matrices: P = S H G Π H B."""
    fast = Fastfood(size, dimension, gen(3), torch.zeros((), dtype=torch.float64))
    whole = 1 << (size - 1).bit_length()
    generator = gen(3)
    signs = torch.randint(0, 2, (whole,), generator=generator, dtype=torch.int8).double() * 2 - 1
    diagonal = torch.randn(whole, generator=generator, dtype=torch.float64)
    order = torch.randperm(whole, generator=generator)
    h = torch.tensor(hadamard(whole), dtype=torch.float64)
    product = h @ torch.diag(diagonal) @ torch.eye(whole, dtype=torch.float64)[order] @ h @ torch.diag(signs)
    unit = product / torch.linalg.vector_norm(product[:, 0])  # all columns are equally long
    torch.testing.assert_close(torch.linalg.vector_norm(unit, dim=0), torch.ones(whole, dtype=torch.float64))
    torch.testing.assert_close(matrix(fast), unit[:size, :dimension] * math.sqrt(whole / size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dimension", [1, 8, 50, 971])
def test_transpose_is_the_adjoint(kind, dimension):
    subspace = random_subspace(kind, ParameterSpace(net()), dimension)
    v, g = normal(dimension), normal(971, seed=1)
    assert float(subspace.matvec(v) @ g) == pytest.approx(float(v @ subspace.rmatvec(g)), rel=1e-11)
    if dimension <= 50:
        torch.testing.assert_close(matrix(subspace).T @ g, subspace.rmatvec(g))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_unit_and_nearly_orthogonal(kind):
    size, d = 7 * 971, 200
    columns = matrix(random_subspace(kind, ParameterSpace(net(width=211)), d, seed=1))
    assert columns.shape == (211 * 32 + 11, d)
    gram = columns.T @ columns
    lengths = gram.diagonal()
    if kind == "fastfood":  # the missing rows of the Hadamard matrix: a relative variance of 2 (1 − P/L) / P
        expected = math.sqrt(2 / size * (1 - len(columns) / 8192))
        assert float((lengths - 1).square().mean().sqrt()) == pytest.approx(expected, rel=0.5)
    else:
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
    products = gram[~torch.eye(d, dtype=torch.bool)]
    # Independent unit vectors: 1/√P; Fastfood's are √2 of that by the normal diagonal G, E[g⁴]/E[g²]² − 1 = 2.
    spread = math.sqrt((2 if kind == "fastfood" else 1) / len(columns))
    assert float(products.square().mean().sqrt()) == pytest.approx(spread, rel=0.1)
    assert abs(float(products.mean())) < 5 * spread / math.sqrt(len(products) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_gets_its_share(kind):
    """‖P v‖² over a tensor of n entries is n/P on average: none is left behind, as small ones are tensor by tensor."""
    space = ParameterSpace(net())
    columns = matrix(random_subspace(kind, space, 400))
    for piece, size in zip(columns.split(space.sizes), space.sizes, strict=True):
        share = float(piece.square().sum(0).mean())
        assert share == pytest.approx(size / space.size, rel=0.15)
        if kind != "dense":
            assert (piece != 0).any(0).all()


def test_sparse_is_sparse():
    space = ParameterSpace(net())
    columns = matrix(random_subspace("sparse", space, 30))
    for piece, size in zip(columns.split(space.sizes), space.sizes, strict=True):
        assert ((piece != 0).sum(0) == int(size**0.5)).all()
        assert len(piece[piece != 0].abs().unique()) == 1
    assert (columns.sign().sum() / (columns != 0).sum()).abs() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_subspaces_of_one_seed_lie_in_each_other(kind):
    space = ParameterSpace(net())
    small, large = (matrix(random_subspace(kind, space, d, seed=4)) for d in (9, 70))
    torch.testing.assert_close(large[:, :9], small)
    other = matrix(random_subspace(kind, space, 9, seed=5))
    assert float((small * other).sum(0).abs().max()) < 0.3


def test_fastfood_keeps_three_numbers_a_parameter_whatever_the_dimension():
    for dimension in (1, 500, 3000):
        fast = Fastfood(3000, dimension, gen(), torch.zeros(()))
        held = sum(tensor.numel() for tensor in vars(fast).values() if isinstance(tensor, torch.Tensor))
        assert held == 3 * 4096 + dimension


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_parameters_type(kind, dtype):
    space = ParameterSpace(mlp().to(dtype))
    subspace = random_subspace(kind, space, 4)
    reference = random_subspace(kind, ParameterSpace(mlp().double()), 4)
    v, g = normal(4), normal(space.size)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    assert subspace.matvec(v.to(dtype)).dtype == subspace.rmatvec(g.to(dtype)).dtype == dtype
    if kind == "sparse":  # torch draws other normal numbers in another precision
        torch.testing.assert_close(subspace.matvec(v.to(dtype)).double(), reference.matvec(v), atol=tolerance, rtol=0)


def test_all_parameters_of_a_restricted_space():
    space = ParameterSpace(seeded(conv_batchnorm).double(), "0.*")
    assert random_subspace("fastfood", space, 3).matvec(normal(3)).shape == (space.size,)


def test_bad_arguments():
    space = ParameterSpace(net())
    with pytest.raises(ValueError, match="projection: expected one of fastfood, sparse, dense, got 'gauss'"):
        random_subspace("gauss", space, 3)
    for dimension in (0, 972, 2.0, True):
        with pytest.raises(ValueError, match="dimension: expected 1 to 971, the number of parameters, got"):
            random_subspace("fastfood", space, dimension)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_matrix_that_does_not_fit_is_refused_before_it_is_made(kind, monkeypatch):
    monkeypatch.setattr(subspaces, "free_bytes", lambda device: 10_000)
    with pytest.raises(ValueError, match=f"projection: expected one that fits half .* got '{kind}' with .* 'fastfood'"):
        random_subspace(kind, ParameterSpace(net()), 100)
    random_subspace("fastfood", ParameterSpace(net()), 100)
