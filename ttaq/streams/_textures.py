"""Random textures that lie over images: plasma for fog, ice crystals for frost."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

_TILE = 512  # side of a procedural frost texture, which repeats without a seam
_TEXTURES = 4
_BEND = 24  # how far, in pixels, crystal borders stray from straight lines
_TINT = np.array([0.86, 0.95, 1.0], dtype=np.float32)


def grow_plasma(generators, height, width, decay):
    """Grow one plasma field a generator by midpoint displacement on a torus.

    Each halving of the step adds uniform noise whose amplitude falls by ``decay ** 2``.

    Args:
        generators: n random generators.
        height: Rows kept of the square of the next power of two.
        width: Columns kept.
        decay: Above 1; the larger, the smoother.

    Returns:
        (n, height, width), float32, 0..1 over the whole square.
    """
    side = 1 << max(1, (max(height, width) - 1).bit_length())
    noise = np.stack([generator.uniform(-1, 1, side * side) for generator in generators]).astype(np.float32)
    field = np.zeros((len(noise), side, side), dtype=np.float32)
    step, amplitude, used = side, 1.0, 0
    while step > 1:
        half, cells = step // 2, side // step
        kicks = amplitude * noise[:, used : used + 3 * cells * cells].reshape(-1, 3, cells, cells)
        corner = field[:, ::step, ::step]
        beside, below = np.roll(corner, -1, 2), np.roll(corner, -1, 1)
        centre = (corner + beside + below + np.roll(below, -1, 2)) / 4 + kicks[:, 0]
        field[:, half::step, half::step] = centre
        field[:, ::step, half::step] = (corner + beside + centre + np.roll(centre, 1, 1)) / 4 + kicks[:, 1]
        field[:, half::step, ::step] = (corner + below + centre + np.roll(centre, 1, 2)) / 4 + kicks[:, 2]
        step, amplitude, used = half, amplitude / decay**2, used + 3 * cells * cells
    low = field.min(axis=(1, 2), keepdims=True)
    high = field.max(axis=(1, 2), keepdims=True)
    return ((field - low) / np.maximum(high - low, 1e-12))[:, :height, :width]


@lru_cache(maxsize=4)
def grow_frost(scale):
    """Grow the procedural frost textures: crystal borders of three sizes over a plasma of ice, tinted blue.

    Args:
        scale: 1 for images of ImageNet's size, 0.2 for images of CIFAR's.

    Returns:
        Tuple of (side, side, 3) arrays, float32, 0..1, periodic.
    """
    textures = []
    for number in range(_TEXTURES):
        generator = np.random.default_rng([2019, number])
        ice, bend_rows, bend_columns = grow_plasma([generator] * 3, _TILE, _TILE, 1.5)
        crystals = np.zeros((_TILE, _TILE), dtype=np.float32)
        for cells, weight in ((6, 0.6), (14, 0.8), (30, 0.6)):
            crystals += weight * _grow_crystals(generator, cells, _BEND * bend_rows, _BEND * bend_columns)
        light = 0.3 * ice + np.clip(1.6 * ice - 0.1, 0, 1) * crystals
        light = np.clip(0.5 + 0.3 * (light - light.mean()) / light.std(), 0, 1)
        side = round(_TILE * scale)
        small = Image.fromarray(light).resize((side, side), Image.Resampling.BOX)
        textures.append(np.asarray(small)[:, :, None] * _TINT)
    return tuple(textures)


def _grow_crystals(generator, cells, bend_rows, bend_columns):
    """Return (side, side) light along the borders of random cells: exp(-(F2 - F1) / width), F1 < F2 distances."""
    seeds = generator.random((cells * cells, 2)).astype(np.float32)
    shine = generator.random(cells * cells).astype(np.float32)
    pixels = np.arange(_TILE, dtype=np.float32)
    rows, columns = (pixels[:, None] + bend_rows) * (cells / _TILE), (pixels + bend_columns) * (cells / _TILE)
    row, column = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    rows, columns = rows - row, columns - column
    nearest = np.full((_TILE, _TILE), np.inf, dtype=np.float32)
    second, glow = nearest.copy(), np.zeros_like(nearest)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            cell = (row + down) % cells * cells + (column + right) % cells
            seed = seeds[cell]
            distance = (seed[..., 0] + down - rows) ** 2 + (seed[..., 1] + right - columns) ** 2
            second = np.minimum(second, np.maximum(nearest, distance))
            glow = np.where(distance < nearest, shine[cell], glow)
            nearest = np.minimum(nearest, distance)
    nearest, second = np.sqrt(nearest), np.sqrt(second)
    return np.exp((nearest - second) / 0.12) * (0.4 + 0.6 * glow) + 0.25 * glow * (1 - nearest)


def read_frost(folder, scale):
    """Read frost pictures from a folder, scaled for the image size.

    Args:
        folder: Holds .png, .jpg or .jpeg files, taken in the order of their names.
        scale: As in `grow_frost`.

    Returns:
        Tuple of (H, W, 3) arrays, float32, 0..1.

    Raises:
        ValueError: There is no such folder or no picture in it.
    """
    folder = Path(folder)
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name.suffix.lower() in {".png", ".jpg", ".jpeg"}]
    if not names:
        raise ValueError(
            f"corrupt: frost_folder must hold .png or .jpg pictures, got {folder} with none; "
            "pass frost_folder=None for procedural frost"
        )
    return _read_pictures(tuple((str(name), name.stat().st_mtime_ns) for name in names), scale)


@lru_cache(maxsize=2)
def _read_pictures(stamped, scale):
    """Decode pictures given as (path, time of change), so that a changed file is read again."""
    pictures = []
    for path, _ in stamped:
        try:
            with Image.open(path) as picture:
                size = [max(1, round(side * scale)) for side in picture.size]
                picture = picture.convert("RGB").resize(size, Image.Resampling.BOX)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"corrupt: cannot decode the frost picture {path} ({error}); remove it") from error
        pictures.append(np.asarray(picture, dtype=np.float32) / 255)
    return tuple(pictures)


def cut(texture, generator, height, width):
    """Cut a random window; a texture smaller than the window repeats.

    Args:
        texture: (h, w, 3).
        generator: Draws the corner.
        height: Of the window.
        width: Of the window.

    Returns:
        (height, width, 3).
    """
    tall, wide = texture.shape[:2]
    top = generator.integers(max(1, tall - height + 1))
    left = generator.integers(max(1, wide - width + 1))
    rows, columns = (top + np.arange(height)) % tall, (left + np.arange(width)) % wide
    return texture[rows[:, None], columns]
