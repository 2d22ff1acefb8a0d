"""Training by the geometry: TALT, in the eigenspace of the gradient's covariance, and rates that follow the curvature.

The names live in the modules that `__init__.pyi` points to and are imported on first use: TALT's options, which
configurations hold, need no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
