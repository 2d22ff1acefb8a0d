"""A run's configuration read from YAML or JSON and checked, with errors that say what to do.

Needs no torch, so that a wrong configuration is refused at once.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from losslab.studies.config_file import ConfigError, assign, read_mapping, shown
from losslab.studies.sections import RunConfig, suggestion


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration from a YAML or JSON file.

    Args:
        path: The file. What it leaves out takes the defaults above.
        overrides: Assignments such as "optimizer.lr=5e-4", applied in order; the values are YAML.

    Raises:
        ConfigError: With one line for each problem: where, what was expected, what came.
    """
    values = read_mapping(Path(path))
    for assignment in overrides:
        assign(values, assignment)
    return make_config(values, source=str(path))


def make_config(values: Mapping[str, Any], *, source: str = "configuration") -> RunConfig:
    """Check plain values and make them a configuration; `source` opens the error lines.

    Raises:
        ConfigError: With one line for each problem.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"{source}: {_explain(problem)}" for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def _explain(problem: ErrorDetails) -> str:
    """One of pydantic's errors as `path: expected ..., got ...`."""
    location = problem["loc"]
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        *sections, unknown = location
        known = list(_schema_at(sections)["properties"])
        return f"{_dotted(location)}: unknown key, {suggestion(str(unknown), known)}"
    if problem["type"] == "value_error":
        return f"{_dotted(location)}: {problem['ctx']['error']}"
    if problem["type"] == "missing" and isinstance(location[-1], int):  # a list that is too short
        location = location[:-1]
    elif problem["type"] == "missing":
        return f"{_dotted(location)}: expected {_described(_schema_at(location))}, got nothing"
    expected = _described(_schema_at(location))
    if problem["type"] == "finite_number":
        expected = expected.replace("a number", "a finite number")
    return f"{_dotted(location)}: expected {expected}, got {shown(problem['input'])}"


def _schema_at(location: Iterable[int | str]) -> dict[str, Any]:
    """The JSON schema of one field: it knows type and bounds where only one was violated."""
    whole = RunConfig.model_json_schema()
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
    if "pattern" in schema:
        return "a name of letters, digits, '.', '_' and '-'"
    if "items" in schema:
        kind = "" if "enum" in schema["items"] else " of numbers"
        return f"a list{kind}, each {_described(schema['items'])}"
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([_NOUNS[schema["type"]], " and ".join(bounds)]).strip()


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
