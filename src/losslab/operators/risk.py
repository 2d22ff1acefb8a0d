"""EmpiricalRisk: model + loss + data as one function of the parameters. The only reader of data.

Everything is evaluated functionally (`torch.func.functional_call`) on tensors of our own, so the user's parameters,
`.grad`, `requires_grad`, buffers, train/eval modes and random states stay as they are.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from losslab.memory import free_bytes
from losslab.operators import batches as kinds
from losslab.operators.averages import require_average
from losslab.operators.determinism import Evaluation, fingerprint, nonfinite_message, require_equal, tolerance_of
from losslab.operators.exact_convolutions import exact_convolutions
from losslab.operators.subset import draw_subset
from losslab.params import ParameterSpace
from losslab.random import preserved_random_states
from losslab.ranks import ALONE, Ranks

# Of a part of the examples: the scatter of two or three batches may be small by chance, and with it the stated error.
_LEAST_BATCHES = 8


class EmpiricalRisk:
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
            batch and refuse a sum over examples that is not stated. Cost: two g, and a batch.
        graph_memory: Bytes that kept gradient graphs may take; "auto": a quarter of the free memory; 0: keep none.
        count_examples: `batch -> int`, where the first axis of the first tensor is not the examples; or where the loss
            averages over something else, such as the tokens that `ignore_index` leaves (count those then).
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
        kinds.check_reiterable(batches)
        if mode not in ("eval", "train"):
            raise ValueError(f"mode: expected 'eval' or 'train', got {mode!r}")
        if graph_memory != "auto" and (type(graph_memory) is not int or graph_memory < 0):
            raise ValueError(f"graph_memory: expected 'auto' or a number of bytes >= 0, got {graph_memory!r}")
        self.model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper has no second derivatives
        self.loss_fn, self.batches, self.mode = loss_fn, batches, mode
        if max_examples is not None and (type(max_examples) is not int or max_examples < 1):
            raise ValueError(f"max_examples: expected a number >= 1 or None, got {max_examples!r}")
        self.graph_memory, self.ranks = graph_memory, ranks
        self._cast: torch.dtype | None = None
        self.space = ParameterSpace(self.model, params)
        self._reduction = kinds.reduction_of(loss_fn)
        self._count = count_examples
        if count_examples is kinds.count_examples:
            kinds.require_equal_weights(loss_fn, self._reduction)
        self.num_examples = self.population = self._count_all()
        if self.num_examples == 0:
            raise ValueError("batches: expected at least one example, got none; is the loader empty (drop_last)?")
        if max_examples is not None and max_examples < self.population:
            self._draw(max_examples, subset_seed, least_batches=_LEAST_BATCHES)
        if check:
            first, second = (self.evaluate(seed=seed, fingerprints=True) for seed in (1, 2))
            require_equal(first, second, model=self.model, batches=batches, mode=mode, dtype=self.dtype)
            if kinds.stated_reduction(loss_fn) is None:
                self._require_average()

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
        if max_examples < self.num_examples:
            risk._draw(max_examples, seed)
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

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.space.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, and that of gradients and products."""
        return self.space.dtype

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Sums over batches are kept in at least float32: half precision would lose the small batches."""
        return torch.promote_types(self.dtype, torch.float32)

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
        tensors = list(leaves.values())
        gradient = torch.zeros(self.space.size, dtype=self.accumulation_dtype, device=self.device)
        loss, loss_scale, gradient_scale = 0.0, 0.0, 0.0
        seen: list[float] = []
        with self.evaluating(seed), torch.enable_grad():
            for index, (batch, count) in enumerate(self.read()):
                part = self.batch_share(leaves, batch, count)
                share = float(part.detach())
                if not math.isfinite(share):
                    raise ValueError(nonfinite_message("loss", index, share, batch))
                grads: Sequence[Tensor | None] = [None] * len(tensors)
                if part.requires_grad:
                    grads = torch.autograd.grad(part, tensors, allow_unused=True)
                piece = self.space.flatten(grads).to(self.accumulation_dtype)
                size = float(piece.norm())
                if not math.isfinite(size):
                    raise ValueError(nonfinite_message("gradient", index, size, batch))
                gradient += piece
                loss += share
                loss_scale += abs(share)
                gradient_scale += size
                if fingerprints:
                    seen.append(fingerprint(batch))
        loss, loss_scale, gradient_scale = self.ranks.total(loss, loss_scale, gradient_scale)
        return Evaluation(loss, self.ranks.sum(gradient).to(self.dtype), loss_scale, gradient_scale, tuple(seen))

    @contextlib.contextmanager
    def at(self, vector: Tensor) -> Iterator["EmpiricalRisk"]:
        """The model itself at another point; its own parameters come back at the end, whatever happens."""
        before = self.space.vector()
        try:
            self.space.assign(vector)
            yield self
        finally:
            self.space.assign(before)

    # -- for operators ------------------------------------------------------------------------------------------

    def leaves(self, vector: Tensor) -> dict[str, Tensor]:
        """Fresh leaf tensors that require gradients and share the vector's memory, by parameter name."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("inference mode: gradients do not exist inside torch.inference_mode(); leave it first")
        return {name: view.detach().requires_grad_() for name, view in self.space.named_views(vector).items()}

    def batch_share(self, parameters: dict[str, Tensor], batch: Any, count: int) -> Tensor:
        """One batch's share of L at these parameters. To be called inside `evaluating()`."""
        loss = kinds.batch_loss(self.loss_fn, self.output(parameters, batch), kinds.targets_of(batch))
        return loss * self.batch_weight(count)

    def batch_weight(self, count: int) -> float:
        """How often the loss of a batch of `count` examples counts in L."""
        return (count if self._reduction == "mean" else 1) / self.num_examples

    def output(self, parameters: dict[str, Tensor], batch: Any) -> Any:
        """The model's output on a batch at these parameters.

        Parameters that were not chosen are detached, so that nothing is kept for their sake; buffers, which a forward
        pass may write, are copies.
        """
        state = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        state |= parameters

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, state, args, kwargs)

        return kinds.call_model(call, batch, self.model)

    def read(self) -> Iterator[tuple[Any, int]]:
        """(batch on the device, its number of examples) for each batch; inside `evaluating()`."""
        total = 0
        for batch, count in self._read():
            total += count
            yield batch, count
        if total != self._own_examples:
            raise ValueError(f"batches: expected the same {self._own_examples} examples on every pass, got {total}")

    @contextlib.contextmanager
    def evaluating(self, seed: int = 0) -> Iterator[None]:
        """The model in the risk's mode. Every submodule's own mode and all random states come back at the end.

        Every pass starts from the same seed, so a shuffling loader gives the same batches in the same order: an
        operator that keeps the graphs of the first batches and reads the others again counts each example once.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        # Attention's fast path, taken only without gradients, sets padded positions to zero: another function.
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        with preserved_random_states(seed, kinds.generators_of(self.batches)), exact_convolutions():
            try:
                torch.backends.mha.set_fastpath_enabled(False)
                self.model.train(self.mode == "train")
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast_attention)
                for module, training in modes:
                    module.training = training

    @torch.no_grad()
    def _require_average(self) -> None:
        parameters = self.space.named_views(self.space.vector())

        def loss_of(batch: Any) -> float:
            return float(kinds.batch_loss(self.loss_fn, self.output(parameters, batch), kinds.targets_of(batch)))

        with self.evaluating():
            require_average(loss_of, self.read(), tolerance_of(self.dtype))

    def _draw(self, max_examples: int, seed: int, least_batches: int = 1) -> None:
        before = sum(self.ranks.each(self._own_examples)[: self.ranks.rank])
        with self.evaluating():
            mine = self._read("cpu")
            self.batches = draw_subset(
                mine, self.num_examples, max_examples, seed, int(before), least_batches=least_batches
            )
        self.num_examples = self._count_all()

    def _count_all(self) -> int:
        """N over all processes; this process's own examples, which every pass must find again, and batches."""
        with self.evaluating():
            counts = [count for _, count in self._read()]
        self._own_examples, self.num_batches = sum(counts), len(counts)
        return int(self.ranks.total(self._own_examples)[0])

    def _read(self, device: torch.device | str | None = None) -> Iterator[tuple[Any, int]]:
        for batch in self.batches:
            count = int(self._count(batch))
            if count:  # an empty batch adds nothing, and its mean would be NaN
                yield kinds.to_device(batch, torch.device(device or self.device), self._cast), count

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"EmpiricalRisk({name}, {self.num_examples} examples, {self.space!r}, mode={self.mode!r})"
