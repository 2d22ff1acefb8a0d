"""Networks whose permutations are known by hand, each with a batch: what alignment's tests share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cases import classes, gen, normal, seeded
from losslab.operators.risk import EmpiricalRisk


class ResidualStages(nn.Module):
    """Two residual blocks on one stream, then a shortcut convolution to a second, wider stream."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3, padding=1)
            )
            for _ in range(2)
        )
        self.down, self.shortcut = nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(torch.relu(self.down(x) + self.shortcut(x)).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, GroupNorm, and channels that are concatenated and split."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.gate = nn.Conv2d(20, 10, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        y = torch.tanh(self.depthwise(self.grouped(x)))
        left, right = self.gate(torch.cat([x, y], 1)).chunk(2, dim=1)
        return self.head((left * torch.sigmoid(right)).mean((2, 3)))


class Attention(nn.Module):
    """One transformer block with separate projections and a tied head, and tokens as input."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def flattened() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(5, 3))


def conv_norm() -> nn.Module:
    first = [nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4)]
    return nn.Sequential(*first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def images() -> Tensor:
    return normal(8, 1, 6, 6)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {  # network, inputs, classes
    "MLP": (perceptron, lambda: normal(8, 4), 3),
    "conv and BatchNorm": (conv_norm, images, 3),
    "residual": (ResidualStages, images, 3),
    "flatten": (flattened, images, 3),
    "attention": (Attention, lambda: classes(8, 5, num=7), 7),
    "grouped": (Grouped, images, 3),
}


def net_risk(name: str, dtype: torch.dtype = torch.float64) -> EmpiricalRisk:
    """The network with BatchNorm statistics that are not the initial ones, in two unequal batches."""
    build, inputs, num = NETS[name]
    model = seeded(build)
    x = inputs() if not inputs().is_floating_point() else inputs().to(dtype)
    model.to(dtype)(x)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=gen(5), dtype=torch.float64).to(dtype))
    y = classes(8, num=num)
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x[:5], y[:5]), (x[5:], y[5:])], check=False)


def other(risk: EmpiricalRisk, scale: float = 0.3) -> dict[str, Tensor]:
    """A state that differs from the risk's model."""
    return {
        name: tensor + scale * torch.rand(tensor.shape, generator=gen(i), dtype=torch.float64).to(tensor.dtype)
        for i, (name, tensor) in enumerate(risk.model.state_dict().items())
        if tensor.is_floating_point()
    }
