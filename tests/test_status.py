"""One progress count over parts; checksums of what a computation depends on; any form of a solution by name."""

import numpy as np
import torch
from torch import nn

from losslab.params import state_of
from losslab.probes.partial import PartialFile, checksum
from losslab.status import Stages


def told(stages_and_calls) -> list[tuple[float, float, str]]:
    seen: list[tuple[float, float, str]] = []
    stages_and_calls(lambda *call: seen.append(call))
    return seen


def test_each_part_moves_the_whole_by_its_share():
    def run(progress):
        stages = Stages(progress, 10)
        first = stages.stage(6)
        first(1, 2, "half")
        first(5, 2, "beyond its total")
        second = stages.stage(4, name="second", expected=8)
        second(2, 100, "a limit only")
        stages.stage(0)(0, 0, "nothing to do")

    assert told(run) == [
        (3, 10, "half"),
        (6, 10, "beyond its total"),
        (6, 10, "second  "),
        (7, 10, "second  a limit only"),
        (10, 10, "nothing to do"),
    ]


def test_nobody_is_told_nothing():
    assert Stages(None, 3).stage(1, name="first") is None


def test_checksums_see_values_kinds_and_bounds():
    one = torch.arange(4.0)
    parts = [
        (one,),
        (one.double(),),
        (one + 1,),
        (one.numpy()[:2], one.numpy()[2:]),
        ("a", "b"),
        ("ab",),
        (1, np.zeros(1)),
        (1.0, np.zeros(1)),
    ]
    assert len({checksum(*part) for part in parts}) == len(parts)
    assert checksum(one.reshape(2, 2).T.contiguous().T) == checksum(one)  # values in order, whatever the layout
    assert checksum(torch.tensor(2.0), nn.Parameter(one)) == checksum(torch.tensor(2.0), one)


def test_a_state_has_parameters_and_all_buffers_of_any_form():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_buffer("hidden", torch.ones(1), persistent=False)
    state = state_of(model)
    assert {"0.weight", "1.running_mean", "hidden"} <= state.keys()
    assert not any(tensor.requires_grad for tensor in state.values())
    assert state_of(torch.compile(model)).keys() == state.keys()
    assert state_of(model.state_dict()).keys() == state.keys() - {"hidden"}
    assert state_of(torch.zeros(3)) == {}


def test_a_partial_file_is_written_now_and_then_and_knows_its_computation(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("losslab.probes.partial.time.monotonic", lambda: now[0])
    file = PartialFile(tmp_path / "below" / "part.npz", "mine")
    assert not file.is_due()
    now[0] += 2.1
    assert file.is_due()
    file.save({"x": np.arange(3)})
    assert not file.is_due()
    np.testing.assert_array_equal(PartialFile(file.path, "mine").load()["x"], [0, 1, 2])
    assert PartialFile(file.path, "another's").load() == {}
    file.remove()
    assert file.load() == {}
    assert not PartialFile(None, "").is_due()
