"""All runs of a folder in TensorBoard, also those that were trained without its files, and those still at work."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from losslab.studies.record import RunFolder
from losslab.studies.tensorboard import FOLDER, TensorBoard, package

SECONDS = 5.0  # from one look for new runs and rows to the next; TensorBoard's own pace


class Logdir:
    """A folder for TensorBoard with an entry for each run below a study folder, under the run's path there.

    Args:
        root: A run folder, or a folder that holds some at any depth.
        path: An empty folder to write to.

    Raises:
        FileNotFoundError: If there is no run.
    """

    def __init__(self, root: str | Path, path: str | Path) -> None:
        self.root, self.path = Path(root), Path(path)
        self._written: dict[str, tuple[TensorBoard, list[int]]] = {}  # for runs without files of their own: steps told
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; expected one that holds runs")
        if not self.runs():
            raise FileNotFoundError(f"{root}: no run folder in it; expected what `losslab train` wrote")

    def runs(self) -> dict[str, RunFolder]:
        """The runs by their path below the root."""
        # Not config.json, which other programs write too.
        found = [RunFolder(file.parent) for file in sorted(self.root.rglob("environment.json"))]
        return {self._name(run.path): run for run in found if run.is_run()}

    def refresh(self) -> None:
        """Take up new runs, and new rows of those that are there."""
        for name, run in self.runs().items():
            own, entry = run.path / FOLDER, self.path / name
            if name not in self._written and own.is_dir():
                if not entry.is_symlink():
                    entry.parent.mkdir(parents=True, exist_ok=True)
                    entry.symlink_to(own.resolve(), target_is_directory=True)
            else:
                self._convert(name, run)

    def _convert(self, name: str, run: RunFolder) -> None:
        """Write the rows that are new. A run that went on from a checkpoint takes some back."""
        sink, told = self._written.get(name) or (TensorBoard(self.path / name, run.config), [])
        rows = run.metrics()
        if told != [row["step"] for row in rows[: len(told)]]:
            sink.rewind(-1)
            told = []
        for row in rows[len(told) :]:
            sink.log(row["step"], {key: value for key, value in row.items() if key != "step"})
        self._written[name] = sink, [row["step"] for row in rows]

    def _name(self, run: Path) -> str:
        name = run.relative_to(self.root).as_posix()
        return run.resolve().name if name == "." else name


def serve(root: str | Path, port: int, host: str, started: Callable[[str], Any]) -> None:
    """Show all runs below a folder in TensorBoard until somebody stops it by Ctrl-C.

    Args:
        root: A run folder, or a folder that holds some at any depth.
        port: Where it answers; 0 takes a free one.
        host: The address that it answers at; anything but 127.0.0.1 lets other machines look, without a password.
        started: Told the page's address.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: TensorBoard is not installed, or the port is taken.
    """
    program = package("tensorboard.program")
    with tempfile.TemporaryDirectory(prefix="losslab-board-") as folder:
        logdir = Logdir(root, folder)
        logdir.refresh()
        server = program.TensorBoard()
        # Without the second process that reads faster: it knows nothing of points that are void, and might outlive us.
        server.configure(logdir=folder, host=host, port=port, load_fast="false", reload_interval=SECONDS)
        try:
            started(server.launch())
        except program.TensorBoardServerException as error:
            raise ValueError(f"port: {error}") from None
        while True:
            time.sleep(SECONDS)
            logdir.refresh()
