"""Training by the geometry: TALT, which works in the eigenspace of the gradient's covariance."""

from losslab.optim.eigenspace.options import FIXES, TALTOptions
from losslab.optim.talt import TALT

__all__ = ["FIXES", "TALT", "TALTOptions"]
