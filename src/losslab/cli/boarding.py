"""`losslab board`: runs in TensorBoard."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from losslab.cli.terminal import console
from losslab.studies.board import serve


def board(
    folder: Annotated[Path, typer.Argument(help="A run folder, or one that holds runs at any depth.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 6006,
    host: Annotated[
        str, typer.Option("--host", help="Anything else lets other machines look, without a password.")
    ] = "127.0.0.1",
) -> None:
    """Show all runs below a folder in TensorBoard, until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder goes too
    serve(folder, port, host, lambda url: console.print(f"{url}  shows {folder}; Ctrl-C ends it", soft_wrap=True))
