"""Keep what adapts sound: look before a step and after it, and go back when it went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .normalisation import Normalisation, Record
from .statistics import AdaptiveBatchNorm, discard
from .watch import Collapse, Correlation


class Adapting(Protocol):
    """What a guard asks of a method."""

    optimizer: Optimizer | None
    forward: Callable[[nn.Module, Tensor], Tensor]
    correlated: bool

    def evidence(self, logits: Tensor) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]: ...


class Skip(Exception):
    """Stop an update; the message says why, as the history will. The Adapter restores what was before the batch."""


class Settled(Skip):
    """End an update without a step, all that adapts being as the method wants it: nothing is restored."""


class Guard:
    """Check tensors for NaN and Inf, hold a copy of the last good state, and watch what predictions say (`watch`).

    Packed layers code their input, and a code has no NaN: they count non-finite activations in a buffer called
    `nonfinite`, which the guard reads and sets back. All tensors of one check cost one transfer to the host.

    Args:
        model: The network whose `nonfinite` counters are read.
        method: What adapts: its `tensors()` and its `optimizer` are copied.
        active: False checks nothing and restores nothing.
        watches: Whether predictions are watched, too, and the normalisation of the first batch is.
        inputs: What calibration found the model's images to be, see `Normalisation`.
    """

    def __init__(
        self, model: nn.Module, method: Adapting, active: bool = True, watches: bool = True,
        inputs: Record | None = None,
    ) -> None:  # fmt: skip
        self.active, self.watches = active, active and watches
        self._model, self._method = model, method
        self._counting = [m for m in model.modules() if isinstance(getattr(m, "nonfinite", None), Tensor)]
        self._snapshot = Snapshot(method)
        self.correlation = Correlation(m for m in model.modules() if isinstance(m, AdaptiveBatchNorm))
        self.collapse = Collapse()
        self.normalisation = Normalisation(model, inputs)

    def check(self, **groups: Iterable[Tensor | None]) -> None:
        """Raise `Skip` where a tensor of a group, or a counter of the model, says NaN or Inf.

        Args:
            groups: Tensors under the name that the reason will use; None, empty and integer tensors pass.

        Raises:
            Skip: With the names of the groups that are not finite.
        """
        if not self.active:
            return
        flags = {name: flag for name, tensors in groups.items() if (flag := finite(tensors)) is not None}
        if self._counting:
            flags["activations of quantised layers"] = self._take_counters() == 0
        if flags:
            verdicts = torch.stack(list(flags.values())).tolist()
            bad = [name.replace("_", " ") for name, good in zip(flags, verdicts, strict=True) if not good]
            if bad:
                raise Skip(f"NaN or Inf in {', '.join(bad)}")

    def begin(self) -> None:
        """Set the counters back and copy the present state, which is good."""
        if self.active:
            if self._counting:
                torch._foreach_zero_([module.nonfinite for module in self._counting])
            self._snapshot.save()

    def peek(self, images: int) -> None:
        """Make ready for a batch of so many images that is only predicted."""
        if self.watches:
            self._method.correlated = self.correlation.shared
            self.correlation.peek(images)

    def prepare(self, images: int) -> str | None:
        """Make ready for a batch of so many images; return in words what changed for it, or None."""
        if not self.watches or not images:
            return None
        self._method.correlated = self.correlation.shared
        return self.correlation.prepare(images)

    def looking(self) -> AbstractContextManager[None]:
        """Look inside at how the images of the first batch are normalised."""
        return self.normalisation.looking() if self.watches else nullcontext()

    def compare(self) -> list[str]:
        """Return in words, and warn, where a first batch that is sound is normalised otherwise than calibration was."""
        return self.normalisation.report() if self.watches else []

    def observe(self, x: Tensor, logits: Tensor, first: dict[str, Tensor]) -> list[str]:
        """Watch the predictions of a batch, and put parameters back where the model collapses.

        Args:
            x: The batch.
            logits: What was predicted for it before the step, detached.
            first: The method's tensors as they were when it was made.

        Returns:
            What was found and done, in words.
        """
        if not self.watches:
            return []
        seen = self._method.evidence(logits).float().cpu()  # once: all that looks at predictions does so on the host
        self.correlation.observe(seen)
        live = {n: t for n, t in self._method.tensors().items() if t.is_floating_point() and not _is_moment(n)}
        if not live or not self.collapse.due(seen):
            return []
        verdict, finding = self.collapse.judge(seen, self._reference(x, live, first))
        if verdict:
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.lerp_(first[name], 0.5 if verdict == "half" else 1.0)
        if verdict == "half" and self._method.optimizer:
            self._method.optimizer.state.clear()
        if verdict == "full":
            self._method.reset()
        done = {"half": "halfway back to the source", "full": "back to the source"}
        return [f"collapse: {finding}; {done[verdict]}"] if verdict else []

    def _reference(self, x: Tensor, live: dict[str, Tensor], first: dict[str, Tensor]) -> Tensor:
        """Predict a batch as before adaptation, under the statistics of now; what is live stays, come what may."""
        with torch.no_grad():
            held = [tensor.detach().clone() for tensor in live.values()]
            copy_all(list(live.values()), [first[name] for name in live])
            try:
                return self._method.forward(self._model, x).float().cpu()
            finally:
                copy_all(list(live.values()), held)
                discard(self.correlation.norms)

    def reset(self) -> None:
        """Forget the stream."""
        self.correlation.reset()
        self.collapse.reset()
        self.normalisation.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered of the stream."""
        parts = {"correlation": self.correlation, "collapse": self.collapse}
        return {name: part.state_dict() for name, part in parts.items()} | {"looked": self.normalisation.looked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.correlation.load_state_dict(state["correlation"])
        self.collapse.load_state_dict(state["collapse"])
        self.normalisation.looked = state["looked"]

    def restore(self) -> None:
        """Write the copied state back."""
        if self.active:
            self._snapshot.restore()

    def _take_counters(self) -> Tensor:
        counters = [module.nonfinite for module in self._counting]
        total = torch.stack([counter.reshape(()) for counter in counters]).sum()
        torch._foreach_zero_(counters)
        return total


def _is_moment(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def finite(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """Tell without a transfer to the host whether all values are finite.

    Args:
        tensors: Any shapes on one device; None, empty and integer tensors are passed over.

    Returns:
        (), bool; None where there was nothing to look at.
    """
    floats = [t.detach() for t in tensors if t is not None and t.is_floating_point() and t.numel()]
    if not floats:
        return None
    extremes = torch.aminmax(floats[0] if len(floats) == 1 else torch.cat([t.flatten() for t in floats]))
    return torch.isfinite(extremes.min) & torch.isfinite(extremes.max)


class Snapshot:
    """Hold a copy of tensors and of an optimizer's state in memory that is used again.

    Args:
        method: Its `tensors()` are always as many; the state of its `optimizer` may appear and grow between copies.
    """

    def __init__(self, method: Adapting) -> None:
        self._method = method
        self._copies: list[Tensor] = []
        self._state: dict[Tensor, dict[str, Any]] = {}

    def save(self) -> None:
        """Copy the present values."""
        optimizer = self._method.optimizer
        live = list(self._method.tensors().values())
        state = {p: dict(values) for p, values in optimizer.state.items()} if optimizer else {}
        live += [v for values in state.values() for v in values.values() if isinstance(v, Tensor)]
        if [(t.shape, t.dtype, t.device) for t in live] != [(t.shape, t.dtype, t.device) for t in self._copies]:
            self._copies = [t.detach().clone() for t in live]
        else:
            copy_all(self._copies, live)
        self._state = state

    def restore(self) -> None:
        """Write the copied values back, and drop optimizer state that was not there."""
        optimizer = self._method.optimizer
        live = list(self._method.tensors().values())
        live += [v for values in self._state.values() for v in values.values() if isinstance(v, Tensor)]
        copy_all(live, self._copies)
        if optimizer:
            optimizer.state.clear()
            optimizer.state.update({p: dict(values) for p, values in self._state.items()})


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors one to one, in one launch a device."""
    with torch.no_grad():
        for device in {t.device for t in targets}:
            pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.device == device]
            torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])
