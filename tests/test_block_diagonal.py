"""Restriction to some parameters, and the block-diagonal matrix of all restrictions; alone and on several processes."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cases import CASES, Tied, classes, normal, paired, seeded, split
from losslab.operators.block_diagonal import BlockDiagonal
from losslab.operators.finite_difference import FiniteDifferenceHessian
from losslab.operators.fisher import Fisher
from losslab.operators.gauss_newton import GaussNewton
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.rescaled import Rescaled
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import Ranks
from losslab.solvers.lanczos import eigenpairs
from processes import run_ranks

OPERATORS = {
    "Hessian": Hessian,
    "GradientCovariance": GradientCovariance,
    "GaussNewton": GaussNewton,
    "Fisher": Fisher,
    "FiniteDifferenceHessian": FiniteDifferenceHessian,
}


class Layered(nn.Module):
    """A parameter of the model's own between those of its layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(3, 3, bias=False))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(self.scale * self.stem(x)))


def layered(**kwargs) -> EmpiricalRisk:
    return paired(seeded(Layered), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4], **kwargs).risk()


def indices(risk: EmpiricalRisk, names) -> torch.Tensor:
    """Where the parameters of these names lie in a vector."""
    numbers = risk.space.named_views(torch.arange(risk.space.size))
    return torch.cat([numbers[name].reshape(-1) for name in names])


# -- restriction


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("patterns", ["body.*", ["head.weight", "scale"]])
def test_a_restricted_operator_is_the_block(name, patterns):
    risk = layered()
    part = risk.restrict(patterns)
    where = indices(risk, part.space.names)
    whole, block = OPERATORS[name](risk).to_dense(), OPERATORS[name](part).to_dense()
    assert_close(block, whole[where][:, where], rtol=1e-7, atol=1e-9)
    assert block.any()


# -- blocks


def test_one_block_a_module_that_holds_parameters():
    risk = layered()
    operator = BlockDiagonal(risk)
    assert {name: block.size for name, block in operator.blocks.items()} == {"": 3, "stem": 15, "body.1": 9, "head": 12}
    dense, hessian = operator.to_dense(), Hessian(risk).to_dense()
    for name, members in {"": ["scale"], "stem": ["stem.weight", "stem.bias"], "body.1": ["body.1.weight"]}.items():
        where = indices(risk, members)
        assert_close(dense[where][:, where], hessian[where][:, where])
        assert_close(operator.blocks[name].to_dense(), hessian[where][:, where])
        dense[where.unsqueeze(1), where] = 0.0
    head = indices(risk, ["head.weight", "head.bias"])
    dense[head.unsqueeze(1), head] = 0.0
    assert not dense.any()  # nothing outside the blocks


def test_blocks_of_ones_own_may_interleave():
    risk = layered()
    operator = BlockDiagonal(risk, blocks={"biases": ["*.bias", "scale"], "weights": "*.weight"})
    assert list(operator.blocks) == ["biases", "weights"]
    hessian = Hessian(risk).to_dense()
    biases = torch.zeros(operator.size, dtype=torch.bool)
    biases[indices(risk, ["stem.bias", "head.bias", "scale"])] = True
    assert_close(operator.to_dense(), hessian * (biases.unsqueeze(1) == biases))


def test_one_block_of_everything_is_the_operator_itself():
    risk = layered()
    assert_close(BlockDiagonal(risk, blocks={"all": "*"}).to_dense(), Hessian(risk).to_dense())


def test_solvers_take_a_block_by_its_name():
    risk = layered()
    operator = BlockDiagonal(risk)
    found = eigenpairs(operator.blocks["head"], 2, tol=1e-8)
    truth = torch.linalg.eigvalsh(Hessian(risk.restrict("head.*")).to_dense())
    assert_close(torch.from_numpy(found.values), truth.flip(0)[:2])
    largest = max(eigenpairs(block, 1, tol=1e-8).values[0] for block in operator.blocks.values())
    assert abs(eigenpairs(operator, 1, tol=1e-8).values[0] - largest) < 1e-8


def test_only_chosen_parameters_are_divided():
    risk = layered(params=["stem.*", "head.weight"])
    operator = BlockDiagonal(risk)
    assert {name: block.size for name, block in operator.blocks.items()} == {"stem": 15, "head": 9}
    assert operator.size == 24


def test_tied_weights_go_by_their_first_name():
    risk = EmpiricalRisk(seeded(Tied).double(), nn.MSELoss(), [(normal(6, 4), normal(6, 4, seed=2))])
    assert list(BlockDiagonal(risk).blocks) == ["encoder"]
    with pytest.raises(ValueError, match=r"blocks\['d'\]: no chosen parameter matches 'decoder.\*'; there are encoder"):
        BlockDiagonal(risk, blocks={"e": "encoder.*", "d": "decoder.*"})


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"a": "*", "b": "head.*"}, r"each parameter in one block, got 'head.weight' in 'a' and 'b'"),
        ({"a": ["stem.*", "scale"], "b": "head.*"}, r"every chosen parameter in a block, got none for 'body.1.weight'"),
        ({}, r"every chosen parameter in a block, got none for 'scale'"),
        ({"a": "*", "b": "tail"}, r"blocks\['b'\]: no chosen parameter matches 'tail'"),
    ],
)
def test_blocks_that_do_not_divide_the_parameters_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        BlockDiagonal(layered(), blocks=blocks)


def test_graph_memory_is_shared_out():
    case = CASES["ragged MSE"]()
    for graph_memory, share in ((10_001, 5000), (0, 0)):
        operator = BlockDiagonal(case.risk(graph_memory=graph_memory))
        operator @ normal(operator.size)
        assert [block.risk.graph_memory for block in operator.blocks.values()] == [share, share]
        assert all(block.kept_bytes <= share for block in operator.blocks.values())
    risk = case.risk()
    BlockDiagonal(risk)
    assert risk.graph_memory == "auto"  # the user's own is as it was


def test_precision_is_that_of_the_worst_block():
    operator = BlockDiagonal(layered(), FiniteDifferenceHessian)
    assert operator.precision == max(block.precision for block in operator.blocks.values())
    assert operator.precision > torch.finfo(torch.float64).eps


# -- several processes

OWNERS = [0, 2, 2]  # of the batches: process 1 has none


def measured(ranks: Ranks) -> dict[str, torch.Tensor]:
    model, x, y = seeded(Layered).double(), normal(9, 4), classes(9)
    batches = [b for i, b in enumerate(split([4, 3, 2], x, y)) if ranks.count == 1 or OWNERS[i] == ranks.rank]
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), batches, ranks=ranks)
    operators = {
        "blocks": BlockDiagonal(risk),
        "rescaled": Rescaled(Hessian(risk), risk.space.vector().abs()),
        "differences": FiniteDifferenceHessian(risk),
        "restricted": Hessian(risk.restrict("head.*")),
    }
    found = {name: operator @ normal(operator.size, 2, seed=5) for name, operator in operators.items()}
    for name, operator in operators.items():
        found[f"{name}, eigenvalues"] = torch.from_numpy(eigenpairs(operator, 3, tol=1e-9, vectors=False).values)
    return found


def test_several_processes_give_the_answers_of_one(tmp_path):
    alone, together = measured(Ranks()), run_ranks(measured, 3, tmp_path)
    for name, expected in alone.items():
        assert all(torch.equal(found[name], together[0][name]) for found in together)
        # Differences of gradients divide rounding by their step, 1e-8 or so.
        assert_close(together[0][name], expected, rtol=1e-7, atol=1e-7 if "differences" in name else 1e-8)
