"""The ops that quantise and dequantise, as typed functions with their gradients; `ops` has them beside the others."""

from torch import Tensor

from .checks import check_conv_groups, check_log2, check_perturbation, check_prologue, check_scales, learns
from .declarations import RAW
from .gradients import FakeQuant, Log2FakeQuant, PerturbedFakeQuant, PrologueFakeQuant, SoftRound


def fake_quant(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, axis: int | None = None, group: int = 0
) -> Tensor:
    """Quantise and dequantise in one pass, letting gradients straight through.

    ``t = round(x / scale) + round(zero)``; ``y = (clamp(t, qmin, qmax) - round(zero)) * scale``.
    Source: Esser et al., Learned Step Size Quantization, arXiv:1902.08153, section 2.1; Bhalgat et al.,
    LSQ+, arXiv:2004.09576.

    Args:
        x: Any shape, float16, bfloat16 or float32; any layout.
        scale: float32, positive: () for one scale, (x.shape[axis],) along an axis, x.shape[:-1] + (K / group,) for
            groups of the last axis (group = K: per token). Learns inside and outside the range.
        zero: Shape of `scale`, float32 (learns outside the range) or int32 (does not).
        qmin: Lowest code.
        qmax: Highest code; ties round to even before both bounds apply.
        axis: The axis `scale` runs along, or None.
        group: Elements of the last axis that share a scale, or 0.

    Returns:
        Shape, dtype and (for a dense x) strides of `x`.

    Raises:
        ValueError: `scale` or `zero` does not fit, or is elsewhere than `x`.
    """
    axis = check_scales("fake_quant", x, scale, zero, axis, group)
    if learns(x, scale, zero):
        return FakeQuant.apply(x, scale, zero, qmin, qmax, axis, group)
    return RAW.fake_quant(x, scale, zero, qmin, qmax, axis, group)


