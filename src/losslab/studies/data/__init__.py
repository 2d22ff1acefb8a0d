"""The data sets, in memory, in three fixed splits. To add one: a function and a row in `DATASETS` (table.py)."""

from losslab.studies.data.augmentation import augmentation
from losslab.studies.data.images import from_arrays
from losslab.studies.data.splits import Batches, Dataset, Split
from losslab.studies.data.table import DATASETS, load_dataset

__all__ = ["DATASETS", "Batches", "Dataset", "Split", "augmentation", "from_arrays", "load_dataset"]
