"""A configuration is read exactly, and refused in one line a problem."""

import json

import pytest

from losslab.studies.config import load_config, make_config
from losslab.studies.config_file import ConfigError
from losslab.studies.sections import RunConfig


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def problems(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_defaults_and_values(write):
    config = load_config(write("name: first\noptimizer:\n  name: adamw\n  betas: [0.9, 0.99]\n"))
    assert config.name == "first"
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.training == RunConfig().training


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("1E+3", 1e3), ("+2e0", 2.0), (".5", 0.5), ("1.", 1.0), ("1.5e-4", 1.5e-4), ("3", 3.0)],
)
def test_numbers_without_a_point_are_numbers(write, text, value):
    assert load_config(write(f"optimizer: {{lr: {text}}}")).optimizer.lr == value
    assert load_config(write("{}"), [f"optimizer.lr={text}"]).optimizer.lr == value


@pytest.mark.parametrize("text", ["e5", "1e", "5e-", "1.2.3", "2026-01-01", "'5e-4'"])
def test_what_is_no_number_stays_none(write, text):
    (line,) = problems(write(f"optimizer: {{lr: {text}}}"))
    assert line.startswith("optimizer.lr: expected a number > 0, got ")


def test_json_is_read_too(write):
    config = load_config(write(json.dumps({"optimizer": {"lr": 5e-4, "momentum": 0.9}}), "run.json"))
    assert (config.optimizer.lr, config.optimizer.momentum) == (5e-4, 0.9)


def test_dumped_configuration_comes_back_equal():
    training = {"snapshots": {"every": 5, "steps": [1, 2]}}
    config = make_config({"optimizer": {"name": "adamw", "lr": 1, "betas": [0.8, 0.9]}, "training": training})
    assert make_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_overrides_apply_in_order_and_parse_as_yaml(write):
    path = write("optimizer: {lr: 0.1}\ntraining:\n")
    overrides = [
        "optimizer.lr=0.2",
        "optimizer.lr = 0.3",
        "training.max_steps=7",
        "name=x",
        "model.batch_norm=true",
    ]
    config = load_config(path, [*overrides, "training.clip_norm=null"])
    assert config.optimizer.lr == 0.3
    assert config.training.max_steps == 7
    assert config.training.clip_norm is None
    assert config.name == "x"
    assert config.model.batch_norm is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer: {momentun: 0.9}", "optimizer.momentun: unknown key, did you mean 'momentum'?"),
        ("modle: {}", "modle: unknown key, did you mean 'model'?"),
        ("training: {epochs: many}", "training.epochs: expected an integer >= 1, got 'many'"),
        ("training: {epochs: 0}", "training.epochs: expected an integer >= 1, got 0"),
        ("training: {epochs: 1.5}", "training.epochs: expected an integer >= 1, got 1.5"),
        ("training: {epochs: true}", "training.epochs: expected an integer >= 1, got True"),
        ("training: {clip_norm: -1}", "training.clip_norm: expected a number > 0 or null, got -1"),
        ("training:", "training: expected a mapping, got null"),
        ("model: 3", "model: expected a mapping, got 3"),
        ("model: {batch_norm: 1}", "model.batch_norm: expected true or false, got 1"),
        ("dataset: {name: 3}", "dataset.name: expected a text, got 3"),
        ("name: a/b", "name: expected a name of letters, digits, '.', '_' and '-', got 'a/b'"),
        ("optimizer: {lr: .inf}", "optimizer.lr: expected a finite number > 0, got inf"),
        ("optimizer: {lr: .nan}", "optimizer.lr: expected a finite number > 0, got nan"),
        ("optimizer: {momentum: 1}", "optimizer.momentum: expected a number >= 0 and < 1, got 1"),
        (
            "schedule: {name: cosinus}",
            "schedule.name: expected one of 'constant', 'cosine', 'linear', 'cooldown', 'one_cycle', 'homotopy', got "
            "'cosinus'; did you mean 'cosine'?",
        ),
        (
            "schedule: {name: steps}",
            "schedule.name: expected one of 'constant', 'cosine', 'linear', 'cooldown', 'one_cycle', 'homotopy', got "
            "'steps'",
        ),
        (
            "{optimizer: {name: sam}, training: {precision: 16-mixed}}",
            "training.precision: sam cannot scale its two gradients; expected bf16-mixed or 32-true",
        ),
        ("dataset: {vocabulary: [1]}", "dataset.vocabulary: expected an integer >= 1 or a text, got [1]"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: expected a list of two numbers, got [0.9]"),
        ("optimizer: {betas: 0.9}", "optimizer.betas: expected a list of two numbers, got 0.9"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas.1: expected a number >= 0 and < 1, got 1"),
        ("optimizer: {name: adamw, momentum: 0.9}", "optimizer: 'momentum' does nothing in adamw: remove it"),
        (
            "training: {snapshots: {every: 0}}",
            "training.snapshots.every: expected an integer >= 1 or null, got 0",
        ),
        (
            "training: {snapshots: {steps: [0, -1]}}",
            "training.snapshots.steps.1: expected an integer >= 0, got -1",
        ),
        (
            "training: {snapshots: {steps: 50}}",
            "training.snapshots.steps: expected a list of numbers, each an integer >= 0, got 50",
        ),
        ("training: {snapshots: 50}", "training.snapshots: expected a mapping, got 50"),
        ("training: {snapshots: {evry: 5}}", "training.snapshots.evry: unknown key, did you mean 'every'?"),
        ("optimizer: {nesterov: true}", "optimizer: 'nesterov' needs a momentum > 0"),
        ("", "the file is empty; expected a mapping such as 'optimizer: {lr: 0.1}'"),
        ("# nothing", "the file is empty; expected a mapping such as 'optimizer: {lr: 0.1}'"),
        ("[1, 2]", "expected a mapping such as 'optimizer: {lr: 0.1}', got [1, 2]"),
        ("seed: 2026-13-01", "not readable as YAML: month must be in 1..12"),
        ("{[1]: 2}", "not readable as YAML at line 1, column 2: found unhashable key"),
        ("a: b: c", "not readable as YAML at line 1, column 5: mapping values are not allowed here"),
    ],
)
def test_every_problem_is_one_clear_line(write, text, expected):
    assert problems(write(text)) == [expected]


