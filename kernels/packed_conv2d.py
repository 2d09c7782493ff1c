"""Two-dimensional convolution on packed low-bit weights; padding stands for the value 0.0.

A row of words holds the codes of one output with its channels last, as `_taps` lays them out. The integer law is that
of `packed_linear`: exact integer sums, times ``scale_x * scale_w`` in float32, plus bias.
"""

from functools import partial

import torch
from torch.nn import functional as F

from . import _epilogue, _native, _products
from . import codes as cd
from ._epilogue import Epilogue, finish, store_finished
from ._operands import activation_operand, exact_sum, load_codes, weight_operand
from ._taps import from_rows
from ._tiles import gather_codes, without_autocast
from ._triton import jit, tl, triton
from .codes import exact_product, refuses_sum, refuses_words, stored_codes, unpacked

NARROWEST = 16  # inputs of a group that the native kernel for floats takes
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_REGISTERS = 168  # a ceiling that is named keeps ptxas from spilling a few registers to fit more warps


@without_autocast
def reference(
    x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, kernel_size, stride, padding, dilation, groups, dtype,
    *end,
):  # fmt: skip
    """Return (y, moments, nonfinite): the specification of the op."""
    end, convolve = Epilogue(*end), lambda x, weight, bias: F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    layout = _output(x, words.shape[0], kernel_size, stride, padding, dilation, end.dtype(dtype))
    shape = (words.shape[0], x.shape[1] // groups, *kernel_size)
    if x_scale is None:
        weight = dequantise(words, scale, zero, bits, shape).to(x.dtype)
        y = convolve(x, weight, None if bias is None else bias.to(x.dtype))
    else:
        y = _integer_product(convolve, x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, shape)
    y, *seen = finish(y, end, 1)
    return layout.copy_(y), *seen


def _integer_product(convolve, x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, shape):
    terms = shape[1] * shape[2] * shape[3]
    weight = from_rows(stored_codes(words, bits, terms).float() - zero.unsqueeze(-1), shape)
    with torch.backends.cudnn.flags(enabled=False):  # Winograd and TF32 sums of integers are not exact
        sums = exact_product(partial(convolve, bias=None), x.float() - x_zero, weight, terms, x_bits, bits)
    y = sums * (x_scale * scale).reshape(-1, 1, 1)
    return y if bias is None else y + bias.float().reshape(-1, 1, 1)


@without_autocast
def reference_backward(grad, words, scale, zero, bits, input_shape, kernel_size, stride, padding, dilation, groups):
    """Return the gradient of the dequantised input, shape `input_shape`."""
    shape = (words.shape[0], input_shape[1] // groups, *kernel_size)
    weight = dequantise(words, scale, zero, bits, shape).to(grad.dtype)
    return torch.nn.grad.conv2d_input(input_shape, weight, grad, stride, padding, dilation, groups).contiguous()


def dequantise(words, scale, zero, bits, shape):
    """Return the float32 weight of `shape` behind `words`; it must not outlive the call."""
    codes = stored_codes(words, bits, shape[1] * shape[2] * shape[3])
    return from_rows((codes.float() - zero.unsqueeze(-1)) * scale.unsqueeze(-1), shape)


def fake(
    x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, kernel_size, stride, padding, dilation, groups, dtype,
    *end,
):  # fmt: skip
    """Allocate the outputs as the op does."""
    end = Epilogue(*end)
    y = _output(x, words.shape[0], kernel_size, stride, padding, dilation, end.dtype(dtype))
    return y, *_epilogue.allocate(y, words.shape[0], end)


def output_shape(x, channels, kernel_size, stride, padding, dilation):
    """Return the shape of the output, (B, channels, H', W')."""
    axes = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    return x.shape[0], channels, *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)


def _output(x, channels, kernel_size, stride, padding, dilation, dtype):
    """Allocate y: contiguous, or channels-last where `x` is."""
    shape = output_shape(x, channels, kernel_size, stride, padding, dilation)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


@jit
def _packed_conv2d_kernel(
    x_ptr, word_ptr, scale_ptr, zero_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, y_ptr,
    gain_ptr, shift_ptr, residual_ptr, y_scale_ptr, y_zero_ptr, moments_ptr, nonfinite_ptr, qmax, AFTER: tl.constexpr,
    M, N, K, C, H, W, OH, OW, row_bytes,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_yb, stride_yc, stride_yp,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, S: tl.constexpr, BY_TAP: tl.constexpr,
    INTEGER: tl.constexpr, BITS: tl.constexpr, WIDE_W: tl.constexpr, WIDE_X: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # An implicit GEMM for each group of channels: N of its outputs, M output pixels, K = taps x C of its inputs.
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * N + tl.minimum(offs_n, N - 1)
    m = tl.minimum(offs_m, M - 1)
    image, pixel = (m // (OH * OW)).to(tl.int64), m % (OH * OW)
    top, left = pixel // OW * step_h - pad_h, pixel % OW * step_w - pad_w
    images = x_ptr + image * stride_xb + (tl.program_id(1) * C).to(tl.int64) * stride_xc
    rows = word_ptr + n.to(tl.int64) * row_bytes
    zero, scale = tl.load(zero_ptr + n), tl.load(scale_ptr + n)
    zero_x = tl.load(x_zero_ptr) if INTEGER else 0
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER else tl.float32)
    sum_w = tl.zeros((BLOCK_N,), tl.int32)
    sum_x = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, K, BLOCK_K):
        w = load_codes(rows, start, row_bytes, BITS, BLOCK_K, EVEN)
        k = (start + tl.arange(0, BLOCK_K))[:, None]
        tap = start // C if BY_TAP else k // C  # a block that lies in one tap has one place in the image
        c = k - tap * C
        h = top[None, :] + tap // S * dilation_h
        v = left[None, :] + tap % S * dilation_w
        inside = (h >= 0) & (h < H) & (v >= 0) & (v < W)
        inside = inside if EVEN else inside & (k < K)
        x = tl.load(images[None, :] + (c * stride_xc + h * stride_xh + v * stride_xw), mask=inside, other=0)
        if INTEGER:  # padding, and what lies beyond K, gets the code of 0.0
            x = activation_operand(tl.where(inside, x, zero_x.to(tl.uint8)), WIDE_X)
            w = weight_operand(w, zero, WIDE_W)
            sum_w += tl.sum(w.to(tl.int32), axis=1)
            if WIDE_W:
                sum_x += tl.sum(x.to(tl.int32), axis=0)
            total = tl.dot(w, x, total, out_dtype=tl.int32)
        else:
            w = (w.to(tl.float32) - zero[:, None].to(tl.float32)).to(x.dtype)
            total = tl.dot(w, x, total, input_precision="ieee")
    if INTEGER:
        total = exact_sum(total, sum_w, sum_x, zero, zero_x, tl.cdiv(K, BLOCK_K) * BLOCK_K, WIDE_W, WIDE_X)
        scale *= tl.load(x_scale_ptr)
    y = total.to(tl.float32) * scale[:, None]
    if BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    channel = tl.program_id(1) * N + offs_n
    offs = (image * stride_yb)[None, :] + pixel[None, :] * stride_yp + channel[:, None] * stride_yc
    store_finished(
        y, n, offs, offs_n < N, offs_m < M, tl.program_id(0) // tiles_n, tl.cdiv(M, BLOCK_M), N * tl.num_programs(1),
        y_ptr, gain_ptr, shift_ptr, residual_ptr, y_scale_ptr, y_zero_ptr, moments_ptr, nonfinite_ptr, qmax, AFTER,
    )  # fmt: skip


@jit
def _packed_conv2d_backward_kernel(
    grad_ptr, word_ptr, scale_ptr, zero_ptr, dx_ptr,
    M, N, C, H, W, OH, OW, row_bytes, stride_gb, stride_gc, stride_gh, stride_gw,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, R: tl.constexpr, S: tl.constexpr,
    BITS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Each of M input pixels gathers, for C inputs of a group, what its N outputs received through each tap.
    tiles_c = tl.cdiv(C, BLOCK_C)
    first = (tl.program_id(0) % tiles_c) * BLOCK_C
    offs_c = first + tl.arange(0, BLOCK_C)
    offs_m = (tl.program_id(0) // tiles_c) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    image, pixel = (offs_m // (H * W)).to(tl.int64), offs_m % (H * W)
    images = grad_ptr + image * stride_gb
    dx = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    for tap in range(R * S):
        h = pixel // W + pad_h - tap // S * dilation_h
        v = pixel % W + pad_w - tap % S * dilation_w
        inside = (offs_m < M) & (h >= 0) & (h % step_h == 0) & (h // step_h < OH)
        inside &= (v >= 0) & (v % step_w == 0) & (v // step_w < OW)
        offs = h // step_h * stride_gh + v // step_w * stride_gw
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            n = group * N + tl.minimum(offs_n, N - 1)
            pointers = images[None, :] + (n[:, None] * stride_gc + offs[None, :])
            grad = tl.load(pointers, mask=inside[None, :] & (offs_n < N)[:, None], other=0.0)
            rows = word_ptr + n.to(tl.int64) * row_bytes
            if WHOLE:  # a tap starts with a whole byte
                code = tl.trans(load_codes(rows, tap * C + first, row_bytes, BITS, BLOCK_C, False))
            else:
                code = gather_codes(rows[None, :], (tap * C + offs_c)[:, None], (offs_c < C)[:, None], BITS)
            w = (code.to(tl.float32) - tl.load(zero_ptr + n).to(tl.float32)[None, :]) * tl.load(scale_ptr + n)[None, :]
            dx = tl.dot(w.to(grad.dtype), grad, dx, input_precision="ieee")
    channel = image[None, :] * tl.num_programs(1) * C + (group * C + offs_c)[:, None]
    out = dx_ptr + channel * H * W + pixel[None, :]
    tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=(offs_c < C)[:, None] & (offs_m < M)[None, :])


def launch(
    x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, kernel_size, stride, padding, dilation, groups, dtype,
    *end,
):  # fmt: skip
    """Run the Triton kernel."""
    end, geometry = Epilogue(*end), (*stride, *padding, *dilation)
    y = _output(x, words.shape[0], kernel_size, stride, padding, dilation, end.dtype(dtype))
    if y.numel() == 0:
        return y, *(t.zero_() for t in _epilogue.allocate(y, y.shape[1], end))
    pixels, inputs, outputs = y.numel() // y.shape[1], x.shape[1] // groups, y.shape[1] // groups
    k = inputs * kernel_size[0] * kernel_size[1]
    block_n, block_m, block_k, warps, stages = _tiles(outputs, inputs, pixels, x, end.transforms)
    programs, tiles_m = triton.cdiv(outputs, block_n) * triton.cdiv(pixels, block_m), triton.cdiv(pixels, block_m)
    finishing = _epilogue.arguments(end, y, y.shape[1], tiles_m, programs * groups)
    weight = (t.contiguous() for t in (words, scale, zero))
    sizes = (pixels, outputs, k, inputs, *x.shape[2:], *y.shape[2:], words.shape[-1])
    steps = (*x.stride(), *(y.stride(d) for d in (0, 1, 3)))
    integer = x_scale is not None
    with torch.cuda.device_of(x):
        _packed_conv2d_kernel[(programs, groups)](
            x, *weight, bias, x_scale, x_zero, y, *finishing.values(), *sizes, *steps, *geometry, kernel_size[1],
            BY_TAP=k == inputs or inputs % block_k == 0, INTEGER=integer, BITS=8 if words.shape[-1] == k else bits,
            WIDE_W=bits == 8, WIDE_X=x_bits == 8, BIAS=bias is not None, EVEN=k % block_k == 0, BLOCK_N=block_n,
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
            maxnreg=None if integer else FLOAT_REGISTERS, enable_fp_fusion=not integer and not end.transforms,
        )  # fmt: skip
    return y, *_epilogue.gather(finishing, y)


def refuses(
    x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, kernel_size, stride, padding, dilation, groups, dtype,
    *end,
):  # fmt: skip
    """Say why the Triton kernel cannot run, or None."""
    k = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    if x_scale is not None and (reason := refuses_sum(k, bits, x_bits)):
        return reason
    if x_scale is None and x.dtype not in FLOATS:
        return f"x is {x.dtype}; the kernel takes float16, bfloat16 and float32"
    return _refuses_size(x, groups) or refuses_words(words, bits, 0, k)


def launch_backward(grad, words, scale, zero, bits, input_shape, kernel_size, stride, padding, dilation, groups):
    """Run the Triton kernel: no float weight is held in memory."""
    dx = grad.new_empty(input_shape)
    if dx.numel() == 0:
        return dx
    pixels, inputs, outputs = dx.numel() // dx.shape[1], dx.shape[1] // groups, words.shape[0] // groups
    k = inputs * kernel_size[0] * kernel_size[1]
    block_c, block_m, block_n = _small_tile(inputs, grad.dtype)
    with torch.cuda.device_of(grad):
        _packed_conv2d_backward_kernel[(triton.cdiv(inputs, block_c) * triton.cdiv(pixels, block_m), groups)](
            grad, *(t.contiguous() for t in (words, scale, zero)), dx, pixels, outputs, inputs, *dx.shape[2:],
            *grad.shape[2:], words.shape[-1], *grad.stride(), *stride, *padding, *dilation, *kernel_size,
            BITS=8 if words.shape[-1] == k else bits, WHOLE=refuses_words(words, bits, inputs, k) is None,
            BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=_backward_warps(grad.dtype), num_stages=2,
        )  # fmt: skip
    return dx


def refuses_backward(grad, words, scale, zero, bits, input_shape, kernel_size, stride, padding, dilation, groups):
    """Say why the Triton kernel cannot run, or None."""
    if grad.dtype not in FLOATS:
        return f"grad is {grad.dtype}; the kernel takes float16, bfloat16 and float32"
    k = input_shape[1] // groups * kernel_size[0] * kernel_size[1]
    return _refuses_size(grad, groups) or refuses_words(words, bits, 0, k)


def launch_cpu(
    x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, kernel_size, stride, padding, dilation, groups, dtype,
    *end,
):  # fmt: skip
    """Run the native kernel on activation codes, or on floats; what it does not follow with, torch does."""
    geometry, end = (kernel_size, stride, padding, dilation, groups), Epilogue(*end)
    ends = x_scale is not None and _products.follows(end)
    made = torch.float32 if x_scale is None or end.transforms or end.moments else dtype
    made = end.dtype(dtype) if ends else made
    y = _output(x, words.shape[0], *geometry[:4], made)
    channels_last = not y.is_contiguous()
    weight = (words.contiguous(), scale.contiguous(), zero.contiguous())
    bias = None if bias is None else bias.float().contiguous()
    last = (y, _products.stored_bits(words, bits, _terms(x.shape[1], *geometry)), _flat(*geometry), channels_last)
    moments, nonfinite = _epilogue.allocate(y, words.shape[0], end) if ends else (None, None)
    if y.numel() and x_scale is None:
        _products.packed_conv2d_floats(_innermost(x), *weight, bias, *last)
    elif y.numel():
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        ending = _products.Ending(end, y, nonfinite, dtype) if ends else None
        _products.packed_conv2d(x, *weight, bias, x_scale, x_zero, *last, ending)
    if ends:
        return y, moments, nonfinite if y.numel() else nonfinite.zero_()
    y, *seen = finish(y, end, 1, cd.launch_cpu)
    y = _output(x, words.shape[0], *geometry[:4], end.dtype(dtype)).copy_(y) if end.transforms else y.to(dtype)
    return y, *seen


def refuses_cpu(
    x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, kernel_size, stride, padding, dilation, groups, dtype,
    *end,
):  # fmt: skip
    """Say why the native kernel cannot run, or None."""
    terms = _terms(x.shape[1], kernel_size, groups)
    if reason := _products.refuses_words(words, bits, terms):
        return reason
    if x_scale is None:
        return _products.refuses_floats("x", x) or _refuses_narrow(words, x.shape[1], groups)
    return refuses_sum(terms, bits, x_bits)


def launch_cpu_backward(grad, words, scale, zero, bits, input_shape, *geometry):
    """Run the native kernel: no more of the weight than a tile a thread is float at any time."""
    dx = grad.new_empty(input_shape, dtype=torch.float32)
    if dx.numel():
        weight = (words.contiguous(), scale.contiguous(), zero.contiguous())
        stored = _products.stored_bits(words, bits, _terms(input_shape[1], *geometry))
        _products.packed_conv2d_backward(_innermost(grad), *weight, dx, stored, _flat(*geometry), False)
    return dx.to(grad.dtype)


def refuses_cpu_backward(grad, words, scale, zero, bits, input_shape, *geometry):
    """Say why the native kernel cannot run, or None."""
    reason = _products.refuses_floats("grad", grad) or _refuses_narrow(words, input_shape[1], geometry[-1])
    return reason or _products.refuses_words(words, bits, _terms(input_shape[1], *geometry))


def launch_unpacked(x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, kernel_size, *args):
    """Compute the reference on codes that the native kernel has unpacked."""
    k = x.shape[1] // args[3] * kernel_size[0] * kernel_size[1]
    words = unpacked(words, bits, k)
    return reference(x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, kernel_size, *args)


def launch_unpacked_backward(grad, words, scale, zero, bits, input_shape, kernel_size, *args):
    """Compute the reference on codes that the native kernel has unpacked."""
    k = input_shape[1] // args[-1] * kernel_size[0] * kernel_size[1]
    return reference_backward(grad, unpacked(words, bits, k), scale, zero, bits, input_shape, kernel_size, *args)


def refuses_unpacked(*args):
    """Say why the native kernel cannot unpack, or None."""
    return _native.reason("cpu")


def _innermost(x):
    """Give float32 with the channels innermost in memory."""
    return x.float().contiguous(memory_format=torch.channels_last)


def _flat(kernel_size, stride, padding, dilation, groups):
    return *kernel_size, *stride, *padding, *dilation, groups


def _terms(channels, kernel_size, *geometry):
    """Count the codes of a row of words."""
    return channels // geometry[-1] * kernel_size[0] * kernel_size[1]


def _refuses_narrow(words, channels, groups):
    inputs, outputs = channels // groups, words.shape[0] // groups
    if inputs < NARROWEST and (inputs, outputs) != (1, 1):
        return f"{inputs} inputs a group leave vectors empty; below {NARROWEST} torch is faster on unpacked codes"
    return None


def _refuses_size(x, groups):
    if sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 1 << 31:
        return f"an image of {tuple(x.shape[1:])} spans more than 2^31 elements; the kernel counts in int32"
    if groups >= 1 << 16:
        return f"there are {groups} groups; a grid has at most 65535"
    return None


def _tiles(outputs, inputs, pixels, x, follows):
    """Choose (BLOCK_N, BLOCK_M, BLOCK_K, warps, stages): large tiles once they fill a GPU with channels-last images.

    Where something `follows` floats, what it holds beside 128 x 128 sums would spill registers, and so would the
    addresses of channels that lie apart.
    """
    fills = (outputs // 128) * (pixels // 128) >= 128 and inputs % 64 == 0 and x.stride(1) == 1
    if fills and (x.dtype == torch.uint8 or (x.dtype != torch.float32 and not follows)):
        return 128, 128, 64, 8, 3
    return *_small_tile(outputs, x.dtype), 4, 2


def _small_tile(channels, dtype):
    """Choose the tile: (channels of a group, pixels, contraction)."""
    if dtype == torch.float32:
        return (64, 32, 32) if channels > 32 else (32, 32, 16)
    return min(64, max(16, triton.next_power_of_2(channels))), 64, 32


def _backward_warps(dtype):
    """Choose the warps of the backward: with 4 for float32, which no tensor core takes, ptxas spills registers."""
    return 8 if dtype == torch.float32 else 4
