"""A batch file: many configurations in one, and every broken entry by its place and field. Needs no torch."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from losslab.studies.aliases import flag_assignments
from losslab.studies.config import make_config
from losslab.studies.config_file import ConfigError, assign, read_mapping, shown
from losslab.studies.schedule_section import named
from losslab.studies.section import suggestion
from losslab.studies.sections import RunConfig

KEYS = {"runs": ("description", "defaults", "runs"), "experiments": ("description", "experiments")}


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_Named)


@dataclass(frozen=True)
class Entry:
    """One run, and where in the file it stands, for messages."""

    source: str
    config: RunConfig


@dataclass(frozen=True)
class Batch:
    """What a batch file asks for.

    Attributes:
        description: What it is for, in the file's words.
        entries: The runs of all sound entries, with different names.
        problems: One line for each problem: which entry, which field, what was expected.
    """

    description: str
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]


def read_batch(path: str | Path) -> Batch:
    """Read a batch file in YAML or JSON.

    Its own form is `{"description", "defaults": {…}, "runs": [{…}, …]}`: each run is a configuration, laid over the
    defaults; a section that names another model, data set, optimizer or schedule than the defaults' replaces theirs
    whole. With `seeds: [0, 1, 2]` an entry is as many runs, "<name>-seed0" and so on. The other form is
    `{"description", "experiments": [{…}, …]}`, where each experiment holds flags of `losslab train` without dashes.

    Raises:
        ConfigError: The file cannot be read, or has neither form.
    """
    values, path = read_mapping(Path(path)), Path(path)
    form = "experiments" if "experiments" in values else "runs"
    for key in values:
        if key not in KEYS[form]:
            raise ConfigError(f"{path}: {key}: unknown key, {suggestion(str(key), KEYS[form])}")
    entries, defaults = values.get(form), values.get("defaults") or {}
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: {form}: expected a list of configurations, got {shown(entries)}")
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: defaults: expected a mapping, got {shown(defaults)}")
    sound: list[Entry] = []
    problems: list[str] = []
    for index, entry in enumerate(entries):
        source = f"{path}: {form}[{index}]"
        try:
            found = list(_entries(_plain(entry, form, source), defaults, source))
            _require_new_names([*sound, *found])
            sound += found
        except ConfigError as error:
            problems += str(error).splitlines()
    return Batch(str(values.get("description", "")), tuple(sound), tuple(problems))


def together(runs: Iterable[Named]) -> dict[str, list[Named]]:
    """Runs under the names of the entries that they were made of by `seeds`; any other under its own."""
    groups: dict[str, list[Named]] = {}
    for run in runs:
        groups.setdefault(re.sub(r"(?<=.)-seed\d+$", "", run.name), []).append(run)
    return groups


def _plain(entry: Any, form: str, source: str) -> dict[str, Any]:
    """An entry as a configuration, whatever the form."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{source}: expected a mapping, got {shown(entry)}")
    if form == "runs":
        return entry
    nested: dict[str, Any] = {}
    try:
        for assignment in flag_assignments(entry):
            assign(nested, assignment)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return nested


def _entries(values: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> Iterator[Entry]:
    """The runs of one entry: one, or one a seed."""
    values = _over(named(defaults), named(values))
    seeds = values.pop("seeds", None)
    if isinstance(name := values.get("name"), str):
        source = f"{source} ({name})"
    if seeds is None:
        yield Entry(source, make_config(values, source=source))
        return
    if not isinstance(seeds, list) or not seeds or "seed" in values:
        got = "both 'seed' and 'seeds'" if "seed" in values else shown(seeds)
        raise ConfigError(f"{source}: seeds: expected a list of integers such as [0, 1, 2], got {got}")
    for seed in seeds:
        config = make_config({**values, "seed": seed}, source=source)
        yield Entry(source, config.model_copy(update={"name": f"{config.name}-seed{seed}"}))


def _over(defaults: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry laid over the defaults, section by section."""
    merged = dict(defaults)
    for key, value in entry.items():
        below = defaults.get(key)
        if (
            isinstance(value, dict)
            and isinstance(below, dict)
            and value.get("name", below.get("name")) == below.get("name")
        ):
            merged[key] = _over(below, value)
        else:
            merged[key] = value
    return merged


def _require_new_names(entries: list[Entry]) -> None:
    """Each run has its folder, which its name names; not every file system tells Adam from adam."""
    taken: dict[str, str] = {}
    for entry in entries:
        name = entry.config.name
        if before := taken.get(name.casefold()):
            raise ConfigError(f"{entry.source}: name: {name!r} is taken by {before.rpartition(': ')[2]}")
        taken[name.casefold()] = entry.source
