"""The networks. To add one: a function of the configuration and the inputs, and a row in `MODELS` (table.py)."""

from losslab.studies.models.inputs import Inputs
from losslab.studies.models.small import SimpleCNN
from losslab.studies.models.table import MODELS, build_model

__all__ = ["MODELS", "Inputs", "SimpleCNN", "build_model"]
