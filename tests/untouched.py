"""One check for "touch nothing": parameters, buffers, .grad, modes, requires_grad and random states."""

import contextlib
import random

import numpy as np
import torch
from torch import nn


def snapshot(model: nn.Module) -> dict:
    return {
        "tensors": {k: (v.detach().clone(), v.data_ptr()) for k, v in model.state_dict(keep_vars=True).items()},
        "grads": {k: None if p.grad is None else (id(p.grad), p.grad.clone()) for k, p in model.named_parameters()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "leaf": {k: p.is_leaf and p.grad_fn is None for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }


@contextlib.contextmanager
def assert_untouched(model: nn.Module):
    """The model and the global states are after the block what they were before, whatever it raised."""
    # Something to lose: a mixed mode, a gradient, random states that are not fresh.
    modules = list(model.modules())
    modules[-1].train(not modules[0].training)
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.full_like(first, 0.5)
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    before = snapshot(model)
    try:
        yield
    finally:
        after = snapshot(model)
        for what in ("requires_grad", "leaf", "modes", "hooks", "grad mode", "python"):
            assert after[what] == before[what], what
        for name, (value, pointer) in before["tensors"].items():
            assert torch.equal(after["tensors"][name][0], value), name
            assert after["tensors"][name][1] == pointer, name
        for name, grad in before["grads"].items():
            now = after["grads"][name]
            assert (grad is None) == (now is None), name
            if grad is not None:
                assert grad[0] == now[0], name
                assert torch.equal(grad[1], now[1]), name
        assert torch.equal(after["torch"], before["torch"])
        assert all(np.array_equal(a, b) for a, b in zip(after["numpy"], before["numpy"], strict=True))
