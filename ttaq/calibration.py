"""calibrate: set every scale from a few hundred images."""

from collections.abc import Iterable

import torch
from torch import nn

from .batches import Extent, Forward, call, collect, count
from .files import fingerprint
from .layers import QuantConv2d, QuantLinear
from .quantizers import ActivationQuantizer, Quantizer, disabled
from .surgery import device_of, evaluating


def calibrate(model: nn.Module, batches: Iterable, *, forward: Forward | None = None, seed: int = 0) -> dict:
    """Choose the range of every weight and of every activation that the float model uses on `batches`.

    Args:
        model: A prepared model; its scales are set in place, nothing else changes.
        batches: A re-iterable of tensors, (x, y) pairs or dicts; a few hundred images.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.
        seed: Of the values that are sampled from each activation.

    Returns:
        `model.ttaq_report`, with the number of images under "calibration", "unseen", the layers that no image
        reached: they have no ranges, and `reconstruct` and `pack` refuse them by name; and where the model takes
        images (N, C, H, W), "inputs": what they are in each channel (`batches.Extent`), for `adapt` to compare.

    Raises:
        ValueError: Nothing to calibrate, no images, NaN in them, or NaN in an activation, named.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantConv2d))}
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    if not layers and not quantizers:
        raise ValueError("calibrate: the model has no quantised layers; call ttaq.prepare first")
    inputs = collect("calibrate", batches, device_of(model))
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"calibrate: the weight of {name} holds NaN or infinite values; load sound weights first")
    given = Extent()
    samples, reached = _observe(model, inputs, quantizers, forward, seed, given)
    for layer in layers.values():
        if layer.weight_quantizer in reached:
            layer.weight_quantizer.fit(layer.weight)
    for name, values in samples.items():
        quantizers[name].fit(values)
    unseen = sorted({name.rpartition(".")[0] for name, q in quantizers.items() if q not in reached})
    report = model.ttaq_report = getattr(model, "ttaq_report", {})
    report.setdefault("fingerprint", fingerprint(model))
    report["calibration"] = {"images": sum(count(entry) for entry in inputs), "unseen": unseen}
    if record := given.record():
        report["calibration"]["inputs"] = record
    return report


@torch.no_grad()
def _observe(model, inputs, quantizers, forward, seed, given):
    """Run the float model; gather a sample of the values that reach each activation, and all quantisers reached.

    `given` looks at what the model is given.
    """
    generator = torch.Generator().manual_seed(seed)
    samples, reached = {}, set()

    def watch(name):
        def hook(quantizer, args):
            reached.add(quantizer)
            if isinstance(quantizer, ActivationQuantizer):
                samples.setdefault(name, []).append(quantizer.sample(args[0], generator))

        return hook

    hooks = [quantizer.register_forward_pre_hook(watch(name)) for name, quantizer in quantizers.items()]
    hooks.append(given.watch(model))
    try:
        with disabled(model), evaluating(model):
            for entry in inputs:
                call(model, entry, forward)
    finally:
        for hook in hooks:
            hook.remove()
    gathered = {name: torch.cat(parts) for name, parts in samples.items()}
    for name, values in gathered.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"calibrate: the input of {name} holds NaN or infinite values; check the model's weights")
    return gathered, reached
