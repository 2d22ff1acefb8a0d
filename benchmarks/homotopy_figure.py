"""What curvature alone makes of the learning rate, from five initialisations: drawn, and in a few numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from homotopy_study import STARTS
from matplotlib.figure import Figure

COLORS = ("tab:blue", "black", "tab:red", "tab:green", "tab:orange")
GROWN = 1.5  # η later in η early, from where on a warm-up is said to emerge
History = Mapping[str, Sequence[float]]


def kappa(history: History) -> np.ndarray:
    """‖P^(−½)HP^(−½)‖/‖∇L‖²: the founders' κ where the optimizer has no preconditioner."""
    return np.array(history["hessian_norm"]) / np.array(history["grad_norm"]) ** 2


def rises(history: History) -> list[str]:
    """Of η, λ and κ: later in early; where η was highest; whether that is a warm-up."""
    steps = np.array(history["step"])
    early, later = steps <= 5, (steps >= 50) & (steps <= 100)
    if not early.any() or not later.any():
        return ["–"] * 5
    grown = [
        float(np.exp(np.log(part[later]).mean() - np.log(part[early]).mean()))
        for part in map(np.array, (history["lr"], history["hessian_norm"], kappa(history)))
    ]
    top = int(steps[int(np.argmax(history["lr"]))])
    return [*(f"{factor:.2g}" for factor in grown), str(top), "yes" if grown[0] >= GROWN else "no"]


def draw(found: Mapping[str, Sequence[History]], path: Path) -> None:
    """A column for each task: κ, λ and η by step."""
    figure = Figure(figsize=(4.2 * len(found), 7.5), layout="constrained")
    axes = figure.subplots(3, len(found), squeeze=False, sharex="col")
    for column, (title, histories) in enumerate(found.items()):
        axes[0, column].set_title(title.replace("; ", "\n").replace(", ", "\n", 1), fontsize=9)
        for (seed, scale), color, history in zip(STARTS, COLORS, histories, strict=False):
            label = f"seed {seed}, weights × {scale:g}"
            lines = (kappa(history), history["hessian_norm"], history["lr"])
            for row, values in enumerate(lines):
                axes[row, column].plot(history["step"], values, color=color, label=label, lw=1.2)
        for row in range(3):
            axes[row, column].set_yscale("log")
            axes[row, column].grid(alpha=0.3)
        axes[2, column].set_xlabel("step")
    for row, name in enumerate(("κ = λ/‖∇L‖²", "λ of P$^{-½}$HP$^{-½}$", "η")):
        axes[row, 0].set_ylabel(name)
    axes[0, -1].legend(fontsize=8)
    figure.savefig(path, dpi=130)
