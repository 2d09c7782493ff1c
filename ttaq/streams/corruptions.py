"""The fifteen common corruptions from two tables, seeded per image.

Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
arXiv:1903.12261. Written from the definitions and parameters of the paper with numpy, scipy and Pillow: images are
"CIFAR-C style" and "ImageNet-C style", never identical to the published ones, which were made with other
software and without seeds. The two tables are different benchmarks (gaussian sigma 0.10 against 0.38 at severity
5) and are never mixed. Two corruptions differ in kind: frost is grown procedurally unless a folder of pictures is
given, and the elastic transform scales with the image's shorter side (32 and 224 are the published sizes).
"""

import io

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from ._filters import blur_motion, build_disk, correlate, magnify, scatter_pixels, warp
from ._levels import LEVELS
from ._textures import cut, grow_frost, grow_plasma, read_frost

_CHUNK = 1 << 20  # values worked on at once: large enough for numpy, small enough for the cache
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def corrupt(images, name, severity, *, seed=0, table="cifar", start=0, index=None, frost_folder=None):
    """Corrupt images as CIFAR-C or ImageNet-C would; each image depends on its own index alone.

    One generator an image, seeded by (seed, corruption, severity, index): part of a batch comes out like the
    whole. Source: Hendrycks and Dietterich, arXiv:1903.12261; similar in kind and strength, not identical.

    Args:
        images: (N, H, W, 3), uint8, RGB.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Not negative.
        table: "cifar", mild and lossless, for small images; "imagenet", for 224 x 224, saved again as JPEG 85.
        start: Index of the first image; the others follow.
        index: (N,), the index of each image, where they do not follow one another.
        frost_folder: Pictures to take frost from; None grows it.

    Returns:
        (N, H, W, 3), uint8; the input is left as it was.

    Raises:
        ValueError: An argument is not as described.
    """
    images = np.asarray(images)
    index = np.arange(start, start + len(images)) if index is None else np.asarray(index)
    check_corruption(name, severity, table)
    _check_images(images, index, seed)
    function, level = _FUNCTIONS[name], LEVELS[table][name][severity - 1]
    if name == "frost":
        scale = {"cifar": 0.2, "imagenet": 1.0}[table]
        level = (*level, grow_frost(scale) if frost_folder is None else read_frost(frost_folder, scale))
    number = CORRUPTIONS.index(name)
    corrupted = np.empty_like(images)
    chunk = max(1, _CHUNK // max(1, images[:1].size))
    for first in range(0, len(images), chunk):
        part = slice(first, first + chunk)
        generators = [np.random.default_rng([seed, number, severity, int(i)]) for i in index[part]]
        pixels = _to_pixels(function(images[part].astype(np.float32) / 255, level, generators))
        corrupted[part] = pixels if table == "cifar" else _save_as_jpeg(pixels, 85)
    return corrupted


def check_corruption(name, severity, table):
    """Refuse a corruption, severity or table that does not exist, in one sentence."""
    if name not in _FUNCTIONS:
        raise ValueError(f"corrupt: name must be one of {', '.join(CORRUPTIONS)}; got {name!r}")
    if not isinstance(severity, int | np.integer) or severity not in range(1, 6):
        raise ValueError(
            f"corrupt: severity must be 1, 2, 3, 4 or 5, got {severity!r}; use the images as they are for 0"
        )
    if table not in ("cifar", "imagenet"):
        raise ValueError(f'corrupt: table must be "cifar" or "imagenet", got {table!r}; take "cifar" for small images')


def _check_images(images, index, seed):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(
            f"corrupt: images must be uint8 of shape (N, H, W, 3), got {images.dtype} of {images.shape}; "
            "corrupt before normalising and put the channels last"
        )
    if index.shape != (len(images),):
        raise ValueError(f"corrupt: index must hold {len(images)} numbers, one an image, got shape {index.shape}")
    if seed < 0 or (index < 0).any():
        raise ValueError(f"corrupt: seed and indices must not be negative, got seed {seed}; count from 0")


def _to_pixels(x):
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _save_as_jpeg(pixels, quality):
    saved = np.empty_like(pixels)
    for k, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        saved[k] = np.asarray(Image.open(file))
    return saved


# Each corruption below takes x (n, H, W, 3) float32 in 0..1, its level, and n generators; the result may leave 0..1.


def _add_gaussian(x, sigma, generators):
    noise = [generator.standard_normal(x.shape[1:], dtype=np.float32) for generator in generators]
    return x + np.float32(sigma) * np.stack(noise)


def _count_photons(x, photons, generators):
    counts = [generator.poisson(image * photons) for image, generator in zip(x, generators, strict=True)]
    return np.stack(counts).astype(np.float32) / photons


def _add_impulses(x, amount, generators):
    draw = np.stack([generator.random(x.shape[1:], dtype=np.float32) for generator in generators])
    return np.where(draw < amount / 2, 0, np.where(draw >= 1 - amount / 2, 1, x))


def _defocus(x, level, _):
    radius, alias = level
    return correlate(x, build_disk(radius, alias))


def _look_through_glass(x, level, generators):
    sigma, delta, rounds = level
    blur = (0, sigma, sigma, 0)
    x = gaussian_filter(x, blur, mode="nearest")
    return gaussian_filter(scatter_pixels(x, delta, rounds, generators), blur, mode="nearest")


def _move(x, level, generators):
    radius, sigma = level
    return blur_motion(x, radius, sigma, [generator.uniform(-45, 45) for generator in generators])


def _zoom(x, level, _):
    last, step = level
    planes = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    factors = 1 + step * np.arange(np.ceil((last - 1) / step - 1e-6))
    total = planes + sum(magnify(planes, factor) for factor in factors)
    return (total / (len(factors) + 1)).transpose(0, 2, 3, 1)


def _snow(x, level, generators):
    mean, deviation, factor, threshold, radius, sigma, keep = level
    flakes = [generator.normal(mean, deviation, x.shape[1:3]) for generator in generators]
    flakes = magnify(np.stack(flakes).astype(np.float32), factor)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)[..., None]
    angles = [generator.uniform(-135, -45) for generator in generators]
    flakes = blur_motion(flakes, radius, sigma, angles)
    pale = np.maximum(x, (x @ _GREY)[..., None] * 1.5 + 0.5)
    return np.clip(keep * x + (1 - keep) * pale + flakes + flakes[:, ::-1, ::-1], 0, 1)


