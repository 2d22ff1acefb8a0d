"""Runs as tasks of a Ray cluster. The run folders must lie where all its machines see them."""

import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from losslab.status import StopRequested
from losslab.studies.engine.following import Follower
from losslab.studies.engine.jobs import EngineOptions, Standing
from losslab.studies.engine.worker import work
from losslab.studies.optional import optional

POLL = 0.1  # seconds
LEAVING = 60.0  # seconds that tasks have to write their checkpoints when told to stop


def run_on_ray(standings: Sequence[Standing], options: EngineOptions, follower: Follower) -> None:
    """Make the runs that wait. Ray gives a run whose worker or machine died to another one, which resumes it.

    Args:
        standings: They are kept up to date.
        options: How many at a time, on what, on which cluster.
        follower: Told again and again.

    Raises:
        ValueError: Ray is not installed.
        ConnectionError: There is no cluster at the address.
    """
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        _connect(ray, options.address)
    tasks = _Tasks(ray, options)
    queue = deque(standings)
    try:
        while queue or tasks.running:
            while queue and len(tasks.running) < (options.parallel or len(standings)):
                tasks.start(queue.popleft())
            tasks.collect(POLL)
            follower.tell()
    except StopRequested:
        tasks.stop()
    except BaseException:
        tasks.stop()
        raise
    finally:
        if own:
            ray.shutdown()


class _Tasks:
    """The cluster's part: what was handed to it."""

    def __init__(self, ray: Any, options: EngineOptions) -> None:
        self.ray = ray
        self.task = ray.remote(work).options(
            num_cpus=options.cpus or 1,
            num_gpus=options.gpus,
            memory=options.memory,
            max_retries=options.retries,
        )
        self.running: dict[Any, tuple[Standing, int]] = {}  # by reference; with the starts before

    def start(self, standing: Standing) -> None:
        """Hand a run to the cluster, which begins when it has room."""
        values = standing.job.config.model_dump(mode="json")
        reference = self.task.remote(values, standing.job.folder.absolute())
        self.running[reference] = standing, standing.starts()

    def collect(self, wait: float) -> None:
        """See which runs have begun, and which have ended."""
        ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=wait)
        for reference, (standing, before) in self.running.items():
            if starts := standing.starts() - before:
                standing.begin(starts)
            if reference in ready:
                self._end(standing, reference)
        for reference in ready:
            del self.running[reference]

    def _end(self, standing: Standing, reference: Any) -> None:
        errors = self.ray.exceptions
        try:
            standing.end("finished" if self.ray.get(reference) else "stopped")
        except errors.TaskCancelledError:
            standing.end("stopped")
        except errors.RayTaskError as error:  # raised by the training: it would be raised again
            standing.fail(str(error.cause) or type(error.cause).__name__)
        except errors.RayError as error:  # the worker or its machine died
            standing.fail(f"died {standing.attempts} times: {error}")

    def stop(self) -> None:
        """Interrupt all tasks, and wait until they have written their checkpoints."""
        for reference in self.running:
            self.ray.cancel(reference, force=False)
        self.ray.wait(list(self.running), num_returns=len(self.running), timeout=LEAVING)
        for reference, (standing, _) in self.running.items():
            self._end(standing, reference)


def _ray() -> Any:
    return optional("ray", "losslab[ray]")


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster, or start one of this machine alone, which reports to nobody."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        _require_answer(address)
        ray.init(address=address, **quiet)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", include_dashboard=False, **quiet)


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:  # "auto", of which Ray says at once that there is none
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"address: no Ray cluster answers at {address}: {error}; see `ray start --help`"
        ) from None
