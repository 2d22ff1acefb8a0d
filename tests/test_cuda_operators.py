"""On a GPU, products are what they are on the CPU: exact ones, kept graphs, half precision, memory that runs out."""

import contextlib
import gc
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import CASES, Case, classes, normal, paired, seeded
from contracts.test_operators import OPERATORS
from contracts.test_probes import encoder_case
from devices import CUDA, DEVICE, equal, is_there, on_device, only_cuda
from losslab.memory import free_bytes, is_out_of_memory, peak_bytes
from losslab.operators.finite_difference import FiniteDifferenceHessian
from losslab.operators.gauss_newton import GaussNewton
from losslab.operators.hessian import Hessian
from losslab.operators.kernel import NeuralTangentKernel
from losslab.operators.minibatches import minibatch_loss, minibatches
from losslab.operators.risk import EmpiricalRisk
from losslab.random import preserved_random_states
from losslab.solvers.lanczos import eigenpairs
from untouched import assert_untouched

pytestmark = on_device
MIB = 1 << 20


def pooled() -> Case:
    """Convolutions as people write them: strides, padding, in-place ReLU, pooling."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip

    return paired(seeded(build), nn.CrossEntropyLoss(), normal(6, 2, 6, 6), classes(6), [4, 2])


NETWORKS = {**CASES, "convolutions": pooled, "transformer": encoder_case}
ALL = {**{name: row[0] for name, row in OPERATORS.items()}, "NeuralTangentKernel": NeuralTangentKernel}


def refusal(make, risk):
    """The matrix; or the message of what refuses to be one."""
    try:
        return make(risk).to_dense()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("operator", ALL)
def test_matrices_are_those_of_the_cpu(network, operator):
    risk = NETWORKS[network]().risk()
    here, there = refusal(ALL[operator], risk), refusal(ALL[operator], risk.to(DEVICE))
    if isinstance(here, str):
        assert there == here
        return
    assert is_there([there])
    # Differences divide rounding by their step: eps^(2/3), and one more digit for a step found elsewhere.
    equal(there, here, 1e-6 if operator == "FiniteDifferenceHessian" else 1e-10)


@pytest.mark.parametrize("network", ["convolutions", "transformer"])
def test_loss_and_gradient(network):
    risk = NETWORKS[network]().risk()
    there = risk.to(DEVICE)
    equal(there.loss(), risk.loss(), 1e-13)
    equal(there.gradient(), risk.gradient(), 1e-12)
    equal(there.loss_at(risk.space.vector() + 0.1), risk.loss_at(risk.space.vector() + 0.1), 1e-13)


@pytest.mark.parametrize("memory", ["auto", 0, 100_000])
@pytest.mark.parametrize("operator", [Hessian, GaussNewton, NeuralTangentKernel])
def test_kept_graphs_change_nothing(memory, operator):
    case = pooled()
    expected, risk = operator(case.risk()), case.risk(graph_memory=memory).to(DEVICE)
    made, v = operator(risk), normal(expected.size, 3, seed=5)
    for _ in range(2):  # the first pass builds the graphs
        equal(made @ v, expected @ v, 1e-10)
    assert made.num_kept == {"auto": 2, 0: 0}.get(memory, made.num_kept)


def test_a_model_that_is_there_is_left_as_it_was():
    case = pooled()
    model = case.model.to(DEVICE)
    risk = EmpiricalRisk(model, case.loss_fn, case.batches)
    with assert_untouched(model):
        Hessian(risk) @ normal(risk.space.size)
        eigenpairs(GaussNewton(risk), 1)
    assert is_there(model.parameters())


@pytest.mark.parametrize("loader", [True, False])
def test_batches_that_are_there_already_and_loaders(loader):
    case = pooled()
    x, y = (torch.cat(parts) for parts in zip(*case.batches, strict=True))
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(x, y)
    batches = DataLoader(data, 4, shuffle=True, generator=generator) if loader else [(x.to(DEVICE), y.to(DEVICE))]
    there = EmpiricalRisk(case.model, case.loss_fn, batches).to(DEVICE)
    v = normal(there.space.size, 2, seed=5)
    equal(Hessian(there) @ v, Hessian(case.risk()) @ v, 1e-10)
    equal(there.subset(6).loss(), case.risk().loss(), 1e-12)


def test_batches_there_and_the_model_here():
    """A copy from the device must have arrived before the host reads it: behind work that the device is still at."""
    x, y = normal(1024, 1024), classes(1024)
    model = seeded(lambda: nn.Linear(1024, 3)).double()
    expected = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, y)], check=False).loss()
    batch, busy = (x.to(DEVICE), y.to(DEVICE)), torch.ones(4096 if CUDA else 64, 4096 if CUDA else 64, device=DEVICE)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [batch], check=False)
    for measured in (risk, risk.subset(1023)):
        for _ in range(20):
            busy @ busy
        found = measured.loss()
        if measured is risk:
            equal(found, expected, 1e-12)
    equal(risk.subset(1023).loss(), EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, y)]).subset(1023).loss(), 1e-12)


def test_minibatches_draw_alike_each_time():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).to(DEVICE)
    data = DataLoader(TensorDataset(normal(12, 4).float(), classes(12)), 4, shuffle=True)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), data, mode="train", check=False)

    def losses(start, count):
        with contextlib.closing(minibatches(risk, 3, start)) as batches:
            leaves = risk.leaves(risk.space.vector())
            return [float(minibatch_loss(risk, leaves, *next(batches)).detach()) for _ in range(count)]

    assert losses(0, 5)[2:] == losses(2, 3)
    assert len(set(losses(0, 5))) == 5


# Random states.


def states() -> list:
    cuda = [torch.cuda.get_rng_state().tolist()] if CUDA else []
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), *cuda]  # noqa: NPY002


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_random_states_come_back(seed, error):
    dropout, ones = nn.Dropout(0.5), torch.ones(64, device=DEVICE)
    own = torch.Generator(DEVICE).manual_seed(2)
    dropout(ones)
    before, drawn = (states(), own.get_state().tolist()), []
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt), preserved_random_states(seed, [own]):
            drawn.append(dropout(ones).tolist() + torch.rand(3, generator=own, device=DEVICE).tolist())
            if error:
                raise error
    assert drawn[0] == drawn[1]
    assert (states(), own.get_state().tolist()) == before


def test_dropout_in_a_risk_is_named_and_leaves_the_states():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).to(DEVICE)
    batches, before = [(normal(12, 4).float(), classes(12))], states()
    with pytest.raises(ValueError, match="dropout is active in train mode"):
        EmpiricalRisk(model, nn.CrossEntropyLoss(), batches, mode="train")
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), batches, mode="train", check=False)
    assert risk.loss() == risk.loss()
    Hessian(risk) @ normal(risk.space.size).float()
    assert states() == before


# Precision.


def images(dtype: torch.dtype = torch.float32) -> EmpiricalRisk:
    """Channels enough for a GPU's matrix units, and a head that is not flat."""

    def build() -> nn.Module:
        layers = [nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(16 * 36, 3))

    model = seeded(build).to(DEVICE)
    x, y = normal(32, 8, 8, 8).float(), classes(32)
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x[:16], y[:16]), (x[16:], y[16:])]).to(dtype)


