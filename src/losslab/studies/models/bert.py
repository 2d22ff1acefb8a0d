"""BERT, by Hugging Face's transformers: from token ids to logits."""

import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losslab.studies.models.inputs import Inputs
from losslab.studies.optional import optional
from losslab.studies.sections import ModelConfig
from losslab.studies.vision import torchvision

# J. Devlin et al., "BERT: pre-training of deep bidirectional transformers", 2019; the smallest of I. Turc et al.,
# "Well-read students learn better", 2019.
SIZES = {
    "bert_base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "bert_tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
}


class Bert(nn.Module):
    """Logits (N, classes) of token ids (N, length); 0 fills texts up and is not looked at.

    Attributes:
        network: transformers' `BertForSequenceClassification`. Its attention is written out, not one fused operation,
            so that it has a second derivative and can be shown.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (N, classes)."""
        # Added to the attention's logits. Of a mask (N, length) transformers asks whether it masks anything, and no
        # function that asks can be vectorised over examples.
        kind = self.network.dtype
        mask = torch.zeros(ids.shape, dtype=kind, device=ids.device).masked_fill(ids == 0, torch.finfo(kind).min)
        return self.network(input_ids=ids, attention_mask=mask[:, None, None, :]).logits


def bert_base(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """BERT-base: 12 layers, 768 wide, 12 heads (92 million parameters with 8,000 tokens), random or pretrained."""
    return bert("bert_base", config, inputs)


def bert_tiny(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """BERT-tiny: 2 layers, 128 wide, 2 heads (1.4 million parameters with 8,000 tokens), random or pretrained."""
    return bert("bert_tiny", config, inputs)


def bert(size: str, config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A BERT for these texts.

    With random weights it has as many positions as the texts have tokens, and one kind of segment: no parameter is
    without effect. With `model.pretrained` all sizes are those of the checkpoint; only the last layer is new.

    Raises:
        ValueError: The inputs are not texts, or the checkpoint is not there, not a BERT or too small for them.
    """
    length, library = inputs.length(config.name), transformers()
    if config.pretrained is not None:
        return Bert(_pretrained(library, config.pretrained, inputs))
    settings = library.BertConfig(
        vocab_size=inputs.tokens, max_position_embeddings=length, type_vocab_size=1, num_labels=inputs.classes,
        pad_token_id=0, attn_implementation="eager", **SIZES[size],
    )  # fmt: skip
    return Bert(library.BertForSequenceClassification(settings))


def _pretrained(library: types.ModuleType, source: str, inputs: Inputs) -> nn.Module:
    """A checkpoint from a folder or from transformers' cache; nothing is fetched, and only safetensors are read."""
    local: dict[str, Any] = {"local_files_only": True}
    if Path(source).is_dir() and not (Path(source) / "model.safetensors").is_file():
        raise ValueError(f"model.pretrained: expected model.safetensors in {source}, got no such file")
    with _quiet(library):
        try:
            settings = library.AutoConfig.from_pretrained(source, **local)
        except (OSError, ValueError):
            raise ValueError(
                f"model.pretrained: expected a folder with config.json and model.safetensors, or a name in "
                f"transformers' cache, got {source!r}; fetch it with `hf download {source}`"
            ) from None
        _check(settings, source, inputs)
        options = {"num_labels": inputs.classes, "attn_implementation": "eager", "use_safetensors": True}
        try:
            return library.BertForSequenceClassification.from_pretrained(source, **options, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"model.pretrained: {source}: {' '.join(str(error).split())[:300]}") from None


def _check(settings: Any, source: str, inputs: Inputs) -> None:
    """Refuse a checkpoint that these texts do not fit."""
    (length,) = inputs.shape
    if settings.model_type != "bert":
        raise ValueError(f"model.pretrained: expected a BERT, got {settings.model_type} in {source}")
    if settings.vocab_size < (inputs.tokens or 0):
        raise ValueError(
            f"model.pretrained: {source} knows {settings.vocab_size} tokens, the data have {inputs.tokens}; "
            f"set dataset.vocabulary to the checkpoint's folder"
        )
    if settings.max_position_embeddings < length:
        most = settings.max_position_embeddings
        raise ValueError(f"model.pretrained: {source} takes {most} tokens, got {length}; set dataset.max_length={most}")


def transformers() -> types.ModuleType:
    """The package; its import takes seconds, so only BERT pays it.

    Raises:
        ValueError: It is not installed.
    """
    with suppress(ValueError):  # it imports torchvision where that is installed, which may need help to load
        torchvision()
    return optional("transformers", "transformers")


@contextmanager
def _quiet(library: types.ModuleType) -> Iterator[None]:
    """Without the remark that the last layer is new: it is meant to be."""
    logging = library.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
