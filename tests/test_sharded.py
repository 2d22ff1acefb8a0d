"""FSDP2: products on parameters that lie in parts on two gloo processes, by finite differences, against one process."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cases import classes, normal, seeded, split
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.sharded import ShardedHessian
from losslab.ranks import Ranks
from losslab.solvers.lanczos import eigenpairs
from losslab.solvers.trace import trace
from processes import run_ranks

X, Y = normal(11, 4), classes(11)
SIZES = [3, 3, 3, 2]  # batches: three on the first process, one on the second


def network() -> nn.Module:
    """Layers that two processes cannot share evenly."""

    def build() -> nn.Module:
        middle = [nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh()]
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *middle, nn.Linear(5, 3))

    return seeded(build).double()


def sharded() -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def refused(make) -> str:
    try:
        make()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def measured(ranks: Ranks) -> dict:
    model, batches = sharded(), split(SIZES, X, Y)
    own = batches[:3] if ranks.rank == 0 else batches[3:]
    model.train()
    first = next(model.parameters())
    first.grad = torch.full_like(first, 0.5)
    before = [p.to_local().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    operator = ShardedHessian(model, nn.CrossEntropyLoss(), own)
    pairs = eigenpairs(operator, 3, tol=1e-6, seed=1)
    vector = normal(operator.size, seed=3)
    return {
        "size": operator.size,
        "local": operator.split.local_size,
        "precision": operator.precision,
        "values": pairs.values,
        "errors": pairs.errors,
        "residual": float((operator @ pairs.vectors[:, 0] - pairs.values[0] * pairs.vectors[:, 0]).norm()),
        "symmetric": float(vector @ (operator @ pairs.vectors[:, 1]) - pairs.vectors[:, 1] @ (operator @ vector)),
        "trace": trace(operator, max_matvecs=2 * operator.size, tol=1e-9).value,
        "gradient": float(operator.split.norm(operator.risk.gradient_at(operator.risk.vector()))),
        "untouched": all(torch.equal(a, b.to_local()) for a, b in zip(before, model.parameters(), strict=True)),
        "grad": float(first.grad.to_local().mean()) if first.grad.to_local().numel() else 0.5,
        "others": all(p.grad is None for p in list(model.parameters())[1:]),
        "training": model.training,
        "random": torch.equal(state, torch.get_rng_state()),
        "plain": refused(lambda: ShardedHessian(network(), nn.CrossEntropyLoss(), own)),
        "no data": refused(lambda: ShardedHessian(model, nn.CrossEntropyLoss(), own if ranks.rank == 0 else [])),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    return run_ranks(measured, 2, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def exact() -> EmpiricalRisk:
    return EmpiricalRisk(copy.deepcopy(network()).eval(), nn.CrossEntropyLoss(), split(SIZES, X, Y))


def test_eigenvalues_are_those_of_one_process(found, exact):
    dense = torch.linalg.eigvalsh(Hessian(exact).to_dense())
    expected = dense[dense.abs().argsort(descending=True)][:3].numpy()
    for rank in found:
        assert rank["precision"] < 1e-6
        assert rank["values"] == pytest.approx(expected, rel=1e-6)
        assert (abs(rank["values"] - expected) <= rank["errors"]).all()
        assert rank["residual"] < 1e-5
        assert abs(rank["symmetric"]) < 1e-6


def test_trace_and_gradient_count_every_example_once(found, exact):
    for rank in found:
        assert rank["trace"] == pytest.approx(float(Hessian(exact).to_dense().trace()), rel=1e-6)
        assert rank["gradient"] == pytest.approx(float(exact.gradient().norm()), rel=1e-10)


def test_each_process_holds_its_part(found, exact):
    assert all(rank["size"] == exact.space.size for rank in found)
    assert sum(rank["local"] for rank in found) == exact.space.size
    assert all(0 < rank["local"] < exact.space.size for rank in found)


def test_the_model_is_left_as_it_was(found):
    for rank in found:
        assert rank["untouched"]
        assert rank["grad"] == 0.5
        assert rank["others"]
        assert rank["training"]
        assert rank["random"]


def test_refusals(found):
    for rank in found:
        assert rank["plain"].startswith("TypeError: model: expected one after fully_shard(model), got a plain")
        assert rank["no data"].startswith("ValueError: batches: expected at least one batch on each process")
