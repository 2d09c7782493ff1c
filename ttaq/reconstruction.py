"""reconstruct: learn roundings and activation scales block by block, so that each block repeats its float output.

Source: Li et al., BRECQ, arXiv:2102.05426 (blocks); Wei et al., QDrop, arXiv:2203.05740 (dropping quantisation while
learning); Nagel et al., arXiv:2004.10568 (learned rounding).
"""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .batches import Forward, call, collect
from .blocks import Block, find_blocks, run_block
from .caching import BlockCache
from .learning import check_ready, frozen, progress_bar, quant_layers, restored_on_failure, seeded, settings
from .quantizers import ActivationQuantizer, AdaRound, Quantizer, StraightThrough, clamp_scales, disabled
from .surgery import device_of, evaluating

ROUNDINGS = {"adaround": AdaRound, "ste": StraightThrough}


@dataclass(frozen=True)
class Schedule:
    """How a block is learned.

    Args:
        steps: Of Adam, for each block.
        batch_size: Images a step.
        rounding: "adaround" or "ste".
        rounding_lr: Of the roundings (adaround), or of the weights as a share of their scale (ste).
        scale_lr: Of the activation scales, as a share of each scale; decays to 0 along a cosine.
        drop: Share of elements that pass unquantised while learning, in the block's input and in its activations.
        penalty: Weight of AdaRound's regulariser, after the first `warmup` share of the steps.
        warmup: Share of the steps without the regulariser.
        seed: Of the order of images and of what is dropped.
    """

    steps: int = 1000
    batch_size: int = 32
    rounding: str = "adaround"
    rounding_lr: float = 3e-3
    scale_lr: float = 1e-3
    drop: float = 0.5
    penalty: float = 0.01
    warmup: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"reconstruct: rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"reconstruct: steps and batch_size must be 1 or more, got {self.steps}, {self.batch_size}"
            )
        if not (0 <= self.drop <= 1 and 0 <= self.warmup <= 1):
            raise ValueError(f"reconstruct: drop and warmup are shares from 0 to 1, got {self.drop}, {self.warmup}")


def reconstruct(
    model: nn.Module,
    batches: Iterable,
    *,
    schedule: Schedule | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    **options,
) -> dict:
    """Learn, for each block in turn, the roundings of its weights and the scales of its activations.

    ``loss = |f_q(x) - f(x_float)|^2 + penalty``, x the output of the quantised prefix mixed with that of the float one.

    Args:
        model: A calibrated model; its quantisers are changed in place, its float weights are not.
        batches: A re-iterable of tensors, (x, y) pairs or dicts; 1,024 images are usual.
        schedule: Steps, rates and the like; or give them one by one as `options`.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.
        progress: Show a bar.
        options: Fields of Schedule.

    Returns:
        `model.ttaq_report`, with "blocks" (loss before and after, seconds) and "sqnr" (dB of each layer).

    Raises:
        ValueError: The model is not calibrated, or the images do not serve; the model is then as it was.
    """
    schedule = settings("reconstruct", Schedule, schedule, options)
    check_ready("reconstruct", model)
    inputs = collect("reconstruct", batches, device_of(model))
    rows = []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        frozen(model),
        restored_on_failure(model),
        seeded(schedule.seed, device_of(model)),
    ):
        blocks = find_blocks(model, inputs[0], forward)
        cache = BlockCache(model, inputs, forward)
        with progress_bar(progress) as bar:
            task = bar.add_task("reconstruct", total=len(blocks))
            for block in blocks:
                bar.update(task, description=f"reconstruct {block.name}")
                rows.append(_reconstruct_block(model, block, cache, schedule))
                bar.advance(task)
        sqnr = layer_sqnr(model, inputs[0], forward)
    report = model.ttaq_report = getattr(model, "ttaq_report", {})
    report |= {"blocks": rows, "schedule": asdict(schedule), "sqnr": sqnr}
    return report


def _reconstruct_block(model, block: Block, cache: "BlockCache", schedule: Schedule) -> dict:
    """Learn one block; return its row of the report."""
    start = time.perf_counter()
    quantised, floats, targets = cache.advance(block)
    layers = [m for m in _layers(model, block).values() if m.weight_quantizer is not None]
    before = _block_loss(model, block, cache, quantised, targets)
    for layer in layers:
        layer.weight_quantizer.codes = None
        layer.weight_quantizer.rounding = ROUNDINGS[schedule.rounding](layer.weight, layer.weight_quantizer)
    _learn(model, block, cache, layers, (quantised, floats, targets), schedule)
    for layer in layers:
        layer.weight_quantizer.harden(layer.weight)
    after = _block_loss(model, block, cache, quantised, targets)
    seconds = round(time.perf_counter() - start, 3)
    return {"name": block.name, "layers": list(block.layers), "before": before, "after": after, "seconds": seconds}


