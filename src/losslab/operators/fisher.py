"""Fisher: the Fisher information of the model's own predictions, by labels drawn from them."""

import hashlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from losslab.operators import batches as kinds
from losslab.operators.gauss_newton import OutputCurvature, OutputGraph
from losslab.operators.likelihoods import likelihood_of
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.risk_operator import RiskOperator
from losslab.random import make_generator


class Fisher(RiskOperator):
    """How fast do the model's predictions change with the parameters? Estimated by labels drawn from them.

    F = (1/N) Σᵢ E_{y ~ p(·|xᵢ, θ)} [∇log p ∇log pᵀ], the mean taken over `num_samples` labels y for each example. They
    are drawn once, when this is made, so all products are with one and the same matrix. Its expectation over the labels
    is the exact Fisher information, which for these losses is `GaussNewton`, at the same cost (Martens 2020): take that
    unless samples are what you want. The empirical Fisher, `GradientCovariance(centred=False)`, takes the data's labels
    instead, and is another matrix.

    The loss says what p is: softmax for CrossEntropyLoss, σ for BCEWithLogitsLoss, a normal distribution about the
    output with variance ½ for MSELoss, whose −log p is then (f − y)² + constant. Where an example has several labels
    (positions of a sequence, outputs of a regression) they are independent given x, and each enters by its own
    ∇log p ∇log pᵀ, weighted as the loss weighs it: products of different labels have expectation zero. Targets are read
    only for `ignore_index`.

    Args:
        risk: Where. Its `loss_fn` is one of these three, or `cross_entropy`, `binary_cross_entropy_with_logits` or
            `mse_loss` of `torch.nn.functional`, without weights.
        num_samples: Labels for each example. The error of F falls with its root; the cost of a product stays.
        seed: Of the labels; or a generator. Labels depend on it and on what is in a batch, not on the order of batches,
            `graph_memory`, the processes that share the data, or the precision (beyond rounding of p).

    Cost: drawing is one pass forwards; then as `GaussNewton`.

    Raises:
        ValueError: Another loss, class weights, class probabilities as targets, outputs that are not one tensor.
        RuntimeError: An operation cannot be differentiated a second time; the message names its module.
    """

    def __init__(self, risk: EmpiricalRisk, *, num_samples: int = 1, seed: int | torch.Generator = 0):
        require_risk(risk)
        if type(num_samples) is not int or num_samples < 1:
            raise ValueError(f"num_samples: expected a number >= 1, got {num_samples!r}")
        self.num_samples = num_samples
        self._labels = _Labels(risk, num_samples, seed)
        self.kind = partial(OutputGraph, curvature=self._labels.scatter)
        super().__init__(risk)


class _Labels:
    """The labels drawn for each batch, under what is in the batch."""

    def __init__(self, risk: EmpiricalRisk, num_samples: int, seed: int | torch.Generator):
        self._likelihood = likelihood_of(risk.loss_fn)
        self._mean = kinds.reduction_of(risk.loss_fn) == "mean"
        self._salt = int(torch.randint(2**62, (), generator=make_generator(seed)))
        self.drawn: dict[int, Tensor] = {}
        leaves = risk.space.named_views(risk.space.vector())
        with risk.evaluating(), torch.no_grad():
            for batch, _ in risk.read():
                self._draw(risk.output(leaves, batch), batch, num_samples)

    def _draw(self, output: Any, batch: Any, num_samples: int) -> None:
        outputs, targets = _tensors(output, batch)
        self._likelihood.weights(outputs, targets, mean=self._mean)  # refuses what does not fit
        key = self._key(batch)
        drawn = self._likelihood.draw(outputs, num_samples, make_generator(key))
        if not torch.equal(self.drawn.setdefault(key, drawn), drawn):
            raise ValueError(
                "batches: expected the model's inputs to be tensors, got two batches that differ only in what is none; "
                "use GaussNewton, whose labels need not be found again"
            )

    def scatter(
        self, risk: EmpiricalRisk, leaves: dict[str, Tensor], output: Any, batch: Any, count: int
    ) -> OutputCurvature:
        """D = Σ w r rᵀ over the terms of a batch, r the gradient of −log p with respect to the outputs."""
        outputs, targets = _tensors(output, batch)
        drawn = self.drawn.get(self._key(batch))
        if drawn is None:
            raise ValueError(
                "batches: expected those for which labels were drawn when Fisher was made, got another one; "
                "pass list(batches) or a loader that does not shuffle"
            )
        point = outputs.detach()
        product = self._likelihood.scatter(point, drawn)
        weights = risk.batch_weight(count) * self._likelihood.weights(point, targets, mean=self._mean)
        # Chances or squared residuals, and classes as int64.
        return OutputCurvature(outputs, lambda along: weights * product(along), point.nbytes + 2 * drawn.nbytes)

    def _key(self, batch: Any) -> int:
        """A seed for a batch, from the bits of its tensors; real numbers as float32, the same in any precision."""
        digest = hashlib.blake2b(str(self._salt).encode(), digest_size=7)  # torch takes seeds below 2⁶³
        for tensor in kinds.tensors_of(batch):
            values = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
            values = (values.float() if values.is_floating_point() else values).cpu().contiguous()
            digest.update(str(tuple(values.shape)).encode() + values.numpy().tobytes())
        return int.from_bytes(digest.digest(), "big")


def _tensors(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    targets = kinds.targets_of(batch)
    if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
        got = f"{type(output).__name__} and {type(targets).__name__}"
        raise ValueError(
            f"batches: expected a model that returns a tensor and targets that are one, got {got}; "
            "use GaussNewton, which takes any output"
        )
    return output, targets
