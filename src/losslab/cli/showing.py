"""`losslab show`: pictures of a run's network at work."""

from pathlib import Path
from typing import Annotated

import typer

from losslab.cli.terminal import console
from losslab.report.charts.attention import attention as attention_charts
from losslab.report.charts.common import Figures
from losslab.report.charts.feature_maps import feature_maps as feature_charts
from losslab.report.pictures import draw
from losslab.studies.pictures import Selection, show_attention, show_features

Run = Annotated[Path, typer.Argument(help="The run folder.")]
Layer = Annotated[
    list[str] | None, typer.Option("--layer", help="Only layers of this name, such as features.*; may be repeated.")
]
Split = Annotated[str, typer.Option("--split", help="train, validation or test.")]
Examples = Annotated[str, typer.Option("--examples", help="Places in the split, from 0: 0,5,9.")]
Checkpoint = Annotated[
    list[str] | None, typer.Option("--checkpoint", help="last, best, step-46, step-*; may be repeated; default last.")
]


def features(
    run: Run,
    layer: Layer = None,
    channels: Annotated[str, typer.Option("--channels", help="So many of each layer, or which: 0,3,5.")] = "8",
    examples: Examples = "0,1,2",
    split: Split = "validation",
    checkpoint: Checkpoint = None,
) -> None:
    """What each convolution sees in a few examples: its output, channel by channel."""
    numbers = _numbers("--channels", channels)
    wanted = numbers if "," in channels else numbers[0]
    show_features(run, _selection(split, examples, checkpoint), layers=layer or "*", channels=wanted)
    _draw(run, feature_charts)


def attention(
    run: Run,
    layer: Layer = None,
    examples: Examples = "0,1,2",
    split: Split = "validation",
    checkpoint: Checkpoint = None,
) -> None:
    """Where each attention head looks in a few examples: its weights, token by token."""
    show_attention(run, _selection(split, examples, checkpoint), layers=layer or "*")
    _draw(run, attention_charts)


def _selection(split: str, examples: str, checkpoints: list[str] | None) -> Selection:
    return Selection(split, _numbers("--examples", examples), checkpoints or ("last",))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers with commas between them, such as 0,5,9, got {text!r}") from None


def _draw(run: Path, figures: Figures) -> None:
    for path in draw(run, figures):
        console.print(str(path), soft_wrap=True)
    console.print(f"on the run's page: losslab report {run}", soft_wrap=True)
