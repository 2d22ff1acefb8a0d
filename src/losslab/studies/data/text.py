"""Texts with a class each, as token ids."""

import hashlib
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from losslab.studies.data import vocabulary
from losslab.studies.data.download import download
from losslab.studies.data.splits import Dataset, Split
from losslab.studies.optional import optional
from losslab.studies.sections import DatasetConfig

FILES = {"train": "train.tsv", "validation": "dev.tsv"}  # GLUE's names of the splits, and of their files
VALIDATION = 0.05  # of the training phrases


def sst2(config: DatasetConfig) -> Dataset:
    """67,349 phrases of film reviews, good or bad, and 872 sentences to test on: token ids (N, max_length).

    Reads train.tsv and dev.tsv, in GLUE's form (a line "sentence<TAB>label", then a text and its class a line), from
    `<root>/SST-2`, or with the name sst2:FOLDER from that folder: texts of one's own may have more classes. With
    `download` the files are written there through Hugging Face's `datasets`.

    Splits: the labelled dev.tsv is the test split (GLUE keeps the labels of its test set). 5 % of the training phrases
    validate, those whose text has the smallest hash: equal phrases lie on the same side. Both are in the order of the
    hash, which is as good as random. **The training rows are phrases of the same sentences**, so most validation
    phrases have longer or shorter relatives among the training ones: validation accuracy chooses settings, and is
    several points higher than that on the test split, whose sentences are new and longer.

    Source: R. Socher et al., "Recursive deep models for semantic compositionality over a sentiment treebank", 2013;
    A. Wang et al., "GLUE", 2019.
    """
    given = config.name.partition(":")[2]
    folder = Path(given) if given else Path(config.root) / "SST-2"
    if config.download and not given and not all((folder / name).is_file() for name in FILES.values()):
        library = optional("datasets", "datasets")
        download(config.name, Path(config.root), lambda into: _fetch(library, into / folder.name))
    (texts, labels), (test_texts, test_labels) = [_read(folder / name) for name in FILES.values()]
    hashes = _hashes(texts)
    order = np.argsort(hashes, kind="stable")
    last = hashes[order[max(int(len(texts) * VALIDATION), 1) - 1]]
    check, fit = order[hashes[order] <= last], order[hashes[order] > last]
    if not len(fit):
        raise ValueError(f"dataset.name: {folder / FILES['train']}: expected different texts to train on, got too few")
    if isinstance(config.vocabulary, int):
        tokenizer = vocabulary.trained([texts[i] for i in fit], config.vocabulary, folder)
    else:
        tokenizer = vocabulary.stored(Path(config.vocabulary))
    inputs = vocabulary.encoded(tokenizer, texts, config.max_length)
    test = Split(vocabulary.encoded(tokenizer, test_texts, config.max_length), torch.from_numpy(test_labels))
    targets = torch.from_numpy(labels)
    return Dataset(
        train=Split(inputs[fit], targets[fit]),
        validation=Split(inputs[check], targets[check]),
        test=test,
        num_classes=int(max(labels.max(), test_labels.max(), 1)) + 1,
        vocabulary=vocabulary.names(tokenizer),
    )


def _read(path: Path) -> tuple[list[str], np.ndarray]:
    """The texts and the classes of a file."""
    try:
        # Not splitlines(), which would also cut at characters that may stand in a text.
        header, *lines = path.read_text(encoding="utf-8").replace("\r\n", "\n").rstrip("\n").split("\n")
    except FileNotFoundError:
        raise ValueError(
            f"dataset.root: {path} is not there; unpack GLUE's SST-2 there, or with the name sst2 fetch it with "
            "--set dataset.download=true"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset.root: {path}: expected text in UTF-8: {error}") from None
    texts, labels = [], []
    for number, line in enumerate(lines, start=2):
        text, tab, label = line.rpartition("\t")
        if not tab or not (label.isascii() and label.isdigit()):
            raise ValueError(f"dataset.root: {path}: line {number}: expected sentence<TAB>class, got {line[:60]!r}")
        texts.append(text)
        labels.append(int(label))
    if header.split("\t") != ["sentence", "label"] or not texts:
        first = header[:60]
        raise ValueError(f"dataset.root: {path}: expected a line sentence<TAB>label and texts below, got {first!r}")
    return texts, np.array(labels, dtype=np.int64)


def _hashes(texts: Sequence[str]) -> np.ndarray:
    """64 bits of each text's SHA-256; capital letters and blanks make no difference."""
    plain = (" ".join(text.lower().split()).encode() for text in texts)
    return np.array([int.from_bytes(hashlib.sha256(text).digest()[:8], "big") for text in plain], dtype=np.uint64)


def _fetch(library: types.ModuleType, folder: Path) -> None:
    """GLUE's SST-2 from Hugging Face's hub, or from its cache where it has it, in GLUE's files."""
    found = library.load_dataset("nyu-mll/glue", "sst2")
    folder.mkdir()
    for split, name in FILES.items():
        rows = zip(found[split]["sentence"], found[split]["label"], strict=True)
        lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in rows)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
