"""PEM, perturbation error mitigation: a regulariser of the weights, from how input perturbations reach the output.

For ``y = W x``, quantised ``W^``, ``x^ = Q(x + d)``, ``e = x^ - x`` and ``D = W^ - W`` exactly

    E|W^ x^ - W x|^2 = tr(D Sx D') + tr(W^ Se W^') + 2 tr(W^ C D'),   Sx = E[x x'], Se = E[e e'], C = E[e x']      (1)

The first term is what reconstruction minimises; PEM is the rest. With independent zero-mean d and a quantiser of step s

    R = sum_j |W^[:, j]|^2 (E[x_j^2] / SNR_j + s^2 / 12),   SNR_j = E[x_j^2] / E[d_j^2]                            (2)

divided by E|W x|^2, so that one strength serves all layers. Source of the aim: Xiao et al., TTAQ, arXiv:2412.09899; the
formulas are ours (docs/method.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import QuantLinear, QuantMatMul
from .moments import by_channel, calls_of, energy, inputs_of, noise_like, output_energy, patches_of
from .quantizers import ActivationQuantizer, disabled

FORMS = ("analytic", "clipped", "measured")
STRENGTHS = (0.0, 0.01, 0.03, 0.1)  # what the rule chooses from
FULL = 512  # inputs up to which a linear layer's Se and C are full matrices
SOLVED = 4096  # inputs an output up to which a layer is preconditioned
_SAMPLE = 256  # values a channel that the clipping-aware form looks at


@dataclass(frozen=True)
class PEM:
    """How the regulariser is formed and weighed.

    Args:
        strength: Of R beside the reconstruction error relative to the output's energy; None lets the rule choose among
            `STRENGTHS` on images held out (see `reconstruct`).
        form: "measured" is (1) with Se and C from one perturbed pass; "analytic" is (2); "clipped" adds to that the
            overshoot ``E[(x + d - clip(x + d))^2]`` beyond the activation's range, which moves its scale too.
        snr: Of the perturbation d, dB, alike in all channels; None measures SNR_j of each channel under changes of
            light and noise of the images.
        depth: Weigh each layer by how much the layers behind it amplify a perturbation, 1 on average.
        precondition: Start from ``W* = W Sx (Sx + R)^-1``, the minimiser of (1) in floats, before ranges are chosen.
    """

    strength: float | None = None
    form: str = "measured"
    snr: float | None = None
    depth: bool = False
    precondition: bool = False

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"PEM: form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.strength is not None and not self.strength >= 0:
            raise ValueError(f"PEM: strength must be 0 or more, got {self.strength}; None lets the rule choose")


class Propagation:
    """R of all layers of one block, ready to be added to the loss of each step.

    Args:
        model: Calibrated, the roundings of the block's layers begun.
        layers: The quantised layers of the block by name, and its `QuantMatMul`s.
        pem: The form.
        noise: What `measure_noise` gave; empty where `pem.snr` is a number.
        run: Runs the block in floats on the float model's input, and quantised on that of the quantised prefix:
            ``run(quantised: bool)``.
        weights: Depth weight of each layer; 1 where it is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        pem: PEM,
        noise: dict[str, Tensor],
        run: Callable[[bool], object],
        weights: dict[str, float],
    ):
        with torch.no_grad(), disabled(model):
            floats = calls_of(layers, lambda: run(False))
        with torch.no_grad():
            coded = inputs_of(layers, lambda: run(True)) if pem.form == "measured" else {}
        self.terms: dict[str, Callable[[], Tensor]] = {}
        for name, (args, output) in floats.items():
            layer, weight = layers[name], weights.get(name, 1.0)
            if isinstance(layer, QuantMatMul):
                self.terms[name] = _MatMulTerm(layer, *args, output, pem, weight)
            elif layer.weight_quantizer is not None:
                inverse = noise[name] if pem.snr is None else torch.tensor(10 ** (-pem.snr / 10)).to(args[0])
                kind = _MeasuredTerm if pem.form == "measured" else _Term
                self.terms[name] = kind(layer, args[0], output, inverse, pem, weight, coded.get(name))

    def __call__(self) -> Tensor:
        """Return the sum of R over the layers, () - to be called after the block's forward pass of the step."""
        return sum(term() for term in self.terms.values())


class _Term:
    """(2), or its clipping-aware form, of one linear layer or convolution."""

    def __init__(self, layer, x, output, inverse, pem, weight, _):
        self.layer, self.clips = layer, pem.form == "clipped"
        layer.weight_quantizer.rounding.energy_groups = getattr(layer, "groups", 1)
        self.moved = energy(x, layer) * inverse  # E[d_j^2]
        self.factor = weight / output_energy(layer, output)
        values = by_channel(x, layer)
        picked = torch.randint(values.shape[1], (min(_SAMPLE, values.shape[1]),), device=x.device)
        self.sample = values[:, picked]
        self.sample = self.sample + torch.randn_like(self.sample) * self.moved.sqrt()[:, None]

    def __call__(self):
        rounding = self.layer.weight_quantizer.rounding
        arriving = self.moved + _granular(self.layer.input_quantizer)
        if self.clips:
            arriving = arriving + _overshoot(self.layer.input_quantizer, self.sample).mean(1)
        return self.factor * (rounding.column_energy() * arriving).sum()


