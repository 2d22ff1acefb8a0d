"""The comparison of adaptive optimizers with others runs at its smallest settings, and compares."""

import sys

import numpy as np


def test_what_an_optimizer_is_taken_for_decides(tmp_path, load, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    sizes = {"train": 2300, "test": 9}
    images = {f"x_{name}": generator.integers(0, 256, (n, 28, 28), dtype=np.uint8) for name, n in sizes.items()}
    digits = {f"y_{name}": generator.integers(0, 10, n) for name, n in sizes.items()}
    np.savez(tmp_path / "mnist.npz", **images, **digits)
    script = load("homotopy_adaptive")
    monkeypatch.setattr(sys, "argv", ["homotopy_adaptive.py", "--data", str(tmp_path), "--seeds", "1", "--steps", "3"])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| adamw", "| momentum"))]
    assert [line.split(" | ")[1] for line in rows] == ["adaptive", "of fixed P"] * 2
    for optimizer in ("adamw", "momentum"):
        one, other = (script.final_loss(optimizer, adaptive, 10.0, 0, tmp_path, 40) for adaptive in (False, True))
        assert one != other
