"""ctypes handles of the compiled csrc/, and thin typed wrappers around its functions.

The wrappers take what the ops have checked: dense tensors in physical order, outputs allocated, scales and zeros
contiguous. The canonical form is (outer, channels, inner): element (p, c, i) lies at ``(p * channels + c) * inner + i``
and uses ``scale[c]``. csrc/ttaq_native.h states what each function computes.
"""

import ctypes
import json
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LEVELS = ("base", "v3", "v4")  # enum ttaq_level; x86-64-v3 is AVX2 with FMA, x86-64-v4 is AVX-512
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum ttaq_dtype
KINDS = {"drop": 0, "step": 1, "gauss": 2}  # enum ttaq_kind
BITS = (2, 3, 4, 8)

_ERRORS = {
    -1: "the dtype must be float32, bfloat16 or float16",
    -2: "this processor does not have the instruction set asked for",
    -3: "bits must be 2, 3, 4 or 8",
    -4: "no memory for the partial sums",
    -5: "kind must be drop, step or gauss",
    -6: "roots must be 1 or 2 and qmax 1 to 63",
}
_NO_DRIVER = 35
_IMPORTED_BY = os.getpid()

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_FORM = (_L, _L, _L)  # outer, channels, inner
_COLUMNS = (_L, _L, _L, _L)  # outputs, conv_groups, inputs, stride of inputs
_SIGNATURES = {
    "cpu": {
        "ttaq_cpu_level": (),
        "ttaq_cpu_has_pool": (),
        "ttaq_cpu_fake_quant": (_P, _P, _P, _P, _I, _I, _I, _I, *_FORM, _I, _I),
        "ttaq_cpu_fake_quant_backward": (_P, _P, _P, _P, _P, _I, _P, _P, _I, _I, _I, *_FORM, _I, _I),
        "ttaq_cpu_perturbed_fake_quant": (_P, _P, _P, _P, _I, _P, _P, _I, _I, _I, _I, *_FORM, _I, _I),
        "ttaq_cpu_perturbed_fake_quant_backward": (*(_P,) * 5, _I, *(_P,) * 4, _I, _I, _I, _I, *_FORM, _I, _I),
        "ttaq_cpu_soft_round": (*(_P,) * 4, _I, *(_P,) * 4, _I, _I, *_FORM, *_COLUMNS, _I, _I),
        "ttaq_cpu_soft_round_backward": (*(_P,) * 7, _I, _P, _P, _I, _I, *_FORM, *_COLUMNS, _I, _I),
        "ttaq_cpu_quantize_codes": (_P, _P, _P, _P, _I, _P, _I, _I, _I, *_FORM, _I, _I),
        "ttaq_cpu_log2_fake_quant": (_P, _P, _P, _I, _I, _I, _L, _I, _I),
        "ttaq_cpu_log2_codes": (_P, _P, _P, _P, _I, _I, _I, _L, _I, _I),
        "ttaq_cpu_log2_fake_quant_backward": (_P, _P, _P, _P, _P, _I, _I, _I, _L, _I, _I),
        "ttaq_cpu_aligned_fake_quant": (*(_P,) * 6, _I, _P, _I, _I, _I, *_FORM, _I, _I),
        "ttaq_cpu_aligned_fake_quant_backward": (*(_P,) * 7, _I, *(_P,) * 4, _I, _I, _I, *_FORM, _I, _I),
        "ttaq_cpu_activation_codes": (_P, _L, *(_P,) * 5, _I, _I, _I, _I, _I, _L, _L, _I, _I),
        "ttaq_cpu_pack_codes": (_P, _P, _L, _L, _I, _I, _I),
        "ttaq_cpu_unpack_codes": (_P, _P, _L, _L, _I, _I, _I),
    },
    "cuda": {
        "ttaq_cuda_status": (),
        "ttaq_cuda_pack_codes": (_P, _P, _L, _L, _I, _P),
        "ttaq_cuda_unpack_codes": (_P, _P, _L, _L, _I, _P),
    },
}


def library(kind: str) -> ctypes.CDLL | None:
    """Return the native library ``"cpu"`` or ``"cuda"``, loaded at the first call, or None where it cannot serve."""
    return _load(kind)[0]


def reason(kind: str) -> str | None:
    """Return one sentence on why there is no library ``"cpu"`` or ``"cuda"``, or None when there is one."""
    return _load(kind)[1]


@cache
def cpu_level() -> str | None:
    """Return the highest instruction set that the CPU library and this processor share, or None without the library."""
    cpu = library("cpu")
    return None if cpu is None else LEVELS[cpu.ttaq_cpu_level()]


@cache
def _load(kind: str) -> tuple[ctypes.CDLL | None, str | None]:
    path = Path(__file__).with_name(f"_native_{kind}.so")
    if not path.exists():
        return None, _why_not_built(kind)
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the native {kind} library does not load here ({error}); build ttaq again on this machine"
    for name, argtypes in _SIGNATURES[kind].items():
        function = getattr(handle, name)
        function.argtypes, function.restype = argtypes, _I
    if kind == "cuda" and (code := handle.ttaq_cuda_status()):
        cause = "there is no CUDA driver" if code == _NO_DRIVER else "no CUDA device can be used"
        return None, f"{cause} (CUDA error {code})"
    return handle, None


