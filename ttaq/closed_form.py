"""solve: choose the codes of every weight in closed form, layer by layer, without a gradient step.

With x the input of a layer in the float model and x^ in the quantised one, the codes are chosen to minimise

    E|W^ x^ - W x|^2 + sum_j r_j |W^[:, j]|^2 + d |W^ - W|^2                                                       (1)

whose minimiser over floats is ``W* = (W C + d W) H^-1`` with ``H = E[x^ x^'] + diag(r) + d``, ``C = E[x x^']``; (1) is
``tr((W^ - W*) H (W^ - W*)')`` and a constant. Columns are rounded one after another, and what rounding one of them
costs is made up by those that follow, through the Cholesky factor of H^-1.

Source: Frantar et al., GPTQ, arXiv:2210.17323 (the order of columns and the factor); Li et al., GPTAQ, arXiv:2504.02692
(targets of the float model); r is the ridge of PEM (`perturbation`, equation (2)).
"""

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .batches import Forward, collect, count, take
from .blocks import find_blocks, run_block
from .caching import BlockCache
from .distributed import Team
from .layers import QuantConv2d, QuantLinear
from .learning import check_ready, frozen, learned_in, progress_bar, quant_layers, restored_on_failure
from .moments import measure_noise, patches_of
from .perturbation import PEM
from .quantizers import WeightQuantizer, broadcast, disabled
from .reconstruction import layer_sqnr
from .sharding import Shard
from .stores import bytes_of
from .stores import rows as taken
from .surgery import device_of, evaluating

COLUMNS = 128  # that are rounded before the rest is brought up to date, in one product
PIECE = 64  # images that run through a block at once


@torch.no_grad()
def solve(
    model: nn.Module,
    batches: Iterable,
    *,
    damping: float = 0.01,
    pem: PEM | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    cache: str | int | None = None,
    team: Team | None = None,
) -> dict:
    """Choose the codes of every weight in closed form: seconds a block where `reconstruct` takes minutes.

    Scales of activations stay as calibrated; those of weights are chosen anew for W*.

    Args:
        model: A calibrated model; the codes of its weights are set in place, its float weights are left.
        batches: A re-iterable of tensors, (x, y) pairs or dicts; some hundred images.
        damping: d of (1), as a share of the mean of diag E[x^ x^'].
        pem: Its `strength` and `snr` make the ridge r; None for none.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.
        progress: Show a bar.
        cache: As in `reconstruct`.
        team: As in `reconstruct`: the processes sum up E[x^ x^'] and E[x x^'], and each of them rounds.

    Returns:
        `model.ttaq_report`, with "blocks" (loss before and after, seconds) and "sqnr" (dB of each layer).

    Raises:
        ValueError: The model is not calibrated, or the images do not serve; the model is then as it was.
    """
    if not damping > 0:
        raise ValueError(f"solve: damping must be above 0, got {damping}; use 0.01")
    if pem and pem.strength is None:
        raise ValueError("solve: no rule chooses the strength of PEM here; give it, as PEM(strength=0.1)")
    check_ready("solve", model)
    inputs = collect("solve", batches, device_of(model))
    shard = Shard(team, sum(map(count, inputs))) if team else None
    rows = []
    with torch.inference_mode(False), evaluating(model), frozen(model), restored_on_failure(model):
        blocks = find_blocks(model, take(inputs[0], slice(0, 2)), forward)
        store = BlockCache(model, inputs, forward, None if cache is None else bytes_of(cache), shard)
        layers = quant_layers(model)
        noise = _noise(model, inputs, forward, pem)
        if team:
            team.follow(noise.values())
        with progress_bar(progress and (not team or team.leads)) as bar:
            task = bar.add_task("solve", total=len(blocks))
            for block in blocks:
                start = time.perf_counter()
                quantised, floats, _ = store.advance(block)
                before = store.loss(block)
                for name in (n for n in block.layers if n in layers and layers[n].weight_quantizer is not None):
                    ridge = _ridge(layers[name], noise.get(name), pem)
                    _solve_layer(model, block, layers[name], quantised, floats, damping, ridge, team)
                if team:
                    team.agree("solve", f"block {block.name}", learned_in(block.resolve(model)))
                after = store.loss(block)
                row = {"name": block.name, "layers": list(block.layers), "before": before, "after": after}
                rows.append(row | {"seconds": round(time.perf_counter() - start, 3)})
                bar.advance(task)
        sqnr = layer_sqnr(model, inputs[0], forward)
    report = model.ttaq_report = getattr(model, "ttaq_report", {})
    report |= {"blocks": rows, "sqnr": sqnr, "damping": damping}
    return report


