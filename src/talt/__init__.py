"""Another name for losslab's TALT: `from talt import ImprovedTALTOptimizer, create_enhanced_talt_config`."""

from losslab.optim.attach import attach_talt
from losslab.optim.improved import ImprovedTALTOptimizer, TALTOptimizer, create_enhanced_talt_config
from losslab.optim.talt import TALT

__all__ = ["TALT", "ImprovedTALTOptimizer", "TALTOptimizer", "attach_talt", "create_enhanced_talt_config"]
