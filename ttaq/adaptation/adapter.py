"""The Adapter: a model that predicts and then learns from what it has just seen."""

from __future__ import annotations

import copy
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bank import DomainBank
from .guard import Guard, Settled, Skip, finite
from .history import Step
from .losses import entropy
from .method import Method
from .normalisation import Record
from .state import FORMAT, check_state, read_state, write_state
from .statistics import restore_statistics
from .telemetry import Telemetry


class Adapter(nn.Module):
    """Predict, then update: ``logits = adapter(x)`` for ever, on a changing stream.

    Made by `ttaq.adapt`. The logits are those before the update. Gradients are switched on inside, so callers may
    sit under no_grad or inference_mode; what comes back carries no graph. Images with NaN or Inf get NaN logits,
    the others of their batch are predicted without them, and no step is taken.

    Args:
        model: The network that adapts, in eval mode, owned by the Adapter.
        method: What adapts it; made on `model`.
        name: The method's name, written into the state.
        flags: Whether each parameter required a gradient in the caller's model; `export` gives that back.
        guard: Whether NaN and Inf skip the step and restore the last good state, correlated and tiny batches get less
            say in the statistics of BatchNorm, and a model that collapses goes back towards the source (`watch`);
            "finite" for the first of these alone.
        history: How many `Step`s are remembered, the latest; they outlive `reset`.
        telemetry: What measures drift, made on `model`.
        bank: What keeps the tensors of domains that were met.
        inputs: What calibration found the images to be, which the guard compares with those of the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        name: str,
        flags: dict[str, bool],
        guard: bool | str = True,
        history: int = 1000,
        telemetry: Telemetry | None = None,
        bank: DomainBank | None = None,
        inputs: Record | None = None,
    ) -> None:
        super().__init__()
        self.model, self.method, self.name = model, method, name
        self.history: deque[Step] = deque(maxlen=history)
        self.images = self.steps = self.skipped = 0
        self.guard = Guard(model, method, bool(guard), guard != "finite", inputs)
        self.telemetry, self.bank = telemetry, bank
        self._flags = flags
        self._frozen = False
        self._first = {key: tensor.detach().clone() for key, tensor in method.tensors().items()}
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch, then adapt to it (inside `frozen`: only predict).

        Args:
            x: (batch, ...), on the model's device; an empty batch gives empty logits and no step.

        Returns:
            (batch, classes), detached.
        """
        return self.predict(x) if self._frozen else self._adapt(x)

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits of a batch and change nothing."""
        with _plain(grad=False):
            x = self._receive(x)
            self.guard.peek(len(x))
            return self.method.answer(self._answer(x)[0])[0]

    def update(self, x: Tensor) -> Step:
        """Adapt to a batch and return what happened, refusing inside `frozen`."""
        if self._frozen:
            raise ValueError("Adapter.update: the adapter is frozen; leave the frozen() block first")
        self._adapt(x)
        return self.history[-1]

    @contextmanager
    def frozen(self) -> Iterator[Adapter]:
        """Make calls predict only, until the block ends."""
        before, self._frozen = self._frozen, True
        try:
            yield self
        finally:
            self._frozen = before

    def train(self, mode: bool = True) -> Adapter:
        """Do nothing: the model inside stays in eval mode, methods choose their statistics themselves."""
        return self

    def reset(self) -> None:
        """Put adapted tensors, optimizer, averages and counters back to the first moment, bit for bit."""
        with _plain(grad=False):
            for name, tensor in self.method.tensors().items():
                tensor.copy_(self._first[name])
            self.method.reset()
        for part in self._parts().values():
            part.reset()
        self.images = self.steps = self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that adapted: tensors, the method's memory and the counters; no weights."""
        with _plain(grad=False):
            return {
                "format": FORMAT,
                "method": self.name,
                "tensors": {name: tensor.detach().clone() for name, tensor in self.method.tensors().items()},
                "memory": self.method.state_dict(),
                "parts": {name: part.state_dict() for name, part in self._parts().items()},
                "counters": {"images": self.images, "steps": self.steps, "skipped": self.skipped},
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit, on an Adapter made with the same model and arguments.

        Raises:
            ValueError: The state is of another format, method or model; nothing was changed.
        """
        live = self.method.tensors()
        check_state(state, self.name, live, self._parts())
        with _plain(grad=False):
            self.method.load_state_dict(state["memory"])
            for name, part in self._parts().items():
                part.load_state_dict(state["parts"][name])
            for name, tensor in live.items():
                tensor.copy_(state["tensors"][name])
        for name, value in state["counters"].items():
            setattr(self, name, value)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the state to a file, whole or not at all: a process that dies while it writes leaves the old one.

        Returns:
            `path`.
        """
        return write_state(self.state_dict(), path)

    def resume(self, path: str | os.PathLike) -> None:
        """Continue from what `save` wrote, bit for bit, on an Adapter made with the same model and arguments.

        Raises:
            ValueError: There is no file, it is no state, or one of another format, method or model.
        """
        self.load_state_dict(read_state(path, self._home(torch.empty(0))))

    def export(self) -> nn.Module:
        """Return the adapted model as a plain one: eval mode, ordinary norm layers, no memory shared."""
        with _plain(grad=False):
            model = copy.deepcopy(self.model)
            restore_statistics(model)
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self._flags[name])
        return model.eval()

    def _adapt(self, x: Tensor) -> Tensor:
        started = time.perf_counter()
        loss = reason = None
        with _plain(grad=self.method.needs_graph):
            x = self._receive(x)
            events = [self._turn(x), self.guard.prepare(len(x))]
            self.guard.begin()
            with self.guard.looking(), nullcontext() if self.telemetry is None else self.telemetry.looking():
                logits, returned, whole = self._answer(x)
            sound = whole
            if not whole:
                reason = "empty batch" if len(x) == 0 else "NaN or Inf in input"
            else:
                try:
                    loss = self.method.update(x, logits, self.guard)
                except BaseException as interruption:
                    sound = isinstance(interruption, Settled)
                    if not sound:
                        self.guard.restore()
                    if not isinstance(interruption, Skip):
                        raise
                    reason = str(interruption)
        logits = logits.detach()
        with _plain(grad=False):
            events += self.guard.compare() if whole else []
            given, how = self.method.answer(logits)
            if sound:
                events += self.guard.observe(x, logits, self._first)
            drift, found = (None, []) if self.telemetry is None or not whole else self.telemetry.report()
        events = tuple(event for event in (*events, *found) if event)
        self._record(started, logits, loss, reason, f"{returned}, {how}" if how else returned, events, drift)
        return given

    def _record(
        self, started: float, logits: Tensor, loss: Tensor | None, reason: str | None, returned: str,
        events: tuple[str, ...], drift: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        with _plain(grad=False):
            unsure = entropy(logits).mean()
            values = torch.stack([unsure, unsure if loss is None else loss.float()]).tolist()
        mean_entropy = values[0] if values[0] == values[0] else None
        batch = self.steps + self.skipped
        spent = time.perf_counter() - started
        shown = None if loss is None else values[1]
        what = (reason is not None, reason, returned, spent, events, drift)
        self.history.append(Step(batch, len(logits), shown, mean_entropy, *what))
        self.images += len(logits)
        self.steps += reason is None
        self.skipped += reason is not None

    def _turn(self, x: Tensor) -> str | None:
        """Let the bank look at a batch, and give back what was learned in a domain that returns."""
        if self.bank is None or not len(x):
            return None
        with torch.no_grad():
            returns, event = self.bank.turn(x, self.method.tensors())
        if returns and self.method.optimizer:
            self.method.optimizer.state.clear()
        return event

    def _parts(self) -> dict[str, Any]:
        """Name what remembers the stream beside the method."""
        parts = {"guard": self.guard, "telemetry": self.telemetry, "bank": self.bank}
        return {name: part for name, part in parts.items() if part is not None}

    def _answer(self, x: Tensor) -> tuple[Tensor, str, bool]:
        """Return logits, what they are in words, and whether all images could be predicted."""
        if len(x) == 0:
            with torch.no_grad():
                return self._logits(x.new_zeros((1, *x.shape[1:])))[:0], "empty logits", False
        verdict = finite([x]) if self.guard.active else None
        if verdict is None or verdict:
            return self._logits(x), "logits", True
        good = torch.isfinite(x.flatten(1)).all(1)
        with torch.no_grad():
            some = self._logits(x[good]) if good.any() else self._logits(torch.zeros_like(x[:1]))[:0]
        logits = some.new_full((len(x), some.shape[1]), float("nan"))
        logits[good] = some
        return logits, f"NaN logits for {len(x) - len(some)} images, the others predicted without them", False

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.method.predict(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"Adapter: the model must return logits of shape (batch, classes), got {got}; "
                "pass forward=lambda model, x: model(x).logits, or what picks them out"
            )
        return logits

    def _receive(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() < 2:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"Adapter: a batch must be a tensor of shape (batch, ...), got {got}; stack the images")
        home = self._home(x)
        if x.device != home:
            raise ValueError(f"Adapter: the batch is on {x.device} and the model on {home}; pass x.to({str(home)!r})")
        return x.clone() if x.is_inference() else x

    def _home(self, other: Tensor) -> torch.device:
        """Return the model's device, that of `other` where the model holds no tensor."""
        return next((t for t in chain(self.model.parameters(), self.model.buffers())), other).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)
        live = self.method.tensors()  # of which the scales of quantisers keep their dtype
        self._first = {name: tensor.to(live[name]) for name, tensor in self._first.items()}
        for parameter, values in self.method.optimizer.state.items() if self.method.optimizer else ():
            for key, value in values.items():
                moves = isinstance(value, Tensor) and (value.dim() or not parameter.dim())
                if moves and key != "step":  # a step counter stays on the host
                    values[key] = value.to(parameter) if value.is_floating_point() else fn(value)
        return self


@contextmanager
def _plain(grad: bool) -> Iterator[None]:
    """Leave inference_mode and switch gradients as wanted: inference_mode(False) alone switches them on."""
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield
