"""Trainings at the rates of a scheduler: on a bowl of known curvature, and on a few examples."""

import torch
from torch import nn
from torch.optim import SGD

from cases import classes, normal
from losslab.optim import HomotopyLR
from quadratics import Quadratic, turned

VALUES = torch.cat([torch.linspace(0.5, 6.0, 9), torch.tensor([10.0])]).double()
X, Y = normal(24, 4), classes(24)


def bowl() -> Quadratic:
    return Quadratic(turned(VALUES))


def train(model: nn.Module, optimizer, scheduler, steps: int, loss=None) -> list[float]:
    """The first group's rate before each step."""
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.zero_grad()
        (loss or model)().backward()
        optimizer.step()
        scheduler.step()
    return rates


def made(model: nn.Module, lr: float = 1.0, make=SGD, **settings) -> tuple:
    optimizer = make(model.parameters(), lr=lr)
    return optimizer, HomotopyLR(optimizer, settings.pop("loss", model), **settings)
