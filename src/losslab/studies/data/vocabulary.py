"""WordPiece: a vocabulary trained on the training texts, or a checkpoint's own, and texts as token ids.

Source: M. Schuster, K. Nakajima, "Japanese and Korean voice search", ICASSP 2012; J. Devlin et al., "BERT", 2019.
"""

import contextlib
import hashlib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losslab.records import write_atomically
from losslab.studies.optional import optional

PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PAD_ID = 0


def trained(texts: Sequence[str], size: int, cache: Path) -> Any:
    """A WordPiece tokenizer of at most `size` tokens, trained on these texts; the same texts give the same one.

    Takes about two seconds for a million words, and none where `cache` has it: a file wordpiece-<size>-<hash>.json, the
    hash that of the texts. A folder that cannot be written to only costs the seconds.

    Raises:
        ValueError: If the single characters alone are more than `size`.
    """
    library = tokenizers()
    digest = hashlib.sha256("\n".join([library.__version__, *texts]).encode()).hexdigest()[:16]
    path = cache / f"wordpiece-{size}-{digest}.json"
    if path.is_file():
        try:
            return library.Tokenizer.from_file(str(path))
        except Exception:  # the library raises nothing narrower; a damaged file is made anew
            path.unlink(missing_ok=True)
    draft = _wordpiece({token: i for i, token in enumerate(SPECIAL)}, lowercase=True)
    letters = sorted({letter for text in texts for letter in draft.normalizer.normalize_str(text)} - {" "})
    # Ties between equally frequent pairs go by ids. The trainer would number the letters in the order of a hash map,
    # another in each process; so they are numbered here, as special tokens, which they are not in the end.
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    if len(first) > size:
        raise ValueError(
            f"dataset.vocabulary: expected at least {len(first)} tokens, the special ones and each character at the "
            f"start of a word and inside, got {size}"
        )
    trainer = library.trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    draft.train_from_iterator(texts, trainer)
    tokenizer = _wordpiece(draft.get_vocab(), lowercase=True)
    with contextlib.suppress(OSError):
        write_atomically(path, tokenizer.to_str(pretty=True).encode())
    return tokenizer


def stored(folder: Path) -> Any:
    """The tokenizer that lies in a checkpoint's folder: tokenizer.json, or vocab.txt with one token a line.

    A vocab.txt without capital letters means that texts are made lower case.

    Raises:
        ValueError: If there is neither, or if token 0 is not "[PAD]".
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = tokenizers().Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.txt").is_file():
        tokens = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        lowercase = not any(token != token.lower() for token in tokens if not token.startswith("["))
        tokenizer = _wordpiece({token: i for i, token in enumerate(tokens)}, lowercase=lowercase)
    else:
        raise ValueError(
            "dataset.vocabulary: expected a number of tokens, or a folder with tokenizer.json or vocab.txt, "
            f"got {str(folder)!r}"
        )
    if tokenizer.id_to_token(PAD_ID) != PAD:
        first = tokenizer.id_to_token(PAD_ID)
        raise ValueError(f"dataset.vocabulary: expected {PAD} as token {PAD_ID} in {folder}, got {first!r}")
    return tokenizer


def names(tokenizer: Any) -> tuple[str, ...]:
    """The tokens in the order of their ids; an id that stands for none is empty."""
    ids = tokenizer.get_vocab()
    tokens = [""] * (max(ids.values()) + 1)
    for token, i in ids.items():
        tokens[i] = token
    return tuple(tokens)


def encoded(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Token ids (N, length): [CLS], the text's, [SEP], filled up with 0; longer texts are cut.

    Raises:
        ValueError: If `length` leaves no room for a token between the two.
    """
    if length < 3:
        raise ValueError(f"dataset.max_length: expected at least 3, [CLS], a token and [SEP], got {length}")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=PAD_ID, pad_token=PAD)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(len(rows), length))


def tokenizers() -> types.ModuleType:
    """The package; its import takes a tenth of a second, so only texts pay it.

    Raises:
        ValueError: It is not installed.
    """
    return optional("tokenizers", "tokenizers")


def _wordpiece(ids: dict[str, int], *, lowercase: bool) -> Any:
    """BERT's way to cut a text: clean, lower case, split at blanks and punctuation, then the longest pieces first."""
    library = tokenizers()
    missing = [token for token in (UNKNOWN, START, END) if token not in ids]
    if missing:
        raise ValueError(f"dataset.vocabulary: expected the tokens {', '.join(SPECIAL)}, got none for {missing[0]}")
    tokenizer = library.Tokenizer(library.models.WordPiece(ids, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([token for token in SPECIAL if token in ids])
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, ids[START]), (END, ids[END])]
    )
    return tokenizer
