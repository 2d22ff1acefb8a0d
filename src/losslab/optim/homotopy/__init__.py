"""The homotopy learning rate: curvature met on the way sets the step.

The names are imported on first use: a configuration, which holds the options, needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
