"""reconstruct: learn roundings and activation scales block by block, so that each block repeats its float output.

Source: Li et al., BRECQ, arXiv:2102.05426 (blocks); Wei et al., QDrop, arXiv:2203.05740 (dropping quantisation while
learning); Nagel et al., arXiv:2004.10568 (learned rounding).
"""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict

import torch
from torch import nn

from .batches import Forward, call, collect
from .blocks import Block, find_blocks
from .blockwise import BlockLearner, Schedule
from .caching import BlockCache
from .consistency import PCR
from .distances import squared_distance
from .learning import check_ready, frozen, progress_bar, quant_layers, restored_on_failure, seeded, settings
from .objectives import Objectives
from .perturbation import PEM
from .quantizers import Quantizer, disabled
from .surgery import device_of, evaluating


def reconstruct(
    model: nn.Module,
    batches: Iterable,
    *,
    schedule: Schedule | None = None,
    pem: PEM | None = None,
    pcr: PCR | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    **options,
) -> dict:
    """Learn, for each block in turn, the roundings of its weights and the scales of its activations.

    ``loss = |f_q(x) - f(x_float)|^2 + penalty + PEM + PCR``, x the output of the quantised prefix mixed with that of
    the float one.

    Args:
        model: A calibrated model; its quantisers are changed in place, its float weights are not.
        batches: A re-iterable of tensors, (x, y) pairs or dicts; 1,024 images are usual.
        schedule: Steps, rates and the like; or give them one by one as `options`.
        pem: Regularise the weights against perturbations (`perturbation`); without a strength of its own the rule
            chooses it on images held out (`Objectives.choose_strength`).
        pcr: Make each block consistent under perturbation (`consistency`).
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.
        progress: Show a bar.
        options: Fields of Schedule.

    Returns:
        `model.ttaq_report`, with "blocks" (loss before and after, seconds), "sqnr" (dB of each layer), and under "pem"
        how the strength was chosen.

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
        cache, objectives = BlockCache(model, inputs, forward), Objectives(model, inputs, forward, pem, pcr)
        rule = objectives.choose_strength(blocks, schedule) if pem and pem.strength is None else {}
        with progress_bar(progress) as bar:
            task = bar.add_task("reconstruct", total=len(blocks))
            for block in blocks:
                bar.update(task, description=f"reconstruct {block.name}")
                rows.append(_reconstruct_block(model, block, cache, schedule, objectives))
                bar.advance(task)
        sqnr = layer_sqnr(model, inputs[0], forward)
    report = model.ttaq_report = getattr(model, "ttaq_report", {})
    report |= {"blocks": rows, "schedule": asdict(schedule), "sqnr": sqnr}
    report |= {"pem": pem and asdict(pem) | rule, "pcr": pcr and asdict(pcr)}
    return report


def _reconstruct_block(model, block: Block, cache: BlockCache, schedule: Schedule, objectives: Objectives) -> dict:
    """Learn one block; return its row of the report."""
    start = time.perf_counter()
    quantised, floats, targets = cache.advance(block)
    before = _block_loss(block, cache, quantised, targets)
    learner = BlockLearner(model, block, schedule, objectives.bases(block, floats))
    objectives.begin(block, quantised, floats, targets)
    learner.learn(quantised, floats, targets, objectives)
    learner.harden(quantised)
    after = _block_loss(block, cache, quantised, targets)
    seconds = round(time.perf_counter() - start, 3)
    return {"name": block.name, "layers": list(block.layers), "before": before, "after": after, "seconds": seconds}


@torch.no_grad()
def _block_loss(block, cache, x, targets):
    return round(squared_distance(cache.run(block, x), targets).item(), 6)


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
