"""Blurs and warps of image batches, float32 in 0..1; each image is worked on for itself, whatever stands beside it."""

import numpy as np


def correlate(images, kernel):
    """Sum a small kernel over each channel, borders mirrored without repeating the edge.

    Args:
        images: (n, H, W, C), float32.
        kernel: (2r+1, 2r+1), float32; zero taps cost nothing.

    Returns:
        (n, H, W, C), float32.
    """
    height, width = images.shape[1:3]
    reach = len(kernel) // 2
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    total = np.zeros_like(images)
    product = np.empty_like(images)
    for row, column in np.argwhere(kernel):
        window = padded[:, row : row + height, column : column + width]
        total += np.multiply(window, kernel[row, column], out=product)
    return total


def build_disk(radius, alias):
    """Build the kernel of a lens out of focus: a disk, its edge softened by a Gaussian of `alias` pixels.

    Args:
        radius: Of the disk, in pixels.
        alias: Standard deviation of the softening over 3 x 3 taps, 5 x 5 where the radius exceeds 8.

    Returns:
        (2r+1, 2r+1), float32, sum 1, without empty borders.
    """
    soft = 1 if radius <= 8 else 2
    reach = int(np.floor(radius)) + soft
    squares = np.arange(-reach, reach + 1) ** 2
    inside = (squares[:, None] + squares[None, :] <= radius**2).astype(float)
    bell = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * alias**2))
    bell /= bell.sum()
    for axis in (0, 1):
        inside = np.apply_along_axis(np.convolve, axis, inside, bell, "same")
    inside[inside < 1e-6 * inside.max()] = 0
    return (inside / inside.sum()).astype(np.float32)


def blur_motion(images, radius, sigma, angles):
    """Smear each image along its own direction with half a Gaussian of 2 radius + 1 taps, edges repeated.

    ``y[p] = sum_i k_i x[p + round(i (sin a, cos a))]``, ``k_i ~ exp(-i^2 / 2 sigma^2)``, i = 0 .. 2 radius.

    Args:
        images: (n, H, W, C), float32.
        radius: Half the length of the smear, in pixels.
        sigma: Standard deviation, in pixels.
        angles: (n,), in degrees.

    Returns:
        (n, H, W, C), float32.
    """
    taps = np.arange(2 * radius + 1)
    kernel = np.exp(-(taps**2) / (2 * sigma**2))
    kernel = kernel[kernel > 1e-6]
    kernel = (kernel / kernel.sum()).astype(np.float32)
    height, width = images.shape[1:3]
    reach = len(kernel)
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    smeared = np.zeros_like(images)
    for image, total, angle in zip(padded, smeared, np.deg2rad(angles), strict=True):
        down = reach + np.rint(taps * np.sin(angle)).astype(int)
        right = reach + np.rint(taps * np.cos(angle)).astype(int)
        for weight, y, x in zip(kernel, down, right, strict=False):
            total += weight * image[y : y + height, x : x + width]
    return smeared


def magnify(planes, factor):
    """Enlarge about the centre by `factor` >= 1 with linear interpolation, keeping the size.

    Args:
        planes: (..., H, W), float32.
        factor: Enlargement.

    Returns:
        (..., H, W), float32.
    """
    return _enlarge_matrix(planes.shape[-2], factor) @ planes @ _enlarge_matrix(planes.shape[-1], factor).T


def _enlarge_matrix(size, factor):
    """Return the (size, size) matrix of linear interpolation at centre + (i - centre) / factor."""
    centre = (size - 1) / 2
    place = centre + (np.arange(size) - centre) / factor
    return np.maximum(1 - np.abs(place[:, None] - np.arange(size)), 0).astype(np.float32)


def scatter_pixels(images, delta, rounds, generators):
    """Replace each pixel, from the last to the first, by one -delta .. delta - 1 rows and columns away.

    Args:
        images: (n, H, W, C), float32; pixels nearer than `delta` to the border stay.
        delta: Reach, in pixels.
        rounds: How often the image is walked through.
        generators: n random generators.

    Returns:
        (n, H, W, C), float32.
    """
    count, height, width, channels = images.shape
    rows, columns = np.arange(height - delta, delta - 1, -1), np.arange(width - delta, delta - 1, -1)
    places = (rows[:, None] * width + columns).ravel()
    sources = np.empty((count, height * width), dtype=np.int64)
    for source, generator in zip(sources, generators, strict=True):
        # A pixel may take what another has just taken; plain lists are the fastest way to go in sequence.
        taken = list(range(height * width))
        for _ in range(rounds):
            steps = generator.integers(-delta, delta, (2, len(places)))
            partners = places + steps[0] * width + steps[1]
            for here, there in zip(places.tolist(), partners.tolist(), strict=True):
                taken[here] = taken[there]
        source[:] = taken
    flat = images.reshape(count, height * width, channels)
    return np.take_along_axis(flat, sources[:, :, None], axis=1).reshape(images.shape)


def warp(images, rows, columns):
    """Read each image at fractional places, bilinearly, mirrored at the borders.

    Args:
        images: (n, H, W, C), float32.
        rows: (n, H, W), where to read each output pixel.
        columns: (n, H, W), alike.

    Returns:
        (n, H, W, C), float32.
    """
    count, height, width, channels = images.shape
    top, bottom, down = _mirror(rows, height)
    left, right, across = _mirror(columns, width)
    flat = images.reshape(-1, channels)
    first = (np.arange(count) * height * width)[:, None, None]

    def read(row, column):
        return flat[first + row * width + column]

    upper = read(top, left) * (1 - across) + read(top, right) * across
    lower = read(bottom, left) * (1 - across) + read(bottom, right) * across
    return upper * (1 - down) + lower * down


def _mirror(place, size):
    """Fold places into 0 .. size - 1; return the pixel before, the pixel after and the fraction between."""
    last = size - 1
    folded = last - np.abs(last - np.abs(place) % max(2 * last, 1))
    before = np.clip(np.floor(folded).astype(np.int64), 0, last)
    fraction = (folded - before).astype(np.float32)[..., None]
    return before, np.minimum(before + 1, last), fraction
