"""Thin typed wrappers around the functions of the compiled csrc/.

They take what the ops have checked: dense tensors in physical order, outputs allocated, scales and zeros contiguous.
The canonical form is (outer, channels, inner): element (p, c, i) lies at ``(p * channels + c) * inner + i`` and uses
``scale[c]``. csrc/ttaq_native.h states what each function computes.
"""

import torch
from torch import Tensor

from ._library import BITS, DTYPES, KINDS, LEVELS, check, cpu_level, level_number, library, reason, threads

__all__ = (
    "BITS", "DTYPES", "KINDS", "LEVELS", "activation_codes", "aligned_fake_quant", "aligned_fake_quant_backward",
    "cpu_level", "fake_quant", "fake_quant_backward", "library", "log2_codes", "log2_fake_quant",
    "log2_fake_quant_backward", "pack_codes", "perturbed_fake_quant", "perturbed_fake_quant_backward",
    "quantize_codes", "reason", "soft_round", "soft_round_backward", "unpack_codes",
)  # fmt: skip


def fake_quant(
    x: Tensor, y: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, outer: int, channels: int, inner: int,
    level: str | None = None,
) -> None:  # fmt: skip
    """Write ``(clamp(round(x / scale) + round(zero), qmin, qmax) - round(zero)) * scale`` to `y`.

    Args:
        x: outer * channels * inner elements in physical order; float32, bfloat16 or float16.
        y: Like `x`; overwritten.
        scale: (channels,) in any shape, float32.
        zero: (channels,) in any shape, float32 or int32.
        level: One of `LEVELS`, by default the highest this processor has.
    """
    check(
        library("cpu").ttaq_cpu_fake_quant(
            x.data_ptr(), y.data_ptr(), scale.data_ptr(), zero.data_ptr(), zero.dtype == torch.int32,
            DTYPES[x.dtype], qmin, qmax, outer, channels, inner, threads(), level_number(level),
        )
    )  # fmt: skip


def fake_quant_backward(
    grad: Tensor, x: Tensor, dx: Tensor, scale: Tensor, zero: Tensor, dscale: Tensor, dzero: Tensor, qmin: int,
    qmax: int, outer: int, channels: int, inner: int, level: str | None = None,
) -> None:  # fmt: skip
    """Write the gradients of `fake_quant` to `dx`, `dscale` and `dzero`; the same bits for any number of threads.

    Args:
        grad: Elements, order and dtype of `x`.
        x: As for `fake_quant`.
        dx: Like `x`; overwritten.
        scale: (channels,) in any shape, float32.
        zero: (channels,) in any shape, float32 or int32.
        dscale: (channels,) in any shape, float32; overwritten.
        dzero: (channels,) in any shape, float32; overwritten.
        level: One of `LEVELS`, by default the highest this processor has.
    """
    check(
        library("cpu").ttaq_cpu_fake_quant_backward(
            grad.data_ptr(), x.data_ptr(), dx.data_ptr(), scale.data_ptr(), zero.data_ptr(), zero.dtype == torch.int32,
            dscale.data_ptr(), dzero.data_ptr(), DTYPES[x.dtype], qmin, qmax, outer, channels, inner,
            threads(), level_number(level),
        )
    )  # fmt: skip


def perturbed_fake_quant(
    x: Tensor, y: Tensor, scale: Tensor, zero: Tensor, spread: Tensor, seed: Tensor, kind: str, qmin: int, qmax: int,
    outer: int, channels: int, inner: int, level: str | None = None,
) -> None:  # fmt: skip
    """Write `x`, perturbed and fake-quantised as kernels/perturb.py says, to `y`.

    Args:
        x: As for `fake_quant`, and so y.
        scale: One element, float32; zero: one element, float32 or int32.
        spread: (channels,), float32.
        seed: One element, int64.
        kind: One of `KINDS`.
    """
    check(
        library("cpu").ttaq_cpu_perturbed_fake_quant(
            *(t.data_ptr() for t in (x, y, scale, zero)), zero.dtype == torch.int32, spread.data_ptr(),
            seed.data_ptr(), KINDS[kind], DTYPES[x.dtype], qmin, qmax, outer, channels, inner, threads(),
            level_number(level),
        )
    )  # fmt: skip


def perturbed_fake_quant_backward(
    grad: Tensor, x: Tensor, dx: Tensor, scale: Tensor, zero: Tensor, spread: Tensor, seed: Tensor, dscale: Tensor,
    dzero: Tensor, kind: str, qmin: int, qmax: int, outer: int, channels: int, inner: int, level: str | None = None,
) -> None:  # fmt: skip
    """Write the gradients of `perturbed_fake_quant`; the same bits for any number of threads.

    Args:
        grad: Elements, order and dtype of `x`, and so dx.
        dscale: One element, float32, and so dzero; overwritten.
    """
    check(
        library("cpu").ttaq_cpu_perturbed_fake_quant_backward(
            *(t.data_ptr() for t in (grad, x, dx, scale, zero)), zero.dtype == torch.int32,
            *(t.data_ptr() for t in (spread, seed, dscale, dzero)), KINDS[kind], DTYPES[x.dtype], qmin, qmax,
            outer, channels, inner, threads(), level_number(level),
        )
    )  # fmt: skip


