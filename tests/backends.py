"""Run an op on one backend, and compare bit for bit."""

from collections.abc import Iterator

import pytest
import torch
from cases import cases

from ttaq import dispatch
from ttaq.declarations import RAW

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parameters(*ops: str) -> list:
    """List (backend, case) for every implementation but the reference, as parameters of a test.

    The Triton kernels run compiled on a GPU where there is one, else in the interpreter.
    """
    return [
        pytest.param(chosen.name, case, id=f"{op}-{chosen.name}-{case.name}", marks=_marks(chosen.name))
        for op in ops
        for chosen in dispatch.OPS[op].implementations
        if chosen.name != "reference"
        for case in cases(op)
    ]


def _marks(backend):
    needs_gpu = backend in ("cuda", "dequantised") or (backend == "triton" and torch.cuda.is_available())
    return [pytest.mark.gpu] if needs_gpu else []


def device(backend: str) -> str:
    """Name the device that `backend` computes on in this test run."""
    return "cuda" if backend in ("cuda", "dequantised", "triton") and torch.cuda.is_available() else "cpu"


def run(op: str, backend: str, args: tuple):
    """Run `op` on `backend`; skip the test with its sentence where the backend refuses."""
    with dispatch.backend(backend):
        reason = dict(dispatch.OPS[op].explain(*args))[backend]
        if reason is not None:
            pytest.skip(f"{op}: {backend} refuses: {reason}")
        return getattr(RAW, op)(*args)


def everywhere(op: str, *args) -> Iterator[tuple[str, object]]:
    """Yield (backend, output) for every implementation of `op` that does not refuse."""
    for implementation in dispatch.OPS[op].implementations:
        with dispatch.backend(implementation.name):
            serves = implementation.refuses(*args) is None
            output = getattr(RAW, op)(*args) if serves else None
        if serves:
            yield implementation.name, output


def assert_same(got: torch.Tensor, wanted: torch.Tensor):
    """Check dtype, shape, strides and every bit; any NaN equals any other."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert got.stride() == wanted.stride()
    word = WORDS[got.element_size()]
    different = got.contiguous().view(word) != wanted.contiguous().view(word)
    if got.is_floating_point():
        different &= ~(got.isnan() & wanted.isnan())
    at = different.nonzero()[:5].tolist()
    assert not at, (
        f"{int(different.sum())} of {got.numel()} differ, first at {at}: {[(got[*i], wanted[*i]) for i in at]}"
    )


def assert_as_good(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | None = None):
    """Bound the error against float64 by twice that of plain float32 torch, plus one ulp.

    Args:
        got: What a backend computed.
        plain: What the reference computed in float32.
        exact: The same in float64.
        terms: For sums: the sum of the magnitudes of what each adds up, because terms cancel; every sum is then held to
            its own bound. Without, the largest errors are compared, and the ulp is that of the largest value.
    """
    assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
    finite = exact.isfinite() & plain.isfinite()
    torch.testing.assert_close(got[~finite], plain[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    errors = [(y.double() - exact)[finite].abs() for y in (got, plain)]
    if terms is None:
        terms, errors = exact[finite].abs().max(), [e.max() for e in errors]
    else:
        terms = terms[finite]
    bound = 2 * errors[1] + terms * torch.finfo(torch.float32).eps
    assert (errors[0] <= bound).all(), f"errors {errors[0]} exceed {bound}"