class _MeasuredTerm:
    """The second and third term of (1): full matrices for small linear layers, else their diagonals by channel."""

    @torch.no_grad()
    def __init__(self, layer, x, output, inverse, pem, weight, coded):
        self.layer, self.groups = layer, getattr(layer, "groups", 1)
        self.factor = weight / output_energy(layer, output)
        seen = coded.float() + noise_like(coded, layer, (energy(x, layer) * inverse).sqrt())
        seen = seen if layer.input_quantizer is None else layer.input_quantizer(seen)
        x = by_channel(x, layer)
        error = by_channel(seen, layer) - x
        self.full = isinstance(layer, QuantLinear) and len(x) <= FULL
        if self.full:
            self.see, self.cross = (error @ other.t() / x.shape[1] for other in (error, x))
        else:
            self.see, self.cross = (error * error).mean(1), (error * x).mean(1)

    def __call__(self):
        weight, floats = self.layer.weight_quantizer.rounding.weight, self.layer.weight.detach().float()
        if self.full:
            value = ((weight @ self.see) * weight).sum() + 2 * ((weight @ self.cross) * (weight - floats)).sum()
        else:
            shape = [self.groups, -1, *[1] * (weight.ndim - 2)]
            parts = (weight.square(), weight * (weight - floats))
            see, cross = (
                m.reshape(shape).repeat_interleave(len(weight) // self.groups, 0) for m in (self.see, self.cross)
            )
            value = (parts[0] * see).sum() + 2 * (parts[1] * cross).sum()
        return self.factor * value


class _MatMulTerm:
    """(2) of a product of activations, each in turn the weight of the other: it reaches their scales alone."""

    def __init__(self, layer, a, b, output, pem, weight):
        self.sides = ((layer.left_quantizer, a, b), (layer.right_quantizer, b, a))
        inverse = 10 ** (-(20.0 if pem.snr is None else pem.snr) / 10)
        self.clips = pem.form != "analytic"
        self.fixed = []
        for _, x, other in self.sides:
            power = x.square().mean()
            picked = x.flatten()[torch.randint(x.numel(), (min(4 * _SAMPLE, x.numel()),), device=x.device)]
            sample = picked + torch.randn_like(picked) * (power * inverse).sqrt()
            self.fixed.append((other.square().mean(), power * inverse, sample))
        self.factor = weight * a.shape[-1] / output.square().mean().clamp(min=1e-30)
        self.sides = [quantizer for quantizer, *_ in self.sides]

    def __call__(self):
        total = 0.0
        for quantizer, (other, moved, sample) in zip(self.sides, self.fixed, strict=True):
            arriving = moved + _granular(quantizer)
            if self.clips:
                arriving = arriving + _overshoot(quantizer, sample).mean()
            total = total + other * arriving
        return self.factor * total


@torch.no_grad()
def preconditioned(layers: dict[str, nn.Module], run: Callable[[bool], object], pem: PEM, noise: dict) -> dict:
    """Solve (1) in floats: ``W* = W Sx (Sx + R)^-1`` with ``R = diag(E[x_j^2] / SNR_j) + s^2 / 12 I``.

    Args:
        layers: Quantised layers by name.
        run: As for `Propagation`; the quantisers are to be disabled.
        pem: Its `snr`.
        noise: What `measure_noise` gave.

    Returns:
        Layer to W*, the shape of W; layers with more than `SOLVED` inputs an output are left out.
    """
    found = {}
    for name, x in inputs_of(layers, lambda: run(False)).items():
        layer, weight = layers[name], layers[name].weight.detach()
        if weight[0].numel() > SOLVED:
            continue
        patches = _patches(layer, x)
        rows = weight.flatten(1).unflatten(0, (len(patches), -1)).double()  # (groups, O / groups, K)
        sx = patches @ patches.transpose(1, 2) / patches.shape[2]
        power = sx.diagonal(dim1=1, dim2=2)
        inverse = noise[name] if pem.snr is None else torch.tensor(10 ** (-pem.snr / 10)).to(x)
        share = inverse.double().expand(len(patches) * weight.shape[1]).reshape(len(patches), -1)
        ridge = power * share.repeat_interleave(patches.shape[1] // weight.shape[1], 1)
        ridge = ridge + float(_granular(layer.input_quantizer)) + 1e-8 * power.mean()
        solved = torch.linalg.solve(sx + torch.diag_embed(ridge), sx @ rows.transpose(1, 2))
        found[name] = solved.transpose(1, 2).reshape(weight.shape).to(weight.dtype)
    return found


def _patches(layer, x, images=64, columns=8192):
    """Return samples of what the rows of the weight are multiplied by, (groups, K, n), float64."""
    if isinstance(layer, QuantLinear):
        return patches_of(layer, x)[..., :columns].double()
    rows = patches_of(layer, x[:images])
    return rows[..., torch.randperm(rows.shape[2], device=x.device)[:columns]].double()


def _granular(quantizer: ActivationQuantizer | None) -> Tensor | float:
    """s^2 / 12; 0 for floats and for scales that are measured a token."""
    if quantizer is None or quantizer.spec.granularity != "tensor":
        return 0.0
    return quantizer.scale.square() / 12


def _overshoot(quantizer, x):
    """The square of what lies beyond the range, with a gradient for the scale."""
    if quantizer is None or quantizer.spec.granularity != "tensor":
        return torch.zeros_like(x)
    zero = quantizer.zero.round()
    low, high = -zero * quantizer.scale, (quantizer.spec.qmax - zero) * quantizer.scale
    return torch.relu(x - high).square() + torch.relu(low - x).square()
