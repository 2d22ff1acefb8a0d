"""EmpiricalRisk: model + loss + data as one function of the parameters. The only reader of data.

How the loss of one batch comes about, and that nothing of the user's is touched by it, is in `batchwise`.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from losslab.memory import free_bytes
from losslab.operators import batches as kinds
from losslab.operators.averages import require_average
from losslab.operators.batchwise import BatchwiseLoss
from losslab.operators.determinism import Evaluation, require_equal, tolerance_of
from losslab.operators.examples import Examples
from losslab.operators.gradient_sum import GradientSum
from losslab.operators.time_axis import require_examples_first
from losslab.params import ParameterSpace
from losslab.ranks import ALONE, Ranks

# Of a part of the examples: the scatter of two or three batches may be small by chance, and with it the stated error.
_LEAST_BATCHES = 8


class EmpiricalRisk(BatchwiseLoss):
    """What is the loss, and how does it change with the parameters?  L(θ) = (1/N) Σᵢ ℓ(f(xᵢ; θ), yᵢ).

    The mean is over the N examples, whatever the batch sizes: a batch of n examples counts n/N if the loss function
    averages (reduction "mean") and its sum is divided by N if it sums (reduction "sum").

    Args:
        model: Any module. It is left as it was.
        loss_fn: `loss_fn(output, targets)` → scalar; for batches that are dicts or objects `loss_fn(output, batch)`;
            None for models whose output carries `.loss`. It averages, unless it says otherwise as torch's modules do,
            by an attribute `reduction`, or as a `functools.partial` with that argument.
        batches: Anything that can be read many times: a DataLoader, a list of `(inputs, targets)`, of dicts, of
            dataclasses (see `losslab.operators.batches`). Tensors are moved to the model's device.
        params: Glob pattern or patterns that choose the parameters, e.g. `"layer4.*"`; None: all trainable ones.
        mode: "eval" or "train": the mode that the model is in while it is evaluated.
        check: Evaluate loss and gradient twice and refuse a risk that is not a function of θ alone; look at half a
            batch and refuse a sum over examples that is not stated; look at layers that may take time for examples.
            Cost: two g, and a batch or two.
        graph_memory: Bytes that kept gradient graphs may take; "auto": a quarter of the free memory; 0: keep none.
        count_examples: `batch -> int`. Default: the length of the first axis of the first tensor; refused where the
            targets have another, or where a recurrent layer or attention takes that axis for time (inputs (T, N, F):
            pass `lambda batch: batch[0].shape[1]`). Or where the loss averages over something else, such as the tokens
            that `ignore_index` leaves: count those then.
        max_examples: Take a fixed random subset of so many examples, read once and held on the host, in eight batches
            or more; `spectrum` then says, by their scatter, what the choice of examples leaves uncertain.
        subset_seed: Which subset.
        ranks: `Ranks.world()` where several processes hold a part of the data each: `batches` are this process's own,
            N counts all of them, and every process must make the same calls. Default: this process alone.

    Raises:
        TypeError, ValueError: Batches that can be read only once, empty data, no trainable parameter, an unknown
            reduction, a loss that is not one finite number, or (with `check`) one that differs between two passes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: kinds.LossFunction | None,
        batches: Iterable[Any],
        *,
        params: str | Sequence[str] | None = None,
        mode: Literal["eval", "train"] = "eval",
        check: bool = True,
        graph_memory: int | Literal["auto"] = "auto",
        count_examples: Callable[[Any], int] = kinds.count_examples,
        max_examples: int | None = None,
        subset_seed: int = 0,
        ranks: Ranks = ALONE,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if mode not in ("eval", "train"):
            raise ValueError(f"mode: expected 'eval' or 'train', got {mode!r}")
        if graph_memory != "auto" and (type(graph_memory) is not int or graph_memory < 0):
            raise ValueError(f"graph_memory: expected 'auto' or a number of bytes >= 0, got {graph_memory!r}")
        self.model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper has no second derivatives
        self.loss_fn, self.mode, self.graph_memory, self.ranks = loss_fn, mode, graph_memory, ranks
        self._cast: torch.dtype | None = None
        self.space = ParameterSpace(self.model, params)
        self._reduction = kinds.reduction_of(loss_fn)
        if count_examples is kinds.count_examples:
            kinds.require_equal_weights(loss_fn, self._reduction)
        self._examples = Examples(batches, count_examples, ranks)
        self.population = self._examples.total
        if max_examples is not None:
            self._examples = self._examples.subset(max_examples, subset_seed, least_batches=_LEAST_BATCHES)
        if check:
            self._require_usable(counted=count_examples is not kinds.count_examples)

    @torch.no_grad()
    def _require_usable(self, *, counted: bool) -> None:
        """Refuse what is no function of θ alone, or no mean over the examples that were counted."""
        output_of = functools.partial(self.output, self.space.named_views(self.space.vector()))
        with self.evaluating():
            if not counted:
                require_examples_first(self.model, output_of, self.read())
            if kinds.stated_reduction(self.loss_fn) is None:
                require_average(self.loss_fn, output_of, self.read(), tolerance_of(self.dtype))
        first, second = (self.evaluate(seed=seed, fingerprints=True) for seed in (1, 2))
        require_equal(first, second, model=self.model, batches=self.batches, mode=self.mode, dtype=self.dtype)

    def restrict(self, params: str | Sequence[str]) -> "EmpiricalRisk":
        """The same loss on the same data as a function of other parameters: one layer's, `"layer3.*"`, for example.

        An operator on it is the block of the whole operator on these parameters.
        """
        risk = copy.copy(self)
        risk.space = ParameterSpace(self.model, params)
        return risk

    def subset(self, max_examples: int, seed: int = 0) -> "EmpiricalRisk":
        """The same loss on a fixed random part of the examples, read once and held on the host; on all if so few."""
        risk = copy.copy(self)
        risk._examples = self._examples.subset(max_examples, seed)
        return risk

    def to(self, target: torch.dtype | torch.device | str) -> "EmpiricalRisk":
        """A copy in another precision (`torch.float64`) or on another device; this one and its model stay as they are.

        Model and loss function are copied, the batches' real numbers are converted as they are read.
        """
        risk = copy.copy(self)
        risk.model = copy.deepcopy(self.model).to(target)
        if isinstance(self.loss_fn, nn.Module):
            risk.loss_fn = copy.deepcopy(self.loss_fn).to(target)
        risk.space = ParameterSpace(risk.model, self.space.names)
        risk._cast = risk.dtype if isinstance(target, torch.dtype) else self._cast
        return risk

    def held_as(self, batches: Iterable[Any]) -> "EmpiricalRisk":
        """The same loss on the same examples, held in other batches: on the device, for example. Nothing is read."""
        risk = copy.copy(self)
        risk._examples = self._examples.held_as(batches)
        return risk

    def graph_budget(self) -> int:
        """Bytes that kept graphs may take now."""
        return free_bytes(self.device) // 4 if self.graph_memory == "auto" else int(self.graph_memory)

    def loss(self) -> float:
        """L at the model's present parameters. Cost: one forward pass over the data."""
        return self.loss_at(self.space.vector())

    @torch.no_grad()
    def loss_at(self, vector: Tensor, buffers: dict[str, Tensor] | None = None) -> float:
        """L(θ) at any point θ of shape (P,); NaN or Inf where the loss is. Cost: one forward pass.

        `buffers` replaces buffers of the model by name, for example the running statistics of another solution.
        """
        # A copy: modules such as Embedding(max_norm=…) write into their weights.
        parameters = self.space.named_views(self.space.check(vector).clone()) | (buffers or {})
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.evaluating():
            for batch, count in self.read():
                total += self.batch_share(parameters, batch, count)
        return float(self.ranks.sum(total))

    def gradient(self) -> Tensor:
        """∇L at the present parameters, shape (P,). Cost: the unit g in which all other costs are given."""
        return self.evaluate().gradient

    def gradient_at(self, vector: Tensor) -> Tensor:
        """∇L(θ) at any point θ of shape (P,). Cost: one g."""
        return self.evaluate(self.space.check(vector).clone()).gradient

    def evaluate(self, at: Tensor | None = None, *, seed: int = 0, fingerprints: bool = False) -> Evaluation:
        """Loss and gradient in one pass, with what the determinism check compares.

        Raises:
            ValueError: Loss or gradient of a batch is NaN or Inf; the message names the batch.
        """
        leaves = self.leaves(self.space.vector() if at is None else at)
        total = GradientSum(self.space, list(leaves.values()), self.accumulation_dtype)
        with self.evaluating(seed), torch.enable_grad():
            for index, (batch, count) in enumerate(self.read()):
                part = self.batch_share(leaves, batch, count)
                total.add(index, batch, part, fingerprints=fingerprints)
        return total.over(self.ranks)

    @contextlib.contextmanager
    def at(self, vector: Tensor) -> Iterator["EmpiricalRisk"]:
        """The model itself at another point; its own parameters come back at the end, whatever happens."""
        before = self.space.vector()
        try:
            self.space.assign(vector)
            yield self
        finally:
            self.space.assign(before)

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"EmpiricalRisk({name}, {self.num_examples} examples, {self.space!r}, mode={self.mode!r})"
