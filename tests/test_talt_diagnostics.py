"""TALT's diagnostics: they change nothing, and their numbers are those of the step that TALT took."""

import copy
import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from losslab.optim.diagnostics import LEVELS, PAGES, TALTDiagnostics, TALTSample
from losslab.optim.diagnostics import recorder as recording
from losslab.optim.eigenspace.options import FIXES, TALTOptions
from losslab.optim.talt import TALT
from losslab.report import talt_page
from losslab.report.charts.talt import charts
from losslab.report.table import number
from losslab.report.talt_rows import is_watched, read
from losslab.studies.record import RunFolder
from losslab.studies.talt_monitor import TALTMonitor, scalars

SHAPES = {"square": (5, 5), "wide": (3, 8), "twin": (3, 8), "conv": (4, 2, 3, 1), "bias": (6,)}


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for name, shape in SHAPES.items()}


def descend(optimizer, named, steps: int, seed: int = 1, unit: float = 1.0):
    """Steps at gradients with a signal and noise; each step's gradients and what the tensors were before."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in named.items()}
        for p in named.values():
            noise = torch.randn(p.shape, generator=draw, dtype=p.dtype)
            p.grad = p.detach() + unit * noise * torch.linspace(0.1, 2, p.numel(), dtype=p.dtype).view(p.shape)
        optimizer.step()
        yield before


CASES = {
    "default": {},
    "uphill": {"maximize": True},
    "truncated": {"options": TALTOptions(max_side=4, base_memory=2, adaptive_memory=False)},
    "one sided": {"options": TALTOptions(one_sided=True)},
    "low rank": {"structure": "lowrank", "options": TALTOptions(base_memory=4)},
    "last gradients": {"options": TALTOptions(incremental_covariance=False)},
    "thresholds": {"options": TALTOptions(statistical_thresholds=False, thresholds=(0.5, 2.0), damping=0.5)},
    "early": {"options": TALTOptions(trigger="off_diagonal", trigger_bound=0.1, update_interval=7)},
    "clipped": {"options": TALTOptions(power=0.25, clip=2.0, match_rms=0.2, nesterov=False, near_fraction=1.0)},
    "raw scale": {"options": TALTOptions(parameter_normalization=False)},
    **{f"without {fix}": {"options": TALTOptions().without(fix)} for fix in FIXES},
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_that_is_taken_apart_is_the_step_that_was_taken(case, monkeypatch):
    named, found = tensors(), []
    real = recording.take_apart
    monkeypatch.setattr(recording, "take_apart", lambda *args: found.append(real(*args)) or found[-1])
    lr, decay = 0.01, 0.1
    optimizer = TALT(named.values(), lr, weight_decay=decay, **CASES[case])
    diagnostics = TALTDiagnostics(optimizer, names=named.items(), every=1)
    for before in descend(optimizer, named, 7):
        names = {sample.name for sample in diagnostics.records()}
        updates = [update for stages in found for update in stages.update.unbind()]
        order = [sample.name for sample in diagnostics.records()]
        for name, update in zip(order, updates, strict=True):
            moved = (before[name] * (1 - lr * decay) - named[name].detach()) / lr
            torch.testing.assert_close(update.reshape(moved.shape), moved, rtol=1e-9, atol=1e-11)
        assert len(names) >= 3
        lengths = [sample.update_norm for sample in diagnostics.records()]
        assert lengths == pytest.approx([float(update.norm()) for update in updates], rel=1e-9)
        found.clear()
        diagnostics.clear()


@pytest.mark.parametrize("structure", ["polar", "diagonal"])
def test_structures_without_an_eigenspace_on_request(structure):
    named = tensors()
    optimizer = TALT(named.values(), 0.01, structure=structure)
    with pytest.raises(ValueError, match="no trainable tensor with an eigenspace"):
        TALTDiagnostics(optimizer)
    diagnostics = TALTDiagnostics(optimizer, names=named.items(), tensors="*", every=1)
    for before in descend(optimizer, named, 3):
        del before
    last = {sample.name: sample for sample in diagnostics.records()}["wide"]
    assert last.structure == structure
    assert math.isnan(last.rotation_left)
    assert math.isnan(last.condition) == (structure == "polar")
    assert last.update_norm > 0


def test_a_training_is_the_same_with_them_to_the_last_bit():
    ends = []
    for watched in (False, True):
        named = tensors(dtype=torch.float32)
        optimizer = TALT(named.values(), options=TALTOptions(trigger="off_diagonal", trigger_bound=0.2))
        diagnostics = TALTDiagnostics(optimizer, every=3) if watched else None
        random = torch.get_rng_state()
        for _ in descend(optimizer, named, 20):
            pass
        assert torch.equal(torch.get_rng_state(), random)
        state = [value for each in optimizer.state_dict()["state"].values() for value in each.values()]
        ends.append([*named.values(), *state])
        assert diagnostics is None or len(diagnostics.records()) == 6 * 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_without_state_they_make_none():
    named = tensors()
    optimizer = TALT(named.values())
    TALTDiagnostics(optimizer, every=1, tensors="*")
    for p in named.values():
        p.grad = None
    optimizer.step()
    assert not optimizer.state


def test_hooks_come_off():
    named = tensors()
    optimizer = TALT(named.values())
    with TALTDiagnostics(optimizer, every=2) as diagnostics:
        list(descend(optimizer, named, 4))
    list(descend(optimizer, named, 4))
    assert {sample.step for sample in diagnostics.records()} == {2, 4}


def test_a_skipped_step_and_a_tensor_without_gradient_have_no_sample():
    named = tensors()
    optimizer = TALT(named.values())
    diagnostics = TALTDiagnostics(optimizer, names=named.items(), every=1)
    for p in named.values():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert diagnostics.records() == []
    for name, p in named.items():
        p.grad = None if name == "twin" else torch.ones_like(p)
    optimizer.step()
    assert [sample.name for sample in diagnostics.records()] == ["square", "wide", "conv"]


def test_the_gradient_of_a_closure_is_the_one_that_counts():
    named = {"weight": nn.Parameter(torch.ones(3, 4))}
    optimizer = TALT(named.values())
    diagnostics = TALTDiagnostics(optimizer, every=1)

    def closure():
        optimizer.zero_grad()
        loss = (2 * named["weight"]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert diagnostics.records()[0].gradient_norm == pytest.approx(2 * math.sqrt(12))


@pytest.fixture(scope="module")
def watched():
    """Samples of each of 30 steps with gradients of a million millions, and the optimizer."""
    named = {name: nn.Parameter(p.detach() * 1e12) for name, p in tensors().items()}
    optimizer = TALT(
        named.values(), 0.01, betas=(0.95, 0.95), options=TALTOptions(trigger="off_diagonal", trigger_bound=0.05)
    )
    diagnostics = TALTDiagnostics(optimizer, names=named.items(), every=1)
    states, gradients = [], []
    for _ in range(30):
        states.append({name: copy.deepcopy(optimizer.state.get(p, {})) for name, p in named.items()})
        next(descend(optimizer, named, 1, seed=len(states), unit=1e12))
        gradients.append({name: p.grad.clone() for name, p in named.items()})
    return diagnostics, states, gradients, optimizer


def samples(watched, name: str) -> list[TALTSample]:
    return [sample for sample in watched[0].records() if sample.name == name]


def test_eigenvalues_and_thresholds_are_the_states_in_the_gradients_units(watched):
    sample, state, gradient = samples(watched, "square")[-1], watched[1][-1]["square"], watched[2][-1]["square"]
    scale = float(state["scale"]) ** 2
    Z = state["basis_left"].T @ gradient @ state["basis_right"]
    values = (0.95 * state["exp_avg_sq"] * scale + 0.05 * Z**2) / (1 - 0.95**30)
    ordered = values.flatten().sort().values
    assert scale != 1.0
    assert sample.smallest == pytest.approx(float(ordered[0]))
    assert sample.median == pytest.approx(float(ordered[12]))
    assert sample.largest == pytest.approx(float(ordered[-1]))
    assert sample.condition == pytest.approx(float(ordered[-1] / ordered[0]))
    assert sample.low == pytest.approx(float(state["cuts"][0]) * scale)
    assert sample.high == pytest.approx(float(state["cuts"][2]) * scale)
    assert sample.valley_share == pytest.approx(float((values < sample.low).double().mean()))
    assert sample.high_share == pytest.approx(float((values > sample.high).double().mean()))
    valley = values[values < sample.low]
    assert sample.amplification == pytest.approx(float((1 + 1 / (1 + valley / sample.low)).mean()))
    assert sample.gate == pytest.approx(float((1 / (1 + values / sample.low)).mean()))
    M = 0.95 * state["exp_avg"] * float(state["scale"]) + 0.05 * Z
    ahead = 0.95 * M / (1 - 0.95**31) + 0.05 * Z / (1 - 0.95**30)
    assert sample.smoothed_norm == pytest.approx(float(ahead.norm()))
    assert sample.gradient_norm == pytest.approx(float(gradient.norm()))
    assert sample.normalized_norm == pytest.approx(float((ahead / (values.sqrt() + 1e-8)).norm()), rel=1e-6)
    assert sample.signal == pytest.approx(float(ahead.square().sum() / values.sum()))


def test_the_basis_as_the_step_met_it(watched):
    sample, state = samples(watched, "wide")[-1], watched[1][-1]["wide"]  # there were new bases after step 29
    shares, turned = [], []
    earlier = watched[1][-2]["wide"]
    for side, count in (("left", 1), ("right", 4)):
        Q, C = state[f"basis_{side}"], state[f"covariance_{side}"]
        inner = Q.T @ C @ Q
        shares.append(float((inner - inner.diag().diag()).norm() / inner.norm()))
        cosines = torch.linalg.svdvals(earlier[f"basis_{side}"][:, :count].T @ Q[:, :count]).clamp(max=1)
        turned.append(float(torch.rad2deg(torch.acos(cosines)).mean()))
    assert sample.off_diagonal == pytest.approx(max(shares))
    assert (sample.rotation_left, sample.rotation_right) == pytest.approx(tuple(turned), abs=1e-5)
    assert turned[1] > 1e-3
    assert (sample.refreshes, sample.early) == tuple(state["refreshes"].tolist()[:2])
    assert sample.staleness == 30 - state["refreshes"][2]
    assert (sample.rank_left, sample.rank_right, sample.trigger) == (3, 8, "off_diagonal")


def test_some_bases_came_early(watched):
    counts = [sample.early for sample in samples(watched, "wide")]
    assert counts[-1] > 0
    assert counts == sorted(counts)


def test_the_batch_covariance_is_that_of_the_last_gradients(watched):
    sample, state = samples(watched, "wide")[-1], watched[1][-1]["wide"]
    last = [gradients["wide"] for gradients in watched[2][-4:]]
    B = sum(G @ G.T for G in last)
    C = state["covariance_left"]
    B, C = B / B.trace(), C / C.trace()
    assert sample.covariance_distance == pytest.approx(float((C - B).norm() / B.norm()))


def test_consistency_and_spread(watched):
    steps = [[sample for sample in watched[0].records() if sample.step == step] for step in (1, 30)]
    assert all(math.isnan(sample.consistency) for sample in steps[0])
    assert all(-1 <= sample.consistency <= 1 for sample in steps[1])
    rms = [sample.gradient_norm / math.sqrt(math.prod(sample.shape)) for sample in steps[1]]
    assert {sample.gradient_spread for sample in steps[1]} == {max(rms) / min(rms)}


def test_profiles_sum_to_the_lengths(watched):
    sample = samples(watched, "wide")[-1]
    sizes = [math.ceil(24 * (group + 1) / 20) - math.ceil(24 * group / 20) for group in range(20)]
    for name in ("gradient", "smoothed", "update"):
        profile = getattr(sample, f"profile_{name}")
        length = math.sqrt(sum(size * value**2 for size, value in zip(sizes, profile, strict=True)))
        assert length == pytest.approx(getattr(sample, f"{name}_norm"))
    assert list(sample.profile_eigenvalue) == sorted(sample.profile_eigenvalue, reverse=True)
    assert len(sample.eigenvalues) == len(LEVELS)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gradients_at_the_ends_of_float32(size):
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    optimizer = TALT(named.values(), 0.0)
    diagnostics = TALTDiagnostics(optimizer, names=named.items(), every=1)
    list(descend(optimizer, named, 4, unit=size))
    last = [sample for sample in diagnostics.records() if sample.name == "wide" and sample.step > 2]
    for sample in last:
        assert 0.1 * size**2 < sample.low < sample.high < sample.largest < 100 * size**2
        assert 1 < sample.condition < math.inf
        assert math.isfinite(sample.covariance_distance)


def test_scalars_are_grouped_under_the_eight_fixes(watched):
    tags = watched[0].scalars()
    assert [page.split("_", 2)[2] for page in PAGES] == list(FIXES)
    assert {tag.split("/")[0] for tag in tags} == set(PAGES)
    assert tags["talt_1_adaptive_memory/rank_right/wide"] == 8
    assert tags["talt_6_parameter_normalization/update_spread"] > 0
    known = {field.name for field in dataclasses.fields(TALTSample)} | {"smallest", "median", "largest"}
    assert all(name in known for names in PAGES.values() for name in names)


def test_frame_has_a_row_for_each_sample(watched, monkeypatch):
    frame = watched[0].frame()
    assert len(frame) == len(watched[0].records())
    assert frame.groupby("name")["step"].max().to_dict() == dict.fromkeys(("square", "wide", "twin", "conv"), 30)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"^pandas: expected it installed.*pip install 'losslab\[tables\]'$"):
        watched[0].frame()


def test_on_with_a_state_dict_as_if_never_stopped():
    ends = []
    for stops in (False, True):
        named = tensors()
        optimizer = TALT(named.values())
        monitor = TALTMonitor(optimizer, named.items(), every=2)
        list(descend(optimizer, named, 5))
        if stops:
            saved, kept = optimizer.state_dict(), copy.deepcopy(monitor.state_dict())
            named = {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
            optimizer = TALT(named.values())
            monitor = TALTMonitor(optimizer, named.items(), every=2)
            optimizer.load_state_dict(saved)
            monitor.load_state_dict(kept)
        monitor.rows()
        list(descend(optimizer, named, 5, seed=2))
        ends.append(repr(monitor.rows()))
    assert ends[0] == ends[1]
    assert "nan" not in ends[0].lower()


def test_attached_later_it_samples_the_same_steps():
    named = tensors()
    optimizer = TALT(named.values())
    list(descend(optimizer, named, 3))
    diagnostics = TALTDiagnostics(optimizer, every=4)
    list(descend(optimizer, named, 6))
    assert {sample.step for sample in diagnostics.records()} == {4, 8}


def test_names_and_patterns():
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = TALT(layer.named_parameters())
    diagnostics = TALTDiagnostics(optimizer, every=1, tensors=["1.*"])
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert [sample.name for sample in diagnostics.records()] == ["1.weight", "1.bias"]


def test_bad_input():
    named = tensors()
    with pytest.raises(TypeError, match=r"^optimizer: expected a TALT, got SGD$"):
        TALTDiagnostics(torch.optim.SGD(named.values()))
    optimizer = TALT(named.values())
    with pytest.raises(ValueError, match=r"^every: expected a whole number of steps >= 1, got 0"):
        TALTDiagnostics(optimizer, every=0)
    with pytest.raises(ValueError, match=r"^every: expected a whole number of steps >= 1, got 2.5"):
        TALTDiagnostics(optimizer, every=2.5)
    with pytest.raises(ValueError, match=r"^tensors: .*'none\*'; there are square, wide"):
        TALTDiagnostics(optimizer, names=named.items(), tensors="none*")
    assert not optimizer._optimizer_step_pre_hooks


def test_a_monitors_row_has_scalars_for_tensorboard():
    named = tensors()
    optimizer = TALT(named.values())
    monitor = TALTMonitor(optimizer, named.items(), every=2)
    list(descend(optimizer, named, 4))
    rows = monitor.rows()
    assert [row["kind"] for row in rows] == ["talt", "talt"]
    assert monitor.rows() == []
    tags = scalars(rows[1])
    assert tags["talt_2_dynamic_updates/staleness/wide"] == 1
    assert tags["talt_6_parameter_normalization/gradient_spread"] > 0
    assert {tag.split("/")[0] for tag in tags} == set(PAGES)
    assert scalars({"kind": "epoch", "train_loss": 1.0}) == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with samples of 12 steps, as a monitored training leaves it."""
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "talt")
    folder.write_config({"name": "talt", "optimizer": {"name": "talt"}})
    named = tensors()
    optimizer = TALT(named.values())
    monitor = TALTMonitor(optimizer, named.items(), every=2)
    for step, before in enumerate(descend(optimizer, named, 12), start=1):
        del before
        for row in monitor.rows():
            folder.log(step, row)
    folder.log(12, {"kind": "epoch", "epoch": 1, "train_loss": 0.5})
    return folder