def soft_round(
    w: Tensor, v: Tensor, scale: Tensor, zero: Tensor, beta: Tensor, y: Tensor, penalty: Tensor, energy: Tensor,
    qmin: int, qmax: int, form: tuple[int, int, int], columns: tuple[int, int, int, int], level: str | None = None,
) -> None:  # fmt: skip
    """Write `w`, softly rounded as kernels/soft_round.py says, to `y`, and its two sums.

    Args:
        w: At least one element, float32, in physical order, and so v and y.
        scale: (channels,), float32; zero: (channels,), float32 or int32.
        beta: One element, float32, and so penalty, which is overwritten.
        energy: (conv_groups * inputs,), float32; overwritten.
        form: The canonical one.
        columns: (outputs, conv_groups, inputs, stride of the inputs); no energy for conv_groups 0.
        level: One of `LEVELS`, by default the highest this processor has.
    """
    check(
        library("cpu").ttaq_cpu_soft_round(
            *(t.data_ptr() for t in (w, v, scale, zero)), zero.dtype == torch.int32,
            *(t.data_ptr() for t in (beta, y, penalty, energy)), qmin, qmax, *form, *columns, threads(),
            level_number(level),
        )
    )  # fmt: skip


def soft_round_backward(
    grad: Tensor, dpenalty: Tensor, denergy: Tensor, w: Tensor, v: Tensor, scale: Tensor, zero: Tensor, beta: Tensor,
    dv: Tensor, qmin: int, qmax: int, form: tuple[int, int, int], columns: tuple[int, int, int, int],
    level: str | None = None,
) -> None:  # fmt: skip
    """Write the gradient of `soft_round` by `v` to `dv`.

    Args:
        grad: Elements and order of `w`, and so dv; float32, as are the gradients of the two sums.
    """
    check(
        library("cpu").ttaq_cpu_soft_round_backward(
            *(t.data_ptr() for t in (grad, dpenalty, denergy, w, v, scale, zero)), zero.dtype == torch.int32,
            beta.data_ptr(), dv.data_ptr(), qmin, qmax, *form, *columns, threads(), level_number(level),
        )
    )  # fmt: skip


def quantize_codes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, nonfinite: Tensor, qmin: int, qmax: int, outer: int,
    channels: int, inner: int, level: str | None = None,
) -> None:  # fmt: skip
    """Write ``clamp(round(x / scale) + round(zero), qmin, qmax)`` to `codes`; a NaN gets the code of 0.0.

    Args:
        x: As for `fake_quant`.
        codes: Elements and order of `x`, uint8; overwritten.
        scale: (channels,) in any shape, float32.
        zero: (channels,) in any shape, float32 or int32.
        nonfinite: One element, int32; overwritten with the number of NaN and infinite elements of `x`.
        level: One of `LEVELS`, by default the highest this processor has.
    """
    check(
        library("cpu").ttaq_cpu_quantize_codes(
            x.data_ptr(), codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), zero.dtype == torch.int32,
            nonfinite.data_ptr(), DTYPES[x.dtype], qmin, qmax, outer, channels, inner, threads(), level_number(level),
        )
    )  # fmt: skip


def log2_fake_quant(*tensors_and_grid, level: str | None = None) -> None:
    """Fake-quantise on the logarithmic grid of kernels/log2.py.

    Args:
        tensors_and_grid: x, y (like x; overwritten), scale (one element, float32), qmax, roots.
    """
    _log2("fake_quant", *tensors_and_grid, level=level)


def log2_codes(*tensors_and_grid, level: str | None = None) -> None:
    """Write the codes of the logarithmic grid.

    Args:
        tensors_and_grid: x, codes (uint8; overwritten), scale, nonfinite (int32; overwritten), qmax, roots.
    """
    _log2("codes", *tensors_and_grid, level=level)


def log2_fake_quant_backward(*tensors_and_grid, level: str | None = None) -> None:
    """Write the gradients of `log2_fake_quant`; the same bits for any number of threads.

    Args:
        tensors_and_grid: grad, x, dx (like x; overwritten), scale, dscale (one element; overwritten), qmax, roots.
    """
    _log2("fake_quant_backward", *tensors_and_grid, level=level)


def _log2(what, x, *rest, level):
    *tensors, qmax, roots = rest
    call = getattr(library("cpu"), f"ttaq_cpu_log2_{what}")
    pointers = (t.data_ptr() for t in (x, *tensors))
    check(call(*pointers, DTYPES[x.dtype], qmax, roots, x.numel(), threads(), level_number(level)))


