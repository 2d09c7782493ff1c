"""What the typed functions of `ops` ask of their arguments; what does not fit raises one sentence."""

import torch

from .kernels import _epilogue as ep
from .kernels import activation_codes as ac
from .kernels import codes as cd
from .kernels import log2 as lg
from .kernels import perturb as pt
from .kernels import prologue as pg


def learns(*tensors):
    """Say whether a call on these tensors leaves a graph."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def check_devices(op, x, *held):
    """Raise one sentence when x and what it meets are on several devices."""
    for tensor in held:
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: x is on {x.device}, what it meets on {tensor.device}; move one with .to({str(x.device)!r})"
            )


def check_scales(op, x, scale, zero, axis, group):
    """Raise one sentence when the scales do not fit; return the axis as a non-negative number or None."""
    check_devices(op, x, scale, zero)
    if group:
        if x.shape[-1] % group:
            raise ValueError(
                f"{op}: the last axis must be a multiple of group {group}, got {x.shape[-1]}; use a divisor"
            )
        wanted = (*x.shape[:-1], x.shape[-1] // group)
    elif axis is None:
        wanted = ()
    elif -x.ndim <= axis < x.ndim:
        axis %= x.ndim
        wanted = (x.shape[axis],)
    else:
        raise ValueError(f"{op}: axis must lie in the {x.ndim} axes of x, got {axis}; use None for a single scale")
    if scale.shape != wanted or zero.shape != wanted:
        raise ValueError(
            f"{op}: scale and zero want shape {wanted} for axis={axis}, group={group}, "
            f"got {tuple(scale.shape)} and {tuple(zero.shape)}; reshape them or change axis and group"
        )
    return axis


def check_perturbation(op, x, scale, zero, kind, spread, seed, axis):
    """Raise one sentence when a perturbation does not fit; return the axis as a non-negative number or None."""
    check_devices(op, x, spread, seed)
    check_scales(op, x, scale, zero, None, 0)
    if kind not in pt.KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(pt.KINDS)}, got {kind!r}; use one of these")
    if seed.shape != () or seed.dtype != torch.int64:
        raise ValueError(f"{op}: seed wants shape () and int64, got {tuple(seed.shape)} and {seed.dtype}; draw one")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{op}: axis must lie in the {x.ndim} axes of x, got {axis}; use None for a single spread")
    wanted = () if axis is None else (x.shape[axis],)
    if spread.shape != wanted:
        raise ValueError(
            f"{op}: spread wants shape {wanted} for axis={axis}, got {tuple(spread.shape)}; reshape it or change axis"
        )
    return None if axis is None else axis % x.ndim


def check_prologue(op, x, residual, gain, shift, scale, zero, before, axis):
    """Raise one sentence when what stands before the quantiser does not fit; return the axis, at least 0, or None."""
    check_devices(op, x, scale, zero)
    if scale.shape != () or zero.shape != ():
        raise ValueError(
            f"{op}: scale and zero want shape (), got {tuple(scale.shape)} and {tuple(zero.shape)}; "
            "use fake_quant for scales by channel, token or group"
        )
    if before not in pg.KINDS:
        raise ValueError(f"{op}: before must be one of {', '.join(pg.KINDS)}, got {before!r}; use one of these")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{op}: axis must lie in the {x.ndim} axes of x, got {axis}; use -1 for tokens, 1 for images")
    axis = None if axis is None else axis % x.ndim
    if before == "layer_norm" and axis != x.ndim - 1:
        raise ValueError(f"{op}: a LayerNorm is over the last axis, got axis={axis}; use axis=-1")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"{op}: residual wants the shape, dtype and device of x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(residual.shape)} {residual.dtype} on {residual.device}; convert it"
        )
    if (gain is None) != (shift is None):
        raise ValueError(f"{op}: gain and shift go together, got one of them; use ones or zeros for the other")
    wanted = (1 if axis is None else x.shape[axis],)
    for name, values in (("gain", gain), ("shift", shift)):
        if values is not None:
            check_devices(op, x, values)
            if values.shape != wanted:
                raise ValueError(
                    f"{op}: {name} wants shape {wanted} for axis={axis}, got {tuple(values.shape)}; pass one a channel"
                )
    return axis


def check_log2(op, x, scale, qmax, roots):
    """Raise one sentence when there is no such logarithmic grid."""
    check_devices(op, x, scale)
    if scale.shape != ():
        raise ValueError(
            f"{op}: scale wants shape (), got {tuple(scale.shape)}; use the largest value, 1 for a softmax"
        )
    if not 1 <= qmax <= lg.MOST_CODES or roots not in (1, 2):
        raise ValueError(
            f"{op}: wanted qmax from 1 to {lg.MOST_CODES} and roots 1 or 2, got {qmax} and {roots}; "
            "use 15 and 1 for 4 bits"
        )


def check_conv_groups(op, w, conv_groups):
    """Raise one sentence when w is no weight of a convolution of so many groups; 0 asks for nothing."""
    if conv_groups and (conv_groups < 0 or w.ndim < 2 or w.shape[0] % conv_groups):
        raise ValueError(
            f"{op}: w wants shape (O, I, ...) with O a multiple of conv_groups {conv_groups}, got {tuple(w.shape)}; "
            "use 1 for a linear or an ordinary convolution, 0 for no energy"
        )


def check_activation(op, x, scale, zero, bits, packed):
    """Raise one sentence when the rows of x, their grid or the width of their codes do not fit."""
    if x.ndim == 0:
        raise ValueError(f"{op}: x wants shape (..., K), got a scalar; give it an axis")
    if not 2 <= bits <= 8:
        raise ValueError(f"{op}: bits must be 2 to 8 to fit a byte, got {bits}; use one of these")
    if packed and bits not in ac.PACKABLE:
        raise ValueError(f"{op}: packed codes want 2, 4 or 8 bits, got {bits}; pack_codes packs 3, 5 to 7 stay bytes")
    if x.shape[-1] * ((1 << bits) - 1) >= 1 << 31:
        raise ValueError(f"{op}: the sum of {x.shape[-1]} codes of {bits} bits can pass 2^31; use shorter rows")
    if scale is None and zero is None:
        return
    if scale is None or zero is None:
        raise ValueError(f"{op}: wanted scale and zero, or neither, got one of them; leave both out to measure rows")
    check_devices(op, x, scale, zero)
    if scale.shape not in ((), x.shape[:-1]) or zero.shape != scale.shape:
        raise ValueError(
            f"{op}: scale and zero want shape () or {tuple(x.shape[:-1])}, got {tuple(scale.shape)} and "
            f"{tuple(zero.shape)}; use one for all or one a row"
        )
    if zero.dtype != torch.int32:
        raise ValueError(f"{op}: zero wants int32, got {zero.dtype}; use zero.round().int()")


def check_packable(op, codes, bits):
    """Raise one sentence when there are no such packed codes."""
    if bits not in cd.PACKABLE:
        raise ValueError(f"{op}: bits must be 2, 3, 4 or 8, got {bits}; 5 to 7 bits are simulated only, use 4 or 8")
    if codes.dtype != torch.uint8:
        raise ValueError(f"{op}: wanted uint8, got {codes.dtype}; quantize_codes makes such codes")


def check_rows(op, words, bits, k):
    """Raise one sentence when `words` are no packed rows of `k` codes."""
    check_packable(op, words, bits)
    if words.shape[-1] != cd.row_bytes(k, bits):
        raise ValueError(
            f"{op}: {k} codes of {bits} bits fill rows of {cd.row_bytes(k, bits)} bytes, "
            f"got {words.shape[-1]}; pass the k and bits that the words were packed with"
        )


def check_words(op, x, words, scale, bits, k, scales):
    """Raise one sentence when packed rows or their scales do not fit `k` inputs."""
    check_devices(op, x, words, scale)
    if words.shape[-1] not in (k, cd.row_bytes(k, bits)):
        raise ValueError(
            f"{op}: {k} inputs of {bits} bits need rows of {cd.row_bytes(k, bits)} bytes, got {words.shape[-1]}; "
            "the input does not fit this weight"
        )
    if scale.shape != torch.Size(scales):
        raise ValueError(
            f"{op}: scale wants shape {tuple(scales)}, got {tuple(scale.shape)}; use one per output or group"
        )


def check_linear(x, words, scale, bits, group, x_scale, token=False):
    """Raise one sentence when the arguments of `packed_linear` do not fit each other."""
    k = x.shape[-1]
    check_words("packed_linear", x, words, scale, bits, k, (words.shape[0], k // group) if group else words.shape[:1])
    if group and k % group:
        raise ValueError(f"packed_linear: K must be a multiple of group {group}, got {k}; use a group that divides K")
    if token and x_scale is not None:
        raise ValueError("packed_linear: wanted x_scale or token, got both; leave x_scale out to measure each row")
    if x_scale is not None and x_scale.shape not in ((), x.shape[:-1]):
        raise ValueError(
            f"packed_linear: x_scale wants shape () or {tuple(x.shape[:-1])}, got {tuple(x_scale.shape)}; "
            "use one scale or one a token"
        )


def check_conv2d(x, words, scale, bits, kernel_size, padding, dilation, groups):
    """Raise one sentence when the arguments of `packed_conv2d` do not fit each other."""
    if x.ndim != 4 or x.shape[1] % groups:
        raise ValueError(
            f"packed_conv2d: x wants (B, C, H, W) with C a multiple of groups {groups}, got {tuple(x.shape)}; "
            "add the batch axis or check the channels"
        )
    check_words(
        "packed_conv2d", x, words, scale, bits, x.shape[1] // groups * kernel_size[0] * kernel_size[1], words.shape[:1]
    )
    spans = zip(x.shape[2:], padding, dilation, kernel_size, strict=True)
    if any(size + 2 * p < d * (k - 1) + 1 for size, p, d, k in spans):
        raise ValueError(
            f"packed_conv2d: the kernel {tuple(kernel_size)} must fit into the padded input, got {tuple(x.shape)} "
            f"with padding {tuple(padding)} and dilation {tuple(dilation)}; pass larger images"
        )


def check_operands(a, b, a_scale, b_scale):
    """Raise one sentence when the arguments of `quantized_matmul` do not fit each other."""
    check_devices("quantized_matmul", a, b, a_scale, b_scale)
    if min(a.ndim, b.ndim) < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"quantized_matmul: wanted (..., M, K) and (..., K, N), got {tuple(a.shape)} and {tuple(b.shape)}; "
            "transpose one or check K"
        )


def check_entering(op, x, x_scale, token, dtype):
    """Raise one sentence when x is codes without a grid, or floats of another dtype than asked; return y's dtype."""
    if x.dtype == torch.uint8:
        if x_scale is None or token:
            raise ValueError(f"{op}: x holds codes, and no x_scale says of what; pass the x_scale and x_zero they have")
        return dtype or torch.float32
    if dtype not in (None, x.dtype):
        raise ValueError(f"{op}: y has the dtype of x, {x.dtype}, got dtype={dtype}; it is for inputs that are codes")
    return x.dtype


