"""Make vision transformers safe to quantise: the float model is rewritten, and computes what it did."""

from .diagnosis import diagnose
from .protection import MEASURES, protect, secure
from .words import explain_safety

__all__ = ["MEASURES", "diagnose", "explain_safety", "protect", "secure"]
