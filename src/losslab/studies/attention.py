"""Which tokens each attention head looks at: its weights, as the layer itself computes them."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from losslab.probes.base import ProbeResult
from losslab.studies.activations import Layers, Recorder, Source, chosen, observe

ABOVE_ONE = 1.05  # what a row of weights does not sum to, whatever the precision
_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


@dataclass(frozen=True)
class AttentionMaps(ProbeResult):
    """Attention weights: row i of a map says where token i takes its values from, and sums to 1.

    Attributes:
        layers: The modules' names in the order of their calls; "attention:2" is the second call of "attention".
        weights: For each layer (examples, heads, queries, keys). Keys that the model masks, such as padding, have 0.
        tokens: Each example's texts without its padding; empty where tokens have none (patches of an image).
        source: Which checkpoint and which examples; None of a model that belongs to no run.
    """

    layers: tuple[str, ...]
    weights: tuple[np.ndarray, ...]
    tokens: tuple[tuple[str, ...], ...] = ()
    source: Source | None = None

    def __getitem__(self, layer: str) -> np.ndarray:
        """One layer's weights by its name."""
        return self.weights[self.layers.index(layer)]


def attention_maps(model: nn.Module, inputs: Any, *, layers: Layers = "*") -> AttentionMaps:
    """Where does each attention head look?  softmax(QKᵀ/√d + mask), head by head, for each pair of tokens.

    The weights are those that the layer multiplies its values with. `nn.MultiheadAttention` (also inside
    `nn.TransformerEncoderLayer`, whose fast path computes none) is asked for them; models of transformers compute
    with their "eager" attention for this one call. Both then add up in another order than the fast kernels, so the
    output may differ in its last bits.

    Args:
        model: Any module with `nn.MultiheadAttention` or a model of transformers in it. Nothing of it is changed; it
            is looked at in eval mode, so no weight is dropped.
        inputs: A batch of examples: a tensor, or a mapping or tuple of arguments of `forward`.
        layers: Shell-style pattern or patterns on module names, for example `"encoder.layers.0.*"`.

    Returns:
        AttentionMaps, with status nonfinite where a row has no key left to look at. Cost: one forward pass, and
        heads × tokens² numbers in memory for each layer and example.

    Raises:
        ValueError: The model has no such layer, a pattern matches none (the nearest name is suggested), or none of
            them took part in the forward pass.
    """
    remedy = "expected torch.nn.MultiheadAttention or a model of transformers"
    looked_at = chosen(_attention_layers(model), layers, "attention layer", remedy)
    recorder = Recorder()

    def attach() -> list[Any]:
        return [handle for name, module in looked_at.items() for handle in _hooks(name, module, recorder)]

    with _weights_computed(model):
        observe(model, inputs, attach)
    if not recorder.found:
        raise ValueError(f"layers: {', '.join(looked_at)} took no part in the forward pass; choose others")
    return AttentionMaps(recorder.status(), tuple(recorder.found), recorder.arrays())


def _attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of torch, and in models of transformers the innermost modules called …Attention."""
    found: dict[str, nn.Module] = {}
    theirs = {id(module) for pretrained in _pretrained(model) for module in pretrained.modules()}
    for name, module in model.named_modules():
        named = id(module) in theirs and type(module).__name__.endswith("Attention")
        inner = any(type(child).__name__.endswith("Attention") for child in list(module.modules())[1:])
        if isinstance(module, nn.MultiheadAttention) or (named and not inner):
            found[name or "model"] = module
    return found


def _pretrained(model: nn.Module) -> list[Any]:
    """The models of transformers in it. Where nobody has imported their class there is none."""
    library = sys.modules.get("transformers.modeling_utils")
    return [] if library is None else [m for m in model.modules() if isinstance(m, library.PreTrainedModel)]


@contextmanager
def _weights_computed(model: nn.Module) -> Iterator[None]:
    """No kernels inside that never form the weights: torch's fast path, transformers' SDPA and flash attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    configs = {id(m.config): (m.config, m.config._attn_implementation) for m in _pretrained(model)}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for config, _ in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config, implementation in configs.values():
            config._attn_implementation = implementation


def _hooks(name: str, module: nn.Module, recorder: Recorder) -> list[Any]:
    if not isinstance(module, nn.MultiheadAttention):
        return [module.register_forward_hook(partial(_theirs, name, recorder))]
    asked: list[tuple[bool, bool]] = []
    return [
        module.register_forward_pre_hook(partial(_with_weights, asked), with_kwargs=True),
        module.register_forward_hook(partial(_ours, name, recorder, asked)),
    ]


def _theirs(name: str, recorder: Recorder, module: nn.Module, args: Any, output: Any) -> None:
    """An attention module of transformers returns (output, weights), some with other things before the weights."""
    parts = output if isinstance(output, tuple) else ()
    weights = next((part for part in reversed(parts) if isinstance(part, Tensor) and part.ndim == 4), None)
    if weights is None or bool((weights < 0).any()) or bool((weights.sum(-1) > ABOVE_ONE).any()):
        raise ValueError(f"model: {name} ({type(module).__name__}) returns no weights per head; choose other layers")
    recorder.take(name, weights)


def _with_weights(
    asked: list[tuple[bool, bool]], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call, but for weights of each head; what the caller wanted is noted in `asked`."""
    bound = _SIGNATURE.bind(module, *args, **kwargs)
    bound.apply_defaults()
    asked.append((bound.arguments["need_weights"], bound.arguments["average_attn_weights"]))
    bound.arguments |= {"need_weights": True, "average_attn_weights": False}
    return bound.args[1:], bound.kwargs


def _ours(
    name: str, recorder: Recorder, asked: list[tuple[bool, bool]], module: nn.Module, args: Any, output: Any
) -> tuple[Tensor, Tensor | None]:
    """Keep the weights, and give the caller what it asked for."""
    values, weights = output
    recorder.take(name, weights if weights.ndim == 4 else weights[None])
    needed, averaged = asked.pop()
    return values, None if not needed else weights.mean(-3) if averaged else weights
