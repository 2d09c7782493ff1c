"""What was learned in each domain, kept for its return."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .state import read_state, write_state


class DomainBank:
    """Notice when the domain changes, store what adapted, and take it up again when a domain returns.

    A batch is known by the means and standard deviations of its channels and of their differences between neighbouring
    pixels, its signature: it costs a fraction of a layer, and tells light, contrast, blur and noise. Two of them are
    ``mean_c (|mu_a - mu_b| / sigma_b + |log(sigma_a / sigma_b)|)`` apart. A batch farther from the running signature of
    its domain than `far` times what batches usually are opens another domain: then the tensors that adapted are stored
    with the signature that ends, and the nearest stored domain, if it is near, gives back its own; else what is there
    is kept. Stored domains nearer than that become one, their tensors averaged by batches.
    A bank of adapted parameters as in ZOA, arXiv:2508.02180; detection and merging are our own.

    Args:
        capacity: Domains; the one unused for longest makes room.
        far: Times the usual distance.
        momentum: Share of a batch in running signature and usual distance.
    """

    def __init__(self, capacity: int = 32, *, far: float = 3.0, momentum: float = 0.2) -> None:
        if capacity < 1 or not far > 1 or not 0 < momentum <= 1:
            raise ValueError(
                "DomainBank: capacity must be at least 1, far above 1 and momentum in 0 to 1, got "
                f"{capacity}, {far} and {momentum}; use 32, 3.0 and 0.2"
            )
        self.capacity, self.far, self.momentum = capacity, far, momentum
        self.reset()

    def turn(self, x: Tensor, live: dict[str, Tensor]) -> tuple[bool, str | None]:
        """Look at a batch before it is predicted.

        Args:
            x: (batch, channels, height, width), or (batch, ...) of features.
            live: The tensors that adapt; written to where a domain returns.

        Returns:
            Whether they were written to, and what happened in words, None for nothing.
        """
        now = signature_of(x)
        if not torch.isfinite(now).all():
            return False, None
        if self.signature is None:
            self.signature, self.count = now, 1
            return False, None
        gap = distance(now, self.signature)
        if self.count < 2 or gap <= self.far * self.usual:
            rate = max(self.momentum, 1 / (self.count + 1))
            self.usual = max(self.usual, gap) if self.count == 1 else self.usual + (gap - self.usual) * rate
            self.signature = torch.lerp(self.signature, now, rate)
            self.count += 1
            return False, None
        self._store(live)
        self.signature, self.count = now, 1  # the batch that follows says how far batches of it usually are apart
        return self._recall(now, live)

    def _store(self, live: dict[str, Tensor]) -> None:
        entry = {
            "signature": self.signature.clone(),
            "count": self.count,
            "tensors": {name: tensor.detach().clone() for name, tensor in live.items()},
        }
        near = self._nearest(self.signature)
        if near is not None:
            old = self.entries.pop(near)
            share = old["count"] / (old["count"] + self.count)
            entry["signature"].lerp_(old["signature"], share)
            for name, tensor in entry["tensors"].items():
                if tensor.is_floating_point():
                    tensor.lerp_(old["tensors"][name].to(tensor), share)
            entry["count"] += old["count"]
        self.entries.append(entry)
        del self.entries[: -self.capacity]

    def _recall(self, now: Tensor, live: dict[str, Tensor]) -> tuple[bool, str]:
        near = self._nearest(now)
        if near is None:
            return False, f"domain: one that was not met before; {len(self.entries)} are stored"
        entry = self.entries.pop(near)
        self.entries.append(entry)
        for name, tensor in live.items():
            tensor.copy_(entry["tensors"][name])
        return True, f"domain: one returns of which {entry['count']} batches were met"

    def _nearest(self, signature: Tensor) -> int | None:
        gaps = [distance(signature, entry["signature"]) for entry in self.entries]
        near = min(range(len(gaps)), key=gaps.__getitem__, default=None)
        return near if near is not None and gaps[near] <= self.far * self.usual else None

    def reset(self) -> None:
        """Forget the stream and all domains."""
        self.entries: list[dict[str, Any]] = []
        self.signature: Tensor | None = None
        self.count, self.usual = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the domains and of where the stream is; the capacity is told, not taken up."""
        signature = None if self.signature is None else self.signature.clone()
        entries = [_copy(entry) for entry in self.entries]
        where = {"signature": signature, "count": self.count, "usual": self.usual}
        return {"capacity": self.capacity, "entries": entries, **where}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.entries = [_copy(entry) for entry in state["entries"]]
        self.signature = None if state["signature"] is None else state["signature"].clone()
        self.count, self.usual = state["count"], state["usual"]

    def save(self, path: str | os.PathLike) -> Path:
        """Write the domains to a file, whole or not at all."""
        return write_state(self.state_dict(), path)

    def load(self, path: str | os.PathLike, device: str | torch.device = "cpu") -> None:
        """Take up the domains that `save` wrote, of the same model and method."""
        self.load_state_dict(read_state(path, torch.device(device)))


def signature_of(x: Tensor) -> Tensor:
    """Return means and deviations (2, C') of the channels of a batch, and for images of their differences."""
    x = x.detach().float()
    maps = [x, x.diff(dim=-1), x.diff(dim=-2)] if x.ndim == 4 and min(x.shape[-2:]) > 1 else [x]
    rows = [values.movedim(1, 0).flatten(1) for values in maps]
    moments = [torch.stack([row.mean(1), row.std(1, correction=0).clamp(min=1e-6)]) for row in rows]
    return torch.cat(moments, 1)


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far two signatures (2, C) of means and deviations are apart, in deviations."""
    return ((a[0] - b[0]).abs() / b[1] + (a[1] / b[1]).log().abs()).mean().item()


def _copy(entry: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: tensor.clone() for name, tensor in entry["tensors"].items()}
    return {"signature": entry["signature"].clone(), "count": entry["count"], "tensors": tensors}
