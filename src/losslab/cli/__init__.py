"""The command line: parses, calls, prints. Nothing is computed here."""

from losslab.cli.main import app, main

__all__ = ["app", "main"]
