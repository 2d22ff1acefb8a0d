"""losslab: measure the geometry of a neural network's loss, train with it, compare optimizers honestly.

The names live in the modules that `__init__.pyi` points to and are imported on first use, so that a
report can be made where there is no torch.
"""

import lazy_loader

from losslab._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
