"""The three measures, each a rewriting of the float model: re-parameterisation, migration and rotation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batches import Forward, call
from ..surgery import evaluating
from .hadamard import refuses, spread, spread_about_mean
from .rewriting import absorb, turn_inputs, turn_outputs, turn_tokens
from .structure import Proof, Structure, layer_scale

TAIL = 4.0  # deviations
LEAST = 1e-2  # of the mean range: channels of less range are not stretched further


@dataclass(frozen=True)
class Extremes:
    """What a layer is given: lowest and highest value of each input channel, (K,), float64."""

    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest absolute value of each channel."""
        return torch.maximum(self.low.abs(), self.high.abs())


@torch.no_grad()
def extremes(view: nn.Module, inputs: list, names: set[str], forward: Forward | None) -> dict[str, Extremes]:
    """Run the model over `inputs`; gather the extremes of each input channel of the named linear layers.

    They reach to `TAIL` deviations about the mean at least: a few images do not show how far a channel goes, and where
    all channels have the ranges of the images seen, values of the next ones are clipped in any of them. [ours]
    """
    rows: dict[str, list] = {}

    def watch(name):
        def hook(layer, args):
            flat = args[0].detach().flatten(0, -2).double()
            count = torch.full_like(flat[0], len(flat))
            moments = (flat.sum(0), flat.square().sum(0), count)
            rows.setdefault(name, []).append(torch.stack([*torch.aminmax(flat, dim=0), *moments]))

        return hook

    hooks = [view.get_submodule(name).register_forward_pre_hook(watch(name)) for name in sorted(names)]
    try:
        with evaluating(view):
            for entry in inputs:
                call(view, entry, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _extremes(torch.stack(parts, 1)) for name, parts in rows.items()}


def _extremes(rows):
    total, squares, count = rows[2:].sum(1)
    mean = total / count
    reach = TAIL * (squares / count - mean.square()).clamp(min=0).sqrt()
    return Extremes(torch.minimum(rows[0].amin(0), mean - reach), torch.maximum(rows[1].amax(0), mean + reach))


def reparameterise(found: Structure, seen: dict[str, Extremes]) -> list[str]:
    """Give every channel of a LayerNorm's output the same range and zero; its readers undo that.

    With s_c and z_c the step and the zero of channel c, and their means s and z,

        x' = (x + s_c (z_c - z)) s / s_c,     W' = W diag(s_c / s),     b' = b - W (s_c (z_c - z))

    Source: Li et al., RepQ-ViT, arXiv:2212.08254, section 3.3. Zeros are real numbers here, so the width plays no part;
    where a reader has no bias the ranges alone become equal.

    Returns:
        The names of the norms.
    """
    for joint in found.joints:
        given = seen[next(iter(joint.readers))]
        wide = given.high - given.low if joint.shifts else given.largest
        step = wide.clamp(min=max(LEAST * wide.mean().item(), 1e-12))
        mean = step.mean()
        zero = -given.low / step
        joint.rescale(mean / step, mean * (zero - zero.mean()) if joint.shifts else None)
    return [joint.name for joint in found.joints]


def migrate(found: Structure, seen: dict[str, Extremes], alpha: float = 0.5) -> list[str]:
    """Move outliers of activations into the weights that meet them.

        x' = x / s,     W' = W diag(s),     s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

    Behind every LayerNorm, and between the values of attention and the layer that reads their mix; GELU lets no scale
    through. The scales of one layer are divided by their geometric mean, which quantisation does not see.

    Source: Xiao et al., SmoothQuant, arXiv:2211.10438, section 4.

    Returns:
        The names of the norms and of the attention.
    """
    for joint in found.joints:
        joint.rescale(1 / _migration(seen[next(iter(joint.readers))], list(joint.readers.values()), alpha))
    for heads in found.values:
        name, layer = heads.reader
        scale = _migration(seen[name], [layer], alpha).reshape(heads.count, -1)
        heads.turn_values(torch.diag_embed(1 / scale), torch.diag_embed(scale))
    return [joint.name for joint in found.joints] + [heads.name for heads in found.values]


