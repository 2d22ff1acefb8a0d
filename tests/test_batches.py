"""Batches of every usual kind: how they are read, counted and handed to model and loss."""

import collections
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import Record, normal
from losslab.operators import batches as kinds


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Nested:
    inner: Record
    name: str
    more: tuple[Tensor, ...]


A, B, C = torch.zeros(3, 2), torch.ones(3, 4), torch.arange(3)


@pytest.mark.parametrize(
    ("batch", "tensors"),
    [
        (A, [A]),
        ((A, C), [A, C]),
        ([A, (B, C)], [A, B, C]),
        ({"a": A, "b": {"c": C}, "text": "words"}, [A, C]),
        (Pair(A, C), [A, C]),
        (Record(A, C), [A, C]),
        ((Record(A, C), B), [A, C, B]),
        ({"record": Record(A, C)}, [A, C]),
        (Nested(Record(A, B), "name", (C,)), [A, B, C]),
        (collections.OrderedDict(b=B, a=A), [B, A]),
        ("words", []),
        (None, []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_tensors_are_found_and_replaced_in_order(batch, tensors):
    assert all(a is b for a, b in zip(kinds.tensors_of(batch), tensors, strict=True))
    changed = kinds.map_tensors(batch, lambda t: t + 1)
    assert type(changed) is type(batch)
    assert all(torch.equal(a, b + 1) for a, b in zip(kinds.tensors_of(changed), tensors, strict=True))
    assert all(a is b for a, b in zip(kinds.tensors_of(batch), tensors, strict=True))  # the batch itself is as it was
    assert all(t.device.type == "meta" for t in kinds.tensors_of(kinds.to_device(batch, torch.device("meta"))))


def test_what_is_not_a_tensor_stays():
    assert kinds.map_tensors(Nested(Record(A, B), "name", ()), torch.neg).name == "name"
    assert kinds.map_tensors({"text": "words"}, torch.neg) == {"text": "words"}


def test_count_examples():
    assert kinds.count_examples((A, C)) == 3
    assert kinds.count_examples({"scale": torch.tensor(2.0), "x": B}) == 3
    assert kinds.count_examples(Record(A[:0], C[:0])) == 0
    for bad in ((torch.tensor(1.0), "words"), {}, object(), (A.numpy(), C.numpy())):
        with pytest.raises(ValueError, match=r"a tensor with an example axis.*NumPy.*pass count_examples="):
            kinds.count_examples(bad)


def test_check_reiterable():
    loader = DataLoader(TensorDataset(A, C))
    for good in ([(A, C)], loader, ((A, C),), collections.deque([(A, C)]), A.split(2), [A, A.clone()]):
        kinds.check_reiterable(good)
    for one in ((A, C), [A, C], (A[:, 0], A)):  # another type, another number of axes
        with pytest.raises(TypeError, match=r"batches: expected a list of batches, .* pass \[\(x, y\)\]"):
            kinds.check_reiterable(one)
    for one_time in (iter([A]), (b for b in [A]), zip([A], [C], strict=True), map(str, []), iter(loader)):
        with pytest.raises(ValueError, match=r"one-time .*pass list\(batches\)"):
            kinds.check_reiterable(one_time)
    for single in (A, {"x": A}, "words"):
        with pytest.raises(TypeError, match="put it into a list"):
            kinds.check_reiterable(single)
    for not_batches in (3, None, TensorDataset(A)):
        with pytest.raises(TypeError, match="expected an iterable of batches such as a DataLoader"):
            kinds.check_reiterable(not_batches)


class Keyed(nn.Module):
    def forward(self, a, b=None, *, c=None):
        return {"a": a, "b": b, "c": c}


class Everything(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


@pytest.mark.parametrize(
    ("batch", "args", "kwargs", "targets"),
    [
        ((1, 2), (1,), {}, 2),
        ([1, 2], (1,), {}, 2),
        ((1, 2, 3), (1, 2), {}, 3),
        (({"a": 1}, 2), (), {"a": 1}, 2),
        (((1, 2), 3), (1, 2), {}, 3),
        (([1, 2], 3), (1, 2), {}, 3),
        ({"a": 1, "b": 2}, (), {"a": 1, "b": 2}, {"a": 1, "b": 2}),
        (1, (1,), {}, 1),
        ((1,), (1,), {}, (1,)),
        (Pair(1, 2), (Pair(1, 2),), {}, Pair(1, 2)),
        (Record(1, 2), (Record(1, 2),), {}, Record(1, 2)),
    ],
)
def test_calls(batch, args, kwargs, targets):
    assert kinds.call_model(Everything(), batch, Everything()) == (args, kwargs)
    assert kinds.targets_of(batch) == targets


def test_mappings_give_forward_only_what_it_names():
    model = Keyed()
    batch = {"a": 1, "c": 3, "id": 9}
    assert kinds.call_model(model, batch, model) == {"a": 1, "b": None, "c": 3}
    assert kinds.call_model(model, (batch, "target"), model) == {"a": 1, "b": None, "c": 3}
    unnamed = {"x": 1}
    assert kinds.call_model(model, unnamed, model)["a"] is unnamed


@pytest.mark.parametrize(
    ("loss_fn", "reduction"),
    [
        (nn.MSELoss(), "mean"),
        (nn.CrossEntropyLoss(reduction="sum"), "sum"),
        (F.mse_loss, "mean"),
        (functools.partial(F.mse_loss, reduction="sum"), "sum"),
        (functools.partial(F.mse_loss, reduction="mean"), "mean"),
        (functools.partial(nn.MSELoss(reduction="sum")), "sum"),
        (functools.partial(functools.partial(F.mse_loss, reduction="sum")), "sum"),
        (lambda output, target: output.sum(), "mean"),
        (None, "mean"),
    ],
)
def test_reduction(loss_fn, reduction):
    assert kinds.reduction_of(loss_fn) == reduction


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.MSELoss(reduction="none"),
        functools.partial(F.mse_loss, reduction="none"),
        functools.partial(nn.MSELoss(reduction="none")),
        nn.KLDivLoss(reduction="batchmean"),
    ],
)
def test_other_reductions_are_refused(loss_fn):
    with pytest.raises(ValueError, match=r"loss_fn: expected reduction 'mean' or 'sum', got '(none|batchmean)'"):
        kinds.reduction_of(loss_fn)


def test_batch_loss():
    class Output:
        loss = torch.tensor([2.0])

    assert kinds.batch_loss(None, Output(), None).shape == ()
    assert float(kinds.batch_loss(None, {"loss": torch.tensor(3.0)}, None)) == 3
    assert float(kinds.batch_loss(lambda o, t: o.sum() + t, torch.ones(2), 1)) == 3
    for output in (torch.ones(2), {"logits": torch.ones(2)}, {"loss": None}, object()):
        with pytest.raises(ValueError, match=r"must carry \.loss; it is a .* without"):
            kinds.batch_loss(None, output, None)
    for value, got in ((torch.ones(3), r"a tensor of shape \(3,\)"), (1.0, "float"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"expected one scalar tensor a batch, got {got}"):
            kinds.batch_loss(lambda o, t, value=value: value, None, None)


def test_generators_of_loaders():
    data, own = TensorDataset(normal(4, 1)), torch.Generator()
    other = torch.Generator()
    loader: Any = DataLoader(data, shuffle=True, generator=own)
    assert kinds.generators_of(loader) == [own]
    sampler = torch.utils.data.RandomSampler(data, generator=other)
    assert kinds.generators_of(DataLoader(data, sampler=sampler, generator=own)) == [own, other]
    batched = torch.utils.data.BatchSampler(sampler, 2, False)
    assert kinds.generators_of(DataLoader(data, batch_sampler=batched)) == [other]
    assert kinds.generators_of([(A, C)]) == kinds.generators_of(DataLoader(data, shuffle=True)) == []
