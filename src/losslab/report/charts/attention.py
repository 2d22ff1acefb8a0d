"""Attention maps -> charts: one a layer and example, a column for each head, a row for each checkpoint."""

from typing import Any

import numpy as np

from losslab.report.chart import Chart, Panel
from losslab.report.charts.common import Colours, selections, slug
from losslab.report.contents import Contents
from losslab.report.images import Image

SIDE = 2.4  # inches of a map of few tokens
TOKEN = 0.16  # inches that a token's text needs


def attention(contents: Contents, colours: Colours) -> list[Chart]:
    """For each run, layer and example the weights of each head, query by key."""
    charts = []
    for index, run in enumerate(contents.runs):
        found = selections(run.series.get("attention_maps", []), "layers")
        for number, records in enumerate(found):
            source = records[0]["source"]
            for layer, name in enumerate(records[0]["layers"]):
                for place, example in enumerate(source["examples"]):
                    ending = f"{example}{f'-{number + 1}' if number else ''}"
                    title = f"{run.name}, {source['split']} {example}: attention in {name}"
                    label = f"attention-{index + 1}-{slug(name)}-{ending}"
                    charts.append(_chart(label, title, records, layer, place))
    return charts


def _chart(name: str, heading: str, records: list[dict[str, Any]], layer: int, place: int) -> Chart:
    tokens = list(records[0]["tokens"][place]) if records[0]["tokens"] else []
    maps = np.stack([record["weights"][str(layer)][place] for record in records]).astype(float)  # step, head, …
    if tokens:
        maps = maps[..., : len(tokens), : len(tokens)]
    heads = maps.shape[1]
    high = float(np.nanmax(maps)) if np.isfinite(maps).any() else 1.0
    panels = []
    for row, record in enumerate(records):
        for head in range(heads):
            last = row == len(records) - 1, head == heads - 1
            image = _image(maps[row, head], high, tokens, left=head == 0, bottom=last[0], bar=all(last))
            title = f"head {head}, step {record['source']['step']}"
            panels.append(Panel("key" if last[0] else "", "" if head else "query", [image], title))
    what = "token" if tokens else "token or patch"
    caption = (
        f"Row by row, how much each {what} (query) takes from each other (key), for class "
        f"{records[0]['source']['targets'][place]}: a row sums to 1, a bright column is looked at by all, a bright "
        "diagonal is a head that looks at the place itself; weights say where values come from, not why the network "
        "decides as it does."
    )
    return Chart(name, heading, caption, panels, columns=heads)


def _image(weights: np.ndarray, high: float, tokens: list[str], *, left: bool, bottom: bool, bar: bool) -> Image:
    queries, keys = weights.shape
    token = max(SIDE / max(queries, keys), TOKEN if tokens else 0.0)
    names = tokens or [str(place) for place in range(max(queries, keys))]
    every = 1 if tokens else -(-len(names) // 8)  # numbers need no more than a few

    def ticks(count: int, shown: bool) -> tuple[np.ndarray, list[str]]:
        places = np.arange(0, count, every) if shown else np.arange(0)
        return token * (places + 0.5), [names[place] for place in places]

    x, y = token * np.arange(keys + 1), token * np.arange(queries + 1)
    colour_bar = "weight" if bar else ""
    return Image(x, y, weights, 0.0, high, "viridis", ticks(keys, bottom), ticks(queries, left), colour_bar)