def _migration(seen, readers, alpha):
    weights = torch.stack([layer.weight.detach().double().abs().amax(0) for layer in readers]).amax(0)
    floor = 1e-3 * weights.mean().clamp(min=1e-9), 1e-3 * seen.largest.mean().clamp(min=1e-9)
    scale = seen.largest.clamp(min=floor[1]) ** alpha / weights.clamp(min=floor[0]) ** (1 - alpha)
    return scale / scale.log().mean().exp()


def rotate(view: nn.Module, found: Structure, proof: Proof, seed: int = 0) -> tuple[list[str], dict[str, str]]:
    """Rotate the residual stream, and per head queries with keys and values with what reads them, by Hadamard matrices.

    The stream's rotation leaves the mean over channels (`hadamard.spread_about_mean`), so LayerNorm stays LayerNorm:
    its affine goes into its readers, and weights 1 and biases 0 remain as parameters. LayerScale goes into the layer
    before it.

    Source: Ashkboos et al., QuaRot, arXiv:2404.00456, section 4; Liu et al., SpinQuant, arXiv:2405.16406.

    Returns:
        What was rotated, and of what was not the reason.
    """
    generator = torch.Generator().manual_seed(seed)
    done, left = [], {}
    reason = _rotate_stream(view, found, proof, generator)
    if reason:
        left["the residual stream"] = reason
    else:
        done.append("the residual stream")
    for what, group, rows in (("queries and keys", found.scores, "query"), ("values", found.values, "value")):
        for heads in group:
            width = heads.width(getattr(heads, rows))
            if reason := refuses(width):
                left[f"{heads.name}: {what}"] = reason
                continue
            rotation = torch.stack([spread(width, generator)] * heads.count).to(heads.value[0].weight.device)
            if rows == "query":
                heads.turn_scores(rotation)
            else:
                heads.turn_values(rotation, rotation.mT)
            done.append(f"{heads.name}: {what}")
    return done, left


def _rotate_stream(view, found, proof, generator):
    """Rotate the residual stream, or say why not; the model is then as it was."""
    widths = {joint.norm.normalized_shape[0] for joint in found.joints}
    if not widths:
        return "no LayerNorm is read by linear layers alone"
    if len(widths) > 1:
        return f"its width changes ({', '.join(map(str, sorted(widths)))})"
    width = widths.pop()
    if reason := refuses(width):
        return reason
    norms = {joint.norm for joint in found.joints}
    for name, module in found.calls:
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (width,) and module not in norms:
            return f"{name} is read by more than linear layers"
    if stiff := next((j for j in found.joints if not j.shifts and j.norm.bias is not None and j.norm.bias.any()), None):
        return f"a reader of {stiff.name} has no bias to take the shift"
    before = [(p, p.detach().clone()) for p in view.parameters()]
    rotation = spread_about_mean(width, generator).to(proof.before[0].device)
    _turn(view, found, width, rotation)
    if proof.holds():
        return None
    error = proof.error()
    for parameter, values in before:
        parameter.data.copy_(values)
    return f"something else than LayerNorm and linear layers acts on it (rotated, the output differs by {error:.2g})"


def _turn(view, found, width, rotation):
    """Fold every affine and rotate all that reads, writes or is added to the stream."""
    inner = {layer for heads in found.scores + found.values for layer, _ in (heads.query, heads.key, heads.value)}
    readers = {layer for joint in found.joints for layer in joint.readers.values()}
    fixed, writers, last = readers | inner, [], None
    for _, module in found.calls:
        scale = layer_scale(module)
        if scale is not None and last is not None and len(scale) == width:
            absorb(last, scale)
        elif isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == width and module not in fixed:
            writers.append(module)
            last = module
    for joint in found.joints:
        joint.fold()
    for layer in readers:
        turn_inputs(layer, rotation)
    for layer in writers:
        turn_outputs(layer, rotation)
    for tokens in _tokens(view, width):
        turn_tokens(tokens, rotation)


def _tokens(view, width):
    """List the embeddings: parameters of several axes, the last as wide as the stream, that no layer owns."""
    owned = {id(p) for m in view.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m.parameters(recurse=False)}
    held = {id(p): p for p in view.parameters()}
    return [p for key, p in held.items() if key not in owned and p.ndim > 1 and p.shape[-1] == width]
