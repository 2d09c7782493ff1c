"""What a model sees: data sets, corruptions, and the order in which they come."""

from ._images import IMAGENET_MEAN, IMAGENET_STD, Images
from .corruptions import CORRUPTIONS, corrupt
from .datasets import CifarC, ImageNetC, load_digits, load_image_folder, load_npz
from .order import Batch, Corrupted, Stream, continual, correlated, long_tailed

__all__ = [
    "CORRUPTIONS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "CifarC",
    "Corrupted",
    "ImageNetC",
    "Images",
    "Stream",
    "continual",
    "correlated",
    "corrupt",
    "load_digits",
    "load_image_folder",
    "load_npz",
    "long_tailed",
]
