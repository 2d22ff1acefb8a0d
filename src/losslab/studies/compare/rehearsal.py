"""Would every run of a plan begin?  All is built as a training builds it, nothing is trained and nothing written."""

from losslab.ranks import Ranks
from losslab.studies.compare.plan import CompareConfig
from losslab.studies.config_file import ConfigError
from losslab.studies.data import Dataset, load_dataset
from losslab.studies.devices import make_fabric, seeded
from losslab.studies.record import RunFolder
from losslab.studies.sections import RunConfig
from losslab.studies.training import Training


def rehearse(plan: CompareConfig) -> int:
    """Build data, network and optimizer of each entry.

    Costs reading the data once, and for each entry the time in which its network is made.

    Returns:
        The examples of the validation split; of several, the smallest.

    Raises:
        ConfigError: With one line for each problem, and the entries that have it.
    """
    known: dict[str, Dataset] = {}
    problems: dict[str, list[str]] = {}
    for name in plan.names:
        config = plan.start(name)
        try:
            key = config.dataset.model_dump_json()
            known[key] = known.get(key) or load_dataset(config.dataset)
            _build(config, known[key])
        except (ValueError, TypeError, OSError, RuntimeError) as error:  # what the program tells in one line
            problems.setdefault(" ".join(str(error).split()), []).append(name)
    if problems:
        raise ConfigError("\n".join(f"{', '.join(names)}: {problem}" for problem, names in problems.items()))
    return min(len(data.validation) for data in known.values())


def _build(config: RunConfig, data: Dataset) -> None:
    with Ranks.joined():
        fabric = make_fabric(config.training)
        with seeded(config.seed, fabric.device):
            Training(fabric, config, data.to(fabric.device), RunFolder(config.name), (), None).close()
