"""What every probe must satisfy. A new probe is one row of PROBES, and one of ROWS here."""

import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, classes, conv_batchnorm, mlp, normal, paired, seeded
from losslab.operators.risk import EmpiricalRisk
from losslab.probes import PROBES
from losslab.probes.elastic_band import ElasticBandOptions
from losslab.probes.generalization import GeneralizationOptions
from losslab.probes.intrinsic_dimension import IntrinsicDimensionOptions
from losslab.probes.paths.chain_training import CurveOptions
from losslab.probes.paths.chains import bernstein
from losslab.probes.spectrum import SpectrumOptions
from losslab.probes.subspaces.subspaces import random_subspace
from losslab.probes.trajectories.snapshots import Snapshots
from losslab.probes.trajectories.waypoint import TrajectoryOptions
from losslab.status import Status
from losslab.studies.record import RunFolder
from untouched import assert_untouched


class Encoder(nn.Module):
    """A tiny transformer, called by keywords as transformers' models are."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True), 1, enable_nested_tensor=False
        )
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids):
        return self.head(self.encoder(self.embedding(input_ids)).mean(1))


def encoder_case() -> Case:
    tokens, labels = classes(5, 3, num=6), classes(5)
    batches = [{"input_ids": tokens[i], "labels": labels[i]} for i in (slice(0, 3), slice(3, 5))]
    model = seeded(Encoder).double()
    return Case(model, lambda output, batch: F.cross_entropy(output, batch["labels"]), batches, None, {})


class Residual(nn.Module):
    """One block with a skip connection, as in ResNets."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


