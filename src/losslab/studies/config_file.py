"""Nested mappings from YAML and JSON files and from assignments such as "optimizer.lr=5e-4"."""

import re
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used. The message has one line for each problem."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, where PyYAML reads 5e-4, without a point, as text; and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As ever, but the second of two equal keys is refused instead of replacing the first."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$"
        r"|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


_SHAPE = "expected a mapping such as 'optimizer: {lr: 0.1}'"


def read_mapping(path: Path) -> dict[str, Any]:
    """The nested mapping that a YAML or JSON file holds.

    Raises:
        ConfigError: If the file is missing, empty, broken or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a configuration in YAML or JSON") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    values = _parse(text, str(path))  # JSON is YAML
    if values is None:
        raise ConfigError(f"{path}: the file is empty; {_SHAPE}")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {_SHAPE}, got {shown(values)}")
    return values


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}: not readable as YAML{where}: {what}") from None


def assign(values: dict[str, Any], assignment: str) -> None:
    """Carry out "a.b=c" on a nested mapping; c is YAML.

    Raises:
        ConfigError: If the assignment has another form, or `a` is not a mapping.
    """
    dotted, equals, text = assignment.partition("=")
    *sections, name = (part.strip() for part in dotted.split("."))
    if not equals or not all((*sections, name)):
        raise ConfigError(f"--set {assignment}: expected SECTION.KEY=VALUE, such as optimizer.lr=0.01")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {assignment}: {section!r} is not a section")
    values[name] = _parse(text, f"--set {assignment}")


def shown(value: Any) -> str:
    """A value for an error line: short whatever it is."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two plain trees differ, such as "optimizer.lr: 0.1 there, 0.2 now"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        prefix = f"{name}." if name else ""
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}")]
    return [] if old == new else [f"{name}: {shown(old)} there, {shown(new)} now"]
