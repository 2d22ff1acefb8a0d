"""What an engine is given, what it knows while it works, and what it gives back."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from losslab.studies.config_file import differences
from losslab.studies.record import LOCKS, RunFolder
from losslab.studies.sections import RunConfig

LOG = "worker.log"
STARTED = "--- started"  # opens the log's line of each start
FAILED, INTERRUPTED = 2, 130  # a worker's exit codes


@dataclass(frozen=True)
class Job:
    """One run to be made: its name among the others, what to train, and where."""

    name: str
    config: RunConfig
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        name: The job's.
        folder: Its run folder.
        status: "finished": trained to its end, which may be a divergence. "skipped": was finished before. "failed".
            "stopped": told to; it can go on.
        attempts: How often it was started.
        error: One line, where it failed.
        seconds: From its first start to its end.
    """

    name: str
    folder: Path
    status: Literal["finished", "failed", "skipped", "stopped"]
    attempts: int
    error: str | None
    seconds: float


@dataclass(frozen=True)
class EngineOptions:
    """Where runs are made, and what each may take.

    Attributes:
        parallel: Runs at a time. None: one with "local", as many as the cluster has room for with "ray".
        engine: "local", processes of this machine; or "ray".
        address: The Ray cluster's; None starts one on this machine.
        retries: How often a run whose process was killed is started again.
        cpus: CPUs, and threads, of each run. None: this machine's, divided by `parallel`; one with "ray".
        gpus: GPUs of each run. 0: "local" lets it see all of them, "ray" none.
        memory: Bytes that each run is known to need. None: "local" measures it.
    """

    parallel: int | None = None
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    retries: int = 2
    cpus: int | None = None
    gpus: int = 0
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise ValueError(f"engine: expected 'local' or 'ray', got {self.engine!r}")
        if self.address is not None and self.engine != "ray":
            raise ValueError(f"address: {self.address!r} is a Ray cluster's; use engine 'ray' with it")
        for name, least in (("parallel", 1), ("cpus", 1), ("memory", 1), ("retries", 0), ("gpus", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value}")


@dataclass
class Standing:
    """A job's present state."""

    job: Job
    state: Literal["waiting", "running", "finished", "failed", "skipped", "stopped"] = "waiting"
    attempts: int = 0
    error: str | None = None
    seconds: float = 0.0
    began: float | None = None

    @property
    def folder(self) -> RunFolder:
        """Where it is made."""
        return RunFolder(self.job.folder)

    def look(self) -> None:
        """See whether there is anything to do: a finished run is left alone, and so is what is no run."""
        path = self.job.folder
        try:
            if self.folder.is_run():
                if changed := differences(self.folder.config, self.job.config.model_dump(mode="json")):
                    self.fail(f"{path}: holds a run of another configuration: {'; '.join(changed)}")
                elif self.folder.final is not None:
                    self.state = "skipped"
            elif path.exists() and {child.name for child in path.iterdir()} - {LOG, *LOCKS}:
                self.fail(f"{path}: the folder is not empty, and no run; choose another one")
        except (ValueError, OSError) as error:
            self.fail(str(error))

    def begin(self, attempts: int) -> None:
        """It is at work, for the so-manieth time."""
        self.state, self.attempts = "running", attempts
        self.began = self.began or time.monotonic()

    def end(self, state: Literal["finished", "stopped"]) -> None:
        """It has ended well."""
        self.state, self.seconds = state, self._elapsed()

    def fail(self, error: str) -> None:
        """It will not be tried again."""
        self.state, self.error, self.seconds = "failed", " ".join(error.split()), self._elapsed()

    def outcome(self) -> Outcome:
        """How it ended. What never began was stopped."""
        ended: Any = "stopped" if self.state in ("waiting", "running") else self.state
        return Outcome(self.job.name, self.job.folder, ended, self.attempts, self.error, self.seconds)

    def log_lines(self) -> list[str]:
        """What its processes printed, in all attempts."""
        path = self.job.folder / LOG
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return [line for line in text.splitlines() if line.strip()]

    def starts(self) -> int:
        """How often it was started, now and before."""
        return sum(line.startswith(STARTED) for line in self.log_lines())

    def _elapsed(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began
