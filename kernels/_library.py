"""ctypes handles of the compiled csrc/, or the reason why there is none; csrc/ttaq_native.h states each function."""

import ctypes
import json
import os
from functools import cache
from pathlib import Path

import torch

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
    -7: "the words of a group must fill whole dwords, or whole steps on a GPU",
    -8: "there are too many rows, or they begin where the kernel cannot load",
}
_NO_DRIVER = 35
_IMPORTED_BY = os.getpid()

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_FORM = (_L, _L, _L)  # outer, channels, inner
_COLUMNS = (_L, _L, _L, _L)  # outputs, conv_groups, inputs, stride of inputs
_SIGNATURES = {
    "cpu": {
        "ttaq_cpu_level": (),
        "ttaq_cpu_product_level": (),
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
        "ttaq_cpu_packed_linear": (_P, _L, *(_P,) * 6, _I, _P, _I, _I, _L, _L, _L, _L, _P, _I, _I),
        "ttaq_cpu_packed_conv2d": (*(_P,) * 8, _I, _I, _I, _P, _P, _I, _I),
        "ttaq_cpu_packed_linear_floats": (_P, _L, *(_P,) * 5, _I, *(_L,) * 4, _I, _I, _I, _I),
        "ttaq_cpu_packed_linear_backward": (_P, _L, *(_P,) * 4, _I, *(_L,) * 4, _I, _I, _I),
        "ttaq_cpu_packed_conv2d_floats": (*(_P,) * 6, _I, _I, _P, _I, _I),
        "ttaq_cpu_packed_conv2d_backward": (*(_P,) * 5, _I, _I, _P, _I, _I),
    },
    "cuda": {
        "ttaq_cuda_status": (),
        "ttaq_cuda_pack_codes": (_P, _P, _L, _L, _I, _P),
        "ttaq_cuda_unpack_codes": (_P, _P, _L, _L, _I, _P),
        "ttaq_cuda_skinny_linear": (_P, _L, *(_P,) * 6, _I, _P, _I, _I, _I, *(_L,) * 4, _P),
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
def product_level() -> str | None:
    """Return the instruction set of the products of codes, or None without the library: "v4" only with VNNI."""
    cpu = library("cpu")
    return None if cpu is None else LEVELS[cpu.ttaq_cpu_product_level()]


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


def threads() -> int:
    """Return torch's number of threads, or 1 in a child of the process that imported torch: a fork ends its pool."""
    return torch.get_num_threads() if os.getpid() == _IMPORTED_BY else 1


def level_number(level: str | None) -> int:
    """Return the number of an instruction set by its name, of the highest one by None."""
    if level is None:
        level = cpu_level()
    elif level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    return LEVELS.index(level)


def check(code: int) -> None:
    """Raise what a code of csrc/ttaq_native.h says."""
    if code:
        raise RuntimeError(f"ttaq native call failed: {_ERRORS.get(code, f'CUDA error {code}')}")
