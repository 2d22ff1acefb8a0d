"""Training: a configuration in, a run folder out, and on from where it stopped."""

from collections.abc import Sequence

from losslab.ranks import Ranks
from losslab.status import Progress
from losslab.studies.config_file import differences
from losslab.studies.data import load_dataset
from losslab.studies.devices import make_fabric, seeded
from losslab.studies.record import RunFolder, Sink
from losslab.studies.sections import RunConfig
from losslab.studies.training import Training


def train(
    config: RunConfig,
    folder: RunFolder,
    *,
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
    resume: bool = False,
) -> RunFolder:
    """Train as configured and leave everything in `folder`.

    A row of the metrics holds the mean training loss and accuracy *while* the weights moved, since the row before, and
    those on the validation split *after* it; `seconds` counts training only. Checkpoints: "last", "best" by validation
    accuracy, and those that are kept on the way. The test split is evaluated once, with the last weights. The final
    row says how it ended: "completed"; "reached", the target; or "diverged", where the training loss was not finite.

    A run that was stopped (`StopRequested` from `progress` or a sink, or Ctrl-C), or killed at any moment, goes on with
    `resume` from its checkpoint "last", to the same metrics, bit for bit, on the same machine, as one never stopped.

    Under `torchrun` the processes share each batch; their mean gradient is the batch's, up to rounding (the statistics
    of batch normalisation are each process's own). The first process writes.

    Args:
        config: What to train, on what, how.
        folder: An empty run folder, from `RunFolder.create`; with `resume` one that holds the run.
        sinks: Other takers of the rows that go to `metrics.jsonl`.
        progress: Called after each step with the steps done and in all, and the latest validation accuracy.
        resume: Go on with the run in the folder; start it where there is none; do nothing where it is finished.

    Returns:
        `folder`. A run that was stopped has no final row.

    Raises:
        ValueError: `resume` with another configuration; a device, data set or network that is not there.
        OSError: A checkpoint cannot be written; the one of before is still there.
    """
    if resume and folder.is_run():
        if changed := differences(folder.config, config.model_dump(mode="json")):
            raise ValueError(f"resume: {folder.path} holds a run of another configuration: {'; '.join(changed)}")
        if folder.final is not None:
            return folder
    with Ranks.joined():
        fabric = make_fabric(config.training)
        data = load_dataset(config.dataset).to(fabric.device)
        with seeded(config.seed, fabric.device):
            training = Training(fabric, config, data, folder, sinks, progress)
            training.start(resume)
            try:
                training.run()
            except KeyboardInterrupt:
                training.save_if_whole()
                raise
            finally:
                training.close()
    return folder
