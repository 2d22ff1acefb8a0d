"""Every command of docs/coming-from.md runs, in the order of its table, on small networks and small data.

The names in the commands are checked against the tables; what is trained is small: the pairs named there take a GPU.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from losslab import cli
from losslab.cli import measuring
from losslab.optim import FIXES
from losslab.studies.aliases import DROPPED, FLAGS, KEYS, NAMES, PROBES, SETTINGS, SWITCHES, flag_assignments
from losslab.studies.config import from_assignments, load_config
from losslab.studies.data import DATASETS
from losslab.studies.models import MODELS
from losslab.studies.record import RunFolder
from losslab.studies.sections import RunConfig
from losslab.studies.spaces import SPACES, TALT_FIXES

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from.md").read_text(encoding="utf-8")
LATER = "the pages in this folder; notebooks come later"
FOUNDING = """\
seed: 42
device: auto
dataset: {name: CIFAR10, root: data, train_batch: 128, eval_batch: 256}
model: {name: small_cnn, num_classes: 10}
optimizer: {name: sgd, lr: 0.01, momentum: 0.0, weight_decay: 5e-4}
train: {epochs: 12, save_dir: experiments/runs/sgd_seed42, save_name: checkpoint.pt}
probes: {out_dir: experiments/runs/sgd_seed42/probes}
"""
FEW = ["dataset.train_examples=64", "probes.examples=16", "training.max_steps=2"]
SMALL = ["dataset.name=digits", "model.name=mlp", "model.width=2", "schedule.warmup_steps=0"]
# Classes, fields and methods of the founders' header, and what their document runs.
HOMOTOPY = """
HomotopyLRScheduler Config base_lr target_curvature min_lr max_lr alpha warmup_steps adaptive_target target_percentile
step apply_to_optimizer get_current_lr get_current_curvature get_curvature_history export_metrics
HutchinsonConfig num_samples power_iterations power_iter_tol use_rademacher estimation_frequency ema_decay
CurvatureEstimator estimate hessian_vector_product estimate_trace_hutchinson estimate_spectral_norm_power
estimate_top_eigenvalues_lanczos CurvatureMetrics spectral_norm_hessian kappa_curv gradient_norm trace_hessian
required_mantissa_bits PerLayerHomotopyLR normalize_by_median register_layer get_layer_curvature update_layer
CurvatureAwareGradientClipper base_clip_norm curvature_target min_clip_norm clip_gradients
CurvatureAwareWarmup target_lr initial_lr_fraction curvature_threshold increase_factor max_warmup_steps is_complete
HomotopyOptimizer get_lr cmake test_homotopy_lr mnist_demo
"""
ALL_ON = [f"optimizer.talt.{fix}=true" for fix in FIXES]
# What follows a command, by its first words, so that it takes no time.
TINY = {
    "probe hessian_lanczos": ["num_nodes=8", "num_probes=1", "trace_samples=2"],
    "probe sgd_noise": ["tol=0.1"],
    "probe perturbation": ["resolution=5", "num_random=1"],
    "probe intrinsic_dim": ["steps=2", "num_seeds=1"],
    "probe interpolation": ["steps=3"],
    "probe auto_neb": ["num_nodes=3", "steps=1"],
}
# These have tests of their own: a batch and a tuning take processes, a study takes minutes, a board does not end.
ELSEWHERE = {
    "losslab batch": "test_batch",
    "losslab board": "test_board",
    "losslab demo homotopy": "test_cli_homotopy",
    "losslab study fourway": "test_fourway",
    "losslab show attention": "test_activations",
}


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}.*?(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL).group()


def rows(title: str) -> list[list[str]]:
    lines = [line.strip("|\n ").split(" | ") for line in section(title).splitlines() if line.startswith("| ")]
    return [cells for cells in lines if cells[0] != "there" and not cells[0].startswith("---")]


def commands(title: str) -> list[str]:
    return [code for _, here in rows(title) for code in re.findall(r"`(losslab [^`]*)`", here)]


def run(command: str) -> None:
    """A command of the page, small."""
    arguments = shlex.split(command)[1:]
    changes = TINY.get(" ".join(arguments[:2]), [])
    if arguments[0] in ("train", "analyze") and "--resume" not in arguments:
        changes = FEW if "--config" in arguments else [*FEW, *SMALL]
    if "--mixed-precision" in arguments:  # its feature maps are drawn: a convolution
        changes = [*changes, "model.name=simple_cnn"]
    for change in changes:
        arguments += ["--set", change]
    if "--n-trials" in arguments:
        arguments[arguments.index("--n-trials") + 1] = "2"
    quiet = [] if arguments[0] in ("report", "show") else ["--quiet"]
    result = CliRunner().invoke(cli.app, [*arguments, *quiet])
    assert result.exit_code == 0, (command, result.output, result.exception)


def flagged(optimizer: str, *changes: str) -> RunConfig:
    """The configuration that `--optimizer` stands for."""
    return from_assignments([*flag_assignments({"optimizer": optimizer}), *changes])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("title", "at_least"),
    [
        ("The evaluation framework", 8),
        ("The homotopy schedule", 1),
        ("The loss landscape framework", 5),
        ("The study of three optimizers", 9),
    ],
)
def test_every_command_of_the_page_runs(title, at_least, here, monkeypatch):
    monkeypatch.setattr(measuring, "finish", lambda folder: None)  # a page takes a second; `losslab report` makes one
    folder = here / "experiments" / "configs"
    folder.mkdir(parents=True)
    small = FOUNDING.replace("CIFAR10", "digits").replace("10}", "10, width: 2}")
    for name, momentum in (("sgd", 0.0), ("sgd_momentum", 0.9)):
        (folder / f"{name}.yml").write_text(small.replace("momentum: 0.0", f"momentum: {momentum}"))
    (folder / "adamw.yml").write_text(small.replace("name: sgd, ", "name: adamw, ").replace("momentum: 0.0, ", ""))
    found = commands(title)
    assert len(found) >= at_least
    for command in found:
        if not command.startswith(tuple(ELSEWHERE)):
            run(command)


def test_what_the_commands_leave(here):
    """The names of the first command are those of the run; the tuned one is trained."""
    run("losslab train --name mine --architecture resnet50 --dataset cifar100 --optimizer improved-talt --epochs 30")
    config = RunFolder("runs/mine").config
    assert (config["name"], config["optimizer"]["name"], config["training"]["epochs"]) == ("mine", "talt", 30)
    assert all(config["optimizer"]["talt"][fix] for fix in FIXES)
    search = "--optimizer improved-talt --tune-hyperparams --include-theoretical-fixes --n-trials 50"
    run(f"losslab train --name tuned {search}")
    assert RunFolder("runs/tuned/best").final is not None
    assert len(list(Path("runs/tuned/tuning/trials").iterdir())) == 2
    assert set(json.loads(Path("runs/tuned/tuning/tuning.json").read_text())["space"]) == {
        *SPACES["talt"], *TALT_FIXES,
    }  # fmt: skip


def test_an_optimizer_of_theirs_is_talt_with_all_fixes_or_with_none():
    assert flagged("improved-talt").optimizer == from_assignments(["optimizer.name=talt", *ALL_ON]).optimizer
    original = flagged("original-talt").optimizer
    assert original.talt.options().with_fixes(()) == original.talt.options()
    assert (original.name, original.lr, original.talt.structure) == ("talt", 0.1, "lowrank")
    assert flagged("Improved_TALT", "optimizer.talt.nesterov=false").optimizer.talt.nesterov is False


def test_a_flag_of_theirs_turns_the_fixes_on_over_what_a_file_says(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "optimizer: {name: talt, lr: 0.01, talt: {power: 0.25, gradient_smoothing: false}}"
    )
    for flag in ("enhanced_config", "use_all_theoretical_fixes"):
        config = load_config(tmp_path / "mine.yaml", flag_assignments({flag: True}))
        assert (config.optimizer.lr, config.optimizer.talt.power) == (0.01, 0.25)
        assert all(getattr(config.optimizer.talt, fix) for fix in FIXES)
        unchanged = load_config(tmp_path / "mine.yaml", flag_assignments({flag: False}))
        assert unchanged == load_config(tmp_path / "mine.yaml")
        with pytest.raises(ValueError, match=rf"^--{flag}: expected true or false, got 3$"):
            flag_assignments({flag: 3})


def test_what_is_said_wins_over_what_a_name_stands_for():
    for flags in ({"optimizer": "original-talt", "lr": 0.5}, {"lr": 0.5, "optimizer": "original-talt"}):
        assert from_assignments(flag_assignments(flags)).optimizer.lr == 0.5
    both = from_assignments(flag_assignments({"use_all_theoretical_fixes": True, "optimizer": "original-talt"}))
    assert both.optimizer.talt.structure == "lowrank"
    assert all(getattr(both.optimizer.talt, fix) for fix in FIXES)


def test_every_name_in_a_command_is_one_of_the_tables():
    named = {"architecture": MODELS, "model": MODELS, "dataset": DATASETS}
    checked = 0
    for command in re.findall(r"`(losslab [^`]*)`", PAGE):
        for flag, name in re.findall(r"--(architecture|model|dataset) (\S+)", command):
            plain = flag_assignments({"architecture": name})[0].partition("=")[2].strip('"')
            assert plain in named[flag], command
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("name", ["simplecnn", "resnet18", "resnet50", "vgg16", "efficientnet-b0", "bert-base"])
def test_every_architecture_of_the_founders_is_one_of_the_models(name):
    assert from_assignments(flag_assignments({"architecture": name})).model.name in MODELS


@pytest.mark.parametrize("name", ["cifar10", "CIFAR10", "cifar100", "glue-sst2", "mnist"])
def test_every_data_set_of_the_founders_is_one_of_the_data_sets(name):
    assert from_assignments(flag_assignments({"dataset": name})).dataset.name in DATASETS


def test_every_row_of_the_homotopy_schedule_runs(here):
    """What stands in backticks on the right, in the order of the table, after the lines above it."""
    (code,) = re.findall(r"```python\n(.*?)```", section("The homotopy schedule"), flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    ran = 0
    for _, cell in rows("The homotopy schedule"):
        for line in re.findall(r"`([^`]*)`", cell):
            if line != "backward()" and not line.startswith("losslab "):
                exec(line, names)
                ran += 1
    assert ran >= 50
    assert names["config"] == replace(names["HomotopyLRScheduler"].Config(), base_lr=0.01)  # the defaults are theirs
    assert names["hvp_config"] == names["HutchinsonConfig"]()
    assert Path("training_metrics.csv").read_text().startswith("step,loss,lr,curvature,")


def test_every_name_of_the_homotopy_schedule_is_in_its_table():
    there = " ".join(cells[0] for cells in rows("The homotopy schedule"))
    assert [name for name in HOMOTOPY.split() if not re.search(rf"\b{name}\b", there)] == []


def test_one_row_alone_waits_for_what_is_not_there_yet():
    assert [cells[0] for cells in rows("The loss landscape") if cells[1] == LATER] == [
        "`jupyter notebook` and five notebooks"
    ]
    assert "comes with" not in PAGE


def test_the_founding_yaml_is_read_as_it_is(tmp_path):
    (tmp_path / "sgd.yml").write_text(FOUNDING)
    config = load_config(tmp_path / "sgd.yml", ["training.epochs=3"])
    assert (config.name, config.seed) == ("sgd", 42)
    assert (config.dataset.name, config.dataset.batch_size, config.dataset.eval_batch_size) == ("cifar10", 128, 256)
    assert (config.model.name, config.optimizer.weight_decay) == ("simple_cnn", 5e-4)
    assert (config.training.device, config.training.epochs) == ("auto", 3)
    (tmp_path / "wrong.yml").write_text(FOUNDING.replace("lr: 0.01", "lr: fast"))
    with pytest.raises(ValueError, match=r"wrong\.yml: optimizer\.lr: expected a number > 0, got 'fast'"):
        load_config(tmp_path / "wrong.yml")


def test_the_page_names_all_that_is_read_otherwise():
    flags = [f"--{flag.replace('_', '-')}" for flag in (*FLAGS, *SWITCHES, "include_theoretical_fixes")]
    scripts = [name for name in PROBES if name not in ("lanczos", "neb")]  # short for two that are there
    settings = [f"--{name}" for table in SETTINGS.values() for name in table]
    spelled = [name for name in NAMES if name != "glue_sst2"]
    for name in (*flags, *KEYS, *DROPPED, *scripts, *settings, *spelled, "glue-sst2"):
        assert re.search(rf"{re.escape(name)}\b", PAGE), name