def test_float32_is_as_exact_as_it_says():
    """As torch is set up by default, where cuDNN's convolutions keep ten bits (TF32) unless they are told not to."""
    single, double = Hessian(images()), Hessian(images(torch.float64))
    v = normal(single.size, 4, seed=2)
    wrong = (single @ v).double() - double @ v
    norm = abs(eigenpairs(double, 1, tol=1e-2).values[0])
    # Measured on a CPU: 0.6 times precision · norm. TF32's unit is 4000 times that of float32.
    allowed = 16 * single.precision * norm * v.norm(dim=0).to(DEVICE)
    assert (wrong.norm(dim=0) < allowed).all(), (wrong.norm(dim=0) / allowed).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_its_stated_error(dtype):
    truth = Hessian(images(torch.float64))
    half = Hessian(images(), autocast=dtype)
    assert 1e-5 < half.error.relative < 0.1
    exact = eigenpairs(truth, 3, which="largest", tol=1e-6)
    found = eigenpairs(half, 3, which="largest")
    assert found.status.ok
    assert (np.abs(found.values - exact.values) <= found.errors).all()
    top = exact.vectors[:, 0]
    wrong = (half @ top.float()).double() - truth @ top
    assert 0 < float(wrong.norm()) <= 4 * half.error.error


def test_float32_and_half_precision_graphs_take_memory_in_proportion():
    risk = images()
    half, full = Hessian(risk, autocast=torch.bfloat16), Hessian(risk)
    for operator in (half, full):
        operator @ torch.ones(operator.size)
    assert half.num_kept == full.num_kept == 2
    assert half.kept_bytes < full.kept_bytes


