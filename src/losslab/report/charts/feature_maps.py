"""Feature maps -> charts: one a layer, a row for each example and checkpoint, a column for each channel."""

from typing import Any

import numpy as np

from losslab.report.chart import Chart, Panel
from losslab.report.charts.common import Colours, selections, slug
from losslab.report.contents import Contents
from losslab.report.images import Image, centres, mosaic

TILE = 0.8  # inches
BESIDE = 0.25  # inches between the inputs and the maps
CUT = 99.5  # per cent of the values between the ends of the scale: one of a thousand would make the others pale


def feature_maps(contents: Contents, colours: Colours) -> list[Chart]:
    """For each run and layer the inputs and, beside them, what the layer makes of them."""
    charts = []
    for index, run in enumerate(contents.runs):
        found = selections(run.series.get("feature_maps", []), "layers", "channels")
        for number, records in enumerate(found):
            for layer, name in enumerate(records[0]["layers"]):
                label = f"features-{index + 1}-{slug(name)}{f'-{number + 1}' if number else ''}"
                charts.append(_chart(label, f"{run.name}: feature maps of {name}", records, layer))
    return charts


def _chart(label: str, title: str, records: list[dict[str, Any]], layer: int) -> Chart:
    maps = np.stack([record["maps"][str(layer)] for record in records], axis=1)  # example, step, channel, …
    rows = maps.reshape(-1, *maps.shape[2:]).astype(float)
    finite = np.abs(rows[np.isfinite(rows)])
    limit = float(np.percentile(finite, CUT)) if finite.size else 1.0
    inputs = _inputs(records[0], len(records))
    x, y, z = mosaic(rows, TILE, left=TILE + BESIDE if inputs else 0.0)
    channels = [str(channel) for channel in records[0]["channels"][layer]]
    labels = (centres(x, len(channels)), channels), (centres(y, len(rows)), _labels(records))
    image = Image(x, y, z, -limit or -1.0, limit or 1.0, "RdBu_r", *labels, bar="output")
    size = "×".join(map(str, records[0]["shapes"][layer]))
    caption = (
        f"Blue is negative, red positive, on one scale for the whole picture: {len(channels)} channels of the layer's "
        f"output ({size}), before normalisation and nonlinearity; a channel of one colour says nothing of the example."
    )
    return Chart(label, title, caption, [Panel("channel", "", [*inputs, image])])


def _inputs(record: dict[str, Any], steps: int) -> list[Image]:
    """Each example at the first of its rows, in its own shades of grey; nothing where the inputs are no images."""
    pictures = record["inputs"].astype(float)
    if not pictures.size:
        return []
    low, high = (end(pictures, axis=(1, 2), keepdims=True) for end in (np.min, np.max))
    tiles = np.full((len(pictures), steps, 1, *pictures.shape[1:]), np.nan)
    tiles[:, 0, 0] = (pictures - low) / np.where(high > low, high - low, 1.0)
    x, y, z = mosaic(tiles.reshape(-1, *tiles.shape[2:]), TILE)
    return [Image(x, y, z, 0.0, 1.0, "gray", x_ticks=(centres(x, 1), ["input"]))]


def _labels(records: list[dict[str, Any]]) -> list[str]:
    """The step of each row, and before an example's first one what the example is."""
    source = records[0]["source"]
    steps = [f"step {record['source']['step']}" for record in records]
    return [
        f"{source['split']} {example}\nclass {target}\n{step}" if step is steps[0] else step
        for example, target in zip(source["examples"], source["targets"], strict=True)
        for step in steps
    ]