def aligned_fake_quant(
    x: Tensor, y: Tensor, gain: Tensor, shift: Tensor, scale: Tensor, zero: Tensor, seen: Tensor, qmin: int, qmax: int,
    outer: int, channels: int, inner: int, level: str | None = None,
) -> None:  # fmt: skip
    """Write ``fake_quant(x * gain + shift)`` to `y`, and what is seen of the aligned values to `seen`.

    Args:
        x: As for `fake_quant`, and so y.
        gain: (channels,), float32, and so shift.
        scale: One element, float32; zero: one element, float32 or int32.
        seen: (5, channels), float32; overwritten. Or empty.
    """
    check(
        library("cpu").ttaq_cpu_aligned_fake_quant(
            *(t.data_ptr() for t in (x, y, gain, shift, scale, zero)), zero.dtype == torch.int32,
            seen.data_ptr() if seen.numel() else None, DTYPES[x.dtype], qmin, qmax, outer, channels, inner,
            threads(), level_number(level),
        )
    )  # fmt: skip


def aligned_fake_quant_backward(
    grad: Tensor, x: Tensor, dx: Tensor, gain: Tensor, shift: Tensor, scale: Tensor, zero: Tensor, dgain: Tensor,
    dshift: Tensor, dscale: Tensor, dzero: Tensor, qmin: int, qmax: int, outer: int, channels: int, inner: int,
    level: str | None = None,
) -> None:  # fmt: skip
    """Write the gradients of `aligned_fake_quant`; the same bits for any number of threads.

    Args:
        grad: Elements, order and dtype of `x`, and so dx.
        dgain: (channels,), float32, and so dshift; dscale and dzero: one element, float32. All are overwritten.
    """
    check(
        library("cpu").ttaq_cpu_aligned_fake_quant_backward(
            *(t.data_ptr() for t in (grad, x, dx, gain, shift, scale, zero)), zero.dtype == torch.int32,
            *(t.data_ptr() for t in (dgain, dshift, dscale, dzero)), DTYPES[x.dtype], qmin, qmax, outer, channels,
            inner, threads(), level_number(level),
        )
    )  # fmt: skip


def activation_codes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, sums: Tensor | None, nonfinite: Tensor, bits: int, *,
    packed: bool, measure: bool, level: str | None = None,
) -> None:  # fmt: skip
    """Write the codes of the rows of `x`, their sums, and with `measure` the grid of each row.

    Args:
        x: (rows, k), elements of a row side by side; float32, bfloat16 or float16.
        codes: (rows, k) uint8, or with `packed` the words of `pack_codes`; overwritten.
        scale: float32, one element or one a row; overwritten with `measure`, and so zero, int32.
        sums: (rows,), int32, overwritten; or None.
        nonfinite: As for `quantize_codes`.
    """
    check(
        library("cpu").ttaq_cpu_activation_codes(
            x.data_ptr(), x.stride(0), codes.data_ptr(), scale.data_ptr(), zero.data_ptr(),
            None if sums is None else sums.data_ptr(), nonfinite.data_ptr(), measure, scale.ndim > 0, packed,
            DTYPES[x.dtype], bits, *x.shape, threads(), level_number(level),
        )
    )  # fmt: skip


def pack_codes(codes: Tensor, words: Tensor, bits: int, level: str | None = None) -> None:
    """Write the little-endian bit stream of each row of `codes` to `words`.

    Args:
        codes: (..., k) uint8, contiguous.
        words: (..., ceil(k * bits / 8)) uint8, contiguous, on the same device; overwritten.
        bits: 2, 3, 4 or 8.
        level: One of `LEVELS`, by default the highest this processor has; of no effect on a GPU.
    """
    _move_codes("pack", codes, words, codes, bits, level)


def unpack_codes(words: Tensor, codes: Tensor, bits: int, level: str | None = None) -> None:
    """Write the codes held by each row of `words` to `codes`: the inverse of `pack_codes`.

    Args:
        words: (..., ceil(k * bits / 8)) uint8, contiguous.
        codes: (..., k) uint8, contiguous, on the same device; overwritten.
        bits: 2, 3, 4 or 8.
        level: One of `LEVELS`, by default the highest this processor has; of no effect on a GPU.
    """
    _move_codes("unpack", words, codes, codes, bits, level)


def _move_codes(verb: str, source: Tensor, target: Tensor, codes: Tensor, bits: int, level: str | None) -> None:
    if codes.numel() == 0:
        return
    k = codes.shape[-1]
    shape = (codes.numel() // k, k, bits)
    if not codes.is_cuda:
        call = getattr(library("cpu"), f"ttaq_cpu_{verb}_codes")
        check(call(source.data_ptr(), target.data_ptr(), *shape, threads(), level_number(level)))
        return
    with torch.cuda.device(codes.device):
        stream = torch.cuda.current_stream().cuda_stream
        call = getattr(library("cuda"), f"ttaq_cuda_{verb}_codes")
        check(call(source.data_ptr(), target.data_ptr(), *shape, stream))