def check_epilogue(op, shape, dtype, device, end, *learning):
    """Raise one sentence when what follows a product of `shape` and `dtype` does not fit, or would have to learn."""
    if learns(*(t for t in (*learning, *end) if isinstance(t, torch.Tensor))):
        raise ValueError(
            f"{op}: inputs of codes, gain, residual, after and y_scale are for inference, got a tensor that requires "
            "a gradient; call it under torch.no_grad() or run the layers apart"
        )
    if end.after not in ep.KINDS:
        raise ValueError(f"{op}: after must be one of {', '.join(ep.KINDS)}, got {end.after!r}; use one of these")
    for names in (("gain", "shift"), ("y_scale", "y_zero")):
        pair = [getattr(end, name) for name in names]
        wanted = (shape[1 if op.endswith("conv2d") else -1],) if names[0] == "gain" else ()
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"{op}: {names[0]} and {names[1]} go together, got one of them; pass both")
        if pair[0] is not None and any((t.shape, t.device) != (wanted, device) for t in pair):
            raise ValueError(
                f"{op}: {names[0]} and {names[1]} want shape {wanted} on {device}, got {tuple(pair[0].shape)} and "
                f"{tuple(pair[1].shape)} on {pair[0].device} and {pair[1].device}; reshape or move them"
            )
    residual = end.residual
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (shape, dtype, device):
        raise ValueError(
            f"{op}: residual wants the shape, dtype and device of y, {tuple(shape)} {dtype} on {device}, "
            f"got {tuple(residual.shape)} {residual.dtype} on {residual.device}; convert it"
        )
    if end.y_scale is not None and (not 2 <= end.y_bits <= 8 or end.y_zero.dtype != torch.int32):
        raise ValueError(
            f"{op}: codes of y want y_bits from 2 to 8 and an int32 y_zero, got {end.y_bits} and {end.y_zero.dtype}; "
            "use y_zero.round().int()"
        )
