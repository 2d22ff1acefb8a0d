"""Another name for losslab's analyzer: `from loss_landscape_analysis import LossLandscapeAnalyzer`."""

from losslab.analyzer import LandscapeMetrics, LossLandscapeAnalyzer, compare_architectures

__all__ = ["LandscapeMetrics", "LossLandscapeAnalyzer", "compare_architectures"]
