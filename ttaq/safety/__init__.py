"""Make vision transformers safe to quantise: the float model is rewritten, and computes what it did."""

from .diagnosis import diagnose
from .protection import MEASURES, protect

__all__ = ["MEASURES", "diagnose", "protect"]
