"""The configurations that come with losslab, by name."""

from pathlib import Path

import losslab


def shipped_configs() -> dict[str, Path]:
    """Name -> file. In an installed package they lie inside it, in a checkout two folders above."""
    package = Path(losslab.__file__).parent
    for folder in (package / "configs", package.parents[1] / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise FileNotFoundError(f"{package / 'configs'}: the shipped configurations are missing; install losslab again")


def find_config(name_or_path: str) -> Path:
    """A shipped configuration by its name, or any other by its path."""
    return shipped_configs().get(name_or_path, Path(name_or_path))
