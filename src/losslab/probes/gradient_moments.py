"""Sums over the examples' gradients in one pass: their mean, their sizes tensor by tensor, and partial sums."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.operators.example_gradients import ExampleJacobian, Examples, example_loss
from losslab.operators.risk import EmpiricalRisk
from losslab.random import make_generator
from losslab.status import Progress


@dataclass(frozen=True)
class GradientMoments:
    """Of the N examples' gradients gᵢ, in G random groups of equal sizes (to one a process); float64 on the host.

    Attributes:
        counts: (G,) examples in each group.
        squares: (G,) Σ‖gᵢ‖² over each group.
        sums: (G, P) Σgᵢ over each group, on the risk's device and in its accumulation dtype.
        tensor_squares: (T,) Σ‖gᵢ‖² of each parameter tensor's part, over all examples.
        tensor_means: (T,) ‖ḡ‖² of each parameter tensor's part.
    """

    counts: Tensor
    squares: Tensor
    sums: Tensor
    tensor_squares: Tensor
    tensor_means: Tensor


def gradient_moments(
    risk: EmpiricalRisk, num_groups: int, seed: int, progress: Progress | None = None
) -> GradientMoments:
    """Each example's gradient is made once, 32 MiB of them or one at a time, and let go.

    Of a loss that mixes examples it would be gradients of something else: `GradientCovariance` refuses such a risk.

    Returns:
        GradientMoments. Cost: the gradients of N examples one by one (1.3 g for convolutional nets, 6.5 g for nets of
        plain linear layers: benchmarks/results/example_gradients.md); memory G vectors.
    """
    labels = _labels(risk, num_groups, seed)
    sums = torch.zeros(num_groups, risk.space.size, dtype=risk.accumulation_dtype, device=risk.device)
    squares = torch.zeros(num_groups, len(risk.space.sizes), dtype=torch.float64, device=risk.device)
    leaves, done = risk.leaves(risk.space.vector()), 0
    with risk.evaluating():
        for number, (batch, count) in enumerate(risk.read()):
            jacobian = ExampleJacobian(risk, leaves, Examples(batch, count), example_loss(risk))
            for span in jacobian.spans():
                rows, mine = jacobian.rows(span).detach(), labels[done + span.start : done + span.stop].to(risk.device)
                sums.index_add_(0, mine, rows.to(sums.dtype))
                pieces = [piece.double().square().sum(dim=1) for piece in rows.split(risk.space.sizes, dim=1)]
                squares.index_add_(0, mine, torch.stack(pieces, dim=1))
                del rows, pieces
            done += count
            if progress is not None:
                progress(number + 1, risk.num_batches, "gradients one by one")
    counts = torch.bincount(labels, minlength=num_groups).double()
    counts, squares, sums = risk.ranks.sum(counts), risk.ranks.sum(squares).cpu(), risk.ranks.sum(sums)
    mean = sums.sum(dim=0).double() / risk.num_examples
    means = torch.stack([piece.square().sum() for piece in mean.split(risk.space.sizes)])
    return GradientMoments(counts, squares.sum(dim=1), sums, squares.sum(dim=0), means.cpu())


def _labels(risk: EmpiricalRisk, num_groups: int, seed: int) -> Tensor:
    """A group for each of this process's examples, whatever their order in the data."""
    with risk.evaluating():
        own = sum(count for _, count in risk.read())
    generator = make_generator(seed + risk.ranks.rank)  # other processes hold other examples
    return torch.randperm(own, generator=generator) % num_groups
