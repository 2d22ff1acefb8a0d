"""Everything about one network's landscape behind one object, for those who want numbers first and choices later."""

from losslab.analyzer.architectures import compare_architectures
from losslab.analyzer.landscape import LossLandscapeAnalyzer
from losslab.analyzer.metrics import LandscapeMetrics

__all__ = ["LandscapeMetrics", "LossLandscapeAnalyzer", "compare_architectures"]
