"""What a model sees: data sets, corruptions, and the order in which they come."""

from .corruptions import CORRUPTIONS, corrupt

__all__ = ["CORRUPTIONS", "corrupt"]
