"""Thin typed wrappers around the products with packed weights of the compiled csrc/, and what these cannot take.

They take what the ops have checked, outputs allocated, scales and zeros contiguous. csrc/ttaq_native.h states what each
function computes.
"""

import ctypes
import math

import torch
from torch import Tensor

from ._epilogue import Epilogue
from ._library import BITS, DTYPES, check, level_number, library, reason, threads
from ._tiles import in_order_of


def stored_bits(words: Tensor, bits: int, k: int) -> int:
    """Give the bits that a code takes in rows of `k` codes: a byte where there is one a code."""
    return 8 if words.shape[-1] == k else bits


def refuses_words(words: Tensor, bits: int, k: int) -> str | None:
    """Say why the native library is not there or cannot read rows of `k` codes, or None."""
    if why := reason("cpu"):
        return why
    if stored_bits(words, bits, k) not in BITS:
        return f"the words hold {bits} bits a code; the kernel reads 2, 3, 4 and 8"
    return None


def refuses_floats(name: str, x: Tensor) -> str | None:
    """Say why no native product takes the floats `x`, or None."""
    if x.dtype in DTYPES:
        return None
    return f"{name} is {x.dtype}; the kernel takes float16, bfloat16 and float32"


class Ending(ctypes.Structure):
    """What follows a product of `dtype` in the native kernel, a ttaq_ending; it holds the tensors it points to."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gain", "shift", "residual")),
        *((name, ctypes.c_float) for name in ("least", "most")),
        *((name, ctypes.c_void_p) for name in ("y_scale", "y_zero")),
        ("y_bits", ctypes.c_int),
        ("nonfinite", ctypes.c_void_p),
    ]  # fmt: skip

    def __init__(self, end: Epilogue, y: Tensor, nonfinite: Tensor, dtype: torch.dtype):
        self.dtype = dtype
        gain, shift = (None if t is None else t.float().contiguous() for t in (end.gain, end.shift))
        residual = None if end.residual is None else in_order_of(end.residual, y)
        self.held = (gain, shift, residual, end.y_scale, end.y_zero, nonfinite)
        gain, shift, residual, y_scale, y_zero, nonfinite = (None if t is None else t.data_ptr() for t in self.held)
        bounds = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}.get(end.after, (-math.inf, math.inf))
        super().__init__(gain, shift, residual, *bounds, y_scale, y_zero, end.y_bits, nonfinite)


def follows(end: Epilogue) -> bool:
    """Tell whether a native product of codes makes what follows; without it, and for the rest, torch does."""
    return end.transforms and not end.moments and end.after != "gelu"


def _number(y, ending):
    return DTYPES[y.dtype if ending is None else ending.dtype]


def _pointer(ending):
    return None if ending is None else ctypes.byref(ending)


def packed_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, x_scale: Tensor, x_zero: Tensor,
    y: Tensor, bits: int, group: int, ending: Ending | None = None, level: str | None = None,
) -> None:  # fmt: skip
    """Write the linear layer of kernels/packed_linear.py on activation codes to `y`.

    Args:
        x: (m, k), uint8, elements of a row side by side.
        words: (n, bytes), uint8, contiguous, and so scale, zero (int32), bias (float32).
        x_scale: One element, float32, or (m,); x_zero: its shape, int32. Contiguous.
        y: (m, n), float32, bfloat16 or float16, or uint8 where it ends in codes; overwritten.
        bits: That a code takes in `words`: 2, 3, 4 or 8.
        group: Inputs that share a scale, whose words fill whole dwords; or 0.
        ending: What follows.
    """
    check(
        library("cpu").ttaq_cpu_packed_linear(
            x.data_ptr(), x.stride(0), words.data_ptr(), scale.data_ptr(), zero.data_ptr(),
            None if bias is None else bias.data_ptr(), x_scale.data_ptr(), x_zero.data_ptr(), x_scale.numel() > 1,
            y.data_ptr(), _number(y, ending), bits, group, x.shape[0], words.shape[0], x.shape[1],
            _pointer(ending), threads(), level_number(level),
        )
    )  # fmt: skip


def packed_linear_floats(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, y: Tensor, bits: int, group: int,
    level: str | None = None,
) -> None:  # fmt: skip
    """Write the linear layer of kernels/packed_linear.py on floats to `y`.

    Args:
        x: (m, k), float32, bfloat16 or float16, elements of a row side by side.
        words: As for `packed_linear`, and so scale, zero, bias and bits.
        y: (m, n), float32, bfloat16 or float16; overwritten.
        group: Inputs that share a scale, or 0.
    """
    check(
        library("cpu").ttaq_cpu_packed_linear_floats(
            x.data_ptr(), x.stride(0), words.data_ptr(), scale.data_ptr(), zero.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), bits, group, x.shape[0], words.shape[0],
            x.shape[1], DTYPES[x.dtype], DTYPES[y.dtype], threads(), level_number(level),
        )
    )  # fmt: skip


def skinny_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, y: Tensor, bits: int, group: int, k: int,
) -> None:  # fmt: skip
    """Write the linear layer of kernels/packed_linear.py on up to 8 rows of codes or 16-bit floats to `y`, on a GPU.

    Args:
        x: (m, room), uint8, float16 or bfloat16; rows of `k` and zeros up to a multiple of 16 bytes, as far apart.
        words: As for `packed_linear`, and so scale, zero, bias and bits, all on one device.
        x_scale: As for `packed_linear`, and so x_zero; None for floats.
        y: (m, n), float32, bfloat16 or float16; overwritten.
        group: Inputs that share a scale, a multiple of 64, 128 for 3 bits; or 0.
    """
    grid = [None if t is None else t.data_ptr() for t in (bias, x_scale, x_zero)]
    token, number = x_scale is not None and x_scale.numel() > 1, DTYPES.get(x.dtype, 0)
    with torch.cuda.device(x.device):
        check(
            library("cuda").ttaq_cuda_skinny_linear(
                x.data_ptr(), x.stride(0), words.data_ptr(), scale.data_ptr(), zero.data_ptr(), *grid, token,
                y.data_ptr(), number, DTYPES[y.dtype], bits, group, x.shape[0], words.shape[0], k,
                torch.cuda.current_stream().cuda_stream,
            )
        )  # fmt: skip


def packed_linear_backward(
    grad: Tensor, words: Tensor, scale: Tensor, zero: Tensor, dx: Tensor, bits: int, group: int,
    level: str | None = None,
) -> None:  # fmt: skip
    """Write the gradient of the input of the linear layer to `dx`; the same bits for any number of threads.

    Args:
        grad: (m, n), float32, bfloat16 or float16, elements of a row side by side.
        words: As for `packed_linear_floats`, and so scale, zero, bits and group.
        dx: (m, k), dtype of `grad`; overwritten.
    """
    check(
        library("cpu").ttaq_cpu_packed_linear_backward(
            grad.data_ptr(), grad.stride(0), words.data_ptr(), scale.data_ptr(), zero.data_ptr(), dx.data_ptr(), bits,
            group, *grad.shape, dx.shape[1], DTYPES[grad.dtype], threads(), level_number(level),
        )
    )  # fmt: skip


def packed_conv2d(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, x_scale: Tensor, x_zero: Tensor,
    y: Tensor, bits: int, geometry: tuple[int, ...], channels_last: bool, ending: Ending | None = None,
    level: str | None = None,
) -> None:  # fmt: skip
    """Write the convolution of kernels/packed_conv2d.py on activation codes to `y`.

    Args:
        x: (B, C, H, W), uint8; contiguous, or channels innermost with `channels_last`, and so y, which is float32,
            bfloat16 or float16, or uint8 where it ends in codes, and overwritten.
        words: (O, bytes), uint8, contiguous, and so scale, zero (int32), bias (float32).
        x_scale: One element, float32; x_zero: one, int32.
        bits: That a code takes in `words`: 2, 3, 4 or 8.
        geometry: R, S, and down and across: stride, padding, dilation; groups.
        ending: What follows.
    """
    shape = (*x.shape, *y.shape[1:], *geometry)
    check(
        library("cpu").ttaq_cpu_packed_conv2d(
            x.data_ptr(), words.data_ptr(), scale.data_ptr(), zero.data_ptr(),
            None if bias is None else bias.data_ptr(), x_scale.data_ptr(), x_zero.data_ptr(), y.data_ptr(),
            _number(y, ending), bits, channels_last, (ctypes.c_int64 * len(shape))(*shape),
            _pointer(ending), threads(), level_number(level),
        )
    )  # fmt: skip


def packed_conv2d_floats(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, y: Tensor, bits: int,
    geometry: tuple[int, ...], channels_last: bool, level: str | None = None,
) -> None:  # fmt: skip
    """Write the convolution of kernels/packed_conv2d.py on floats to `y`.

    Args:
        x: (B, C, H, W), float32, channels innermost.
        words: As for `packed_conv2d`, and so scale, zero, bias, bits and geometry.
        y: (B, O, OH, OW), float32; contiguous, or channels innermost with `channels_last`; overwritten.
    """
    shape = (*x.shape, *y.shape[1:], *geometry)
    check(
        library("cpu").ttaq_cpu_packed_conv2d_floats(
            x.data_ptr(), words.data_ptr(), scale.data_ptr(), zero.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), bits, channels_last,
            (ctypes.c_int64 * len(shape))(*shape), threads(), level_number(level),
        )
    )  # fmt: skip


def packed_conv2d_backward(
    grad: Tensor, words: Tensor, scale: Tensor, zero: Tensor, dx: Tensor, bits: int, geometry: tuple[int, ...],
    channels_last: bool, level: str | None = None,
) -> None:  # fmt: skip
    """Write the gradient of the input of the convolution to `dx`; the same bits for any number of threads.

    Args:
        grad: (B, O, OH, OW), float32, channels innermost.
        words: As for `packed_conv2d`, and so scale, zero, bits and geometry.
        dx: (B, C, H, W), float32; contiguous, or channels innermost with `channels_last`; overwritten.
    """
    shape = (*dx.shape, *grad.shape[1:], *geometry)
    check(
        library("cpu").ttaq_cpu_packed_conv2d_backward(
            grad.data_ptr(), words.data_ptr(), scale.data_ptr(), zero.data_ptr(), dx.data_ptr(), bits, channels_last,
            (ctypes.c_int64 * len(shape))(*shape), threads(), level_number(level),
        )
    )  # fmt: skip
