"""Triton where it is installed, an inert stand-in where it is not, so that every kernel file imports anywhere."""

import os
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    jit = triton.jit
except ImportError:
    AVAILABLE = False
    triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << max(n - 1, 0).bit_length())
    tl = SimpleNamespace(constexpr=object)

    def jit(function):
        """Leave the kernel as it is: it is never launched."""
        return function


INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"


def refuses() -> str | None:
    """Say why no Triton kernel can run here, or None."""
    return None if AVAILABLE else "Triton is not installed; pip install triton (Linux, Windows) for the GPU kernels"
