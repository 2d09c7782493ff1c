"""What PEM measures of the inputs of layers: their energy, how much of it perturbed images add, and where it grows."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .augment import add_noise, change_light
from .batches import Forward, call, change_images, has_images
from .layers import QuantConv2d, QuantLinear, pad_input
from .quantizers import disabled


@torch.no_grad()
def measure_noise(model: nn.Module, inputs: list, forward: Forward | None, seed: int) -> dict[str, Tensor]:
    """Measure 1 / SNR_j of the inputs of every quantised layer, when the images change in light and get noise.

    Args:
        model: Runs as the float model.
        inputs: Entries of `batches.collect`.
        forward: Runs the model on one entry.
        seed: Of the changes.

    Returns:
        Layer to (J,), E[d_j^2] / E[x_j^2], 0 where a channel is silent.

    Raises:
        ValueError: There are no images (N, C, H, W) to change.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantConv2d))}
    sums = {}
    if not all(has_images(entry) for entry in inputs):
        raise ValueError("PEM: the inputs hold no images (N, C, H, W) to perturb; give snr in dB")
    with disabled(model):
        for entry in inputs:
            view = change_images(entry, lambda x: add_noise(change_light(x, generator), generator))
            clean, moved = (inputs_of(layers, lambda e=e: call(model, e, forward)) for e in (entry, view))
            for name, x in clean.items():
                terms = torch.stack([energy(moved[name] - x, layers[name]), energy(x, layers[name])])
                sums[name] = sums[name] + terms if name in sums else terms
    return {name: torch.where(x > 0, d / x.clamp(min=1e-30), 0.0) for name, (d, x) in sums.items()}


def depth_weights(noise: dict[str, Tensor]) -> dict[str, float]:
    """Weigh each layer by the energy gain of the layers behind it, 1 on average.

    The relative energy of a perturbation at a layer's input, over that at the last layer's, telescopes to the product
    of the gains between: ``w_l = r_last / r_l`` with ``r_l = E|d|^2 / E|x|^2``.

    Args:
        noise: What `measure_noise` gave, in the order in which layers run.
    """
    relative = {name: inverse.mean().clamp(min=1e-12).item() for name, inverse in noise.items()}
    last = list(relative.values())[-1]
    gains = {name: last / value for name, value in relative.items()}
    mean = sum(gains.values()) / len(gains)
    return {name: gain / mean for name, gain in gains.items()}


def _channels(layer):
    return 1 if isinstance(layer, QuantConv2d) else -1


def by_channel(x, layer):
    """View an input as (J, samples)."""
    return x.detach().float().movedim(_channels(layer), 0).flatten(1)


def noise_like(x, layer, spread):
    """Draw normal noise of the shape of an input, `spread` (J,) wide in each channel."""
    noise = torch.randn_like(x.movedim(_channels(layer), -1), dtype=torch.float32) * spread
    return noise.movedim(-1, _channels(layer))


def energy(x, layer):
    """Return E[x_j^2] of an input, (J,)."""
    return by_channel(x, layer).square().mean(1)


def output_energy(layer, output):
    """Return E|W x|^2, (): without the bias, summed over outputs."""
    y = by_channel(output, layer)
    if layer.bias is not None:
        y = y - layer.bias.detach().float()[:, None]
    return y.square().mean(1).sum().clamp(min=1e-30)


def inputs_of(layers, run):
    """Return the first argument of each layer's first call, in the order of the calls."""
    return {name: args[0] for name, (args, _) in calls_of(layers, run).items()}


def calls_of(layers, run):
    """Return what each layer was first called with, and what it returned, in the order of the calls."""
    found = {}

    def watch(name):
        return lambda layer, args, output: found.setdefault(name, (args, output)) and None

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def patches_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what the rows of a weight are multiplied by, (groups, K, n), float32: tokens, or patches of images."""
    if isinstance(layer, QuantLinear):
        return x.detach().flatten(0, -2).float().mT[None]
    x, padding = pad_input(layer, x.detach().float())
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.transpose(0, 1).flatten(1).unflatten(0, (layer.groups, -1))