def test_the_page_shows_each_tensor(run):
    html = talt_page.build(run.path).read_text(encoding="utf-8")
    assert "6 samples of 4 tensors, from step 2 to 12" in html
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', html, flags=re.DOTALL)
    assert [name for name, _ in rows] == ["square", "wide", "twin", "conv"]
    last = run.metrics()[-2]["tensors"]["wide"]
    cells = re.findall(r'class="value">([^<]*)<', dict(rows)["wide"])
    assert cells[:3] == ["3×8", f"{last['state_numbers']}", f"{last['refreshes']} (0)"]
    assert cells[4] == number(last["condition"], 3)
    pictures = {path.stem for path in (run.path / "figures").glob("*.png")}
    assert pictures == {chart.name for chart in charts(read(run.path))}
    assert len(pictures) == 6


def test_eigenvalues_are_drawn_with_the_thresholds_between_them(run):
    panel = charts(read(run.path))[0].panels[1]
    rows = [row["tensors"]["wide"] for row in run.metrics() if row["kind"] == "talt"]
    assert panel.title == "wide"
    assert list(panel.series[0].y) == [row["eigenvalues"][0] for row in rows]
    assert list(panel.series[-2].y) == [row["low"] for row in rows]
    assert list(panel.series[-1].y) == [row["high"] for row in rows]
    assert list(panel.series[-1].x) == [2, 4, 6, 8, 10, 12]


