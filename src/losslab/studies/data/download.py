"""Fetching a data set: whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def download(name: str, root: Path, fetch: Callable[[Path], object], reuse: str | None = None) -> None:
    """Fetch into a temporary folder in `root` and move what came to `root`.

    A download that fails, or that Ctrl-C ends, leaves `root` as it was.

    Args:
        name: The data set's, for the error.
        root: Where the data set shall lie.
        fetch: Writes the data set into the folder that it is given.
        reuse: A pattern of files in `root` that `fetch` finds in its folder: archives that are there already.

    Raises:
        ValueError: If it fails, with the reason.
    """
    existed = root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            folder, replaced = Path(temporary) / "new", Path(temporary) / "old"
            folder.mkdir()
            replaced.mkdir()
            for archive in root.glob(reuse) if reuse else ():
                copied = folder / archive.relative_to(root)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(archive, copied)
            fetch(folder)
            for item in sorted(folder.iterdir()):
                if (root / item.name).exists():
                    os.replace(root / item.name, replaced / item.name)
                os.replace(item, root / item.name)
    except Exception as error:  # whatever a library's network layer raises: the user's next step is the same
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"dataset.download: {name} could not be fetched into {str(root)!r} ({reason}); nothing was kept"
        ) from error
    finally:
        if not existed and not any(root.iterdir()):
            root.rmdir()
