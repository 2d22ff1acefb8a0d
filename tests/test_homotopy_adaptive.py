"""The comparisons behind the homotopy rate's rule run at their smallest settings, and compare."""

import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a small mnist.npz of noise."""
    generator = np.random.default_rng(0)
    sizes = {"train": 2300, "test": 9}
    images = {f"x_{name}": generator.integers(0, 256, (n, 28, 28), dtype=np.uint8) for name, n in sizes.items()}
    digits = {f"y_{name}": generator.integers(0, 10, n) for name, n in sizes.items()}
    np.savez(tmp_path / "mnist.npz", **images, **digits)
    return tmp_path


def test_what_an_optimizer_is_taken_for_decides(images, load, monkeypatch, capsys):
    script = load("homotopy_adaptive")
    monkeypatch.setattr(sys, "argv", ["homotopy_adaptive.py", "--data", str(images), "--seeds", "1", "--steps", "3"])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| adamw", "| talt", "| mom"))]
    adamw, careful, momentum = (
        [[kind, part] for kind in ("adaptive", "of fixed P")] for part in ("0.3 to 0.5", "0.05 to 0.05", "0.2 to 0.5")
    )
    expected = [*adamw, *careful, ["adaptive", "0.3 to 0.3"], *momentum]
    assert [line.split(" | ")[1:3] for line in rows] == expected
    for optimizer in ("adamw", "momentum"):
        found = (script.trained((optimizer, kind, {}), 10.0, 0, images, 40).record() for kind in (False, True))
        one, other = (record["loss"] for record in found)
        assert one != other


def test_the_bound_of_the_sharpest_batch_is_what_is_compared(images, load, monkeypatch, capsys):
    script = load("homotopy_long")
    monkeypatch.setattr(sys, "argv", ["homotopy_long.py", "--data", str(images), "--seeds", "1", "--steps", "3"])
    script.main()
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("| warm-up", "| stable", "| forg"))
    ]
    assert [line.split(" | ")[0].strip("| ") for line in rows] == ["warm-up 10%, cosine", "stable", "forgetful"] * 2
    quick = {**script.settings_of(script.DEFAULT, "momentum"), "ema": 0.0, "release": 10.0}  # so few forget nothing
    monkeypatch.setattr(script, "settings_of", lambda method, optimizer: quick)
    one, other = (script.final_loss("momentum", name, 10.0, 0, images, 60) for name in ("stable", "forgetful"))
    assert one != other


def test_rates_of_layers_are_compared_with_one_for_all(images, load, monkeypatch, capsys):
    script = load("homotopy_layers")
    arguments = ["--data", str(images), "--tasks", "mnist", "--seeds", "1", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["homotopy_layers.py", *arguments])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| one", "| layers"))]
    assert [line.split(" | ")[0].strip("| ") for line in rows] == list(script.ROWS) * 2
    losses = [script.final_loss("mnist", "momentum", row, 1.0, 0, images, 20) for row in script.ROWS]
    assert len(set(losses)) == len(losses)
