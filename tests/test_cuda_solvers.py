"""On a GPU one seed means the same numbers as on the CPU: every solver, every probe, and the analyzer."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from cases import CASES, classes, conv_batchnorm, mlp, normal, paired, seeded
from contracts.test_probes import CASES as NETWORKS
from contracts.test_probes import ROWS, opposite
from contracts.test_solvers import SOLVERS
from devices import DEVICE, equal, is_there, on_device
from losslab.analyzer import LossLandscapeAnalyzer
from losslab.operators.dense import DenseOperator
from losslab.operators.gauss_newton import GaussNewton
from losslab.operators.hessian import Hessian
from losslab.probes import PROBES
from losslab.probes.curve import curve
from losslab.probes.paths.chain_training import CurveOptions
from losslab.probes.plane import plane
from losslab.probes.sharpness import SharpnessOptions, sharpness
from losslab.probes.subspaces.subspaces import random_subspace
from losslab.solvers.conjugate_gradients import conjugate_gradients
from losslab.solvers.lanczos import eigenpairs
from losslab.status import StopRequested
from matrices import rotated
from untouched import assert_untouched

pytestmark = on_device


def there(operator: DenseOperator) -> DenseOperator:
    return DenseOperator(operator.matrix.to(DEVICE))


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name):
    solver, operator = SOLVERS[name], rotated(np.linspace(-1.0, 2.0, 30) ** 3)
    here, away = (solver.run(o, seed=3, max_matvecs=24) for o in (operator, there(operator)))
    numbers = away.values.cpu() if name.startswith("diagonal") else solver.numbers(away)
    equal(numbers, solver.numbers(here), 1e-7)
    assert (away.matvecs, away.status) == (here.matvecs, here.status)


@pytest.mark.parametrize("which", ["largest_magnitude", "both_ends"])
@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
def test_eigenpairs_of_a_network(operator, which):
    risk = CASES["conv and BatchNorm"]().risk()
    here, away = (eigenpairs(operator(r), 2, which=which, tol=1e-8, seed=1) for r in (risk, risk.to(DEVICE)))
    equal(away.values, here.values, 1e-9)
    assert is_there([away.vectors])
    apart = 2 if operator is GaussNewton else len(here.values)  # its smallest are all zero, and any vector is theirs
    overlaps = (away.vectors.cpu() * here.vectors).sum(0).abs()[:apart]
    equal(overlaps, torch.ones_like(overlaps), 1e-5)


def test_a_starting_vector_from_the_host():
    operator = rotated(np.linspace(-1.0, 2.0, 60))
    start = normal(60, seed=4)
    equal(eigenpairs(there(operator), 2, start=start).values, eigenpairs(operator, 2, start=start).values, 1e-7)


def test_conjugate_gradients():
    operator, b = rotated(np.linspace(0.5, 2.0, 60)), normal(60, 3, seed=4)
    here, away = (conjugate_gradients(o, b, tol=1e-10) for o in (operator, there(operator)))
    equal(away.x, here.x, 1e-9)


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
def test_random_subspaces(kind):
    risk = CASES["conv and BatchNorm"]().risk()
    here, away = (random_subspace(kind, r.space, 5, seed=2) for r in (risk, risk.to(DEVICE)))
    v, w = normal(5, seed=6), normal(risk.space.size, seed=7)
    equal(away.matvec(v.to(DEVICE)), here.matvec(v), 1e-12)
    equal(away.rmatvec(w.to(DEVICE)), here.rmatvec(w), 1e-12)


# Numbers of which rounding is most, where the exact one is zero, or that divide by such a one; how long a grid is.
ROUNDING = ("condition_number", "density", "precision", "error", "rounding", "residual")


def alike(ours: Any, theirs: Any, at: str) -> None:
    """Two records: numbers nearly, everything else exactly but for remarks, which quote numbers."""
    if any(word in at for word in ROUNDING):
        return
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), at
        for key, value in theirs.items():
            alike(ours[key], value, f"{at}.{key}")
    elif isinstance(theirs, list | tuple) and not all(isinstance(item, int | float) for item in theirs):
        assert len(ours) == len(theirs), at
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            alike(a, b, f"{at}[{index}]")
    elif isinstance(theirs, bool | str) or theirs is None:
        assert ours == theirs or isinstance(theirs, str), (at, ours, theirs)
    else:
        a, b = (np.asarray(value, dtype=np.float64) for value in (ours, theirs))
        trained = at.startswith("intrinsic_dimension")  # a training magnifies rounding
        rtol = 0.05 if trained else 1e-4
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7 * max(1.0, np.abs(b).max(initial=0.0)), err_msg=at)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PROBES)
def test_probes(name, network):
    case, row, measure = NETWORKS[network](), ROWS[name], PROBES[name].measure
    risk, away = case.risk(), case.risk().to(DEVICE)
    solutions = row.solutions(risk)  # on the host, as files have them
    with assert_untouched(away.model):
        found = measure(away, *solutions, **row.options)
    expected = measure(risk, *solutions, **row.options)
    assert found.status == expected.status
    for ours, theirs in zip(found.to_record(), expected.to_record(), strict=True):
        alike(ours, theirs, name)


@pytest.mark.parametrize("method", ["ball", "average", "ascent"])
def test_sharpness_by_every_method(method):
    risk = CASES["conv and BatchNorm"]().risk()
    options = {"method": method, "num_samples": 6, "options": SharpnessOptions(steps=5)}
    equal(sharpness(risk.to(DEVICE), **options).value, sharpness(risk, **options).value, 1e-6)


@pytest.mark.parametrize("directions", ["filter", "layer", "pca"])
def test_planes_of_every_kind(directions):
    """Points on the host, as a trajectory has them, and a network on the device."""
    risk = CASES["conv and BatchNorm"]().risk()
    points = [risk.space.vector() + 0.1 * normal(risk.space.size, seed=s) for s in range(3)]
    where = {"through": points} if directions == "pca" else {"directions": directions, "trajectory": points}
    here, away = (plane(r, resolution=5, recalibrate=True, **where) for r in (risk, risk.to(DEVICE)))
    equal(away.losses, here.losses, 1e-9)


@pytest.mark.parametrize("after", [1, 3])
def test_a_curve_that_was_stopped_goes_on_to_the_same_bits(tmp_path, after):
    """A file with the state of a training on the device; in eval mode of batch normalisation, without atomics."""
    risk = paired(mlp(), torch.nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk().to(DEVICE)
    ends, options = opposite(CASES["ragged cross-entropy"]().risk()), CurveOptions(steps=6, num_points=5)
    whole = curve(risk, *ends, options=options)

    def stop(done, total, note):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curve(risk, *ends, options=options, resume=tmp_path / "part.npz", progress=stop)
    again = curve(risk, *ends, options=options, resume=tmp_path / "part.npz")
    assert again.losses.tobytes() == whole.losses.tobytes()
    assert again.control_points.tobytes() == whole.control_points.tobytes()


def test_a_stopped_plane_has_what_is_known():
    risk = CASES["ragged cross-entropy"]().risk().to(DEVICE)

    def stop(done, total, note):
        raise StopRequested

    assert np.isfinite(plane(risk, resolution=5, progress=stop).losses).any()


@pytest.mark.parametrize("where", ["there", "asked"])
def test_the_analyzer(where):
    """The model on the device, or on the host with `device=`: the same numbers as on the host alone."""
    data = [(normal(6, 1, 4, 4), classes(6))], [(normal(5, 1, 4, 4, seed=8), classes(5, seed=9))]
    model = seeded(conv_batchnorm).double()
    expected = LossLandscapeAnalyzer(model, *data, torch.nn.CrossEntropyLoss()).full_analysis(num_eigenvalues=2)
    model = model.to(DEVICE) if where == "there" else model
    options = {"device": DEVICE} if where == "asked" else {}
    found = LossLandscapeAnalyzer(model, *data, torch.nn.CrossEntropyLoss(), **options).full_analysis(num_eigenvalues=2)
    equal(found.top_eigenvalues, expected.top_eigenvalues, 1e-6)
    for name in ("trace", "sharpness", "train_loss", "test_loss", "test_accuracy"):
        assert math.isclose(getattr(found, name), getattr(expected, name), rel_tol=1e-6), name
