"""What TALT's step is made of: percentiles are torch's; the benchmark of its time runs at its smallest settings."""

import sys
from types import SimpleNamespace

import pytest
import torch

from losslab.optim.eigenspace.response import AT_MOST, quantiles


@pytest.fixture
def bench(load):
    """The script."""
    return load("talt_step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (3, 7, 9), (2, 16, 144), (1, 300, 300)], ids=str)
def test_percentiles_are_those_of_torch_to_the_bit(shape, dtype):
    values = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).square()
    flat = values.flatten(1)
    flat = flat[:, :: -(-flat.shape[1] // AT_MOST)]
    assert flat.shape[1] <= AT_MOST
    for levels in ((20.0, 50.0, 80.0), (0.0, 50.0, 100.0), (33.3, 50.0, 99.9)):
        expected = torch.quantile(flat, torch.tensor(levels, dtype=dtype) / 100, dim=1)
        assert torch.equal(quantiles(values, levels)[..., 0, 0], expected.mT)


def test_percentiles_leave_the_table_and_follow_its_own_order():
    table = torch.tensor([3.0, 1.0, 2.0]).view(1, 1, 3).mT  # not contiguous
    before = table.clone()
    assert quantiles(table, (0.0, 50.0, 75.0)).flatten().tolist() == [1.0, 2.0, 2.5]
    assert torch.equal(table, before)


def test_the_steps_of_two_optimizers_are_timed(bench, monkeypatch, capsys, tmp_path):
    file = tmp_path / "step.md"
    small = ["--tasks", "digits", "--optimizers", "talt", "--steps", "4", "--rounds", "1", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["talt_step", *small])
    bench.main()
    text = capsys.readouterr().out
    assert file.read_text() == text.removesuffix("\n")
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert cells["adamw"][3] == cells["adamw"][5] == "1.00"
    assert cells["adamw"][6] == "2.0"
    total, apart = (float(part.split()[0]) for part in cells["talt"][6].split(", "))
    assert 1 < apart < 4 < total


def test_means_are_of_each_half_and_ratios_of_whole_steps(bench):
    costs = {"adamw": [[(3.0, 1.0), (3.0, 1.0)]], "talt": [[(3.0, 9.0), (3.0, 3.0)]]}
    (_, *adamw), (_, *talt) = bench.rows(costs, ["2.0", "8.0"])
    assert adamw == ["3.0", "1.0", "1.00", "1.0", "1.00", "2.0"]
    assert talt == ["3.0", "9.0", "3.00", "3.0", "1.50", "8.0"]


def test_where_a_step_goes(load, monkeypatch, capsys):
    """The parts are the whole, what was patched is as it was, and a step's operations are counted."""
    script = load("talt_profile")
    places = [(module, name) for module, names in script.PARTS.values() for name in names]
    before = [getattr(module, name) for module, name in places]
    run = script.Run("digits", "talt", script.SETTINGS["talt"], seed=0, horizon=4)
    data = script.TASKS["digits"].data(None)
    found = script.parts_of(run, data)
    assert sum(found[part] for part in (*script.PARTS, "the rest")) == pytest.approx(found["whole"])
    assert min(found.values()) > 0
    calls = script.calls_of(run, data)
    names = {name for name, _ in calls}
    assert set(script.ARITHMETIC) <= names
    assert 0 < script.arithmetic(calls, 4) < script.arithmetic(calls, 1)
    decomposed = sum(count for (name, _), count in calls.items() if name == "geqrf")
    whole = sum(count for (name, _), count in calls.items() if name == "_linalg_eigh")
    assert decomposed + whole == 4 * 10  # both sides of five matrices after each of the first steps
    monkeypatch.setattr(sys, "argv", ["talt_profile", "--tasks", "digits", "--steps", "3", "--rounds", "1"])
    script.main()
    said = capsys.readouterr().out
    assert all(f"| {part} |" in said for part in script.PARTS)
    assert [getattr(module, name) for module, name in places] == before


def test_a_part_within_a_part_counts_once(load, monkeypatch):
    script = load("talt_profile")
    clock, ticks = script.Clock(), iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=ticks.__next__))
    (inner, outer) = next(iter(script.INSIDE.items()))
    clock._timed(outer, clock._timed(inner, lambda: None))()
    assert clock.spent == {inner: 2000.0, outer: 5000.0}