def _solve_layer(model, block, layer, quantised, floats, damping, ridge, team):
    """Set the codes of one layer, those before it in its block having theirs."""
    hessian = cross = seen_rows = 0
    for start in range(0, len(quantised), PIECE):
        part = slice(start, start + PIECE)
        x, other = (taken(whole, part, layer.weight.device) for whole in (quantised, floats))
        seen = _given(layer, lambda x=x: run_block(model, block, x))
        with disabled(model):
            meant = _given(layer, lambda x=other: run_block(model, block, x))
        for x_hat, x_float in zip(seen, meant, strict=True):
            rows, wanted = patches_of(layer, x_hat), patches_of(layer, x_float)
            hessian = hessian + (rows @ rows.mT).double()
            cross = cross + (wanted @ rows.mT).double()
            seen_rows += rows.shape[2]
    if not seen_rows:
        return
    if team:
        hessian, cross = team.add_up(hessian), team.add_up(cross)
        seen_rows = team.add_up(torch.tensor(float(seen_rows), dtype=torch.float64, device=hessian.device))
    hessian, cross = hessian / seen_rows, cross / seen_rows
    power = hessian.diagonal(dim1=1, dim2=2)
    small = damping * power.mean().clamp(min=1e-12)
    weight = layer.weight.detach().flatten(1).unflatten(0, (len(hessian), -1)).double()
    hessian = hessian + torch.diag_embed(small + ridge * power)
    wanted = torch.linalg.solve(hessian, weight @ cross + small * weight, left=False)
    quantizer = layer.weight_quantizer
    best = wanted.flatten(0, 1).reshape(layer.weight.shape).to(layer.weight.dtype)
    quantizer.fit(best)
    quantizer.codes = feed_back(wanted.float(), hessian, quantizer, layer.weight)


def feed_back(weight: Tensor, hessian: Tensor, quantizer: WeightQuantizer, like: Tensor) -> Tensor:
    """Round columns one after another, the error of each made up by those that follow.

    Args:
        weight: (G, O / G, K), float32: W*, for each group of a convolution.
        hessian: (G, K, K), float64, positive definite.
        quantizer: Ready: its scales and zeros.
        like: The weight as the layer holds it.

    Returns:
        uint8, shape of `like`.
    """
    groups, _, width = weight.shape
    grid = [
        broadcast(v.detach(), like, quantizer.spec.group).expand_as(like) for v in (quantizer.scale, quantizer.zero)
    ]
    scale, zero = (values.flatten(1).unflatten(0, (groups, -1)).float() for values in grid)
    order = hessian.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)  # the dearest columns first
    hessian, work = hessian[:, order][:, :, order], weight[:, :, order].clone()
    scale, zero = scale[:, :, order], zero[:, :, order]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    codes = torch.empty_like(work)
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        errors = torch.empty_like(work[:, :, start:end])
        for j in range(start, end):
            column, s, z = work[:, :, j], scale[:, :, j], zero[:, :, j]
            codes[:, :, j] = (column / s).round().add(z).clamp(0, quantizer.spec.qmax)
            error = (column - (codes[:, :, j] - z) * s) / factor[:, j, j, None]
            work[:, :, j + 1 : end] -= error[:, :, None] * factor[:, None, j, j + 1 : end]
            errors[:, :, j - start] = error
        work[:, :, end:] -= errors @ factor[:, start:end, end:]
    back = torch.empty_like(codes)
    back[:, :, order] = codes
    return back.flatten(0, 1).reshape(like.shape).to(torch.uint8)


def _given(layer, run):
    """Return what a layer is called with in a run: on the codes of its own input where it quantises that."""
    found = []

    def watch(layer, args):
        quantizer = layer.input_quantizer
        found.append(args[0] if quantizer is None else quantizer(args[0]))

    hook = layer.register_forward_pre_hook(watch)
    try:
        run()
    finally:
        hook.remove()
    return found


def _noise(model, inputs, forward, pem):
    return measure_noise(model, inputs, forward, 0) if pem and pem.strength and pem.snr is None else {}


def _ridge(layer: QuantLinear | QuantConv2d, inverse: Tensor | None, pem: PEM | None) -> Tensor | float:
    """Return r of (1) over E[x_j^2], for each of the K inputs of a row: the strength of PEM over SNR_j."""
    if not pem or not pem.strength:
        return 0.0
    if inverse is None:
        return pem.strength * 10 ** (-pem.snr / 10)
    groups = getattr(layer, "groups", 1)
    channels = inverse.double().reshape(groups, -1)
    return pem.strength * channels.repeat_interleave(layer.weight[0].numel() // channels.shape[1], 1)
