"""TALT's page: what its diagnostics saw in each tensor of a run, from the run's folder alone."""

import json
from pathlib import Path
from typing import Any

from losslab.report import matplotlib_backend
from losslab.report.charts.talt import charts as charts_of
from losslab.report.page import drawings, template
from losslab.report.table import ABSENT, Cell, number, percent
from losslab.report.talt_rows import Watched, read
from losslab.report.tuning import Entry
from losslab.studies.record import write_atomically

PAGE = "talt.html"

GLOSSARY = (
    Entry("shape", "structure, and ranks kept of the shorter and the longer side",
          "How TALT sees the tensor: of a side longer than max_side it keeps the first eigenvectors.",
          "Directions that are left out have one eigenvalue together."),
    Entry("state", "numbers in the tensor's state", "Its memory, in the tensor's precision."),
    Entry("bases", "refreshes (early ones), and steps since the last",
          "Early ones were brought by the trigger.", "Many of them mean that the schedule is too slow."),
    Entry("λ", "median of the averaged squares V̂ in the eigenspace",
          "The eigenvalues of the gradient's covariance, in units of the squared gradient."),
    Entry("condition", "largest λ / smallest λ",
          "Large means that directions are of very unlike steepness, which is where TALT gains.",
          "Directions that never had a gradient keep the first steps' average for about a hundred steps."),
    Entry("valleys", "share of directions with λ below the threshold, and their mean gain",
          "What is amplified, and by how much.", "A fifth, at the time of a refresh, by the 20th percentile."),
    Entry("signal", "‖M̂‖² / Σλ", "1: gradients agree from step to step; near (1 − β)/(1 + β): noise alone."),
    Entry("off diagonal", "‖QᵀCQ off its diagonal‖ / ‖QᵀCQ‖, of the worse side",
          "How far the basis was from the eigenvectors as the step met it.",
          "Near eigenvalues turn freely, and it does not matter."),
    Entry("covariance", "‖C − B‖ / ‖B‖ of covariances of trace 1, B of the last four sampled gradients",
          "Small: the incremental covariance is what the gradients are now.", "Four gradients alone are a noisy B."),
    Entry("rotation", "mean principal angle of the leading directions since the sample before, shorter and longer side",
          "Large means that the terrain turns faster than the samples follow."),
    Entry("consistency", "cosine of the update with the sample before's, and with the gradient",
          "Near 1: steady; the second near 0: the update is no gradient's any more."),
)  # fmt: skip


def build(folder: str | Path) -> Path:
    """Write `talt.html` and `figures/talt-*.png` into the folder of a run by TALT, finished or not.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If the folder is no run, or holds no samples of TALT's.
    """
    watched = read(folder)
    charts = charts_of(watched)
    images = matplotlib_backend.save_all(charts, folder)
    page = template("talt.html.j2").render(
        contents={"name": watched.name},
        summary=in_words(watched),
        columns=GLOSSARY,
        rows=[(name, cells(samples[-1])) for name, samples in watched.tensors.items()],
        drawings=drawings(charts, images),
        configurations=[(watched.name, json.dumps(watched.config, indent=2, ensure_ascii=False))],
    )
    path = Path(folder) / PAGE
    write_atomically(path, page.encode())
    return path


def in_words(watched: Watched) -> str:
    """What was sampled, and what stands out."""
    last = [samples[-1] for samples in watched.tensors.values()]
    first, end = watched.steps[[0, -1]]
    text = f"{len(watched.steps)} samples of {len(last)} tensors, from step {first:g} to {end:g}"
    early = int(sum(sample["early"] for sample in last))
    text += f"; {early} of {int(sum(sample['refreshes'] for sample in last))} bases came early"
    near = sum(bool(sample["near"]) for sample in last)
    return f"{text}; at the last one {near} tensors were held to be near a minimum."


def cells(sample: dict[str, Any]) -> list[Cell]:
    """A tensor's row."""
    ranks = f"{sample['structure']}, {sample['rank_left']} and {sample['rank_right']}"
    median = (sample.get("eigenvalues") or [None] * 13)[6]
    rotation = [sample.get(f"rotation_{side}") for side in ("left", "right")]
    return [
        Cell("×".join(map(str, sample["shape"])), ranks),
        Cell(number(int(sample["state_numbers"]))),
        Cell(f"{sample['refreshes']} ({sample['early']})", f"staleness {_number(sample.get('staleness'))}"),
        Cell(_number(median)),
        Cell(_number(sample.get("condition"))),
        Cell(percent(sample.get("valley_share")), f"gain {_number(sample.get('amplification'))}"),
        Cell(_number(sample.get("signal"))),
        Cell(_number(sample.get("off_diagonal"))),
        Cell(_number(sample.get("covariance_distance"))),
        Cell(", ".join(ABSENT if angle is None else f"{angle:.1f}°" for angle in rotation)),
        Cell(_number(sample.get("consistency")), f"gradient {_number(sample.get('alignment'))}"),
    ]


def _number(value: Any) -> str:
    return number(value, 3)