class Parabola(nn.Module):
    """L(θ) = ½ Σ hᵢ θᵢ² as the mean of examples ½ N Σ over one coordinate each: everything about it is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight.reshape(-1)


CURVATURES = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0, 13.0], dtype=torch.float64)


def quadratic() -> EmpiricalRisk:
    """At θ = 0: H = diag(CURVATURES), gradients ∓gᵢ in pairs."""
    rows = torch.diag((6 * CURVATURES).sqrt())

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (0.5 * output**2 + target * output).mean()

    # Each row twice, with target +1 and −1: the linear terms cancel, and are the gradient noise.
    inputs, targets = rows.repeat_interleave(2, 0), torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    return EmpiricalRisk(Parabola(), loss, [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])])


CASES: dict[str, Callable[[], Case]] = {
    "MLP": lambda: paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]),
    "CNN with BatchNorm": lambda: paired(
        seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2]
    ),
    "residual net": lambda: paired(seeded(Residual), nn.CrossEntropyLoss(), normal(5, 1, 4, 4), classes(5), [3, 2]),
    "transformer, dict batches": encoder_case,
}


POURED_OUT = re.compile(r"array|tensor\(|\[|Result\(")


@dataclass
class Row:
    """Small settings for speed, what follows the risk, and a check of the known values on the quadratic."""

    options: dict[str, Any]
    known: Callable[[Any], None]
    solutions: Callable[[EmpiricalRisk], tuple[Any, ...]] = lambda risk: ()


def near(value: Any, expected: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)


def known_spectrum(result) -> None:
    near(result.top, [13, 8])
    near(result.smallest, [1, 2])
    near([result.trace.value, result.condition_number, result.spectral_gap], [32, 13, 5])
    assert (result.num_negative, result.negative_mass, result.num_parameters) == (0, 0.0, 6)


def known_sharpness(result) -> None:
    assert 0 < result.value <= 0.5 * 0.3**2 * 13
    near([result.loss, result.radius, result.first_order], [0, 0.3, 0])
    near(result.flat_fraction, np.mean(result.increases <= 0.1))
    near(result.quadratic, 0.5 * 0.3**2 * 13, 1e-2)


def known_perturbation(result) -> None:
    near(result.curvatures[:2], [13, 8])
    near(result.losses, 0.5 * result.curvatures[:, None] * result.epsilons**2)
    near(result.fitted, result.curvatures)
    near(result.valid_to, np.full(4, 0.3))
    assert all(remark.endswith("they agree") for remark in result.remarks)


def known_line(result) -> None:
    near(result.losses, 0.5 * 13 * result.alphas**2)


def known_plane(result) -> None:
    near(result.losses, 0.5 * 13 * result.alphas[None, :] ** 2 + 0.5 * result.betas[:, None] ** 2)


def known_noise(result) -> None:
    # gᵢ = ±√(6hᵢ)eᵢ: C = diag(h) too.
    near([result.covariance_top, result.hessian_top, result.ratio], [13, 13, 1], 1e-5)
    near([result.alignment, result.covariance_trace, result.gradient_square], [1, 32, 0], 1e-5)
    near([result.noise_scale.trace, result.noise_scale.signal], [32 * 12 / 11, -32 / 11])  # 12 examples, mean 0


def known_interpolation(result) -> None:
    near(result.losses, 0.5 * 32 * (2 * result.alphas - 1) ** 2)
    near([result.barrier, result.distance, result.best_alpha], [0, 2 * 6**0.5, 0.5])
    near([result.barrier_over_line, result.connectivity, result.best_loss], [0, 1, 0])


def known_intrinsic_dimension(result) -> None:
    """One step of gradient descent from θ = 0 on the first batch, whose only unpaired example is the fifth."""
    gradient = torch.zeros(6, dtype=torch.float64)
    gradient[2] = 18**0.5 / 5
    subspace = random_subspace("fastfood", quadratic().space, 2)
    v = -0.1 * subspace.rmatvec(gradient)
    near(result.coordinates, v[None])
    near([result.score, result.start_score], [float(0.5 * subspace.matvec(v) ** 2 @ CURVATURES), 0])
    assert (result.measure, result.split, result.num_parameters) == ("loss", "train", 6)


def known_curve(result) -> None:
    points = bernstein(result.ts, 2) @ result.control_points
    near(result.losses, 0.5 * points**2 @ CURVATURES.numpy())
    near(result.line.losses, 0.5 * 32 * (3 * result.line.alphas - 1) ** 2)
    near([result.distance, result.barrier, result.line.barrier], [3 * 6**0.5, 0, 0])
    assert result.length_ratio >= 1
    assert result.steps == 3


def known_elastic_band(result) -> None:
    """Along an eigenvector of H the gradient has no part across the path: it stays straight."""
    near(result.losses, 0.5 * 13 * (result.positions - 1) ** 2)
    near(result.pivots, np.linspace(-1, 1, 5)[:, None] * E5.numpy())
    near([result.barrier, result.straight_barrier, result.distance, result.length], [0, 0, 2, 2])
    near(result.saddles, [6.5, 6.5])


def known_alignment(result) -> None:
    """There are no hidden units: nothing changes."""
    near([result.losses_before, result.losses_after], 2 * [0.5 * 32 * (2 * result.alphas - 1) ** 2])
    near([result.barrier_after, result.distance_after], [0, 2 * 6**0.5])
    assert result.groups == ()


def known_generalization(result) -> None:
    near([result.train.loss, result.train.loss_error, result.ridge], [0, 0, 1 / 12])
    near(result.effective_dimension.value, (CURVATURES / (CURVATURES + 1 / 12)).sum())
    near(result.predicted_loss_rise, 0.5 * 32 * result.pac_bayes.sigma**2)
    rises = result.pac_bayes.rises / result.pac_bayes.sigmas**2  # one number, ½ of the mean zᵀHz
    near(rises, np.full(len(rises), rises[0]), 1e-6)
    assert (result.rise_of, result.vacuous, result.caveat) == ("loss", None, "")


def known_implicit_bias(result) -> None:
    """Only the fifth and the sixth example are not paired within their batches of 5 and 7: g_B = ±√18 e₂/n_B."""
    near([result.losses, result.modified], [[0], [0.1 / 4 * 18 * (1 / 25 + 1 / 49) / 2]])
    near([result.gd_penalties, result.batch_cosines], [[0.1 / 4 * 18 / 35**2], [-1]])
    near(result.sgd_corrections, [0.1**2 / 2 * 18**1.5 * (1 / 25 - 1 / 49) / 2])
    near(result.quoted_corrections, [0.1**2 * 18**1.5 * (1 / 5 + 1 / 7) / 2 / 35])


def known_kernel(result) -> None:
    """Each row twice, with labels ±1: those lie in the kernel's null space, and are never learnt."""
    near(result.eigenvalues, [*(12 * CURVATURES.flip(0)), *[0] * 6], 1e-8)
    near([result.alignment, result.label_quotient], [0, 0])
    near([result.predicted, result.linearised, result.network], np.full((3, 51), 0.5))
    assert (result.rank, result.condition_number) == (6, np.inf)


def known_convergence(result) -> None:
    """θ = 0 is the minimum; what moves is in tests/test_convergence.py."""
    near([result.losses, result.predicted], np.zeros((2, 101)))
    near([result.top, result.smallest_positive, result.condition_number, result.rate], [13, 1, 13, 12 / 13])


def opposite(risk: EmpiricalRisk) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(risk.space.size, generator=generator, dtype=risk.dtype) * 0.3
    return risk.space.vector() - step, risk.space.vector() + step


def descent() -> Snapshots:
    """Gradient descent on the quadratic from (1, …, 1), of step 0.1."""
    model, snapshots = Parabola(), Snapshots()
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        snapshots.take(step, model, optimizer)
        model.weight.grad = CURVATURES.view(2, 3) * model.weight.detach()
        optimizer.step()
    return snapshots


