"""Samples of what TALT does while it trains, from hooks around its steps."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.diagnostics.history import History
from losslab.optim.diagnostics.sample import TALTSample
from losslab.optim.diagnostics.samples import samples_of, with_spreads
from losslab.optim.diagnostics.stages import take_apart
from losslab.optim.diagnostics.states import stacked
from losslab.optim.eigenspace.gradients import matrices, sizes
from losslab.optim.eigenspace.layout import Layout, new_state
from losslab.optim.eigenspace.options import TALTOptions, of_group
from losslab.optim.eigenspace.plans import layout_of

Named = Iterable[tuple[str, Tensor]]


class TALTDiagnostics:
    """What does TALT see in each tensor, and what does it make of the gradient?  A sample every so many steps.

    Hooks around `optimizer.step()` copy the state of the tensors before a sampled step and take the step apart after
    it. They only read: a training is the same with them and without, to the last bit. Other steps cost nothing. A
    sample costs about one to three of TALT's steps (benchmarks/talt_diagnostics.py), and memory for the copy. It
    keeps 5 numbers for each of a tensor's until `close`. A step that TALT skipped has no sample.

    Args:
        optimizer: A `TALT`.
        names: The tensors' names, as `model.named_parameters()` gives them; otherwise they are called
            "<group>.<place>".
        every: Steps from one sample to the next.
        tensors: Shell-style patterns on the names; None takes all that have an eigenspace.

    Raises:
        TypeError: The optimizer is none of TALT's.
        ValueError: `every` is below 1, or there is no tensor to sample.

    >>> from losslab.optim import TALT
    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = TALT(model.parameters())
    >>> with TALTDiagnostics(optimizer, names=model.named_parameters(), every=2) as diagnostics:
    ...     for x in torch.eye(4):
    ...         optimizer.zero_grad()
    ...         model(x).square().sum().backward()
    ...         optimizer.step()
    >>> [(sample.step, sample.name, sample.rank_left) for sample in diagnostics.records()]
    [(2, 'weight', 3), (4, 'weight', 3)]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        names: Named | None = None,
        every: int = 100,
        tensors: str | Sequence[str] | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer) or "near_fraction" not in optimizer.defaults:
            raise TypeError(f"optimizer: expected a TALT, got {type(optimizer).__name__}")
        if type(every) is not int or every < 1:
            raise ValueError(f"every: expected a whole number of steps >= 1, got {every!r}")
        self.optimizer, self.every = optimizer, every
        self._patterns = [tensors] if isinstance(tensors, str) else tensors
        self._names = list(names or ())
        self._records: list[TALTSample] = []
        self._history = History()
        self._steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
        self._met: list[tuple[_Watched, dict[str, Tensor]]] = []  # with the state that the step meets
        if next(self._chosen(), None) is None:
            known = ", ".join([name for name, *_ in trained(self.optimizer, self._names)][:8])
            raise ValueError(f"tensors: no trainable tensor with an eigenspace matches {tensors!r}; there are {known}")
        hooks = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))
        self._hooks = list(hooks)

    def close(self) -> None:
        """Take the hooks off; what was recorded stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._history, self._met = [], History(), []

    def __enter__(self) -> "TALTDiagnostics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def records(self) -> list[TALTSample]:
        """All samples so far, in the order of their steps."""
        return list(self._records)

    def clear(self) -> None:
        """Forget the samples, not what the next one is compared with."""
        self._records = []

    def scalars(self) -> dict[str, float]:
        """The newest number of each tensor under TensorBoard's tags, a page for each of the eight fixes."""
        return {tag: value for sample in self._records for tag, value in sample.scalars().items()}

    def frame(self) -> Any:
        """The samples as a pandas DataFrame, a row each.

        Raises:
            ValueError: pandas is not installed.
        """
        try:
            import pandas  # noqa: PLC0415  # optional
        except ModuleNotFoundError:
            message = "pandas: expected it installed, got no such package; pip install 'losslab[tables]'"
            raise ValueError(message) from None
        columns = [field.name for field in dataclasses.fields(TALTSample)]
        return pandas.DataFrame([dataclasses.asdict(sample) for sample in self._records], columns=columns)

    def state_dict(self) -> dict[str, Any]:
        """What the next sample is compared with, for a training that goes on from a checkpoint."""
        return {"steps": self._steps, "kept": {name: dict(kept) for name, kept in self._history.kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._steps = state["steps"]
        self._history.load(
            state["kept"], {name: parameter.device for name, parameter, _ in trained(self.optimizer, self._names)}
        )

    def _chosen(self) -> Iterator["_Watched"]:
        known: dict[int, TALTOptions] = {}  # a group's options take longer to check than a tensor to sample
        for name, parameter, group in trained(self.optimizer, self._names):
            options = known.setdefault(id(group), known.get(id(group)) or of_group(group))
            of = layout_of(parameter, group, options)
            wanted = self._patterns
            if of.turns if wanted is None else any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
                yield _Watched(name, parameter, group, options, of)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Copy the state that the step meets."""
        self._steps += 1
        self._met = []  # of a step that failed, if any
        if self._steps % self.every:
            return
        for each in self._chosen():
            state = optimizer.state.get(each.parameter) or new_state(each.layout, each.parameter)  # [] would make one
            self._met.append((each, {key: tensor.clone() for key, tensor in state.items()}))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Take the step apart."""
        if not self._met:
            return
        met, self._met = self._met, []
        stacks: dict[Any, list[tuple[_Watched, dict[str, Tensor]]]] = {}
        for each, before in met:
            after = optimizer.state.get(each.parameter)
            if each.parameter.grad is not None and after and int(after["step"]) == int(before["step"]) + 1:
                stacks.setdefault((each.alike, int(after["step"])), []).append((each, before))
        found = []
        for pairs in stacks.values():
            members, states = zip(*pairs, strict=True)
            first = members[0]
            stack = stacked(states, first.layout, first.options)
            parameters = [each.parameter for each in members]
            G = matrices(parameters, stack)
            G = stack.in_units(-G if first.group["maximize"] else G, sizes(parameters))
            stages = take_apart(stack, G, first.group["betas"], first.group["eps"], first.options)
            known = [(each.name, tuple(each.parameter.shape)) for each in members]
            found += samples_of(known, stack, stages, first.options, self._history)
        self._records += with_spreads(found)


def trained(optimizer: Optimizer, names: Named | None) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Name, tensor and group of all that an optimizer trains."""
    known = {parameter: name for name, parameter in names or ()}
    for index, group in enumerate(optimizer.param_groups):
        own = group.get("param_names") or [f"{index}.{place}" for place in range(len(group["params"]))]
        for name, parameter in zip(own, group["params"], strict=True):
            if parameter.requires_grad and parameter.numel():
                yield known.get(parameter, name), parameter, group


class _Watched(NamedTuple):
    """A tensor, and how TALT treats it."""

    name: str
    parameter: Tensor
    group: dict[str, Any]
    options: TALTOptions
    layout: Layout

    @property
    def alike(self) -> Any:
        """Tensors with the same can be taken apart together."""
        settings = tuple(self.group["betas"]), self.group["eps"], self.group["maximize"]
        return self.layout, self.options, settings, self.parameter.device, self.parameter.dtype
