"""Small float64 problems of every kind the risk must handle, each with its loss written plainly on the whole data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators.risk import EmpiricalRisk


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def classes(*shape: int, num: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(num, shape, generator=gen(seed))


@dataclass
class Case:
    """A model, its loss, its batches, and `whole(parameters)`: the same mean loss without batching."""

    model: nn.Module
    loss_fn: Any
    batches: list[Any]
    whole: Callable[[dict[str, Tensor]], Tensor]
    kwargs: dict[str, Any]

    def risk(self, **kwargs: Any) -> EmpiricalRisk:
        return EmpiricalRisk(self.model, self.loss_fn, self.batches, **(self.kwargs | kwargs))

    def reference_hessian(self, risk: EmpiricalRisk) -> Tensor:
        def loss(vector: Tensor) -> Tensor:
            return self.whole(risk.space.named_views(vector))

        with sdpa_kernel(SDPBackend.MATH):
            # torch.func.hessian is not symmetric where there is a LayerNorm (torch 2.13: its backward under vmap), and
            # central differences of the gradient agree with the loop.
            if any(isinstance(m, nn.LayerNorm) for m in self.model.modules()):
                return torch.autograd.functional.hessian(loss, risk.space.vector())
            return torch.func.hessian(loss)(risk.space.vector())

    def reference_gradient(self, risk: EmpiricalRisk) -> Tensor:
        return torch.func.grad(lambda v: self.whole(risk.space.named_views(v)))(risk.space.vector())


def split(sizes: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(sizes) for t in tensors), strict=True))


def paired(
    model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, sizes: list[int], scale: float = 1.0, **kwargs: Any
) -> Case:
    """(inputs, targets) batches of the given sizes."""
    model = model.double().eval()

    def whole(parameters: dict[str, Tensor]) -> Tensor:
        return loss_fn(functional_call(model, parameters, (x,)), y) * scale

    return Case(model, loss_fn, split(sizes, x, y), whole, kwargs)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        return build()


def mlp(inputs: int = 4, outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)))


class Tied(nn.Module):
    """Encoder and decoder share one weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


class Unused(nn.Module):
    """Has a parameter that the loss never sees, and one that enters it linearly."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.idle = nn.Parameter(torch.ones(2))
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.body(x)


class Tokens(nn.Module):
    """Embedding, LayerNorm, self-attention: integer inputs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.norm(self.embedding(x))
        h, _ = self.attention(h, h, h, need_weights=False)
        return self.head(h.mean(1))


class Keyed(nn.Module):
    """Called by keywords, as transformers' models are; returns an object with .loss when it gets labels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, features, labels=None):
        logits = self.layer(torch.sin(features))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@dataclass(frozen=True)
class Record:
    """A user's own batch type."""

    x: Tensor
    y: Tensor


class OnRecords(nn.Module):
    """A model that takes the whole record."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, record):
        return torch.tanh(self.layer(record.x))


def keyed_case(loss_fn: Any) -> Case:
    model = seeded(Keyed).double()
    x, y = normal(7, 4), classes(7)
    batches = [{"features": a, "labels": b, "id": a[:, 0]} for a, b in split([3, 4], x, y)]

    def whole(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x, y))["loss"]

    return Case(model, loss_fn, batches, whole, {})


def record_case() -> Case:
    model = seeded(OnRecords).double()
    x, y = normal(7, 4), classes(7)

    def loss_fn(output: Tensor, record: Record) -> Tensor:
        return F.cross_entropy(output, record.y)

    def whole(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (Record(x, y),)), y)

    return Case(model, loss_fn, [Record(a, b) for a, b in split([3, 4], x, y)], whole, {})


def conv_batchnorm() -> nn.Module:
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3)]
    net = nn.Sequential(*layers)
    net(torch.randn(8, 1, 4, 4, generator=gen(3)))  # running statistics that are not the initial ones
    return net


class PerToken(nn.Module):
    """Outputs of shape (B, 5, C)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x))


def token_loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


CASES: dict[str, Callable[[], Case]] = {
    "ragged cross-entropy": lambda: paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]),
    "ragged MSE": lambda: paired(mlp(), nn.MSELoss(), normal(10, 4), normal(10, 3, seed=2), [3, 3, 3, 1]),
    "ragged BCE": lambda: paired(
        mlp(outputs=1), nn.BCEWithLogitsLoss(), normal(7, 4), classes(7, 1, num=2).double(), [3, 4]
    ),
    "sum reduction": lambda: paired(
        mlp(), nn.CrossEntropyLoss(reduction="sum"), normal(7, 4), classes(7), [3, 4], scale=1 / 7
    ),
    "tied weights": lambda: paired(seeded(Tied), nn.MSELoss(), normal(6, 4), normal(6, 4, seed=2), [4, 2]),
    "unused parameter": lambda: paired(seeded(Unused), nn.CrossEntropyLoss(), normal(6, 4), classes(6), [2, 4]),
    "embedding, norm, attention": lambda: paired(
        seeded(Tokens), nn.CrossEntropyLoss(), classes(5, 3, num=6), classes(5), [2, 3]
    ),
    "conv and BatchNorm": lambda: paired(
        seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2]
    ),
    "sequence outputs": lambda: paired(seeded(PerToken), token_loss, normal(5, 5, 4), classes(5, 5), [2, 3]),
    "dict batches": lambda: keyed_case(lambda output, batch: F.cross_entropy(output["logits"], batch["labels"])),
    "model with .loss": lambda: keyed_case(None),
    "dataclass batches": record_case,
    "chosen parameters": lambda: paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4], params="2.*"),
}