def _frost(x, level, generators):
    image, frost, textures = level
    windows = [cut(textures[g.integers(len(textures))], g, *x.shape[1:3]) for g in generators]
    return image * x + frost * np.stack(windows)


def _fog(x, level, generators):
    strength, decay = level
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    hazy = x + strength * grow_plasma(generators, *x.shape[1:3], decay)[..., None]
    return hazy * brightest / (brightest + strength)


def _brighten(x, amount, _):
    """Raise the value of HSV, keeping hue and saturation: all channels by one factor; black turns grey."""
    value = x.max(axis=3, keepdims=True)
    raised = np.minimum(value + np.float32(amount), 1)
    return np.where(value > 0, x * (raised / np.maximum(value, 1e-6)), raised)


def _flatten(x, contrast, _):
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * contrast + mean


def _stretch(x, level, generators):
    """Warp by a random affine map of three points, then by a smoothed random field."""
    alpha, sigma, shift, scale = level
    height, width = x.shape[1:3]
    side = scale * min(height, width)
    rows, columns = np.mgrid[:height, :width].astype(float)
    centre, arm = np.array([height, width]) // 2, max(1, min(height, width) // 3)
    anchors = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = np.stack([anchors + g.uniform(-shift * side, shift * side, (3, 2)) for g in generators])
    ones = np.ones((len(x), 3, 1))
    back = np.linalg.solve(np.concatenate([moved, ones], axis=2), np.broadcast_to(anchors, moved.shape))
    places = np.stack([rows, columns, np.ones_like(rows)], axis=2).reshape(-1, 3) @ back
    places = places.reshape(len(x), height, width, 2)
    x = warp(x, places[..., 0], places[..., 1])
    if alpha == 0:
        return x
    field = np.stack([generator.uniform(-1, 1, (2, height, width)) for generator in generators])
    down, across = (
        gaussian_filter1d(np.eye(size), sigma * side, axis=0, mode="reflect", truncate=3) for size in (height, width)
    )
    field = alpha * side * (down @ field @ across.T)
    return warp(x, rows + field[:, 0], columns + field[:, 1])


def _pixelate(x, fraction, _):
    height, width = x.shape[1:3]
    small = max(1, int(width * fraction)), max(1, int(height * fraction))
    coarse = np.empty_like(x)
    for k, image in enumerate(_to_pixels(x)):
        picture = Image.fromarray(image).resize(small, Image.Resampling.BOX)
        coarse[k] = np.asarray(picture.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
    return coarse


def _compress(x, quality, _):
    return _save_as_jpeg(_to_pixels(x), quality).astype(np.float32) / 255


_FUNCTIONS = {
    "gaussian_noise": _add_gaussian,
    "shot_noise": _count_photons,
    "impulse_noise": _add_impulses,
    "defocus_blur": _defocus,
    "glass_blur": _look_through_glass,
    "motion_blur": _move,
    "zoom_blur": _zoom,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brighten,
    "contrast": _flatten,
    "elastic_transform": _stretch,
    "pixelate": _pixelate,
    "jpeg_compression": _compress,
}

CORRUPTIONS = tuple(_FUNCTIONS)
