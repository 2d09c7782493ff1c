"""The few seeded perturbations of image batches that calibration and its relatives use.

All draw from the generator they are given and from nothing else, image by image; all keep shape and dtype and
work on images that are already normalised, because strengths are relative to each image.
"""

import torch
from torch.nn import functional as F

__all__ = ["add_noise", "change_light", "perturb", "shift_and_flip"]


def shift_and_flip(x: torch.Tensor, generator: torch.Generator, pixels: int = 4) -> torch.Tensor:
    """Move each image by up to `pixels` in both directions, borders mirrored, and flip half of them.

    Args:
        x: (N, C, H, W), floating point; H and W above `pixels`.
        generator: On any device.
        pixels: Largest shift.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is not a batch of float images, or is too small for the shift.
    """
    _check("shift_and_flip", x)
    n, _, height, width = x.shape
    if pixels >= min(height, width):
        raise ValueError(
            f"shift_and_flip: pixels must be below height and width, got {pixels} for {height} x {width}; "
            "take a smaller shift"
        )
    rows = _start(n, pixels, generator, x.device) + torch.arange(height, device=x.device)
    columns = _start(n, pixels, generator, x.device) + torch.arange(width, device=x.device)
    flip = _uniform(n, generator, x) < 0.5
    columns = torch.where(flip.view(n, 1), columns.flip(1), columns)
    padded = F.pad(x, [pixels] * 4, mode="reflect")
    image = torch.arange(n, device=x.device).view(n, 1, 1)
    moved = padded.permute(0, 2, 3, 1)[image, rows.unsqueeze(2), columns.unsqueeze(1)]
    return moved.permute(0, 3, 1, 2).contiguous()


def add_noise(x: torch.Tensor, generator: torch.Generator, snr: float | torch.Tensor = 20.0) -> torch.Tensor:
    """Add white Gaussian noise ``snr`` decibels below each image.

    ``y = x + rms(x) * 10^(-snr / 20) * n``, ``n ~ N(0, 1)``.

    Args:
        x: (N, C, H, W), floating point.
        generator: On any device.
        snr: Signal-to-noise ratio, dB; or (N,), one an image.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is not a batch of float images.
    """
    _check("add_noise", x)
    noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    rms = x.float().square().mean(dim=(1, 2, 3), keepdim=True).sqrt().to(x.dtype)
    level = 10 ** (-torch.as_tensor(snr, dtype=torch.float64) / 20)
    return x + rms * level.to(x).view(-1, *[1] * (x.dim() - 1)) * noise


def change_light(
    x: torch.Tensor, generator: torch.Generator, brightness: float = 0.2, contrast: float = 0.2
) -> torch.Tensor:
    """Change each image's brightness and contrast.

    ``y = (x - mean) * c + mean + b * std`` with ``c ~ U(1 - contrast, 1 + contrast)`` and
    ``b ~ U(-brightness, brightness)``; mean and std over all pixels and channels of the image.

    Args:
        x: (N, C, H, W), floating point.
        generator: On any device.
        brightness: Largest shift, in standard deviations.
        contrast: Largest relative change.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is not a batch of float images.
    """
    _check("change_light", x)
    n = len(x)
    gain = (1 + contrast * (2 * _uniform(n, generator, x) - 1)).view(n, 1, 1, 1)
    shift = (brightness * (2 * _uniform(n, generator, x) - 1)).view(n, 1, 1, 1)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    std = x.std(dim=(1, 2, 3), keepdim=True, correction=0)
    return (x - mean) * gain + mean + shift * std


def perturb(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, flip, relight and add noise, in this order, at the default strengths.

    Args:
        x: (N, C, H, W), floating point; small images move by an eighth of their side.
        generator: On any device.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is not a batch of float images.
    """
    _check("perturb", x)
    x = shift_and_flip(x, generator, min(4, *(side // 8 for side in x.shape[2:])))
    return add_noise(change_light(x, generator), generator)


def _check(verb: str, x: torch.Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"{verb}: images must be floating point (N, C, H, W), got {x.dtype} {tuple(x.shape)}; convert them first"
        )


def _uniform(n: int, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.rand(n, generator=generator, device=generator.device).to(like)


def _start(n: int, pixels: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    start = torch.randint(2 * pixels + 1, (n, 1), generator=generator, device=generator.device)
    return start.to(device)
