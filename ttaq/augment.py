"""The few seeded perturbations of image batches that calibration, its relatives and adaptation use.

All draw from the generator they are given and from nothing else, image by image; all keep shape and dtype and
work on images that are already normalised, because strengths are relative to each image.
"""

import math

import torch
from torch.nn import functional as F

__all__ = ["add_noise", "blur", "change_colour", "change_light", "distort", "perturb", "shift_and_flip", "warp"]


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


def change_colour(
    x: torch.Tensor, generator: torch.Generator, saturation: float = 0.5, hue: float = 0.06
) -> torch.Tensor:
    """Change each image's saturation and turn its hues.

    With ``grey`` the mean over channels and ``d = x - grey``: ``y = grey + s * (d cos(t) + (k x d) sin(t))``, a
    rotation about ``k = (1, 1, 1) / sqrt(3)``; ``s ~ U(1 - saturation, 1 + saturation)``, ``t ~ 2 pi U(-hue, hue)``.
    Images that have not three channels keep their hues.

    Args:
        x: (N, C, H, W), floating point.
        generator: On any device.
        saturation: Largest relative change.
        hue: Largest turn, in full turns.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is not a batch of float images.
    """
    _check("change_colour", x)
    n = len(x)
    gain = _between(n, generator, x, 1 - saturation, 1 + saturation).view(n, 1, 1, 1)
    turn = 2 * math.pi * _between(n, generator, x, -hue, hue).view(n, 1, 1, 1)
    grey = x.mean(dim=1, keepdim=True)
    colour = x - grey
    if x.shape[1] == 3:
        across = (colour.roll(1, 1) - colour.roll(-1, 1)) / math.sqrt(3)
        colour = colour * turn.cos() + across * turn.sin()
    return grey + gain * colour


def warp(
    x: torch.Tensor, generator: torch.Generator, angle: float = 15.0, shift: float = 1 / 16, scale: float = 0.1
) -> torch.Tensor:
    """Rotate, move and scale each image, borders mirrored, and flip half of them, in one bilinear resampling.

    Args:
        x: (N, C, H, W), floating point.
        generator: On any device.
        angle: Largest rotation, degrees.
        shift: Largest move, as a share of height and width.
        scale: Largest relative change of size.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is not a batch of float images.
    """
    _check("warp", x)
    n, _, height, width = x.shape
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    turn = math.radians(angle) * _between(n, generator, values, -1, 1)
    size = _between(n, generator, values, 1 - scale, 1 + scale)
    flip = torch.where(_uniform(n, generator, values) < 0.5, -1.0, 1.0)
    right, down = (2 * shift * _between(n, generator, values, -1, 1) for _ in range(2))
    cos, sin = size * turn.cos(), size * turn.sin()
    rows = [flip * cos, -flip * sin * (height / width), right, sin * (width / height), cos, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3).to(values), list(x.shape), align_corners=False)
    return F.grid_sample(values, grid, padding_mode="reflection", align_corners=False).to(x.dtype)


def blur(x: torch.Tensor, generator: torch.Generator, sigma: float = 0.5) -> torch.Tensor:
    """Blur each image with a Gaussian of 5 x 5 pixels, borders repeated.

    Args:
        x: (N, C, H, W), floating point.
        generator: On any device.
        sigma: Largest standard deviation, in pixels; each image's is drawn from 0 to it.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is not a batch of float images.
    """
    _check("blur", x)
    n, _, height, width = x.shape
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    spread = _between(n, generator, values, 0, sigma).clamp(min=1e-3)
    taps = torch.exp(-torch.arange(-2, 3, device=x.device).square() / (2 * spread.square().unsqueeze(1)))
    taps = (taps / taps.sum(1, keepdim=True)).view(n, 5, 1, 1, 1)
    padded = F.pad(values, [2] * 4, mode="replicate")
    padded = sum(taps[:, k] * padded[:, :, k : k + height] for k in range(5))
    return sum(taps[:, k] * padded[..., k : k + width] for k in range(5)).to(x.dtype)


def distort(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change light and colour, warp, blur and add a little noise, in this order: the strong views of adaptation.

    The kinds are those of Wang et al., CoTTA, arXiv:2203.13591 (supplement); strengths are restated relative to each
    image, which may be normalised already.

    Args:
        x: (N, C, H, W), floating point.
        generator: On any device.

    Returns:
        Like `x`.

    Raises:
        ValueError: `x` is not a batch of float images.
    """
    _check("distort", x)
    x = change_colour(change_light(x, generator, brightness=0.5, contrast=0.4), generator)
    return add_noise(blur(warp(x, generator), generator), generator, snr=40.0)


def _check(verb: str, x: torch.Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"{verb}: images must be floating point (N, C, H, W), got {x.dtype} {tuple(x.shape)}; convert them first"
        )


def _uniform(n: int, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.rand(n, generator=generator, device=generator.device).to(like)


def _between(n: int, generator: torch.Generator, like: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * _uniform(n, generator, like)


def _start(n: int, pixels: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    start = torch.randint(2 * pixels + 1, (n, 1), generator=generator, device=generator.device)
    return start.to(device)
