"""Measure one case: ours, its rivals and the ceiling in turn, on the same inputs; a row for each rival."""

from contextlib import nullcontext

import torch

from ttaq import dispatch

from .case import DTYPES, Case
from .rows import Row
from .timing import in_turn, peak_bytes, peak_flops, sets_needed

_OURS, _CEILING = "ours", "ceiling"


def measure(case: Case, device: str, origin: dict[str, str], *, backend: str | None, seconds: float) -> list[Row]:
    """Time one case on `device`.

    Args:
        case: What to time.
        device: "cpu" or "cuda".
        origin: The columns that say where and of what the row is.
        backend: The implementation to force for ours, or None.
        seconds: For each contestant.

    Returns:
        A row for each rival, or one without.

    Raises:
        RuntimeError: A call failed.
    """
    if "torch.compile" in case.rivals:
        torch.compiler.reset()  # else the sizes of earlier cases would make what is compiled general
    generator = torch.Generator(device).manual_seed(20)
    # A stream of our own, since what the ordinary one has run cannot be captured in a graph.
    with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
        sets = [case.make(generator, device) for _ in range(sets_needed(case.bytes, device))]
        wanted, arguments = case.exact(sets[0]), case.raw(sets[0])
        with dispatch.backend(backend):
            running = _running(case.op, backend, arguments)
            binders = {_OURS: case.ours, **case.rivals, _CEILING: case.ceiling}
            calls = {name: [bind(inputs) for inputs in sets] for name, bind in binders.items()}
            error, held = _error(calls[_OURS][0](), wanted), peak_bytes(calls[_OURS][0], device)
            timings = in_turn(calls, device, seconds, case.graph)
    ours, floor = timings.pop(_OURS), timings.pop(_CEILING).p50
    if case.flops:
        floor = max(floor, case.flops / _peak(case, device))
    common = origin | {
        "op": case.op,
        "backend": running,
        "dtype": case.dtype,
        "case": case.name,
        "p20_us": ours.p20 * 1e6,
        "p50_us": ours.p50 * 1e6,
        "p80_us": ours.p80 * 1e6,
        "gbps": case.bytes / ours.p50 * 1e-9,
        "tflops": case.flops / ours.p50 * 1e-12 if case.flops else None,
        "percent_of_roofline": 100 * floor / ours.p50,
        "peak_mib": held / 2**20,
        "max_error": error,
    }
    against = {name: timing.p50 / ours.p50 for name, timing in timings.items()} or {"": None}
    return [Row(**common, rival=name, ratio=ratio) for name, ratio in against.items()]


def _running(op, backend, arguments):
    names = [name for name, refusal in dispatch.OPS[op].explain(*arguments) if refusal is None]
    if backend and backend not in names:
        raise RuntimeError(f"backend {backend!r} cannot run it: {dispatch.explain(op, *arguments)}")
    return backend or names[0]


def _peak(case, device):
    dtypes = (torch.int8, torch.bfloat16) if case.integer else (DTYPES[case.dtype],)
    return max(peak_flops(device, dtype) for dtype in dtypes)


def _error(got, wanted):
    """Return the largest error of any output, as a share of that output's largest magnitude."""
    got = got if isinstance(got, tuple) else (got,)
    errors = []
    for mine, exact in zip(got, wanted, strict=True):
        difference = (mine.double() - exact.double()).abs().max().item()
        errors.append(difference / max(exact.double().abs().max().item(), torch.finfo(torch.float32).tiny))
    return max(errors)
