"""Several networks side by side on the same data."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from losslab.analyzer.landscape import LossLandscapeAnalyzer
from losslab.operators.batches import LossFunction

COLUMNS = {
    "Parameters": "num_parameters",
    "Train Loss": "train_loss",
    "Test Loss": "test_loss",
    "Condition Number": "condition_number",
    "Sharpness": "sharpness",
    "Flatness": "flatness",
    "Spectral Gap": "spectral_gap",
    "Negative Eigenvalues": "num_negative_eigenvalues",
    "Trace": "trace",
    "Largest Eigenvalue": "top_eigenvalues",
    "Status": "status",
}


def compare_architectures(
    models: Mapping[str, nn.Module],
    train_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    criterion: LossFunction | None = None,
    **options: Any,
) -> Any:
    """Does the architecture change the landscape?  A pandas DataFrame, a row a network; `.to_markdown()` prints it.

    The networks are compared as they are: train them alike first, since an untrained network's curvature says little
    about where training would lead it. `options` are those of `LossLandscapeAnalyzer`.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ModuleNotFoundError:
        raise ImportError("compare_architectures: expected pandas, got no such package; pip install pandas") from None
    rows = {}
    for name, model in models.items():
        found = LossLandscapeAnalyzer(model, train_loader, test_loader, criterion, **options).full_analysis()
        values = {title: getattr(found, key) for title, key in COLUMNS.items()}
        values["Largest Eigenvalue"] = float(found.top_eigenvalues[0])
        rows[name] = values | {"Status": str(found.status)}
    return pandas.DataFrame(rows).T
