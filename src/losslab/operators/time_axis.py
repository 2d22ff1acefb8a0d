"""Does a recurrent layer or attention take for time the axis that was counted as examples? A forward pass tells."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_Axes = tuple[int, int]  # the lengths that a layer takes for time and for examples


def require_examples_first(
    model: nn.Module, output_of: Callable[[Any], Any], batches: Iterator[tuple[Any, int]]
) -> None:
    """Refuse inputs (T, N, F) whose T was counted as the number of examples.

    torch's recurrent layers and attention want the time axis first unless `batch_first=True`. Where the first axis of
    the data was counted and such a layer sees as long an axis for time, and no layer sees it for examples, N is wrong.
    Batches with T = N do not tell; the next ones may.

    Args:
        model: Whose layers are watched.
        output_of: A forward pass.
        batches: (batch, its number of examples), counted along the first axis.

    Raises:
        ValueError: See above. Cost: a forward pass over the first batch with T ≠ N; none without such layers.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.RNNBase | nn.MultiheadAttention)}
    time_first = {name: m for name, m in layers.items() if not m.batch_first}
    if not time_first:
        return
    for batch, count in batches:
        seen = _watched(time_first, output_of, batch)
        if any(examples == count != time for time, examples in seen.values()):
            return
        for name, (time, examples) in seen.items():
            if time == count != examples:
                kind = type(layers[name]).__name__
                raise ValueError(
                    f"batches: expected the examples on the first axis, of length {count}, got an axis that {name!r} "
                    f"({kind}, batch_first=False) takes for time, with {examples} examples on the second; "
                    "pass count_examples=…, for example lambda batch: batch[0].shape[1]"
                )


def _watched(layers: Mapping[str, nn.Module], output_of: Callable[[Any], Any], batch: Any) -> dict[str, _Axes]:
    """What each layer that is called sees in its first call."""
    seen: dict[str, _Axes] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            axes = _axes_of(args[0] if args else kwargs.get("input", kwargs.get("query")))
            if axes is not None:
                seen.setdefault(name, axes)

        return note

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        output_of(batch)
    return seen


def _axes_of(sequences: Any) -> _Axes | None:
    if isinstance(sequences, PackedSequence):
        return len(sequences.batch_sizes), int(sequences.batch_sizes[0])
    if isinstance(sequences, Tensor) and sequences.ndim == 3:  # of two: one sequence alone
        return sequences.shape[0], sequences.shape[1]
    return None
