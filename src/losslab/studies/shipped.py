"""The configurations that come with losslab, by name."""

import re
from pathlib import Path

import losslab
from losslab.studies.config_file import ConfigError
from losslab.studies.section import suggestion


def shipped_configs(kind: str = "") -> dict[str, Path]:
    """Name -> file. In an installed package they lie inside it, in a checkout two folders above.

    Args:
        kind: The folder of those that are more than one run's configuration: "batch" or "compare".
    """
    package = Path(losslab.__file__).parent
    for folder in (package / "configs", package.parents[1] / "configs"):
        if folder.is_dir():
            files = [path for path in sorted((folder / kind).glob("*")) if path.suffix in (".yaml", ".json")]
            return {path.stem: path for path in files}
    raise FileNotFoundError(f"{package / 'configs'}: the shipped configurations are missing; install losslab again")


def purpose(path: Path) -> str:
    """What a YAML configuration is for: the first sentence of the comment that opens it."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    text = " ".join(comment)
    return re.split(r"(?<=[.?!]) ", text, maxsplit=1)[0]


def find_config(name_or_path: str, kind: str = "") -> Path:
    """A shipped configuration by its name, or any other by its path.

    Raises:
        ConfigError: It is neither a file nor written like one's name.
    """
    known, path = shipped_configs(kind), Path(name_or_path)
    if name_or_path not in known and not path.suffix and not path.exists():
        raise ConfigError(f"{name_or_path}: no such file or shipped configuration, {suggestion(name_or_path, known)}")
    return known.get(name_or_path, path)