def _learn(model, block, cache, layers, tensors, schedule):
    """Run the steps: images at random, part of the input and of the activations left unquantised."""
    quantised, floats, targets = tensors
    activations = [q for m in block.resolve(model) for q in m.modules() if isinstance(q, ActivationQuantizer)]
    roundings = [layer.weight_quantizer.rounding for layer in layers]
    learned = _learned(layers, activations, schedule)
    if not roundings and not learned:
        return
    optimizer, scheduler = _optimizers(layers, learned, schedule)
    for quantizer in activations:
        quantizer.drop = schedule.drop
    size = min(schedule.batch_size, len(targets))
    for step in range(schedule.steps):
        picked = torch.randint(len(targets), (size,), device=targets.device)
        x = quantised[picked]
        if schedule.drop:
            x = torch.where(torch.rand_like(x) < schedule.drop, floats[picked], x)
        regularised = _progress_past_warmup(roundings, step, schedule)
        loss = _distance(run_block(model, block, x), targets[picked])
        if regularised:
            loss = loss + schedule.penalty * sum(r.penalty for r in roundings if r.penalty is not None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        clamp_scales(learned)
    for quantizer in activations:
        quantizer.drop = 0.0


def _learned(layers, activations, schedule):
    """List the quantisers whose scales learn: those of activations, and under "ste" those of weights."""
    learned = [q for q in activations if q.spec.granularity == "tensor"]
    return learned + [layer.weight_quantizer for layer in layers if schedule.rounding == "ste"]


def _optimizers(layers, learned, schedule):
    """Give one Adam over roundings at a constant rate and scales whose rate falls to 0 along a cosine."""
    groups, decays = [], []
    for layer in layers:
        quantizer = layer.weight_quantizer
        unit = 1.0 if schedule.rounding == "adaround" else quantizer.scale.mean().item()
        groups.append({"params": [quantizer.rounding.v], "lr": schedule.rounding_lr * unit})
        decays.append(schedule.rounding == "ste")
    for quantizer in learned:
        quantizer.scale.requires_grad_(True)
        groups.append({"params": [quantizer.scale], "lr": schedule.scale_lr * quantizer.scale.mean().item()})
        decays.append(True)
    optimizer = torch.optim.Adam(groups)
    cosine = lambda step: (1 + math.cos(math.pi * step / schedule.steps)) / 2  # noqa: E731
    rates = [cosine if decay else (lambda step: 1.0) for decay in decays]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


def _progress_past_warmup(roundings, step, schedule) -> bool:
    """Set the sharpness of AdaRound's regularisers, 20 falling to 2 after the warm-up; say whether that is over."""
    done = (step / schedule.steps - schedule.warmup) / max(1 - schedule.warmup, 1e-9)
    for rounding in roundings:
        if schedule.rounding == "adaround":
            rounding.beta.fill_(20.0 if done < 0 else 2 + 18 * max(0.0, 1 - done))
    return done >= 0


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Sum squared errors over channels, average over samples and positions."""
    channels = 1 if output.ndim == 4 else -1
    return (output.float() - target.float()).square().sum(channels).mean()


@torch.no_grad()
def layer_sqnr(model: nn.Module, entry, forward: Forward | None = None) -> dict[str, float]:
    """Measure each quantised layer alone: dB of its float output over its quantisation error, on float inputs."""
    found = {}

    def measure(name):
        def hook(layer, args, output):
            if name not in found:
                quantizers = [q for q in layer.modules() if isinstance(q, Quantizer)]
                for q in quantizers:
                    q.enabled = True
                error = (layer.forward(*args) - output).float().square().sum()
                for q in quantizers:
                    q.enabled = False
                signal = output.float().square().sum().item()
                found[name] = round(10 * math.log10(max(signal, 1e-30) / max(error.item(), 1e-30)), 2)

        return hook

    with disabled(model), evaluating(model):
        hooks = [layer.register_forward_hook(measure(name)) for name, layer in quant_layers(model).items()]
        try:
            call(model, entry, forward)
        finally:
            for hook in hooks:
                hook.remove()
    return found


@torch.no_grad()
def _block_loss(model, block, cache, x, targets):
    return round(_distance(cache.run(block, x), targets).item(), 6)


def _layers(model, block: Block):
    named = quant_layers(model)
    return {n: named[n] for n in block.layers if n in named}
