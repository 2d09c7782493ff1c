"""Changes of an image that take the object away and leave its colours and textures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Transform = Callable[[Tensor, torch.Generator], Tensor]


def shuffle_patches(x: Tensor, generator: torch.Generator, rows: int = 4, columns: int = 4) -> Tensor:
    """Cut each image into equal patches and put them back in another order, drawn for each image.

    Sides that the number of patches does not divide keep the pixels left over, at the bottom and at the right,
    where they are.

    Args:
        x: (N, C, H, W); H at least `rows`, W at least `columns`.
        generator: On any device.
        rows: Patches from top to bottom.
        columns: Patches from left to right.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is no batch of images, or too small.
    """
    _check("shuffle_patches", x, rows, columns)
    n, channels, height, width = x.shape
    high, wide = height // rows, width // columns
    part = x[:, :, : rows * high, : columns * wide]
    patches = part.reshape(n, channels, rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(n, rows * columns, generator=generator, device=generator.device).argsort(dim=1, stable=True)
    moved = patches[torch.arange(n, device=x.device)[:, None], order.to(x.device)]
    moved = moved.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).reshape(part.shape)
    y = x.clone()
    y[:, :, : rows * high, : columns * wide] = moved
    return y


def shuffle_pixels(x: Tensor, generator: torch.Generator) -> Tensor:
    """Put the pixels of each image, (N, C, H, W), in another order; see `shuffle_patches`."""
    _check("shuffle_pixels", x, 1, 1)
    return shuffle_patches(x, generator, *x.shape[2:])


def occlude(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Cover the middle of each image, half as high and wide as it, with the mean of each of its channels.

    Args:
        x: (N, C, H, W).
        generator: Not used: the middle is always the same.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is no batch of images, or has sides below 2.
    """
    _check("occlude", x, 2, 2)
    height, width = x.shape[2:]
    top, left = height // 4, width // 4
    y = x.clone()
    y[:, :, top : top + height // 2, left : left + width // 2] = x.mean((2, 3), keepdim=True)
    return y


TRANSFORMS: dict[str, Transform] = {"patch": shuffle_patches, "pixel": shuffle_pixels, "occ": occlude}


def choose_transform(transform: str | Transform) -> Transform:
    """Return a transform given by name, or as it is."""
    chosen = TRANSFORMS.get(transform) if isinstance(transform, str) else transform
    if not callable(chosen):
        raise ValueError(
            f"adapt: transform must be one of {', '.join(TRANSFORMS)} or a function (x, generator) -> x, "
            f'got {transform!r}; use "patch"'
        )
    return chosen


def _check(verb: str, x: Tensor, height: int, width: int) -> None:
    if x.dim() != 4 or x.shape[2] < height or x.shape[3] < width:
        raise ValueError(
            f"{verb}: images must be (N, C, H, W) of at least {height} x {width}, got {tuple(x.shape)}; "
            "pass transform=, a function (x, generator) -> x of your own"
        )
