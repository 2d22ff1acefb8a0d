"""Runs as processes of this machine, each on its own CPUs, as many at a time as the memory holds."""

import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from losslab.status import StopRequested
from losslab.studies.engine.following import Follower
from losslab.studies.engine.jobs import INTERRUPTED, LOG, EngineOptions, Standing
from losslab.studies.engine.process import Work, start
from losslab.studies.engine.resources import (
    MemoryGate,
    available_cpus,
    available_gpus,
    environment,
    pin,
    shares,
)
from losslab.studies.engine.worker import local_work

WORK: Work = local_work
POLL = 0.1  # seconds


def run_local(standings: Sequence[Standing], options: EngineOptions, follower: Follower) -> None:
    """Make the runs that wait.

    Args:
        standings: They are kept up to date.
        options: How many at a time, on what.
        follower: Told again and again.

    Raises:
        KeyboardInterrupt: After the workers have written their checkpoints; pressed again, at once.
    """
    engine = _Local(options)
    queue = deque(standings)
    try:
        while queue or engine.workers:
            queue.extendleft(engine.ended())
            while queue and engine.has_room():
                standing = queue.popleft()
                try:
                    engine.start(standing)
                except OSError as error:  # its folder cannot be made, or written
                    standing.fail(str(error))
            follower.tell()
            time.sleep(POLL)
    except StopRequested:
        engine.stop()
    except BaseException:
        engine.stop()
        raise


@dataclass(frozen=True)
class _Worker:
    """A process that works at a run."""

    standing: Standing
    process: BaseProcess

    def failure(self) -> str:
        """Why it ended, in one line: the last that it printed."""
        lines, code = self.standing.log_lines(), self.process.exitcode or 0
        last = lines[-1] if lines else "it printed nothing"
        log = self.standing.job.folder / LOG
        if code < 0:
            return f"killed by {_signal(code)}, {self.standing.attempts} times; last line of {log}: {last}"
        return f"{last} (exit code {code}; more in {log})"


class _Local:
    """The machine's places for workers."""

    def __init__(self, options: EngineOptions) -> None:
        self.retries, parallel = options.retries, options.parallel or 1
        cpus, gpus = available_cpus(), available_gpus() if options.gpus else []
        self.cpus = shares(cpus, parallel, options.cpus or max(len(cpus) // parallel, 1))
        self.gpus = shares(gpus, parallel, options.gpus) if gpus else [()] * parallel
        self.gate = MemoryGate(options.memory)
        self.workers: dict[int, _Worker] = {}  # by place

    def has_room(self) -> bool:
        """Whether a place is free, and memory enough."""
        return len(self.workers) < len(self.cpus) and self.gate.admits(len(self.workers))

    def start(self, standing: Standing) -> None:
        """Give a run the first free place."""
        place = next(place for place in range(len(self.cpus)) if place not in self.workers)
        folder = standing.job.folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = environment(self.cpus[place], self.gpus[place])
        process = start(WORK, standing.job.config.model_dump(mode="json"), folder, settings)
        pin(process.pid or 0, self.cpus[place])
        standing.begin(standing.attempts + 1)
        self.workers[place] = _Worker(standing, process)

    def ended(self) -> list[Standing]:
        """Free the places of workers that have ended; the runs that are to be started again."""
        self.gate.observe(worker.process.pid or 0 for worker in self.workers.values())
        again = []
        for place, worker in list(self.workers.items()):
            code = worker.process.exitcode
            if code is None:
                continue
            del self.workers[place]
            standing = worker.standing
            if code == 0:
                standing.end("finished")
            elif code == INTERRUPTED:  # somebody told this worker alone
                standing.end("stopped")
            elif code < 0 and standing.attempts <= self.retries:  # killed: by hand, or for its memory
                standing.state = "waiting"
                again.append(standing)
            else:
                standing.fail(worker.failure())
        return again

    def stop(self) -> None:
        """Let all workers write their checkpoints and end."""
        try:
            for worker in self.workers.values():
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(worker.process.pid or 0, signal.SIGINT)
            for worker in self.workers.values():
                worker.process.join()
        except BaseException:
            for worker in self.workers.values():
                worker.process.kill()
            raise
        finally:
            for worker in self.workers.values():
                worker.standing.end("finished" if worker.process.exitcode == 0 else "stopped")


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"
