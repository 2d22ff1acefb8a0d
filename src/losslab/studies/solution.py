"""Which network a probe looks at: a run's checkpoint, a file of weights, or a configuration's initial weights."""

import pickle
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from losslab.random import preserved_random_states
from losslab.studies.config import load_config
from losslab.studies.data import load_dataset
from losslab.studies.models import build_model
from losslab.studies.record import RunFolder
from losslab.studies.runs import LoadedRun, load_run
from losslab.studies.sections import RunConfig
from losslab.studies.shipped import find_config


def find_solution(
    run: str | Path | None = None, checkpoint: str | Path = "last", config: str | Path | None = None
) -> LoadedRun:
    """The network, with its configuration and data.

    | given | what it is |
    | --- | --- |
    | run | the run's checkpoint of that name, "last" or "best" |
    | a checkpoint's path inside a run folder | that one |
    | the path of any weights, and a configuration | the configuration's model with these weights |
    | only a configuration | its model with the initial weights of its seed |

    Args:
        run: A run folder.
        checkpoint: A name, or the path of a file: safetensors, or a state dict that `torch.save` wrote (read with
            `weights_only=True`, so that nothing in it is executed).
        config: A configuration file, or the name of a shipped one.

    Raises:
        FileNotFoundError: A file or a folder is not there.
        ValueError: None of these is given, or the weights are another model's.
    """
    path = Path(checkpoint)
    if run is not None:
        return load_run(run, str(checkpoint))
    if path.suffix and not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    settings = None if config is None else load_config(find_config(str(config)))
    if path.is_file() and RunFolder(path.parent.parent).is_run():
        found = load_run(path.parent.parent, path.stem)
        if settings is not None and settings.model != found.config.model:
            raise ValueError(f"config: {config} names another model than the run of {path}; leave it out")
        return found
    if settings is None:
        raise ValueError("run: expected a run folder (--run), a checkpoint's path or a configuration, got none")
    model = initial(settings)
    if not path.is_file():
        return _loaded(settings, model, Path("runs") / settings.name)
    load_weights(model, path)
    return _loaded(settings, model, path.parent)


def initial(config: RunConfig) -> nn.Module:
    """The configuration's model with the weights that its seed decides, in eval mode."""
    data = load_dataset(config.dataset)
    with preserved_random_states(config.seed):
        return build_model(config.model, data.input_shape, data.num_classes, data.vocabulary).eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the weights of a file into the model.

    Raises:
        ValueError: The file holds no state dict, or another model's.
    """
    try:
        if Path(path).suffix == ".safetensors":
            safetensors.torch.load_model(model, str(path))
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        # What training scripts write is often a mapping with the state dict among other things.
        inner = next((state[key] for key in ("state_dict", "model_state_dict", "model") if key in state), state)
        model.load_state_dict(inner)
    except (RuntimeError, TypeError, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not this model's weights: {' '.join(str(error).split())[:300]}") from None


def _loaded(config: RunConfig, model: nn.Module, folder: Path) -> LoadedRun:
    return LoadedRun(config=config, model=model, dataset=load_dataset(config.dataset), folder=RunFolder(folder), step=0)