def test_far_key_lists_the_choices(write):
    assert problems(write("probes: {zzz: 1}")) == [
        "probes.zzz: unknown key, expected one of split, examples, batch_size"
    ]
    (line,) = problems(write("1: 2"))
    assert line.startswith("1: unknown key, expected one of name, seed, dataset")


def test_all_problems_are_told_at_once(write):
    lines = problems(write("seed: -1\ntraining: {epochs: 0}\nfoo: 1"))
    assert {line.split(":")[0] for line in lines} == {"seed", "training.epochs", "foo"}


def test_long_values_are_cut(write):
    (line,) = problems(write(f"model: {{width: {'x' * 500}}}"))
    assert len(line) < 120


def test_same_key_twice_is_refused(write):
    (line,) = problems(write("seed: 1\nseed: 2"))
    assert "'seed'" in line
    assert "line 2" in line


def test_missing_file_and_folder(tmp_path):
    assert problems(tmp_path / "no.yaml") == ["no such file; expected a configuration in YAML or JSON"]
    (line,) = problems(tmp_path)
    assert line.startswith("cannot be read as text")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr", "--set lr: expected SECTION.KEY=VALUE"),
        ("=1", "--set =1: expected SECTION.KEY=VALUE"),
        ("optimizer..lr=1", "--set optimizer..lr=1: expected SECTION.KEY=VALUE"),
        ("seed.x=1", "--set seed.x=1: 'seed' is not a section"),
        ("optimizer.lr=[1", "--set optimizer.lr=[1: not readable as YAML"),
        ("optimizer.lr=", "optimizer.lr: expected a number > 0, got null"),
        ("optimizer.rl=1", "optimizer.rl: unknown key, did you mean 'lr'?"),
    ],
)
def test_bad_overrides(write, override, expected):
    (line,) = problems(write("seed: 1"), [override])
    assert line.startswith(expected)


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 3  # type: ignore[misc]