def _why_not_built(kind: str) -> str:
    record = Path(__file__).with_name("native_build.json")
    if not record.exists():
        return f"the native {kind} library was never built; install ttaq with `pip install .`"
    recorded = json.loads(record.read_text(encoding="utf-8"))[kind]
    return recorded or f"the native {kind} library was built and is gone; install ttaq again"


def _threads() -> int:
    # The thread pool does not survive a fork: a child of the process that imported torch keeps to one thread.
    return torch.get_num_threads() if os.getpid() == _IMPORTED_BY else 1


def _level(level: str | None) -> int:
    if level is None:
        level = cpu_level()
    elif level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    return LEVELS.index(level)


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"ttaq native call failed: {_ERRORS.get(code, f'CUDA error {code}')}")


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
    _check(
        library("cpu").ttaq_cpu_fake_quant(
            x.data_ptr(), y.data_ptr(), scale.data_ptr(), zero.data_ptr(), zero.dtype == torch.int32,
            DTYPES[x.dtype], qmin, qmax, outer, channels, inner, _threads(), _level(level),
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
    _check(
        library("cpu").ttaq_cpu_fake_quant_backward(
            grad.data_ptr(), x.data_ptr(), dx.data_ptr(), scale.data_ptr(), zero.data_ptr(), zero.dtype == torch.int32,
            dscale.data_ptr(), dzero.data_ptr(), DTYPES[x.dtype], qmin, qmax, outer, channels, inner,
            _threads(), _level(level),
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
    _check(
        library("cpu").ttaq_cpu_perturbed_fake_quant(
            *(t.data_ptr() for t in (x, y, scale, zero)), zero.dtype == torch.int32, spread.data_ptr(),
            seed.data_ptr(), KINDS[kind], DTYPES[x.dtype], qmin, qmax, outer, channels, inner, _threads(),
            _level(level),
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
    _check(
        library("cpu").ttaq_cpu_perturbed_fake_quant_backward(
            *(t.data_ptr() for t in (grad, x, dx, scale, zero)), zero.dtype == torch.int32,
            *(t.data_ptr() for t in (spread, seed, dscale, dzero)), KINDS[kind], DTYPES[x.dtype], qmin, qmax,
            outer, channels, inner, _threads(), _level(level),
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
    _check(
        library("cpu").ttaq_cpu_soft_round(
            *(t.data_ptr() for t in (w, v, scale, zero)), zero.dtype == torch.int32,
            *(t.data_ptr() for t in (beta, y, penalty, energy)), qmin, qmax, *form, *columns, _threads(),
            _level(level),
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
    _check(
        library("cpu").ttaq_cpu_soft_round_backward(
            *(t.data_ptr() for t in (grad, dpenalty, denergy, w, v, scale, zero)), zero.dtype == torch.int32,
            beta.data_ptr(), dv.data_ptr(), qmin, qmax, *form, *columns, _threads(), _level(level),
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
    _check(
        library("cpu").ttaq_cpu_quantize_codes(
            x.data_ptr(), codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), zero.dtype == torch.int32,
            nonfinite.data_ptr(), DTYPES[x.dtype], qmin, qmax, outer, channels, inner, _threads(), _level(level),
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
    _check(call(*pointers, DTYPES[x.dtype], qmax, roots, x.numel(), _threads(), _level(level)))


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
    _check(
        library("cpu").ttaq_cpu_aligned_fake_quant(
            *(t.data_ptr() for t in (x, y, gain, shift, scale, zero)), zero.dtype == torch.int32,
            seen.data_ptr() if seen.numel() else None, DTYPES[x.dtype], qmin, qmax, outer, channels, inner,
            _threads(), _level(level),
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
    _check(
        library("cpu").ttaq_cpu_aligned_fake_quant_backward(
            *(t.data_ptr() for t in (grad, x, dx, gain, shift, scale, zero)), zero.dtype == torch.int32,
            *(t.data_ptr() for t in (dgain, dshift, dscale, dzero)), DTYPES[x.dtype], qmin, qmax, outer, channels,
            inner, _threads(), _level(level),
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
    _check(
        library("cpu").ttaq_cpu_activation_codes(
            x.data_ptr(), x.stride(0), codes.data_ptr(), scale.data_ptr(), zero.data_ptr(),
            None if sums is None else sums.data_ptr(), nonfinite.data_ptr(), measure, scale.ndim > 0, packed,
            DTYPES[x.dtype], bits, *x.shape, _threads(), _level(level),
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
        _check(call(source.data_ptr(), target.data_ptr(), *shape, _threads(), _level(level)))
        return
    with torch.cuda.device(codes.device):
        stream = torch.cuda.current_stream().cuda_stream
        call = getattr(library("cuda"), f"ttaq_cuda_{verb}_codes")
        _check(call(source.data_ptr(), target.data_ptr(), *shape, stream))
