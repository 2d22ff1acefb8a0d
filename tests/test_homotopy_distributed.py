"""HomotopyLR in two gloo processes: one rate on both, that of one process with the whole batch."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from cases import classes, mlp, normal, split
from losslab.operators.risk import EmpiricalRisk
from losslab.optim import TALT, CurvatureEstimator, HomotopyLR, HomotopyOptimizer, PerLayerHomotopyLR, by_module
from losslab.ranks import Ranks
from processes import run_ranks
from second_derivatives import Once

X, Y = normal(16, 4), classes(16)
CASES: dict[str, dict[str, Any]] = {
    "stable": {"warmup_steps": 4, "total_steps": 20},
    "talt": {"warmup_steps": 4},
    "seed": {"rule": "seed", "target_window": "p2"},
    "risk": {"warmup_steps": 4},
    "differences": {"warmup_steps": 4},
    "broken": {"rule": "seed"},
}


def trained(case: str, ranks: Ranks) -> list[list[float]]:
    """Rates, and what was measured."""
    model = mlp().double()
    inner = DistributedDataParallel(model) if ranks.count > 1 else model
    parts = split([16 // ranks.count] * ranks.count, X, Y)
    x, y = parts[ranks.rank]
    optimizer: Optimizer = (TALT if case == "talt" else SGD)(inner.parameters(), lr=0.1 if case == "talt" else 1.0)
    step = 0

    def loss() -> torch.Tensor:
        outputs = Once.apply(model(x)) / 2 if case == "differences" and ranks.rank == 0 else model(x)
        wrong = math.nan if case == "broken" and step in (3, 4) and ranks.rank == ranks.count - 1 else 1.0
        return cross_entropy(outputs, y) * wrong

    given = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, y)], ranks=ranks) if case == "risk" else loss
    estimator = CurvatureEstimator(num_samples=2, power_iterations=2)
    scheduler = HomotopyLR(optimizer, given, estimator=estimator, **CASES[case])
    for step in range(14):  # noqa: B007
        optimizer.zero_grad()
        cross_entropy(inner(x), y).backward()
        optimizer.step()
        scheduler.step()
    rows = [[r.lr, r.loss, r.grad_norm, r.hessian_norm, r.trace, r.curvature] for r in scheduler.history]
    return [[float(scheduler.skipped), *scheduler.get_last_lr()], *rows]


def everything(ranks: Ranks) -> dict[str, list[list[float]]]:
    return {case: trained(case, ranks) for case in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    return run_ranks(everything, 2, tmp_path_factory.mktemp("homotopy"))


@pytest.mark.filterwarnings("ignore:curvature. no second derivatives", "ignore:HomotopyLR. curvature that is not")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_as_one_with_the_whole_batch(found, case):
    one, two = (rank[case] for rank in found)
    assert repr(one) == repr(two)  # the same bits; λ is NaN before an adaptive optimizer's third estimate
    assert len(one) >= 10
    within = {"differences": 1e-5, "talt": 5e-3}.get(case, 1e-8)  # TALT divides rounding by its own size
    for row, expected in zip(one, trained(case, Ranks()), strict=True):
        assert row == pytest.approx(expected, rel=within, nan_ok=True)
    assert one[0][0] == (2 if case == "broken" else 0)


def whole_steps(ranks: Ranks) -> list[list[float]]:
    """Rates and what was left out, of `HomotopyOptimizer` and of layers' rates; the last process's loss is NaN once."""
    found = []
    for layers in (False, True):
        model = mlp().double()
        inner = DistributedDataParallel(model)
        x, y = split([16 // ranks.count] * ranks.count, X, Y)[ranks.rank]
        optimizer = SGD(inner.parameters(), lr=1.0)
        loss = lambda x=x, y=y, model=model: cross_entropy(model(x), y)  # noqa: E731
        kind = partial(PerLayerHomotopyLR, layers=by_module(model)) if layers else HomotopyLR
        training = HomotopyOptimizer(inner, optimizer, kind(optimizer, loss, frequency=1, warmup_steps=2))
        for step in range(8):
            wrong = math.nan if step == 5 and ranks.rank == ranks.count - 1 else 1.0
            training.step(lambda wrong=wrong, inner=inner, x=x, y=y: cross_entropy(inner(x), y) * wrong)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        found.append([training.skipped, *training.scheduler.get_last_lr(), float(weights.sum()), float(weights.norm())])
    return found


@pytest.mark.filterwarnings("ignore:HomotopyOptimizer. a loss that is not finite")
def test_whole_steps_are_left_out_by_all_processes_or_none(tmp_path):
    one, two = run_ranks(whole_steps, 2, tmp_path)
    assert one == two
    assert all(row[0] == 1 and all(map(math.isfinite, row)) for row in one)
    assert len(one[1]) > len(one[0])
