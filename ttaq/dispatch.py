"""The one place that picks an implementation: the first that does not refuse runs, and refusals are sentences."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

Refusal = Callable[..., str | None]

_library = torch.library.Library("ttaq", "DEF")
_forced: str | None = os.environ.get("TTAQ_BACKEND") or None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: `refuses(*args)` gives None or one sentence that says why it cannot run here.

    `why` says what puts it before those that follow, where that is not plain.
    """

    name: str
    run: Callable
    refuses: Refusal
    why: str = ""


@dataclass(frozen=True)
class Op:
    """A declared op and its implementations, in the order in which they are tried."""

    name: str
    implementations: tuple[Implementation, ...]

    def run(self, *args):
        """Run the first implementation that does not refuse, or the forced one; autocast does not reach inside."""
        with without_autocast(args[0].device.type):
            return self._run(*args)

    def _run(self, *args):
        if _forced is not None:
            return self._forced_run(*args)
        for implementation in self.implementations:
            if implementation.refuses(*args) is None:
                return implementation.run(*args)
        raise RuntimeError(f"{self.name}: every implementation refuses: {self.explain(*args)}")

    def explain(self, *args) -> list[tuple[str, str | None]]:
        """List (implementation, refusal or None) for these arguments, in the order of trial."""
        return [(i.name, i.refuses(*args)) for i in self.implementations]

    def _forced_run(self, *args):
        for implementation in self.implementations:
            if implementation.name == _forced:
                reason = implementation.refuses(*args)
                if reason is None:
                    return implementation.run(*args)
                raise RuntimeError(f"{self.name}: backend {_forced!r} is forced and refuses: {reason}")
        names = ", ".join(i.name for i in self.implementations)
        raise RuntimeError(f"{self.name}: backend {_forced!r} is forced, this op has {names}; force one of these")


OPS: dict[str, Op] = {}


def declare(schema: str, *implementations: Implementation, fake: Callable) -> Op:
    """Register an op once, for every device, under torch.ops.ttaq.

    Args:
        schema: The op's signature in torch's schema language, without the namespace.
        implementations: Tried in this order; the last one should never refuse.
        fake: Gives the outputs' shapes, dtypes and strides on meta tensors.

    Returns:
        The op, also found under `dispatch.OPS[name]`.
    """
    op = Op(schema.partition("(")[0], implementations)
    _library.define(schema)
    _library.impl(op.name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ttaq::{op.name}", fake, lib=_library)
    OPS[op.name] = op
    return op


def without_autocast(device: str):
    """Give a context in which autocast, under which exact sums would turn to half precision, is off on `device`."""
    on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def never(*args) -> None:
    """Refuse nothing."""


def gpu(refuses: Refusal) -> Refusal:
    """Refuse tensors that are not on a GPU, then ask `refuses`; Triton's interpreter runs on the CPU when forced."""

    def check(x, *args):
        if x.device.type != "cuda" and not (_forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"the input is on {x.device.type}; this implementation needs a CUDA device"
        return refuses(x, *args)

    return check


def cpu(refuses: Refusal) -> Refusal:
    """Refuse tensors that are not on the CPU, then ask `refuses`."""

    def check(x, *args):
        if x.device.type != "cpu":
            return f"the input is on {x.device.type}; this implementation needs the CPU"
        return refuses(x, *args)

    return check


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force one implementation of every op, in the whole process, while the context is open.

    Args:
        name: "triton", "cuda", "dequantised", "cpu", "unpacked" or "reference"; None for the ordinary choice.

    Raises:
        ValueError: No op has an implementation of that name.
    """
    global _forced
    known = {i.name for op in OPS.values() for i in op.implementations}
    if name is not None and name not in known:
        raise ValueError(f"backend: wanted one of {', '.join(sorted(known))}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def explain(op: str, *args) -> str:
    """Say which implementation of `op` runs on these arguments, and why the others do not.

    Args:
        op: The op's name, such as "fake_quant".
        args: The arguments of the raw op.

    Raises:
        ValueError: There is no such op.
    """
    if op not in OPS:
        raise ValueError(f"explain: wanted one of {', '.join(OPS)}, got {op!r}")
    rows = OPS[op].explain(*args)
    running = next((name for name, reason in rows if reason is None and _forced in (None, name)), None)
    why = {i.name: f": {i.why}" for i in OPS[op].implementations if i.why and _forced is None}.get(running, "")
    lines = []
    for name, reason in rows:
        if name == running:
            lines.append(f"{name}: runs")
        elif reason is not None:
            lines.append(f"{name}: refuses, {reason}")
        else:
            before = "forced" if _forced else f"tried before it{why}"
            lines.append(f"{name}: could run, but {running or _forced} is {before}")
    return "\n".join(lines)
