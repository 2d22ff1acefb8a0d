"""An optimizer of the user's own: found, called, refused in a line; trained, stopped, tuned, compared as any other."""

import importlib
import json
import math
import sys

import pytest
import torch
import yaml
from typer.testing import CliRunner

from losslab import cli
from losslab.studies import checkpoint
from losslab.studies.batch_file import read_batch
from losslab.studies.compare.plan import make_plan
from losslab.studies.compare.rehearsal import rehearse
from losslab.studies.config import apply, from_assignments, make_config
from losslab.studies.config_file import ConfigError
from losslab.studies.optimizers import build_optimizer, evaluating, keeps_an_average
from losslab.studies.record import RunFolder
from losslab.studies.schedules import rate_factor
from losslab.studies.spaces import ANY_RATE, make_space, plain, space_of
from losslab.studies.train import train
from losslab.studies.tune import TuneOptions, tune

MODULE = '''
from collections import deque

import torch
from torch.optim import SGD, Optimizer

SIZE = 3


class Heavy(Optimizer):
    """Plain steps along a sum of gradients; its step takes no closure at all."""

    def __init__(self, params, lr, *, beta=0.5, powers=(1,)):
        if not 0 <= beta < 1:
            raise ValueError(f"beta: expected [0, 1),\\n got {beta}")
        assert isinstance(powers, tuple)
        super().__init__(params, {"lr": lr, "beta": beta, "powers": powers})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                total = self.state[p].setdefault("sum", torch.zeros_like(p))
                p.sub_(total.mul_(group["beta"]).add_(p.grad), alpha=group["lr"])


class Remembers(Heavy):
    def step(self):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["past"] = deque([1.0])


class Averaged(Heavy):
    """Schedule-free's form: it refuses to step before train() and after eval()."""

    training = False

    def eval(self):
        self.training = False
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.5)

    def train(self):
        self.training = True

    def step(self):
        assert self.training
        super().step()


class Twice(SGD):
    """SAM's form, on plain descent: the second gradient counts."""

    def first_step(self): ...

    def second_step(self): ...

    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()


class Rateless(Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {})


class Other:
    pass


class NoLr(Optimizer):
    def __init__(self, params, learning_rate):
        super().__init__(params, {"lr": learning_rate})


def groups(model, lr, share=0.1):
    *first, last = model.parameters()
    return Heavy([{"params": first}, {"params": [last], "lr": share * lr}], lr)


def rates_only(model, lr):
    return SGD(model.parameters(), lr)


def nothing(model, lr):
    return {}
'''
SMALL = {
    "dataset": {"batch_size": 16, "train_examples": 64, "eval_batch_size": 512},
    "model": {"name": "mlp", "width": 4, "hidden": 1},
    "training": {"epochs": 2, "device": "cpu", "eval_every": 3, "evaluate_test": False},
}
TIMES = ("seconds", "samples_per_second", "step_seconds", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def theirs(tmp_path_factory, monkeypatch):
    """The user's module, in the present folder."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "my_opts.py").write_text(MODULE)
    (folder / "broken.py").write_text("1 / 0")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "my_opts", raising=False)
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("my_opts", None)


def configured(name: str, options: dict | None = None, lr: float = 0.05, **sections):
    optimizer = {"name": f"module:{name}", "lr": lr, **({} if options is None else {"options": options})}
    return make_config({**SMALL, "optimizer": optimizer, **sections})


def outcome(folder: RunFolder) -> tuple:
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in folder.metrics()]
    return rows, checkpoint.load(folder, "last").weights


def same(one: tuple, other: tuple) -> bool:
    """NaN never equals itself, and there is none."""
    return one[0] == other[0] and all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


# What it is called with.


def test_a_class_is_given_the_parameters_and_a_function_the_model():
    network = torch.nn.Linear(3, 2)
    made = build_optimizer(configured("my_opts.Heavy", {"beta": 0.25, "powers": [1, 2]}).optimizer, network)
    assert type(made).__name__ == "Heavy"
    (group,) = made.param_groups
    assert (group["lr"], group["beta"], group["powers"]) == (0.05, 0.25, (1, 2))
    assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]
    first, last = build_optimizer(configured("my_opts.groups", {"share": 0.5}).optimizer, network).param_groups
    assert (first["lr"], last["lr"]) == (0.05, 0.025)
    assert last["params"][0] is network.bias


def test_torchs_own_is_the_row_of_the_table(tmp_path):
    """The same steps, the same metrics, under a schedule."""
    row = {"name": "adamw", "lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.1}
    schedule = {"name": "cosine", "warmup_steps": 2}
    config = make_config({**SMALL, "optimizer": row, "schedule": schedule})
    options = {"betas": [0.8, 0.9], "weight_decay": 0.1}
    own = configured("torch.optim.AdamW", options, lr=0.01, schedule=schedule)
    found = [outcome(train(c, RunFolder.create(tmp_path / str(i)))) for i, c in enumerate((config, own))]
    assert same(*found)


def test_every_group_keeps_its_share_of_the_rate(tmp_path):
    config = configured("my_opts.groups", {"share": 0.1}, schedule={"name": "linear"}, training={
        **SMALL["training"], "checkpoints": {"keep": 1}})  # fmt: skip
    folder = train(config, RunFolder.create(tmp_path / "run"))
    for step in range(8):
        saved = checkpoint.load(folder, f"step-{step + 1}").training["optimizer"]["param_groups"]
        factor = rate_factor(config.schedule, step, 8)
        assert [group["lr"] for group in saved] == pytest.approx([0.05 * factor, 0.005 * factor])


# Refusals.


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("my_opts.Heavi", {}, r"name: my_opts has no 'Heavi', did you mean 'Heavy'\?"),
        ("my_optz.Heavy", {}, "name: no module 'my_optz' here or on PYTHONPATH, for my_optz.Heavy"),
        ("broken.Heavy", {}, "name: broken cannot be imported: division by zero"),
        ("Heavy", {}, "name: expected module:path.to.Class, got 'module:Heavy'"),
        ("my_opts.SIZE", {}, r"name: expected a torch\.optim\.Optimizer, or a function .* at my_opts\.SIZE, got int"),
        (
            "my_opts.Other",
            {},
            r"name: expected a torch\.optim\.Optimizer, or a .* at my_opts\.Other, got another class",
        ),
        ("my_opts.nothing", {}, r"name: expected a torch\.optim\.Optimizer from my_opts\.nothing\(.*\), got dict"),
        ("my_opts.Heavy", {"bata": 1}, r"options\.bata: no argument of my_opts\.Heavy, did you mean 'beta'\?"),
        ("my_opts.Heavy", {"x": 1}, r"options\.x: no argument of my_opts\.Heavy, expected one of beta, powers"),
        ("my_opts.rates_only", {"x": 1}, r"options\.x: no argument of my_opts\.rates_only, and no others"),
        ("my_opts.Heavy", {"beta": 2}, r"options: my_opts\.Heavy failed with .*: ValueError: beta: .* \[0, 1\), got 2"),
        ("my_opts.NoLr", {}, r"name: expected an argument lr of my_opts\.NoLr, .*, got learning_rate"),
        ("my_opts.Rateless", {}, r"name: expected 'lr' in each of my_opts\.Rateless's param_groups"),
        (
            "torch.optim.LBFGS",
            {},
            r"name: expected a step\(\) that .*, got torch\.optim\.LBFGS's, which needs a closure",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(name, options, says):
    with pytest.raises(ValueError, match=rf"^optimizer\.{says}") as caught:
        build_optimizer(configured(name, options).optimizer, torch.nn.Linear(3, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weight_decay": 0.1}, "'weight_decay' is not passed to module:a.B: write it under optimizer.options"),
        ({"betas": [0.5, 0.5]}, "'betas' is not passed to module:a.B: write it under optimizer.options"),
        ({"options": {"lr": 1}}, "lr: write it beside them, as optimizer.lr, which the schedule multiplies"),
        ({"options": 3}, "expected a mapping or null, got 3"),
        ({"options": {"x": {1}}}, "expected numbers, texts, true, false, null, and lists and mappings of these"),
        ({"options": {"x": math.inf}}, "expected finite numbers, got inf"),
        ({"options": {"x": {3: 4}}}, "expected texts as names, got 3"),
        ({"name": "adamw", "options": {}}, "'options' does nothing in adamw: remove it"),
        ({"name": "a.B"}, "expected one of sgd, .*, schedule_free, module:path.to.Class, got 'a.B'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(values, says):
    with pytest.raises(ConfigError, match=says) as caught:
        make_config({"optimizer": {"name": "module:a.B", **values}})
    assert str(caught.value).startswith("configuration: optimizer")
    assert "\n" not in str(caught.value)


def test_the_stable_homotopy_rate_is_refused_and_the_founders_is_not(tmp_path):
    homotopy = {"name": "homotopy", "frequency": 2}
    with pytest.raises(ConfigError, match=r"schedule\.rule: stable needs .*; got module:my_opts\.Heavy; take another"):
        configured("my_opts.Heavy", schedule=homotopy)
    config = configured("my_opts.groups", schedule={**homotopy, "rule": "seed", "decay": "none"})
    folder = train(config, RunFolder.create(tmp_path / "run"))
    assert any(row["kind"] == "homotopy" for row in folder.metrics())


# A run of it.


def stopped(config, folder: RunFolder, step: int) -> RunFolder:
    """Killed after a step, and gone on with."""

    def progress(done: float, total: float, note: str) -> None:
        if done == step:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, folder, progress=progress)
    return train(config, folder, resume=True)


@pytest.mark.parametrize("name", ["Heavy", "groups", "Averaged", "Twice"])
def test_killed_and_resumed_it_is_the_same_bit_for_bit(name, tmp_path):
    config = configured(f"my_opts.{name}", training={**SMALL["training"], "checkpoints": {"every": 2}})
    whole = outcome(train(config, RunFolder.create(tmp_path / "whole")))
    assert same(outcome(stopped(config, RunFolder.create(tmp_path / "killed"), 5)), whole)
    assert RunFolder(tmp_path / "killed").config["optimizer"]["name"] == f"module:my_opts.{name}"


def test_a_state_that_no_checkpoint_holds_is_one_line(tmp_path):
    says = (
        r"^optimizer\.name: the state_dict of module:my_opts\.Remembers cannot .*: optimizer\.state\.0\.past: expected"
    )
    with pytest.raises(ValueError, match=rf"{says} tensors and plain values, got deque$"):
        train(configured("my_opts.Remembers"), RunFolder.create(tmp_path / "run"))
    assert not checkpoint.names(RunFolder(tmp_path / "run"))


def test_one_with_eval_and_train_is_judged_there_and_steps_from_where_it_was():
    network = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(configured("my_opts.Averaged").optimizer, network)
    assert keeps_an_average(optimizer)
    assert optimizer.training
    weight = network.weight.detach().clone()
    with evaluating(optimizer):
        assert torch.equal(network.weight, weight / 2)
        assert not optimizer.training
    assert torch.equal(network.weight, weight)
    assert optimizer.training


def test_sams_form_takes_its_gradient_by_the_closure(tmp_path):
    """Without a first step uphill the second gradient is the first: plain descent."""
    twice = outcome(train(configured("my_opts.Twice"), RunFolder.create(tmp_path / "twice")))
    plain_descent = outcome(train(configured("my_opts.rates_only"), RunFolder.create(tmp_path / "once")))
    assert same(twice, plain_descent)


# In configurations, tuning, batches, comparisons.


def test_options_are_set_one_by_one_and_come_back_from_a_file():
    config = from_assignments(["optimizer.name=module:my_opts.Heavy", "optimizer.options.powers=[1, 2]"])
    assert (config.optimizer.lr, config.optimizer.options) == (1e-3, {"powers": (1, 2)})
    assert make_config(json.loads(config.model_dump_json())) == config
    more = apply(config, {"optimizer.options.beta": 0.1})
    assert more.optimizer.options == {"powers": (1, 2), "beta": 0.1}
    assert apply(more, {"optimizer.name": "adamw"}).optimizer.options is None
    other = apply(more, {"optimizer.name": "module:my_opts.groups"}).optimizer
    assert (other.lr, other.options) == (1e-3, {})


def test_a_run_of_a_row_holds_no_options():
    """Runs from before they were there are gone on with."""
    assert make_config({}).model_dump(mode="json")["optimizer"].get("options") is None


def test_tuning_searches_its_options(tmp_path):
    space = make_space({
        "optimizer.lr": {"low": 1e-3, "high": 0.1, "log": True},
        "optimizer.options.beta": {"low": 0.0, "high": 0.9},
        "optimizer.options.powers": {"choices": [[1], [1, 2]]},
    })  # fmt: skip
    base = configured("my_opts.Heavy", {"beta": 0.5, "powers": [1]}, lr=0.01)
    tuned = tune(base, tmp_path / "study", TuneOptions(space=space, trials=3, pruner="none"))
    first, *others = tuned.trials
    assert first.parameters == {"optimizer.lr": 0.01, "optimizer.options.beta": 0.5, "optimizer.options.powers": (1,)}
    assert all(0 <= trial.parameters["optimizer.options.beta"] <= 0.9 for trial in others)
    best = make_config(yaml.safe_load((tmp_path / "study" / "best.yaml").read_text()))
    assert best == tuned.best
    assert best.optimizer.options["beta"] == tuned.best_trial.parameters["optimizer.options.beta"]


def test_its_own_space_is_the_rate():
    space = space_of("module:my_opts.Heavy")
    assert plain(space) == {"optimizer.lr": {"low": ANY_RATE.low, "high": ANY_RATE.high, "log": True}}
    TuneOptions(space=space).check(configured("my_opts.Heavy"))


def test_the_command_and_a_batch_name_it(theirs):
    small = ["--architecture", "mlp", "--set", "model.width=4", "--set", "dataset.train_examples=32"]
    arguments = ["--optimizer", "module:my_opts.Heavy", "--lr", "0.02", "--set", "optimizer.options.beta=0.9"]
    result = CliRunner().invoke(cli.app, ["train", *small, *arguments, "--epochs", "1", "--quiet", "--output", "run"])
    assert result.exit_code == 0, result.output
    wanted = {"name": "module:my_opts.Heavy", "lr": 0.02, "options": {"beta": 0.9}}
    assert wanted.items() <= RunFolder("run").config["optimizer"].items()
    (theirs / "batch.json").write_text(json.dumps({
        "defaults": {"optimizer": {"name": "module:my_opts.Heavy", "options": {"beta": 0.1, "powers": [2]}}},
        "runs": [{"name": "a"}, {"name": "b", "optimizer": {"options": {"beta": 0.2}}}],
    }))  # fmt: skip
    batch = read_batch(theirs / "batch.json")
    assert batch.problems == ()
    assert [entry.config.optimizer.options["beta"] for entry in batch.entries] == [0.1, 0.2]
    assert batch.entries[1].config.optimizer.options["powers"] == (2,)


def planned(*names: str, **base):
    optimizers = [{"name": name.rpartition(".")[2], "changes": {"optimizer.name": name}} for name in names]
    return make_plan({"base": {**SMALL, "seed": 100, **base}, "optimizers": optimizers})


def test_a_plan_names_it():
    plan = planned("adamw", "module:my_opts.Heavy")
    assert plan.space("Heavy") == {"optimizer.lr": ANY_RATE}
    assert plan.start("Heavy").optimizer.name == "module:my_opts.Heavy"
    assert rehearse(plan) == 359  # of digits validate


def test_a_plan_is_rehearsed_before_anything_is_written(theirs):
    """A name that is not there, an optimizer that does not fit the network, and data that fail all alike."""
    before = sorted(theirs.iterdir())
    with pytest.raises(ConfigError) as caught:
        rehearse(planned("adamw", "module:my_opts.Heavi", "module:my_opts.nothing"))
    first, second = str(caught.value).splitlines()
    assert first.startswith("Heavi: optimizer.name: my_opts has no 'Heavi'")
    assert second.startswith("nothing: optimizer.name: expected a torch.optim.Optimizer")
    bert = {"name": "bert", "changes": {"model.name": "bert_tiny"}}
    with pytest.raises(ConfigError, match=r"^bert: model\.name: bert_tiny takes texts, got \(1, 8, 8\)"):
        rehearse(make_plan({"base": {**SMALL, "seed": 100}, "optimizers": [{"name": "sgd"}, bert]}))
    with pytest.raises(ConfigError, match=r"^adamw, sgd: dataset\.name: none\.npz is not there"):
        rehearse(planned("adamw", "sgd", dataset={"name": "arrays:none.npz"}))
    (theirs / "plan.yaml").write_text(yaml.safe_dump({
        "base": {**SMALL, "seed": 100},
        "optimizers": [{"name": name, "changes": {"optimizer.name": name}} for name in ("sgd", "adamw")]
        + [{"name": "mine", "changes": {"optimizer.name": "module:my_opts.Nix"}}],
    }))  # fmt: skip
    result = CliRunner().invoke(cli.app, ["compare", "plan.yaml", "--output", "study", "--quiet"])
    assert str(result.exception).startswith("mine: optimizer.name: my_opts has no 'Nix'")
    found = {path for path in theirs.iterdir() if path.name != "__pycache__"}
    assert found == {*before, theirs / "plan.yaml"} - {theirs / "__pycache__"}
