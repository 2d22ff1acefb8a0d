"""REPAIR (Jordan et al. 2023): the units of a network between two others vary again as much as theirs do."""

import torch
from torch import Tensor, nn

from losslab.operators.batch_statistics import own_batch_statistics
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.permutations.permutations import PermutationSpec, groups_of
from losslab.probes.permutations.tracing import module_calls

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Statistics = dict[str, list[tuple[int, Tensor, Tensor]]]  # layer -> for each call: samples, means, deviations


class Repair:
    """Sets the mean and deviation of each channel to the linear mix of the two networks': μ_α = (1−α)μ_a + αμ_b.

    Averaged weights give units that hardly vary, since what two units do differently cancels (variance collapse). Each
    linear and convolutional layer with a bias, whose outputs can be permuted, gets its rows scaled and its bias moved;
    weights that are used twice stay. BatchNorm does the same by itself once its statistics are recomputed.

    All layers are corrected in one pass: each batch's outputs are brought to the mix of what both networks make of the
    same batch, so that later layers see repaired inputs, and the correction is then computed from all batches. Between
    equal networks it changes nothing.

    Args:
        risk: Whose data and model.
        spec: Tells the layers whose outputs are units.
        a: Parameters and running statistics by name.
        b: The same of the other network, permuted.

    Cost: two forward passes, and one for each α.
    """

    def __init__(self, risk: EmpiricalRisk, spec: PermutationSpec, a: dict[str, Tensor], b: dict[str, Tensor]):
        self.risk = risk
        every = [id(parameter) for _, parameter in risk.model.named_parameters(remove_duplicate=False)]
        self.layers = {
            name: -1 if isinstance(layer, nn.Linear) else 1
            for name, layer in risk.model.named_modules()
            if isinstance(layer, _LAYERS)
            and layer.bias is not None
            and every.count(id(layer.weight)) == every.count(id(layer.bias)) == 1
            and {_name(name, "weight"), _name(name, "bias")} <= set(risk.space.names)
            and groups_of(spec.layouts[_name(name, "weight")][:1])
        }
        self.states = [{name: state[name] for name in spec.layouts if name in state} for state in (a, b)]
        self.ends = [self._statistics(state) for state in self.states]

    @torch.no_grad()
    def point(self, alpha: float) -> Tensor:
        """The repaired network between the two, (P,)."""
        first, second = self.states
        state = {name: torch.lerp(first[name], second[name], alpha) for name in first}
        seen = self._statistics(state, alpha)
        for name in seen:
            mean, deviation = _pooled(seen[name])
            ends = [_pooled(end[name]) for end in self.ends]
            scale = _ratio((1 - alpha) * ends[0][1] + alpha * ends[1][1], deviation)
            goal = (1 - alpha) * ends[0][0] + alpha * ends[1][0]
            weight, bias = state[_name(name, "weight")], state[_name(name, "bias")]
            state[_name(name, "bias")] = ((bias - mean) * scale + goal).to(bias.dtype)
            state[_name(name, "weight")] = (weight * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
        return self.risk.space.vector_of(state)

    @torch.no_grad()
    def _statistics(self, state: dict[str, Tensor], alpha: float | None = None) -> Statistics:
        """Of each layer's outputs at every call; with `alpha` these are then brought to the mix of the ends'."""
        seen: Statistics = {}

        def left(name: str, output: Tensor) -> Tensor | None:
            if name not in self.layers:
                return None
            values = output.double().movedim(self.layers[name], 0).flatten(1)
            mean, deviation = values.mean(1), values.std(1, correction=0)
            calls = seen.setdefault(name, [])
            calls.append((values.shape[1], mean, deviation))
            if alpha is None:
                return None
            (_, mean_a, deviation_a), (_, mean_b, deviation_b) = (end[name][len(calls) - 1] for end in self.ends)
            scale = _ratio((1 - alpha) * deviation_a + alpha * deviation_b, deviation)
            shape = [1] * output.ndim
            shape[self.layers[name]] = -1
            goal = (1 - alpha) * mean_a + alpha * mean_b
            return ((output - mean.view(shape)) * scale.view(shape) + goal.view(shape)).to(output.dtype)

        risk = self.risk
        with risk.evaluating(), own_batch_statistics(risk.model), module_calls(risk.model, lambda name: None, left):
            for batch, _ in risk.read():
                risk.output({name: tensor.clone() for name, tensor in state.items()}, batch)
        return seen


def _pooled(calls: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and deviation over all calls."""
    weights = torch.tensor([count for count, _, _ in calls], dtype=torch.float64)
    means, deviations = torch.stack([mean for _, mean, _ in calls]), torch.stack([std for _, _, std in calls])
    weights = (weights / weights.sum()).to(means.device)[:, None]
    mean = (weights * means).sum(0)
    return mean, (weights * (deviations**2 + (means - mean) ** 2)).sum(0).sqrt()


def _ratio(goal: Tensor, deviation: Tensor) -> Tensor:
    """By what a channel is scaled; one that never varies is left alone."""
    return torch.where(deviation > 1e-12 * goal, goal / deviation.clamp_min(1e-300), 1.0)


def _name(layer: str, what: str) -> str:
    return f"{layer}.{what}".lstrip(".")
