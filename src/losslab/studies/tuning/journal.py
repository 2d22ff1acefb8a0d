"""The study as all its workers see it: Optuna's journal, `study.log` in a folder of one machine or shared by several.

Every claim of a trial is made under a lock, a file that the file system makes once only, so that no two workers get the
same trial and no trial is one too many.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losslab.records import from_record, to_record
from losslab.studies.sections import RunConfig
from losslab.studies.spaces import Choice, Range, plain
from losslab.studies.tuning.backend import coded, decoded, distribution, optuna, quietly
from losslab.studies.tuning.options import TuneOptions, value_at
from losslab.studies.tuning.result import Trial
from losslab.studies.tuning.sampling import next_parameters
from losslab.studies.tuning.workers import Worker

WHOLE = 9000  # a trial's length in the pruners' unit: a share of its steps, whatever its batches
FIRST_RUNG, FACTOR = 1000, 3  # judged after a ninth and a third of the steps; a third of the trials go on
NAME = "losslab"  # of the study in the journal: Hyperband's brackets depend on it


@dataclass(frozen=True)
class Claim:
    """A trial that this worker is to bring to its end.

    Attributes:
        number: The trial's.
        parameters: Its values.
        outcome: How it ended, where only its bookkeeping is left to do.
    """

    number: int
    parameters: dict[str, Any]
    outcome: Trial | None


class Journal:
    """The study in a folder.

    Args:
        folder: It is made if it is not there.
        base: What the trials vary.
        options: What is searched, and how.

    Raises:
        FileExistsError: Something else is in the folder.
        ValueError: A study of another space, configuration, metric, pruner or seed is there; or it is damaged.
    """

    def __init__(self, folder: Path, base: RunConfig, options: TuneOptions):
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.base, self.options, self._path = base, options, folder / "study.log"
        self._package = optuna()
        self._lock = self._package.storages.journal.JournalFileOpenLock(str(folder / "study"))
        with self._locked(), quietly():
            self._storage = _open(self._package, self._path)
            if not self._storage.get_all_studies():
                direction = "maximize" if options.maximize else "minimize"
                self._package.create_study(study_name=NAME, storage=self._storage, direction=direction)
            self._study = self._package.load_study(
                study_name=NAME,
                storage=self._storage,
                sampler=self._package.samplers.RandomSampler(),  # never asked: see next_parameters
                pruner=_pruner(self._package, options.pruner),
            )
            self._agree()

    def claim(self, worker: Worker) -> Claim | None:
        """A trial for this worker: one whose worker died, or else a new one; None where all are taken."""
        with self._locked():
            known = self._study.get_trials(deepcopy=False)
            for trial in known:
                if not trial.state.is_finished() and worker.is_dead(owner := trial.user_attrs["worker"]):
                    self._handle(trial.number).set_user_attr("worker", worker.id)
                    worker.bury(owner)
                    return Claim(trial.number, self._values(trial), self._outcome(trial))
            if len(known) >= self.options.trials:
                return None
            parameters = self._new_parameters(known)
            self._study.add_trial(  # whole in one line of the journal
                self._package.trial.create_trial(
                    state=self._package.trial.TrialState.RUNNING,
                    params={key: coded(entry, parameters[key]) for key, entry in self.options.space.items()},
                    distributions={key: distribution(entry) for key, entry in self.options.space.items()},
                    user_attrs={"worker": worker.id},
                )
            )
            return Claim(len(known), parameters, None)

    def owns(self, worker: Worker, number: int) -> bool:
        """Whether the trial is still this worker's: one that was silent for long is taken for dead."""
        return self._handle(number).user_attrs["worker"] == worker.id

    def report(self, number: int, share: float, value: float) -> bool:
        """Note the metric after a share of the steps; whether the pruner would end the trial there."""
        with quietly():  # of a value that is known already, after a kill: it is the same one
            trial = self._handle(number)
            trial.report(value if not math.isnan(value) else self.options.worst, round(WHOLE * share))
            return bool(trial.should_prune())

    def decide(self, number: int, outcome: Trial) -> None:
        """Note how a trial ended, before `close`: a kill between the two loses nothing."""
        self._handle(number).set_user_attr("outcome", to_record(outcome)[0])

    def close(self, number: int, outcome: Trial) -> None:
        """Count a trial as ended."""
        self.decide(number, outcome)
        if outcome.status == "pruned":
            self._study.tell(number, state=self._package.trial.TrialState.PRUNED)
        else:
            self._study.tell(number, outcome.value)

    def ended(self) -> tuple[Trial, ...]:
        """The trials that ended, by number."""
        trials = self._study.get_trials(deepcopy=False)
        return tuple(found for trial in trials if trial.state.is_finished() and (found := self._outcome(trial)))

    def _new_parameters(self, known: list[Any]) -> dict[str, Any]:
        """The configuration as it stands for the first trial, if the space holds it; else the sampler's choice."""
        space = self.options.space
        if not known:
            standing = {key: value_at(self.base, key) for key in space}
            if all(_holds(entry, standing[key]) for key, entry in space.items()):
                return standing
        in_work = [self._values(trial) for trial in known if not trial.state.is_finished()]
        return next_parameters(space, self.ended(), in_work, maximize=self.options.maximize, seed=self.options.seed)

    def _values(self, trial: Any) -> dict[str, Any]:
        return {key: decoded(entry, trial.params[key]) for key, entry in self.options.space.items()}

    def _outcome(self, trial: Any) -> Trial | None:
        found = trial.user_attrs.get("outcome")
        return found and dataclasses.replace(from_record(Trial, found, {}), parameters=self._values(trial))

    def _handle(self, number: int) -> Any:
        """Optuna's object for a trial, whichever process began it."""
        study_id = self._storage.get_study_id_from_name(NAME)
        identity = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return self._package.trial.Trial(self._study, identity)

    def _agree(self) -> None:
        """Note what the study is about, or check that it is about the same."""
        asked = describe(self.base, self.options)
        there = self._study.user_attrs.get("about")
        if there is None:
            self._study.set_user_attr("about", asked)
            return
        changed = [key for key, value in asked.items() if there.get(key) != value]
        if changed:
            raise ValueError(
                f"{self._path.parent}: the study there has another {' and another '.join(changed)}; "
                "ask for the same, or choose another output folder"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()


def describe(base: RunConfig, options: TuneOptions) -> dict[str, Any]:
    """What two starts of one study must agree on, as plain values."""
    return {
        "space": plain(options.space),
        "metric": options.metric,
        "pruner": options.pruner,
        "seed": options.seed,
        "target": options.target,
        "configuration": base.model_dump(mode="json"),
    }


def _pruner(package: Any, name: str) -> Any:
    pruners = package.pruners
    if name == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=FIRST_RUNG, reduction_factor=FACTOR)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=FIRST_RUNG, max_resource=WHOLE, reduction_factor=FACTOR)
    return pruners.NopPruner()


def _open(package: Any, path: Path) -> Any:
    """The journal; a last line that a crash of the machine tore is cut off, and was never said."""
    journal = package.storages.journal
    lock = journal.JournalFileOpenLock(str(path))
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n") and content:
        lock.acquire()
        try:
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
        finally:
            lock.release()
    try:
        return package.storages.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=lock))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, not a journal of Optuna's ({error}); choose another folder") from None


def _refuse_foreign(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: a file is there; choose another folder for the study")
    if names and not any(name.startswith("study.") for name in names):
        raise FileExistsError(f"{folder}: the folder is not empty and holds no study; choose another one")


def _holds(entry: Range | Choice, value: Any) -> bool:
    """Whether a value could have been drawn."""
    if isinstance(entry, Choice):
        return value in entry.values
    return isinstance(value, int | float) and not isinstance(value, bool) and entry.low <= value <= entry.high
