"""Search spaces: one for each optimizer, accepted by its configuration; read from YAML, refused in one line."""

import math
import subprocess
import sys

import pytest
import yaml

from losslab.studies.config import apply, make_config
from losslab.studies.config_file import ConfigError
from losslab.studies.optimizer_rows import NAMES, defaults
from losslab.studies.spaces import ANY_RATE, SPACES, TALT_FIXES, Choice, Range, make_space, plain, space_of


def test_every_optimizer_has_a_space():
    assert list(SPACES) == list(NAMES)


def test_the_rate_of_ones_own_is_searched_wherever_a_row_has_its_own():
    own = "module:torch.optim.RAdam"
    assert space_of(own) == space_of(own, "homotopy") == {"optimizer.lr": ANY_RATE}
    rates = [space["optimizer.lr"] for space in SPACES.values()]
    assert (min(rate.low for rate in rates), max(rate.high for rate in rates)) == (ANY_RATE.low, ANY_RATE.high)
    assert ANY_RATE.log
    with pytest.raises(ConfigError, match=r"^--include-theoretical-fixes: expected optimizer talt, .*, got module:"):
        space_of(own, with_fixes=True)


@pytest.mark.parametrize("name", SPACES)
def test_spaces_are_taken_by_the_configuration_and_hold_its_defaults(name):
    base = make_config({"optimizer": {"name": name}})
    space = SPACES[name]
    assert 2 <= len(space) <= 3
    for key, entry in space.items():
        values = (entry.low, entry.high) if isinstance(entry, Range) else entry.values
        for value in values:
            apply(base, {key: value})
        usual = defaults(name, None).get(key.partition(".")[2])
        if isinstance(entry, Choice):
            assert usual in entry.values
        elif usual is not None:
            assert entry.low < usual < entry.high
    rate = space["optimizer.lr"]
    assert rate.log
    assert math.log10(rate.high / rate.low) == pytest.approx(3)


def test_talts_fixes_are_searched_on_request_and_no_other_optimizers():
    assert space_of("talt") == SPACES["talt"]
    wide = space_of("talt", with_fixes=True)
    assert wide == {**SPACES["talt"], **TALT_FIXES}
    assert len(TALT_FIXES) == 8
    base = make_config({"optimizer": {"name": "talt"}})
    for key, entry in TALT_FIXES.items():
        section, _, fix = key.rpartition(".")
        assert (section, entry) == ("optimizer.talt", Choice((True, False)))
        for on in entry.values:
            assert getattr(apply(base, {key: on}).optimizer.talt, fix) is on
    with pytest.raises(ConfigError, match=r"^--include-theoretical-fixes: expected optimizer talt, .*, got adamw; "):
        space_of("adamw", with_fixes=True)


def test_yaml_makes_a_space_and_back():
    text = """
    optimizer.lr: {low: 1.0e-4, high: 0.1, log: true}
    optimizer.momentum: {low: 0, high: 0.9}
    dataset.batch_size: {choices: [32, 64]}
    optimizer.betas: {choices: [[0.9, 0.99], [0.9, 0.999]]}
    """
    space = make_space(yaml.safe_load(text))
    assert space == {
        "optimizer.lr": Range(1e-4, 0.1, log=True),
        "optimizer.momentum": Range(0, 0.9),
        "dataset.batch_size": Choice((32, 64)),
        "optimizer.betas": Choice(((0.9, 0.99), (0.9, 0.999))),
    }
    assert make_space(yaml.safe_load(yaml.safe_dump(plain(space)))) == space
    for each in SPACES.values():
        assert make_space(plain(each)) == each


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"low": 1, "high": 0.1}, "low: expected a number < high = 0.1, got 1; exchange them"),
        ({"low": 1, "high": 1}, "low: expected a number < high = 1, got 1; exchange them"),
        ({"low": 0, "high": 1, "log": True}, "low: expected a number > 0 where log is true, got 0"),
        ({"low": "1e-3", "high": 1}, "low: expected a finite number, got '1e-3'"),
        ({"low": False, "high": 1}, "low: expected a finite number, got False"),
        ({"low": 0, "high": float("inf")}, "high: expected a finite number, got inf"),
        ({"low": 0, "high": 1, "log": 1}, "log: expected true or false, got 1"),
        ({"low": 0}, "high: expected a finite number, got nothing"),
        ({"high": 1}, "low: expected a finite number, got nothing"),
        ({"low": 0, "hihg": 1}, "hihg: unknown key, did you mean 'high'?"),
        ({"choices": [1], "low": 0}, "low: unknown key, expected one of choices"),
        ({"choices": []}, "choices: expected a list of one value or more, got []"),
        ({"choices": "adam"}, "choices: expected a list of one value or more, got 'adam'"),
        ({"choices": [1, 2, 1]}, "choices: expected each value once, got 1 twice"),
        (0.1, "expected {low: ..., high: ..., log: ...} or {choices: [...]}, got 0.1"),
        ([0, 1], "expected {low: ..., high: ..., log: ...} or {choices: [...]}, got [0, 1]"),
    ],
)
def test_bad_entries_are_one_line_with_their_key(value, expected):
    with pytest.raises(ConfigError) as caught:
        make_space({"optimizer.lr": value, "seed": {"choices": [0]}}, source="tune.yaml: space")
    assert str(caught.value) == f"tune.yaml: space: optimizer.lr: {expected}"


def test_all_problems_are_told_and_empty_spaces_refused():
    with pytest.raises(ConfigError) as caught:
        make_space({"a": 1, "b": {"low": 2, "high": 1}})
    assert [line.split(":")[1].strip() for line in str(caught.value).splitlines()] == ["a", "b"]
    for nothing in ({}, None, 3):
        with pytest.raises(ConfigError, match=r"^space: expected a mapping such as 'optimizer\.lr: "):
            make_space(nothing)


def test_needs_no_torch():
    code = "import sys, losslab.studies.spaces; assert not {'torch', 'optuna', 'pytorch_optimizer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
