"""Pictures of a run's network at work: which examples, at which checkpoints; one record for each of these."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from losslab.studies import checkpoint
from losslab.studies.activations import Layers, Source
from losslab.studies.attention import AttentionMaps, attention_maps
from losslab.studies.data.vocabulary import PAD_ID
from losslab.studies.feature_maps import FeatureMaps, feature_maps
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.section import suggestion

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Selection:
    """Which examples, seen by which checkpoints.

    Attributes:
        split: Of the run's data set.
        examples: Places in the split, from 0.
        checkpoints: Names or shell-style patterns: "last", "best", "step-46" (a checkpoint that was kept, or a
            snapshot), "step-*".
    """

    split: str = "validation"
    examples: Sequence[int] = (0, 1, 2)
    checkpoints: Sequence[str] = ("last",)


def show_features(
    path: str | Path, selection: Selection | None = None, *, layers: Layers = "*", channels: int | Sequence[int] = 8
) -> list[FeatureMaps]:
    """What do a run's convolutions see in these examples?  A record `probes/feature_maps/<step>` for each checkpoint.

    Args:
        path: The run folder.
        selection: Examples and checkpoints; the default is the first three of the validation split, at the end.
        layers: As for `feature_maps`.
        channels: As for `feature_maps`.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: An unknown split, an example out of range, or as for `feature_maps`.
    """
    found = []
    for view in _views(path, selection or Selection()):
        maps = feature_maps(view.model, view.inputs, layers=layers, channels=channels)
        found.append(dataclasses.replace(maps, source=view.source))
    for maps in found:  # nothing is written where one of them is refused
        _write(path, "feature_maps", maps)
    return found


def show_attention(
    path: str | Path, selection: Selection | None = None, *, layers: Layers = "*"
) -> list[AttentionMaps]:
    """Where do a run's attention heads look in these examples?  A record `probes/attention_maps/<step>` a checkpoint.

    Args:
        path: The run folder.
        selection: Examples and checkpoints; the default is the first three of the validation split, at the end.
        layers: As for `attention_maps`.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: An unknown split, an example out of range, or as for `attention_maps`.
    """
    found = []
    for view in _views(path, selection or Selection()):
        maps = attention_maps(view.model, view.inputs, layers=layers)
        found.append(dataclasses.replace(maps, source=view.source, tokens=_texts(view.inputs, view.vocabulary)))
    for maps in found:
        _write(path, "attention_maps", maps)
    return found


@dataclass(frozen=True)
class _View:
    """A network, what it is shown, and what that is."""

    model: nn.Module
    inputs: Tensor
    source: Source
    vocabulary: Sequence[str]


def _views(path: str | Path, selection: Selection) -> Iterator[_View]:
    """The same network with the weights of one checkpoint after another, in the order of their steps."""
    folder = RunFolder.open(path)
    stored = checkpoint.names(folder)
    snapshots = checkpoint.snapshots(folder)
    kept = {f"step-{step}": index for index, step in enumerate(snapshots.steps)}
    wanted = _matching([*stored, *kept], selection.checkpoints, folder)
    run = load_run(path, stored[0])  # the network and the data; which weights, is decided below
    if selection.split not in SPLITS:
        raise ValueError(f"split: unknown split {selection.split!r}, {suggestion(selection.split, SPLITS)}")
    split = getattr(run.dataset, selection.split)
    examples = _in_range(selection.examples, len(split), selection.split)
    found = [(name, checkpoint.load(folder, name) if name in stored else snapshots[kept[name]]) for name in wanted]
    known: set[int] = set()
    for name, weights in sorted(found, key=lambda item: item[1].step):
        if weights.step not in known:  # the best checkpoint may be the last one
            known.add(weights.step)
            weights.put_into(run.model)
            targets = tuple(int(target) for target in split.targets[examples])
            source = Source(name, weights.step, selection.split, tuple(examples), targets)
            yield _View(run.model, split.inputs[examples], source, run.dataset.vocabulary or ())


def _matching(names: Sequence[str], patterns: Sequence[str], folder: RunFolder) -> list[str]:
    if not names:
        raise FileNotFoundError(f"{folder.path}: no checkpoint yet; train it, or let it train longer")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise FileNotFoundError(f"{folder.path}: no checkpoint {pattern!r}; there: {', '.join(names)}")
    return [name for name in dict.fromkeys(names) if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _in_range(examples: Sequence[int], count: int, split: str) -> list[int]:
    wrong = [example for example in examples if not 0 <= example < count]
    if wrong or not examples:
        got = f"got {wrong[0]}" if wrong else "got none"
        raise ValueError(f"examples: expected places in the {split} split, 0 to {count - 1}, {got}")
    return list(examples)


def _texts(inputs: Tensor, vocabulary: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Each text's tokens without the padding at its end; nothing where the inputs are no texts."""
    if not vocabulary:
        return ()
    lengths = [max((place + 1 for place, token in enumerate(row) if token != PAD_ID), default=0) for row in inputs]
    rows = [row[:length].tolist() for row, length in zip(inputs, lengths, strict=True)]
    return tuple(tuple(vocabulary[token] for token in row) for row in rows)


def _write(path: str | Path, name: str, maps: FeatureMaps | AttentionMaps) -> None:
    assert maps.source is not None
    RunFolder(path).write_probe(name, str(maps.source.step), *maps.to_record())
