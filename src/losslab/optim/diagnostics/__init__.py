"""What TALT sees and does, tensor by tensor, sampled while it trains; and in which phase of the training that is.

The names are imported on first use: a report, which reads samples, needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
