"""Which parameters make a layer: a module's own, or attention and feed-forward part of a transformer's block."""

from collections.abc import Sequence

from torch import nn

from losslab.operators.block_diagonal import by_module as of_modules

Layers = dict[str, list[nn.Parameter]]


def by_module(model: nn.Module) -> Layers:
    """The parameters of each module that holds some itself, under the module's name; tied ones under their first.

    The model's own are those of "(model)".

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> {name: len(parameters) for name, parameters in by_module(model).items()}
    {'0': 2, '2': 2}
    """
    named = dict(model.named_parameters())
    found = of_modules(list(named)).items()
    return {name or "(model)": [named[member] for member in members] for name, members in found}


def transformer_blocks(model: nn.Module) -> Layers:
    """Attention and feed-forward part of each block of a transformer, and all else by module.

    The rule looks at structure, so that it needs no list of architectures. A feed-forward part is made of linear
    layers in pairs, d → k and k → d with k > d (three where it is gated). An attention part is a module whose class is
    called so (`nn.MultiheadAttention`, `BertAttention`, `ViTAttention`) and that holds no such pair; or, without one,
    d → 3d and d → d, or four times d → d, beside the pair. A block is the smallest module that holds both. Of its
    other parameters the last normalisation's are of the feed-forward part, which it belongs to in pre- and in
    post-normalised blocks alike; the rest is attention's.

    Args:
        model: BERT, ViT, `nn.TransformerEncoder`, or one's own.

    Returns:
        "….attention" and "….feed_forward" for each block's name, then embeddings, head and others by module.

    Raises:
        ValueError: No such block is found.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: Layers = {}
    taken: set[int] = set()
    for path, block in _blocks(model):
        attention, feed_forward = _parts(block)
        for part, parameters in (("attention", attention), ("feed_forward", feed_forward)):
            own = [p for p in parameters if id(p) in names and id(p) not in taken]
            taken |= {id(p) for p in own}
            if own:
                found[f"{path}.{part}" if path else part] = own
    if not found:
        raise ValueError(
            f"model: expected a transformer, got a {type(model).__name__} without a block of attention and two linear "
            "layers d → k → d; use by_module(model)"
        )
    for name, parameters in by_module(model).items():
        rest = [p for p in parameters if id(p) not in taken]
        if rest:
            found[name] = rest
    return found


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The smallest modules with both parts."""
    both = {name: module for name, module in model.named_modules() if _has_attention(module) and _pairs(module)}
    return [(n, m) for n, m in both.items() if not any(o != n and _inside(o, n) for o in both)]


def _inside(name: str, of: str) -> bool:
    return not of or name.startswith(f"{of}.")


def _parts(block: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Attention's parameters and the feed-forward part's."""
    ffn = [p for linear in _pairs(block) for p in linear.parameters()]
    attention = {id(p) for module in _attention_modules(block) for p in module.parameters()}
    norms = [m for m in block.modules() if "norm" in type(m).__name__.lower() and list(m.parameters(recurse=False))]
    free = [m for m in norms if not any(id(p) in attention for p in m.parameters())]
    ffn += [p for norm in free[-1:] for p in norm.parameters()]
    chosen = {id(p) for p in ffn}
    return [p for p in block.parameters() if id(p) not in chosen], [p for p in block.parameters() if id(p) in chosen]


def _attention_modules(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if "attention" in type(m).__name__.lower() and not _pairs_among(_linears(m))]


def _has_attention(module: nn.Module) -> bool:
    if any(list(m.parameters()) for m in _attention_modules(module)):
        return True
    pairs = _pairs_among(_linears(module))
    width = min((min(m.in_features, m.out_features) for m in pairs), default=0)
    shapes = [(m.in_features, m.out_features) for m in _linears(module) if m not in pairs]
    square = shapes.count((width, width))
    return square >= 4 or (square >= 1 and (width, 3 * width) in shapes)


def _pairs(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of the feed-forward part: those outside attention of which one undoes the other's widening."""
    inside = {id(linear) for m in _attention_modules(module) for linear in _linears(m)}
    return _pairs_among([linear for linear in _linears(module) if id(linear) not in inside])


def _pairs_among(linears: Sequence[nn.Linear]) -> list[nn.Linear]:
    shapes = {(m.in_features, m.out_features) for m in linears}
    wide = {(d, k) for d, k in shapes if k > d and (k, d) in shapes}
    return [m for m in linears if (m.in_features, m.out_features) in wide or (m.out_features, m.in_features) in wide]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]