def perturbed_fake_quant(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    kind: str,
    spread: Tensor,
    seed: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> Tensor:
    """Perturb an activation at random and fake-quantise it, in one pass that stores no random number.

    "drop": x with probability `spread`, else ``fake_quant(x)``; "step": ``fake_quant(x + spread * scale * u)``, u in
    [-1/2, 1/2); "gauss": ``fake_quant(x + spread * n)``, n nearly normal. Gradients as of `fake_quant` at what was
    quantised. Source: Wei et al., QDrop, arXiv:2203.05740 (drop); Salmon et al., Philox4x32-10, SC 2011 (numbers).

    Args:
        x: Any shape, float16, bfloat16 or float32; any layout. The number of an element depends on its place in memory.
        scale: (), float32, positive. Learns, but not from what is dropped.
        zero: (), float32 (learns outside the range) or int32 (does not).
        kind: "drop", "step" or "gauss".
        spread: float32, () or (x.shape[axis],): a probability, steps, or the unit of `x`; receives no gradient.
        seed: (), int64, on the device of `x`; equal seeds give equal numbers.
        qmin: Lowest code.
        qmax: Highest code.
        axis: The axis `spread` runs along, or None.

    Returns:
        Shape, dtype and (for a dense x) strides of `x`.

    Raises:
        ValueError: `kind` is unknown, or `scale`, `spread` or `seed` does not fit.
    """
    axis = check_perturbation("perturbed_fake_quant", x, scale, zero, kind, spread, seed, axis)
    if learns(x, scale, zero):
        return PerturbedFakeQuant.apply(x, scale, zero, spread, seed, qmin, qmax, axis, kind)
    return RAW.perturbed_fake_quant(x, scale, zero, spread, seed, qmin, qmax, axis, kind)


def prologue_fake_quant(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = -1,
    before: str = "none",
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    observe: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake-quantise an activation and do what stands before it, all in one pass over memory.

    ``u = x + residual``; ``n = u``, ``gelu(u)`` or ``layer_norm(u)``; ``v = n gain + shift``; ``y = fake_quant(v)``.
    What is left out changes nothing. Everything that is a float learns. Source: Hendrycks and Gimpel, arXiv:1606.08415
    (GELU); Ba et al., arXiv:1607.06450 (LayerNorm); Esser et al., arXiv:1902.08153 (quantiser).

    Args:
        x: Any shape, float16, bfloat16 or float32; any layout.
        scale: (), float32, positive.
        zero: (), float32 (learns outside the range) or int32 (does not).
        qmin: Lowest code.
        qmax: Highest code.
        axis: The axis of the channels: -1 for tokens, 1 for images, None for a single one.
        before: "none", "gelu" or "layer_norm" (over the last axis).
        residual: Shape and dtype of `x`.
        gain: (channels,), float: aligns the channels, or is the weight of the LayerNorm. With `shift`, or neither.
        shift: (channels,), float.
        eps: Of the LayerNorm.
        observe: Whether to fill `seen`.

    Returns:
        (y, u, seen): like `x`; like `x`, or empty without a residual; (5, channels), float32, without a gradient: sum,
        sum of squares, least and greatest of v, and how many v lie outside the codes, or empty.

    Raises:
        ValueError: An argument does not fit.
    """
    axis = check_prologue("prologue_fake_quant", x, residual, gain, shift, scale, zero, before, axis)
    gain, shift = (None if values is None else values.float() for values in (gain, shift))
    args = (x, residual, gain, shift, scale, zero, before, eps, observe, qmin, qmax, axis)
    if learns(*(t for t in args[:6] if t is not None)):
        return PrologueFakeQuant.apply(*args)
    return RAW.prologue_fake_quant(*args)


def log2_fake_quant(x: Tensor, scale: Tensor, *, qmax: int, roots: int = 1) -> Tensor:
    """Quantise and dequantise probabilities on a logarithmic grid, on which 0.0 is exact.

    ``code = clamp(round(-roots log2(x / scale)), 0, qmax)``; ``y = scale 2^(-code / roots)``, 0.0 for code qmax.
    ``dx = grad y / x`` within the grid; the scale learns from what lies above it.
    Source: Lin et al., FQ-ViT, arXiv:2111.13824 (roots 1); Li et al., RepQ-ViT, arXiv:2212.08254 (roots 2).

    Args:
        x: Any shape, float16, bfloat16 or float32; what is negative becomes 0.0.
        scale: (), float32, positive: the largest value; 1 after a softmax.
        qmax: Highest code, 1 to 63.
        roots: Codes an octave, 1 or 2.

    Returns:
        Shape, dtype and (for a dense x) strides of `x`.

    Raises:
        ValueError: `scale`, `qmax` or `roots` does not fit.
    """
    check_log2("log2_fake_quant", x, scale, qmax, roots)
    if learns(x, scale):
        return Log2FakeQuant.apply(x, scale, qmax, roots)
    return RAW.log2_fake_quant(x, scale, qmax, roots)


def soft_round(
    w: Tensor,
    v: Tensor,
    scale: Tensor,
    zero: Tensor,
    beta: Tensor,
    *,
    qmax: int,
    axis: int | None = None,
    group: int = 0,
    conv_groups: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise and dequantise a weight with learned rounding, regularise the rounding, and measure its columns.

    ``h = clip(1.2 sigmoid(v) - 0.1, 0, 1)``; ``y = (clamp(floor(w / scale) + h + zero, 0, qmax) - zero) * scale``;
    ``penalty = sum(1 - |2 h - 1|^beta)``; ``energy[k I + i] = sum y[o, i, ...]^2`` over the outputs o of group k and
    the taps. Source: Nagel et al., Up or Down?, arXiv:2004.10568 (y and penalty).

    Args:
        w: The weight, float32, any shape; receives no gradient.
        v: Shape of `w`, float32: the rounding that is learned.
        scale: As in `fake_quant`; receives no gradient.
        zero: Shape of `scale`, whole numbers.
        beta: (), float32: the sharpness of the regulariser.
        qmax: Highest code.
        axis: The axis `scale` runs along, or None.
        group: Elements of the last axis that share a scale, or 0.
        conv_groups: Groups of the convolution that w (O, I, ...) belongs to, 1 for a linear or an ordinary one; 0 to
            measure no energy.

    Returns:
        (y, penalty, energy): shape of `w`; (); (conv_groups * I,). All three are float32 and pass gradients to `v`.

    Raises:
        ValueError: A shape does not fit.
    """
    axis = check_scales("soft_round", w, scale, zero, axis, group)
    if v.shape != w.shape:
        raise ValueError(f"soft_round: v wants the shape of w {tuple(w.shape)}, got {tuple(v.shape)}; start it from w")
    check_conv_groups("soft_round", w, conv_groups)
    return SoftRound.apply(w, v, scale, zero, beta, qmax, axis, group, conv_groups)
