"""What a model sees: data sets, corruptions, and the order in which they come."""

from ._images import IMAGENET_MEAN, IMAGENET_STD, Images
from ._stream import Batch, Stream
from .corruptions import CORRUPTIONS, corrupt
from .datasets import CifarC, ImageNetC, load_digits, load_image_folder, load_npz
from .order import Corrupted, continual, correlated, long_tailed, shuffled
from .shifts import gradual, mixed, mixed_correlated, recurring

__all__ = [
    "CORRUPTIONS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "STREAMS",
    "Batch",
    "CifarC",
    "Corrupted",
    "ImageNetC",
    "Images",
    "Stream",
    "continual",
    "correlated",
    "corrupt",
    "gradual",
    "load_digits",
    "load_image_folder",
    "load_npz",
    "long_tailed",
    "mixed",
    "mixed_correlated",
    "recurring",
    "shuffled",
]

# Every order by name; all take the arguments of `continual`.
STREAMS = {
    "continual": continual,
    "shuffled": shuffled,
    "gradual": gradual,
    "correlated": correlated,
    "long-tailed": long_tailed,
    "mixed": mixed,
    "mixed-correlated": mixed_correlated,
    "recurring": recurring,
}
