"""The networks of gpu.py, each with a batch of random data: residual networks for small images, and a small GPT."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


class Block(nn.Module):
    """Convolutions of the given (kernel, channels) around a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, layers: list[tuple[int, int]], stride: int):
        super().__init__()
        parts: list[nn.Module] = []
        sizes, out = [channels, *(c for _, c in layers)], layers[-1][1]
        strided = next(i for i, (kernel, _) in enumerate(layers) if kernel == 3)
        for i, (kernel, wide) in enumerate(layers):
            step = stride if i == strided else 1
            parts += [nn.Conv2d(sizes[i], wide, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        self.body = nn.Sequential(*parts[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(depths: list[int], *, bottleneck: bool, width: int = 64, classes: int = 10) -> nn.Sequential:
    """ResNet-18: [2, 2, 2, 2]; ResNet-50: [3, 4, 6, 3] with bottlenecks. A 3×3 stem, for images of 32×32."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage, depth in enumerate(depths):
        wide = width * 2**stage
        layers = [(1, wide), (3, wide), (1, 4 * wide)] if bottleneck else [(3, wide), (3, wide)]
        for i in range(depth):
            parts.append(Block(channels, layers, stride=2 if stage and not i else 1))
            channels = layers[-1][1]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.inwards, self.outwards = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.inwards(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.outwards(mixed.transpose(1, 2).reshape(batch, length, width))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and pre-normalisation (Radford et al. 2019)."""

    def __init__(self, vocabulary: int, context: int, *, layers: int, heads: int, width: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.attentions = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), Attention(width, heads)) for _ in range(layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocabulary, length), as cross_entropy takes them."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x).transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """A network, its loss, and a batch."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy


def cases(device: torch.device, *, smoke: bool) -> dict[str, Callable[[], Case]]:
    """Name -> a function that makes it on the device; tiny ones to try the script."""
    width, examples, pixels = (4, 4, 8) if smoke else (64, 512, 32)
    vocabulary, context, sequences = (31, 8, 2) if smoke else (10_000, 256, 32)
    shape = {"layers": 1, "heads": 2, "width": 16} if smoke else {"layers": 6, "heads": 6, "width": 384}

    def images(name: str, depths: list[int], bottleneck: bool, count: int) -> Case:
        torch.manual_seed(0)
        model = resnet(depths, bottleneck=bottleneck, width=width).to(device).eval()
        batch = (torch.randn(count, 3, pixels, pixels).to(device), torch.arange(count).to(device) % 10)
        return Case(f"{name}, {count} images of {pixels}×{pixels}", model, batch)

    def text() -> Case:
        torch.manual_seed(0)
        model = GPT(vocabulary, context, **shape).to(device).eval()
        tokens = torch.randint(vocabulary, (sequences, context + 1)).to(device)
        return Case(f"GPT, {sequences} × {context} tokens", model, (tokens[:, :-1], tokens[:, 1:]))

    return {
        "resnet18": lambda: images("ResNet-18", [1, 1, 1, 1] if smoke else [2, 2, 2, 2], False, examples),
        "resnet50": lambda: images("ResNet-50", [1, 1, 1, 1] if smoke else [3, 4, 6, 3], True, max(examples // 4, 2)),
        "gpt": text,
    }
