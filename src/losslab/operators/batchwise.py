"""A model's loss on one batch after another, at any parameters: what operators are made of.

Everything is evaluated functionally (`torch.func.functional_call`) on tensors of our own, so the user's parameters,
`.grad`, `requires_grad`, buffers, train/eval modes and random states stay as they are.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from losslab.operators import batches as kinds
from losslab.operators.exact_convolutions import exact_convolutions
from losslab.operators.examples import Examples
from losslab.params import ParameterSpace
from losslab.random import preserved_random_states


class BatchwiseLoss:
    """L = Σ_b (batch b's share). `EmpiricalRisk` sets the attributes and adds what is computed over all batches."""

    model: nn.Module
    loss_fn: kinds.LossFunction | None
    mode: Literal["eval", "train"]
    space: ParameterSpace
    _examples: Examples
    _reduction: str
    _cast: torch.dtype | None

    @property
    def batches(self) -> Iterable[Any]:
        """The data."""
        return self._examples.batches

    @property
    def num_examples(self) -> int:
        """N, over all processes."""
        return self._examples.total

    @property
    def num_batches(self) -> int:
        """This process's own."""
        return self._examples.num_batches

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
        return self._examples.read(self.device, self._cast)

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
