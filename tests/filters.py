"""Lengths of the filters of a vector of weights."""

import torch
from torch import Tensor

from losslab.params import ParameterSpace


def filter_norms(space: ParameterSpace, vector: Tensor) -> list[Tensor]:
    """The Euclidean norm of each filter: a tensor of shape (filters,) for each tensor that has filters."""
    return [torch.linalg.vector_norm(f, dim=(2, 3)).flatten() for f in space.filters(vector)]
