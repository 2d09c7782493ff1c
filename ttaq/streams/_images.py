"""Labelled images as every source hands them on: 8-bit RGB, in memory, on disk or made when asked for."""

import io

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Images:
    """Hold labelled RGB images of one size and hand them out in batches, as often as asked.

    ``images`` is indexed with integer arrays only, so a memory map is read page by page and files are decoded
    when their batch comes. `take` shares it: nothing is copied.

    Args:
        images: uint8 (N, H, W, 3); or (N, 3, H, W), one channel or none, an array or a tensor, float in 0..1 (rounded
            to 8 bits); or any object with `len` that gives uint8 (n, H, W, 3) for an array of n indices.
        labels: (N,), integers from 0.
        classes: Name of each class; None numbers them.
        mean: Of each channel, in units of the full scale.
        std: Alike.

    Raises:
        ValueError: An argument is not as described.
    """

    def __init__(self, images, labels, classes=None, *, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        self.images = _to_pixels(images) if isinstance(images, np.ndarray | torch.Tensor) else images
        self.labels = _check_labels(labels, len(self.images), classes)
        if classes is None:
            classes = [str(number) for number in range(int(self.labels.max(initial=-1)) + 1)]
        self.classes = tuple(str(name) for name in classes)
        self.mean, self.std = _check_moments(mean, std)
        self.index = np.arange(len(self.labels))

    def __len__(self):
        return len(self.index)

    def take(self, index):
        """Return the images at `index` (integers, a mask or a slice), sharing the pixels; `.index` keeps the origin."""
        return self.over(self.images, self.index[index], self.labels[index])

    def over(self, images, index, labels):
        """Return the same classes and preprocessing over other pixels: row k is ``images[index[k]]``."""
        other = object.__new__(Images)
        other.images, other.index, other.labels = images, index, labels
        other.classes, other.mean, other.std = self.classes, self.mean, self.std
        return other

    def pixels(self, index=slice(None)):
        """Return uint8 (n, H, W, 3) at `index`, a fresh array."""
        return np.asarray(self.images[self.index[index]])

    def preprocess(self, pixels):
        """Turn uint8 (n, H, W, 3) into what the model eats: ``(pixels / 255 - mean) / std``, float32 (n, 3, H, W)."""
        x = torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        mean, std = (torch.tensor(moment, dtype=torch.float32).view(3, 1, 1) for moment in (self.mean, self.std))
        return x.sub_(mean).div_(std).contiguous()

    def batches(self, batch_size):
        """Return a re-iterable of (x, y) in order, the last one short: float32 (n, 3, H, W), int64 (n,)."""
        return Batches(self, batch_size)


class Batches:
    """Walk through images in order, from the start each time."""

    def __init__(self, images, batch_size):
        check_batch_size("batches", batch_size)
        self.images, self.batch_size = images, batch_size

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        for first in range(0, len(self.images), self.batch_size):
            part = slice(first, first + self.batch_size)
            labels = torch.tensor(self.images.labels[part])
            yield self.images.preprocess(self.images.pixels(part)), labels


class Encoded:
    """Decode images when they are asked for: a list of files, or of their bytes, behind the index of an array.

    Args:
        items: Paths, or uint8 arrays that each hold an encoded image.
        names: What to call each in an error.
        fit: Takes an RGB picture and returns one of the common size.
    """

    def __init__(self, items, names, fit):
        self.items, self.names, self.fit = items, names, fit

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        decoded = [self._decode(int(number)) for number in index]
        for number, image in zip(index, decoded, strict=True):
            if image.shape != decoded[0].shape:
                first, other = (f"{shape[1]}x{shape[0]}" for shape in (decoded[0].shape, image.shape))
                raise ValueError(
                    f"images: all must be of one size, {first} like {self.names[index[0]]}, got {other} in "
                    f"{self.names[number]}; resize them, or read them with load_image_folder(size=...)"
                )
        return np.stack(decoded) if decoded else np.empty((0, 1, 1, 3), dtype=np.uint8)

    def _decode(self, number):
        item = self.items[number]
        try:
            with Image.open(io.BytesIO(item) if isinstance(item, np.ndarray) else item) as picture:
                return np.asarray(self.fit(picture.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"images: {self.names[number]} must be an image that Pillow can read, got {error}; "
                "replace it or take it out"
            ) from error


def check_batch_size(subject, batch_size):
    """Refuse a batch size below 1, in one sentence."""
    if batch_size < 1:
        raise ValueError(f"{subject}: batch_size must be at least 1, got {batch_size}; 200 is usual for small images")


def _to_pixels(images):
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images: shape must be (N, H, W, 3), (N, 3, H, W), one channel or (N, H, W), got {images.shape}; "
            "convert the images to RGB or grey"
        )
    if images.dtype.kind == "f":
        if images.size and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images: floats must lie in 0..1, got {images.min():.3g} to {images.max():.3g}; "
                "pass them before normalisation, mean and std are arguments"
            )
        images = np.rint(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"images: must be uint8, or float in 0..1, got {images.dtype}; convert them")
    return images.repeat(3, axis=3) if images.shape[3] == 1 else images


def _check_labels(labels, count, classes):
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(
            f"labels: there must be one for each of the {count} images, got {labels.size} of shape {labels.shape}; "
            "check that both come from the same data set"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels: must be integers, got {labels.dtype}; number the classes from 0")
    limit = np.inf if classes is None else len(classes)
    if count and not 0 <= labels.min() <= labels.max() < limit:
        raise ValueError(
            f"labels: must lie in 0..{limit - 1}, got {labels.min()} to {labels.max()}; "
            "number the classes from 0 and name them all"
        )
    return labels.astype(np.int64)


def _check_moments(mean, std):
    mean, std = (tuple(float(value) for value in moment) for moment in (mean, std))
    if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
        raise ValueError(f"images: mean and std must be 3 numbers each, std positive, got {mean} and {std}")
    return mean, std
