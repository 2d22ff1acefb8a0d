"""Results to files and back, exactly."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch

from losslab.records import decode, encode, from_record, to_record, write_atomically
from losslab.status import Status, worst


@dataclass(frozen=True)
class Inner:
    value: float
    samples: np.ndarray
    status: Status = Status.converged


@dataclass(frozen=True)
class Everything:
    number: float
    count: int
    flag: bool
    name: str
    status: Status
    shape: tuple[int, ...]
    grid: np.ndarray
    inner: Inner
    table: dict[str, Any]
    items: list[float]
    missing: float | None = None
    no_array: np.ndarray | None = None
    an_array: np.ndarray | None = None
    no_inner: Optional[Inner] = None  # noqa: UP045  # both spellings
    an_inner: Inner | None = None
    maybe_status: Status | None = None
    pair: tuple[float, float] | None = None


def example(**changes: Any) -> Everything:
    inner = Inner(-math.inf, np.array([1.5, math.nan, -math.inf], dtype=np.float32), Status.nonfinite)
    base = Everything(
        number=0.1 + 0.2,
        count=3,
        flag=True,
        name="größe",
        status=Status.budget_reached,
        shape=(2, 3),
        grid=np.linspace(0, 1, 5),
        inner=inner,
        table={"a": math.nan, "b": [1, None, math.inf], "c": {"d": False}},
        items=[1.0, math.nan],
    )
    return dataclasses.replace(base, **changes)


def round_trip(result: Any, path: Path) -> Any:
    """Through real files: strict JSON and npz without pickles."""
    values, arrays = to_record(result)
    path.joinpath("r.json").write_text(json.dumps(values, allow_nan=False))
    np.savez(path / "r.npz", **arrays)
    with np.load(path / "r.npz", allow_pickle=False) as loaded:
        return from_record(type(result), json.loads(path.joinpath("r.json").read_text()), dict(loaded))


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for item in dataclasses.fields(a):
            assert_same(getattr(a, item.name), getattr(b, item.name))
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)  # NaN equals NaN here
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)  # noqa: PLR0124


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"number": math.nan, "missing": math.inf},
        {"number": -0.0, "missing": 5e-324},
        {"an_array": np.arange(3), "an_inner": Inner(1.0, np.zeros((2, 0)))},
        {"maybe_status": Status.budget_reached, "pair": (math.nan, 1.0), "shape": ()},
        {"name": "", "table": {}, "items": []},
        {"name": "NaN"},
        {"name": "Infinity"},
    ],
    ids=lambda changes: ",".join(map(str, changes)) or "plain",
)
def test_round_trip_is_exact(tmp_path, changes):
    result = example(**changes)
    assert_same(round_trip(result, tmp_path), result)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int8", "uint8", "bool", "complex128", "<U3"]
)
@pytest.mark.parametrize("shape", [(3,), (2, 2), (0,), (0, 4), ()])
def test_arrays_of_every_type_and_shape(tmp_path, dtype, shape):
    array = np.ones(shape).astype(dtype)
    result = example(grid=array)
    assert_same(round_trip(result, tmp_path), result)


def test_nested_arrays_have_dotted_names():
    values, arrays = to_record(example(an_inner=Inner(1.0, np.arange(2))))
    assert set(arrays) == {"grid", "inner.samples", "an_inner.samples"}
    assert values["inner"] == {"value": "-Infinity", "status": "nonfinite"}
    assert values["no_inner"] is None


def test_numpy_scalars_become_pythons(tmp_path):
    values, _ = to_record(example(number=np.float32(0.5), count=np.int64(4), flag=np.bool_(False)))
    assert [type(values[k]) for k in ("number", "count", "flag")] == [float, int, bool]
    assert encode(np.float32("nan")) == "NaN"


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 0.5, True, None, "text", [1, [math.nan]], {"a": -math.inf}]
)
def test_encode_is_strict_json_and_decode_its_inverse(value):
    text = json.dumps(encode(value), allow_nan=False)
    assert_same(decode(json.loads(text)), value)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2), {1, 2}, 1j, object(), b"bytes", np.zeros(2), Path("x"), [torch.zeros(1)], {"a": {1}}],
    ids=lambda value: type(value).__name__,
)
def test_unknown_types_are_refused(value):
    with pytest.raises(TypeError, match="a record holds scalars, lists, dicts and NumPy arrays; got"):
        encode(value)


def test_a_record_of_an_older_version_takes_defaults():
    @dataclass(frozen=True)
    class New:
        value: float
        added: int = 7
        extra: list[int] = field(default_factory=list)

    assert from_record(New, {"value": 1.0}, {}) == New(1.0, 7, [])
    with pytest.raises(TypeError, match="value"):
        from_record(New, {}, {})


def test_an_unknown_status_is_an_error():
    with pytest.raises(ValueError, match="finished"):
        from_record(Inner, {"value": 1.0, "status": "finished"}, {"samples": np.zeros(1)})


def test_write_atomically(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"first")
    write_atomically(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_written_bytes_are_on_disk_before_the_rename(tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda _: seen.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(a).read_bytes()), replace(a, b)))
    write_atomically(tmp_path / "a", b"content")
    assert seen == ["fsync", b"content"]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "a", b"")


def test_status_messages_and_order():
    assert [status for status in Status if status.ok] == list(Status)[:3]
    assert len({status.message for status in Status}) == len(Status)
    assert str(Status.converged) == f"{Status.converged}" == json.loads(json.dumps(Status.converged)) == "converged"
    assert worst(Status.converged, Status.nonfinite, Status.budget_reached) is Status.nonfinite
    assert worst(Status.breakdown) is Status.breakdown