# Memory.


def test_more_than_there_is_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
    assert is_out_of_memory(caught.value)
    assert isinstance(caught.value, torch.OutOfMemoryError) == CUDA
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@only_cuda
def test_free_and_peak_bytes_are_the_gpus(monkeypatch):
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    assert 0 < free_bytes(DEVICE) <= total
    held = torch.empty(64 * MIB, dtype=torch.uint8, device=DEVICE)
    assert 64 * MIB <= peak_bytes(DEVICE) <= total
    del held
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() >= 64 * MIB  # freed, but still the allocator's
    risk = pooled().risk().to(DEVICE)
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (400 * MIB, total))
    assert free_bytes(DEVICE) == 400 * MIB + unused
    assert risk.graph_budget() == (400 * MIB + unused) // 4
    assert pooled().risk(graph_memory=7).to(DEVICE).graph_budget() == 7


def wide(graph_memory, batches: int = 8) -> EmpiricalRisk:
    """Graphs of about 25 MiB a batch."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Flatten(2), Mean())).double()
    x, y = normal(64 * batches, 1, 32, 32), classes(64 * batches)
    pairs = list(zip(x.split(64), y.split(64), strict=True))
    risk = EmpiricalRisk(model, F.cross_entropy, pairs, check=False, graph_memory=graph_memory)
    return risk.to(DEVICE)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(2)


@contextlib.contextmanager
def room(num_bytes: int):
    """Let this process take so much more of the GPU's memory."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


@only_cuda
def test_kept_bytes_are_bytes_of_the_gpu():
    risk = wide("auto")
    v = torch.ones(risk.space.size, device=DEVICE, dtype=risk.dtype)
    Hessian(risk) @ v  # libraries take their workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    operator = Hessian(risk)
    operator @ v
    gc.collect()
    taken = torch.cuda.memory_allocated() - before
    assert operator.num_kept == 8
    assert 0.5 * operator.kept_bytes < taken < 2 * operator.kept_bytes


@only_cuda
def test_where_memory_runs_out_fewer_graphs_are_kept():
    risk = wide(512 * MIB, 12)
    v = torch.ones(risk.space.size, device=DEVICE, dtype=risk.dtype)
    expected = Hessian(wide(0, 12)) @ v
    one = Hessian(wide("auto", 1))
    one @ v
    size = one.kept_bytes
    del one
    operator = Hessian(risk)
    with room(8 * size), pytest.warns(UserWarning, match="out of memory: kept graphs dropped, their budget is now"):
        found = operator @ v
    assert operator.num_kept < 12
    equal(found, expected, 1e-10)


@only_cuda
def test_where_not_even_one_graph_fits_it_says_so():
    risk = wide(0)
    operator, v = Hessian(risk), torch.ones(risk.space.size, device=DEVICE, dtype=risk.dtype)
    operator @ v
    with room(4 * MIB), pytest.raises(MemoryError, match=r"out of memory: one batch's graph does not fit on cuda"):
        operator @ v


def test_an_operation_without_second_derivative_is_found():
    """The name of the module is looked for with tensors on the device, and differences take its place."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].cos()

    class Sine(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), Sine(), nn.Linear(5, 3))).double()
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(normal(7, 4), classes(7))]).to(DEVICE)
    with pytest.raises(RuntimeError, match="second derivatives: module '1' has none"):
        Hessian(risk) @ normal(risk.space.size)
    assert FiniteDifferenceHessian(risk).precision < 1e-6
