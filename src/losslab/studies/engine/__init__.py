"""Many runs, made by processes of this machine or by a Ray cluster; what one does never ends another."""

from collections.abc import Sequence
from contextlib import suppress

from losslab.status import Progress, StopRequested
from losslab.studies.engine.cluster import run_on_ray
from losslab.studies.engine.following import Follower, Table
from losslab.studies.engine.jobs import EngineOptions, Job, Outcome, Standing
from losslab.studies.engine.local import run_local


def run_jobs(
    jobs: Sequence[Job],
    options: EngineOptions | None = None,
    progress: Progress | None = None,
    *,
    table: Table | None = None,
) -> list[Outcome]:
    """Train many runs, each in a process of its own.

    A run that is finished is skipped; one whose process was killed is started again, and goes on from its checkpoint
    to the same metrics as one never killed; one that fails is reported, and the others go on. Each folder is held by
    one process at a time. What a worker prints is in `worker.log` in the run folder.

    Args:
        jobs: The runs, in the order in which they are started.
        options: Where they are made, and what each may take; default one at a time on this machine.
        progress: Called now and then with the runs done (and the part of those at work), how many there are, and how
            many are in which state.
        table: Called now and then with a row for each run. It and `progress` may raise `StopRequested`: the workers
            write their checkpoints and end, and what is not finished is "stopped".

    Returns:
        How each job ended, in the order of `jobs`.

    Raises:
        ValueError: Two jobs with one name, or one folder; Ray is not installed.
        ConnectionError: There is no Ray cluster at the address.
        KeyboardInterrupt: Ctrl-C; the workers have written their checkpoints.
    """
    options = options or EngineOptions()
    _require_different([job.name for job in jobs], "name")
    _require_different([str(job.folder.absolute()) for job in jobs], "folder")
    standings = [Standing(job) for job in jobs]
    for standing in standings:
        standing.look()
    waiting = [standing for standing in standings if standing.state == "waiting"]
    follower = Follower(standings, progress, table)
    if waiting:
        (run_on_ray if options.engine == "ray" else run_local)(waiting, options, follower)
    with suppress(StopRequested):
        follower.tell(now=True)
    return [standing.outcome() for standing in standings]


def _require_different(items: Sequence[str], what: str) -> None:
    twice = [item for item in items if items.count(item) > 1]
    if twice:
        raise ValueError(f"jobs: expected a different {what} for each, got {twice[0]} twice")
