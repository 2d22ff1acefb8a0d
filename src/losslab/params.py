"""ParameterSpace: a module's chosen parameters seen as one flat vector.

P is the number of entries; a vector has shape (P,), a stack of vectors (k, P).
"""

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

# A point of weight space as users hold it: a module, its state dict, or a vector of shape (P,).
Solution = nn.Module | Mapping[str, Tensor] | Tensor


def state_of(solution: Solution) -> dict[str, Tensor]:
    """Its parameters and buffers by name; nothing of a vector, which does not say."""
    if isinstance(solution, Tensor):
        return {}
    module = getattr(solution, "_orig_mod", solution)  # torch.compile's wrapper names them otherwise
    if isinstance(module, nn.Module):
        module = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    return {name: tensor.detach() for name, tensor in module.items() if isinstance(tensor, Tensor)}


class ParameterSpace:
    """The trainable parameters of a module, in `named_parameters` order, as coordinates of R^P.

    Tied weights count once (under their first name) and parameters with `requires_grad=False` are left out.

    Args:
        module: The network.
        select: Shell-style pattern or patterns on parameter names, for example `"layer4.*"`; None takes all.

    Raises:
        ValueError: No trainable parameter at all, none matched (the known names are listed), or mixed devices or
            dtypes.

    >>> space = ParameterSpace(nn.Linear(3, 2))
    >>> space.size, space.names
    (8, ('weight', 'bias'))
    """

    def __init__(self, module: nn.Module, select: str | Sequence[str] | None = None):
        self.module = module
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad and p.numel()}
        if not trainable:
            raise ValueError("model: expected at least one parameter with requires_grad=True, got none; unfreeze some")
        patterns = [select] if isinstance(select, str) else select
        chosen = trainable if patterns is None else _matching(trainable, patterns, _first_names(module))
        self.names = tuple(chosen)
        self.shapes = tuple(p.shape for p in chosen.values())
        self.sizes = tuple(p.numel() for p in chosen.values())
        self.size = sum(self.sizes)
        self._parameters = tuple(chosen.values())
        self._groups = _outputs_on_second_axis(module)
        for what in ("device", "dtype"):
            kinds = {getattr(p, what) for p in self._parameters}
            if len(kinds) > 1:
                names = sorted(map(str, kinds))
                raise ValueError(f"params: expected one {what} for all chosen parameters, got {names}; choose fewer")

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return self._parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return self._parameters[0].dtype

    def vector(self) -> Tensor:
        """A copy of the present values as one vector of shape (P,)."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    @torch.no_grad()
    def assign(self, vector: Tensor) -> None:
        """Write a vector into the module's parameters, in place."""
        for parameter, view in zip(self._parameters, self.views(self.check(vector)), strict=True):
            parameter.copy_(view)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The vector's pieces in the parameters' shapes, sharing its memory."""
        return [piece.view(shape) for piece, shape in zip(vector.split(self.sizes), self.shapes, strict=True)]

    def named_views(self, vector: Tensor) -> dict[str, Tensor]:
        """`views` under the parameters' names: what `torch.func.functional_call` takes."""
        return dict(zip(self.names, self.views(vector), strict=True))

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector from tensors in the parameters' shapes; None (a parameter that is not used) counts as zero."""
        pieces = [
            torch.zeros(size, dtype=self.dtype, device=self.device) if tensor is None else tensor.reshape(-1)
            for tensor, size in zip(tensors, self.sizes, strict=True)
        ]
        return torch.cat(pieces)

    def add_to(self, vector: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Add tensors in the parameters' shapes to a vector, in place; None counts as zero."""
        for view, tensor in zip(self.views(vector), tensors, strict=True):
            if tensor is not None:
                view.add_(tensor)

    def check(self, vector: Tensor, name: str = "vector") -> Tensor:
        """The vector itself if it has shape (P,), moved here if need be; else an error that says what was expected."""
        if not isinstance(vector, Tensor) or vector.shape != (self.size,):
            got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(f"{name}: expected a tensor of shape ({self.size},), one entry a parameter; got {got}")
        return vector.to(device=self.device, dtype=self.dtype)

    def vector_of(self, source: Solution, name: str = "vector") -> Tensor:
        """The point that another module of the same architecture, its state dict, or a vector stands for."""
        if isinstance(source, Tensor):
            return self.check(source, name)
        if not isinstance(source, nn.Module | Mapping):
            raise TypeError(f"{name}: expected a module, its state dict or a vector, got {type(source).__name__}")
        source = state_of(source)
        for key, shape in zip(self.names, self.shapes, strict=True):
            if key not in source or source[key].shape != shape:
                got = tuple(source[key].shape) if key in source else "nothing of that name"
                expected = f"{key!r} of shape {tuple(shape)}"
                raise ValueError(f"{name}: expected {expected}, got {got}; use the same architecture")
        return self.flatten([source[key].to(self.device, self.dtype) for key in self.names])

    def filters(self, vector: Tensor) -> list[Tensor]:
        """The filters of a vector: a tensor f of shape (g, r, i, n) for each weight that has any, sharing its memory.

        f[a, b] is one filter: all the weights that lead into one output (Li et al. 2018). That is a slice along the
        first axis of a tensor of two or more dimensions: a neuron of a linear layer, an output channel of a
        convolution, a token of an embedding; of a fused weight (attention's q, k and v, an LSTM's gates) each row is
        an output of its own. Transposed convolutions have their outputs on the second axis, in `groups` groups, and so
        has transformers' `Conv1D`. Tied weights are filters of the module that is named first. Slices of a single entry
        have no direction to normalise: such a tensor counts as one filter. Tensors of one dimension (biases, norm
        layers) have none and are passed over.
        """
        found = []
        for view, parameter in zip(self.views(vector), self._parameters, strict=True):
            if view.ndim < 2:
                continue
            groups = self._groups.get(id(parameter))
            outputs = view.shape[0] if groups is None else groups * view.shape[1]
            if outputs == view.numel():
                found.append(view.view(1, 1, 1, -1))
            elif groups is None:
                found.append(view.view(1, outputs, 1, -1))
            else:
                inputs = view.shape[0] // groups
                found.append(view.view(groups, inputs, outputs // groups, -1).transpose(1, 2))
        return found

    def norm(self) -> float:
        """‖θ‖ at the present values."""
        return float(torch.linalg.vector_norm(self.vector().double()))

    def __repr__(self) -> str:
        return f"ParameterSpace({self.size} entries in {len(self.names)} tensors)"


def _outputs_on_second_axis(module: nn.Module) -> dict[int, int]:
    """The weights of shape (inputs, outputs / groups, …), by identity, with their number of groups."""
    found = {}
    for layer in module.modules():
        if isinstance(layer, _ConvTransposeNd):
            found[id(layer.weight)] = layer.groups
        elif type(layer).__name__ == "Conv1D" and isinstance(getattr(layer, "weight", None), nn.Parameter):
            found[id(layer.weight)] = 1  # transformers' linear layer of GPT-2, not a convolution
    return found


def _matching(
    trainable: dict[str, nn.Parameter], patterns: Sequence[str], first_names: dict[str, str]
) -> dict[str, nn.Parameter]:
    known = ", ".join(list(trainable)[:8]) + (", …" if len(trainable) > 8 else "")
    if not patterns:
        raise ValueError(f"params: expected at least one name or pattern, got none; there are {known}")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in trainable):
            tied = [name for name in first_names if fnmatch.fnmatchcase(name, pattern)]
            if tied:
                raise ValueError(
                    f"params: {pattern!r} matches {tied[0]!r}, which is tied to {first_names[tied[0]]!r} and goes by "
                    f"that name; pass {first_names[tied[0]]!r}"
                )
            raise ValueError(f"params: no trainable parameter matches {pattern!r}; there are {known}")
    return {name: p for name, p in trainable.items() if any(fnmatch.fnmatchcase(name, q) for q in patterns)}


def _first_names(module: nn.Module) -> dict[str, str]:
    """The other names of tied parameters, each with the first."""
    firsts = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    every = module.named_parameters(remove_duplicate=False)
    return {name: firsts[id(p)] for name, p in every if id(p) in firsts and name != firsts[id(p)]}