def known_trajectory(result) -> None:
    h, rates = CURVATURES.numpy(), 1 - 0.1 * CURVATURES.numpy()
    points = rates ** np.arange(4)[:, None]
    steps = np.diff(points, axis=0)
    near(result.losses_train, 0.5 * points**2 @ h)
    near(result.grad_norms, np.linalg.norm(points * h, axis=1))
    near(result.lambda_max, np.full(4, 13))
    near(result.preconditioned / result.bounds, np.full(4, 13 / 20))
    near(result.path.distances, np.linalg.norm(points - 1, axis=1))
    lengths = np.linalg.norm(steps, axis=1)
    near(result.path.step_lengths, lengths)
    near(result.path.cosines, (steps[1:] * steps[:-1]).sum(1) / (lengths[1:] * lengths[:-1]))
    variances = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    near(result.path.explained, variances[:3] / variances.sum())


def wandering(risk: EmpiricalRisk) -> tuple[Snapshots]:
    """Three steps of SGD with momentum along random gradients, from where the risk's model is."""
    model, snapshots, generator = copy.deepcopy(risk.model), Snapshots(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()
        snapshots.take(10 * step, model, optimizer)
    return (snapshots,)


E0, E5 = torch.eye(6, dtype=torch.float64)[[0, 5]]
QUADRATIC: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {  # arguments on the quadratic
    "spectrum": ((2,), {}),
    "sharpness": ((), {"radius": 0.3, "relative": False}),
    "perturbation": ((), {"distance": 0.3, "relative": False}),
    "line": ((), {"direction": E5}),
    "plane": ((), {"directions": (E5, E0), "resolution": 5}),
    "noise": ((), {"tol": 1e-8}),
    "curve": ((-torch.ones(6), 2 * torch.ones(6)), {"options": CurveOptions(steps=3, num_points=5)}),
    "intrinsic_dimension": (
        (),
        {
            "dimension": 2,
            "num_seeds": 1,
            "baseline": 1.0,
            "optimizer": lambda v: torch.optim.SGD(v, lr=0.1),
            "options": IntrinsicDimensionOptions(start="present", steps=1),
        },
    ),
    "alignment": ((-torch.ones(6), torch.ones(6)), {"alphas": [0.25]}),
    "interpolation": ((-torch.ones(6), torch.ones(6)), {"alphas": [-0.5, 0.5, 0.75]}),
    "elastic_band": ((-E5, E5), {"steps": 3, "options": ElasticBandOptions(whole=True)}),
    "trajectory": ((descent(),), {"options": TrajectoryOptions(tol=1e-10)}),
    "generalization": ((), {"options": GeneralizationOptions(num_samples=4)}),
    "implicit_bias": ((), {"learning_rate": 0.1}),
    "kernel": ((), {}),
    "convergence": ((), {}),
}
ROWS = {
    "spectrum": Row({"options": SpectrumOptions(num_nodes=8, num_probes=2, trace_samples=8)}, known_spectrum),
    "sharpness": Row({"num_samples": 4}, known_sharpness),
    "perturbation": Row({"k": 1, "num_random": 1, "resolution": 5}, known_perturbation),
    "line": Row({"resolution": 5}, known_line),
    "plane": Row({"resolution": 3}, known_plane),
    "noise": Row({"tol": 1e-2}, known_noise),
    "curve": Row({"options": CurveOptions(steps=2, num_points=3)}, known_curve, opposite),
    "intrinsic_dimension": Row(
        {"dimension": 2, "num_seeds": 1, "options": IntrinsicDimensionOptions(steps=2)}, known_intrinsic_dimension
    ),
    "alignment": Row({"alphas": [0.5], "starts": 2}, known_alignment, opposite),
    "interpolation": Row({"alphas": [0.25, 0.5]}, known_interpolation, opposite),
    "elastic_band": Row(
        {"num_nodes": 3, "schedule": [[1, 0.05], [1, 0.05, 1, True]], "options": ElasticBandOptions(subdivisions=1)},
        known_elastic_band,
        opposite,
    ),
    "trajectory": Row({"options": TrajectoryOptions(sharpness_samples=2)}, known_trajectory, wandering),
    "generalization": Row(
        {"options": GeneralizationOptions(num_samples=2, num_nodes=3, num_probes=2)}, known_generalization
    ),
    "implicit_bias": Row({"learning_rate": 0.1}, known_implicit_bias),
    "kernel": Row({"num_examples": 4, "num_steps": 2}, known_kernel),
    "convergence": Row({"num_steps": 3, "num_nodes": 3}, known_convergence),
}


@pytest.fixture(params=PROBES, ids=str)
def probe(request):
    return PROBES[request.param]


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return CASES[request.param]()


def measure(probe, risk: EmpiricalRisk, **kwargs: Any) -> Any:
    row = ROWS[probe.name]
    return probe.measure(risk, *row.solutions(risk), **row.options, **kwargs)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, type for type, NaN equal to NaN."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and repr(a) == repr(b)  # floats print exactly, NaN too


def test_table_is_complete():
    assert ROWS.keys() == PROBES.keys() == QUADRATIC.keys()
    assert all(name == probe.name for name, probe in PROBES.items())


def test_known_value_on_a_quadratic(probe):
    arguments, options = QUADRATIC[probe.name]
    result = probe.measure(quadratic(), *arguments, **options)
    ROWS[probe.name].known(result)
    assert result.status.ok


def test_measures_every_architecture(probe, case):
    result = measure(probe, case.risk())
    assert isinstance(result, probe.result)
    assert result.status in (Status.complete, Status.converged, Status.breakdown, Status.budget_reached)
    _, arrays = result.to_record()
    finite = {k: v for k, v in arrays.items() if k != "density.standard_error"}
    assert all(np.isfinite(v).all() for v in finite.values())


def test_record_round_trip_is_exact(probe, case, tmp_path):
    result = measure(probe, case.risk())
    RunFolder(tmp_path).write_probe(probe.name, "7", *result.to_record())
    assert same(probe.result.from_record(*RunFolder(tmp_path).read_record(probe.name)), result)


def test_nonfinite_numbers_survive_the_record(probe, tmp_path):
    """A probe that met NaN has a record too, and says so."""
    result = measure(probe, CASES["MLP"]().risk())
    spoiled = {f.name: spoil(getattr(result, f.name)) for f in dataclasses.fields(result)}
    result = dataclasses.replace(result, **spoiled)
    assert result.status is Status.nonfinite
    RunFolder(tmp_path).write_probe(probe.name, "7", *result.to_record())
    assert same(probe.result.from_record(*RunFolder(tmp_path).read_record(probe.name)), result)


def test_prints_a_short_summary(probe):
    """Numbers in words, and how it ended; no array is poured out, and NaN does not stop it."""
    whole = measure(probe, CASES["MLP"]().risk())
    spoiled = dataclasses.replace(whole, **{f.name: spoil(getattr(whole, f.name)) for f in dataclasses.fields(whole)})
    for result in (whole, spoiled):
        text = str(result)
        assert not POURED_OUT.search(text), text
        assert len(text) < 1200
        if probe.name != "perturbation":  # whose remarks are sentences
            assert str(result.status) in text.splitlines()[-1] or "caveat" in text.splitlines()[-1]


def spoil(value: Any) -> Any:
    if isinstance(value, Status):
        return Status.nonfinite
    if isinstance(value, np.ndarray):
        return np.where(np.arange(value.size).reshape(value.shape) % 2 == 0, np.nan, -np.inf)
    return float("nan") if isinstance(value, float) else value


def test_same_seed_same_bits(probe):
    first, again = (measure(probe, CASES["MLP"]().risk()) for _ in range(2))
    assert same(first, again)
    if hasattr(first, "seed"):
        other = measure(probe, CASES["MLP"]().risk(), seed=5)
        assert not same(first, dataclasses.replace(other, seed=first.seed))
        assert other.seed == 5


def test_touches_nothing(probe, case):
    with assert_untouched(case.model):
        measure(probe, case.risk())


@pytest.mark.parametrize("calls", [1, 2])
def test_touches_nothing_when_interrupted_by_the_progress_callback(probe, case, calls):
    seen = 0

    def stop(done, total, note):
        nonlocal seen
        seen += 1
        if seen == calls:
            raise KeyboardInterrupt

    with assert_untouched(case.model), pytest.raises(KeyboardInterrupt):
        measure(probe, case.risk(), progress=stop)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_touches_nothing_when_interrupted_inside_forward(probe, case, after):
    """The user presses Ctrl-C in the middle of a forward pass, not between two points."""
    risk, calls = case.risk(graph_memory=0), 0

    def stop(module, arguments, output):
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt

    list(case.model.modules())[-1].register_forward_hook(stop)
    with assert_untouched(case.model), pytest.raises(KeyboardInterrupt):
        measure(probe, risk)
    assert calls == after + 1


def test_progress_counts_up_to_the_total(probe):
    seen: list[tuple[float, float]] = []

    def note(done, total, text):
        assert isinstance(text, str)
        seen.append((done, total))

    measure(probe, CASES["MLP"]().risk(), progress=note)
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert all(0 < d <= t for d, t in seen)
    assert len({t for _, t in seen}) == 1
