"""Other names: those of earlier scripts, so that their command lines and files keep working.

docs/coming-from.md lists them. Needs no torch.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from losslab.optim.eigenspace.options import FIRST_VERSION, FIXES
from losslab.studies.config_file import ConfigError, shown
from losslab.studies.section import suggestion

PROBES = {
    "lanczos": "spectrum",
    "hessian_lanczos": "spectrum",
    "sgd_noise": "noise",
    "intrinsic_dim": "intrinsic_dimension",
    "auto_neb": "elastic_band",
    "neb": "elastic_band",
}
SETTINGS = {
    "intrinsic_dimension": {"d_sub": "dimension"},
    "elastic_band": {"n_nodes": "num_nodes", "iters": "steps"},
}
# A flag of `losslab train`, and a key of an experiment in a batch file -> the setting that it is.
FLAGS = {
    "name": "name",
    "seed": "seed",
    "architecture": "model.name",
    "dataset": "dataset.name",
    "batch_size": "dataset.batch_size",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "schedule": "schedule.name",
    "warmup_steps": "schedule.warmup_steps",
    "epochs": "training.epochs",
    "mixed_precision": "training.precision",
}
# The founding study's YAML files: their keys, and those that say nothing about a run's outcome.
KEYS = {
    "device": "training.device",
    "dataset.train_batch": "dataset.batch_size",
    "dataset.eval_batch": "dataset.eval_batch_size",
    "train.epochs": "training.epochs",
}
DROPPED = ("model.num_classes", "train.save_dir", "train.save_name", "probes.out_dir")
# Spelled otherwise there than the rule "lower case, _ for -" makes of them.
NAMES = {"simplecnn": "simple_cnn", "small_cnn": "simple_cnn", "glue_sst2": "sst2"}
NAMED = ("model.name", "dataset.name", "optimizer.name", "schedule.name")
# Two optimizers of theirs, and two flags that are true or false -> the settings of TALT that they are. The first TALT
# had none of the fixes, their code's numbers, and fixed thresholds: here what tells valleys and walls apart on digits.
ALL_FIXES = {f"optimizer.talt.{fix}": True for fix in FIXES}
VARIANTS: dict[str, dict[str, Any]] = {
    "improved_talt": ALL_FIXES,
    "original_talt": {
        "optimizer.lr": 0.1,  # their scripts' own, on the scale of gradients that nothing normalises
        **{f"optimizer.talt.{name}": value for name, value in FIRST_VERSION.items()},
    },
}
SWITCHES: dict[str, dict[str, Any]] = {
    "enhanced_config": ALL_FIXES,
    "use_all_theoretical_fixes": ALL_FIXES,
    "monitor_theoretical_fixes": {"training.monitor_talt": 100},
}


def probe_name(name: str) -> str:
    """The probe that a name stands for; unknown ones stay."""
    plain = name.replace("-", "_")
    return PROBES.get(plain, plain)


def assignments(probe: str, arguments: Iterable[str]) -> Iterator[str]:
    """`--k 3`, `--k=3` and `--recalibrate` as "k=3" and "recalibrate=true", under the probe's own names.

    Raises:
        ValueError: A value without a name.
    """
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"{argument}: expected --NAME VALUE with one of the probe's settings")
        name, given, value = argument[2:].partition("=")
        if not given:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        plain = name.replace("-", "_")
        yield f"{SETTINGS.get(probe, {}).get(plain, plain)}={value}"


def settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that flags stand for: {"batch-size": 128} is {"dataset.batch_size": 128}.

    Args:
        flags: By name, without dashes in front; None is not given. `mixed_precision` is true or false: bfloat16 inside
            the network's operations, float32 weights. So are `SWITCHES`.

    Raises:
        ConfigError: A flag that is not there, or one that is true or false and has another value.
    """
    found: dict[str, Any] = {}
    implied: dict[str, Any] = {}
    for name, value in flags.items():
        plain = name.replace("-", "_")
        if plain not in (*FLAGS, *SWITCHES):
            advice = suggestion(name, [flag.replace("_", "-") for flag in (*FLAGS, *SWITCHES)])
            raise ConfigError(f"--{name}: no such flag, {advice}; every setting has --set a.b=c")
        if plain in SWITCHES:
            implied |= _switched(name, value, SWITCHES[plain], flags.get("optimizer"))
        elif value is not None:
            found[FLAGS[plain]] = _value(FLAGS[plain], value)
    if (optimizer := str(found.get("optimizer.name"))) in VARIANTS:
        found = {**VARIANTS[optimizer], **implied, **found, "optimizer.name": "talt"}
    return {**implied, **found}


def _switched(name: str, value: Any, settings: dict[str, Any], optimizer: str | None) -> dict[str, Any]:
    if value and optimizer is not None and plain_name(str(optimizer)) not in ("talt", *VARIANTS):
        raise ConfigError(
            f"--{name.replace('_', '-')}: expected optimizer talt, got {optimizer}; leave one of them out"
        )
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"--{name}: expected true or false, got {shown(value)}")
    return settings if value else {}


def flag_assignments(flags: Mapping[str, Any]) -> list[str]:
    """`settings` as "optimizer.lr=0.1"; JSON's values are YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings(flags).items()]


def refuse_unknown(configuration: str | None, more: Iterable[str]) -> None:
    """Say what is wrong where a command was given more than the one configuration that it takes, or a flag for it.

    Raises:
        ConfigError: If it was.
    """
    found = [argument for argument in (configuration, *more) if argument is not None]
    for argument in found:
        if argument.startswith("--"):
            settings({argument.partition("=")[0].removeprefix("--"): None})
    if any(argument.startswith("-") for argument in found) or len(found) > 1:
        raise ConfigError(f"expected one configuration, got {' '.join(found)}")


def _value(key: str, value: Any) -> Any:
    if key == "training.precision" and isinstance(value, bool):
        return "bf16-mixed" if value else "32-true"
    return plain_name(value) if key in NAMED and isinstance(value, str) else value


def plain_name(name: str) -> str:
    """A model's, data set's or optimizer's name as the tables spell it; paths ("arrays:…", "module:…") stay."""
    plain = name if ":" in name else name.lower().replace("-", "_")
    return NAMES.get(plain, plain)


def is_founding(values: Mapping[str, Any]) -> bool:
    """Whether a configuration has the founding study's layout."""
    return any(_at(values, key) is not None for key in (*KEYS, *DROPPED))


def modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the founding study's layout in losslab's; what else it holds stays.

    The number of classes is the data's, and where things are written is `--output-dir`'s to say.
    """
    found: dict[str, Any] = {}
    for key, value in _leaves(values):
        if key not in DROPPED:
            *sections, name = KEYS.get(key, key).split(".")
            section = found
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = plain_name(value) if key in NAMED and isinstance(value, str) else value
    return found


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _at(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values.get(part, {}) if isinstance(values, Mapping) else {}
    return None if values == {} else values
