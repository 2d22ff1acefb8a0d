"""A run's configuration read from YAML or JSON and checked, with errors that say what to do.

Needs no torch, so that a wrong configuration is refused at once.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from losslab.studies.aliases import is_founding, modern
from losslab.studies.config_file import ConfigError, assign, read_mapping, shown
from losslab.studies.schedule_section import EVERYWHERE, named, spelled
from losslab.studies.section import suggestion
from losslab.studies.sections import RunConfig, Section

Checked = TypeVar("Checked", bound=Section)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration from a YAML or JSON file.

    Args:
        path: The file. What it leaves out takes the defaults of `RunConfig`. One of the founding study's layout is
            read too (docs/coming-from.md); the run has the file's name then.
        overrides: Assignments such as "optimizer.lr=5e-4", applied in order; the values are YAML.

    Raises:
        ConfigError: With one line for each problem: where, what was expected, what came.
    """
    values = read_mapping(Path(path))
    if is_founding(values):
        values = {"name": Path(path).stem, **modern(values)}
    values = named(values)
    for assignment in overrides:
        assign(values, spelled(assignment))
    return make_config(values, source=str(path))


def from_assignments(assignments: Iterable[str]) -> RunConfig:
    """The defaults with assignments such as "optimizer.lr=5e-4", applied in order.

    Raises:
        ConfigError: With one line for each problem.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        assign(values, spelled(assignment))
    return make_config(values)


def make_config(values: Mapping[str, Any], *, source: str = "configuration") -> RunConfig:
    """Check plain values and make them a configuration; `source` opens the error lines.

    Raises:
        ConfigError: With one line for each problem.
    """
    return checked(RunConfig, values, source=source)


def checked(kind: type[Checked], values: Mapping[str, Any], *, source: str) -> Checked:
    """Check plain values and make them a section of any kind; `source` opens the error lines.

    Raises:
        ConfigError: With one line for each problem.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"{source}: {_explain(problem, kind)}" for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def apply(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with some values changed, and checked again as a whole.

    Another optimizer starts from its own defaults: nothing of the one before is left. Another schedule keeps the rise.

    Args:
        config: What to change; it is left as it is.
        changes: New values by dotted names, such as `{"optimizer.lr": 0.1}`.

    Raises:
        ConfigError: With one line for each name or value that a configuration does not take.
    """
    values, changes = config.model_dump(mode="json"), {spelled(dotted): value for dotted, value in changes.items()}
    if any(changes.get(f"optimizer.{key}", values["optimizer"][key]) != values["optimizer"][key] for key in _ROW):
        values["optimizer"] = {"name": config.optimizer.name}
    if changes.get("schedule.name", config.schedule.name) != config.schedule.name:
        values["schedule"] = {key: values["schedule"][key] for key in EVERYWHERE}
    for dotted, value in changes.items():
        *sections, name = dotted.split(".")
        branch = values
        for section in sections:
            if branch.get(section) is None:
                branch[section] = {}
            branch = branch[section]
            if not isinstance(branch, dict):
                raise ConfigError(f"{dotted}: {section!r} is not a section")
        branch[name] = value
    return make_config(values, source="changes")


def _explain(problem: ErrorDetails, kind: type[Section]) -> str:
    """One of pydantic's errors as `path: expected ..., got ...`."""
    location = problem["loc"]
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        *sections, unknown = location
        known = list(_schema_at(sections, kind)["properties"])
        return f"{_dotted(location)}: unknown key, {suggestion(str(unknown), known)}"
    if problem["type"] == "value_error":
        where = [_dotted(location)] if location else []  # a check of the whole says itself what it is about
        return ": ".join([*where, str(problem["ctx"]["error"])])
    if problem["type"] == "missing" and isinstance(location[-1], int):  # a list that is too short
        location = location[:-1]
    elif problem["type"] == "missing":
        return f"{_dotted(location)}: expected {_described(_schema_at(location, kind))}, got nothing"
    if "anyOf" in _schema_at(location[:-1], kind):  # pydantic names the choice that it tried
        location = location[:-1]
    expected = _described(_schema_at(location, kind))
    if problem["type"] == "finite_number":
        expected = expected.replace("a number", "a finite number")
    line = f"{_dotted(location)}: expected {expected}, got {shown(problem['input'])}"
    known = _schema_at(location, kind).get("enum", []) if problem["type"] == "literal_error" else []
    near = suggestion(str(problem["input"]), known)
    return f"{line}; {near}" if near.startswith("did you mean") else line


def _schema_at(location: Iterable[int | str], kind: type[Section]) -> dict[str, Any]:
    """The JSON schema of one field: it knows type and bounds where only one was violated."""
    whole = kind.model_json_schema()
    schema = whole
    for part in location:
        if isinstance(part, str):
            schema = schema["properties"][part]
        else:
            schema = schema["prefixItems"][part] if "prefixItems" in schema else schema["items"]
        schema = next((choice for choice in schema.get("anyOf", ()) if "$ref" in choice), schema)
        if "$ref" in schema:
            schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _described(schema: dict[str, Any]) -> str:
    """A schema in words, such as "an integer >= 1"."""
    if "anyOf" in schema:
        return " or ".join(_described(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(repr(choice) for choice in schema["enum"])
    if "const" in schema:
        return repr(schema["const"])
    if "pattern" in schema:
        return "a name of letters, digits, '.', '_' and '-'"
    if "items" in schema:
        kind = "" if "enum" in schema["items"] else " of numbers"
        return f"a list{kind}, each {_described(schema['items'])}"
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([_NOUNS[schema["type"]], " and ".join(bounds)]).strip()


_ROW = ("name", "base")  # what decides which settings act in an optimizer
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list of two numbers",
    "object": "a mapping",
    "null": "null",
}


def _dotted(location: Iterable[int | str]) -> str:
    return ".".join(str(part) for part in location)