def test_the_transformation_is_drawn_over_the_rank(run):
    panel = next(chart for chart in charts(read(run.path)) if chart.name == "talt-transformation").panels[1]
    last = run.metrics()[-2]["tensors"]["wide"]
    for line, kind in zip(panel.series, ("gradient", "smoothed", "update"), strict=True):
        profile = np.array(last[f"profile_{kind}"])
        np.testing.assert_allclose(line.y, profile / np.sqrt(np.mean(profile**2)))
        assert np.all(np.diff(line.x) > 0)


def test_a_run_without_samples_has_no_page(run, tmp_path):
    other = RunFolder.create(tmp_path / "sgd")
    other.write_config({"name": "sgd"})
    other.log(1, {"kind": "epoch", "epoch": 1})
    assert is_watched(run.path)
    assert not is_watched(other.path)
    with pytest.raises(FileNotFoundError, match="no samples of TALT"):
        talt_page.build(other.path)
    assert not (other.path / "talt.html").exists()


def test_rows_are_small(run):
    rows = [row for row in run.metrics() if row["kind"] == "talt"]
    size = len(json.dumps(rows[-1])) / len(rows[-1]["tensors"])
    assert size < 2500


def test_a_step_that_fails_is_no_sample():
    """Its state was copied before; the next step begins anew, sampled or not."""
    x = nn.Parameter(torch.ones(3, 4))
    optimizer = TALT([x])
    diagnostics = TALTDiagnostics(optimizer, every=2)
    for failing in (False, True, False, False):
        x.grad = torch.randn(3, 4)
        if failing:
            x.grad = x.grad.to_sparse()
            with pytest.raises(RuntimeError, match="dense"):
                optimizer.step()
        else:
            optimizer.step()
    assert [sample.step for sample in diagnostics.records()] == [3]
