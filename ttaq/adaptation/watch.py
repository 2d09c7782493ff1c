"""What predictions say of a stream and of a method: batches that speak for few classes, and models that collapse.

Neither looks at labels. Both are part of the guard: what they do is written into the history.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .statistics import AdaptiveBatchNorm

_STALE = 2000  # images over which the frequency of the predicted classes is averaged
_CALM, _ALARM = 0.75, 0.5  # effective classes, as a share of those of the unadapted parameters: collapse twice, at once
_ENOUGH, _OFTEN = 16, 4  # images that a judgement needs; batches between looks at fewer


class Correlation:
    """Measure how much less a batch says of its domain than as many independent images would.

    Predicted classes of the latest `window` images are counted, ``k_c``, and compared with their long-run frequency
    ``pi_c``: ``phi = sum_c (k_c - n pi_c)^2 / (n pi_c + 1/2) / (C - 1)``, which is 1 on average for independent images,
    and moves into an average. A batch of n images then counts as ``n / max(1, phi)``, and, where phi passes `chance` or
    there are fewer than `few` images, BatchNorm layers on batch statistics get the share ``count / (count + prior)`` of
    the batch and an average of those before it. Published methods leave the choice to the user, and lose most of what
    they gain on correlated streams (Yuan et al., RoTTA, arXiv:2303.13899, section 3.2).

    A domain in which the model prefers some classes raises phi, too. Whether neighbours share their classes is told by
    `local` therefore: the same measure of how much both halves of a batch differ from their sum.

    Args:
        norms: Of the model.
        window: Images whose predictions are counted, at least the batch.
        prior: Images that the average counts for.
        momentum: Share of a batch of 64 images or more in phi.
        few: Images below which a batch is never trusted alone.
        chance: Value of phi from which a batch is not trusted alone.
        apart: Value of `local` from which neighbours share their classes.
    """

    def __init__(
        self, norms: Iterable[AdaptiveBatchNorm], *, window: int = 64, prior: float = 64, momentum: float = 0.3,
        few: int = 8, chance: float = 3.0, apart: float = 2.0,
    ) -> None:  # fmt: skip
        self.norms = [norm for norm in norms if norm.statistics == "batch"]
        self.window, self.prior, self.momentum = window, prior, momentum
        self.few, self.chance, self.apart = few, chance, apart
        self.reset()

    @property
    def evident(self) -> bool:
        """Whether classes vary so much more than by chance that neighbours share them, or domains prefer some."""
        return self.phi > self.chance

    @property
    def shared(self) -> bool:
        """Whether they do so from one neighbour to the next."""
        return self.evident and self.local > self.apart

    def share(self, images: int) -> float | None:
        """Return the share that a batch may have in the statistics, None for all of them."""
        if images >= self.few and not self.evident:
            return None
        count = images / max(1.0, self.phi)
        return count / (count + self.prior)

    def peek(self, images: int) -> float | None:
        """Tell the norms about the share of a batch that comes, and return it."""
        share = self.share(images) if self.norms and images else None
        for norm in self.norms:
            norm.cap = share
        return share

    def prepare(self, images: int) -> str | None:
        """Do so, and return in words what changed, or None."""
        share = self.peek(images)
        before, self.capped = self.capped, share is not None
        if before == self.capped:
            return None
        if share is None:
            return "BatchNorm uses the statistics of each batch again"
        why = f"{images} images" if images < self.few else f"classes vary {self.phi:.1f} times as much as by chance"
        return f"BatchNorm averages the statistics of batches ({why})"

    def observe(self, logits: Tensor) -> None:
        """Count the predictions of a batch, logits (n, C) on the CPU, n at least 1."""
        images, classes = logits.shape
        self.recent.append(logits.argmax(1).tolist())
        while sum(map(len, self.recent)) - len(self.recent[0]) >= self.window:
            self.recent.popleft()
        seen = torch.tensor([label for labels in self.recent for label in labels])
        usual = torch.tensor(self.frequency or [1 / classes] * classes, dtype=torch.float64)
        expected = len(seen) * usual
        counts = torch.bincount(seen, minlength=classes)
        spread = (counts - expected).square() / (expected + 0.5)
        rate = self.momentum * min(1.0, images / 64)
        self.phi += (spread.sum().item() / max(1, classes - 1) - self.phi) * rate
        self.local += (_apart(seen, counts) - self.local) * rate
        now = torch.bincount(seen[-images:], minlength=classes) / images
        usual = torch.lerp(usual, now.double(), min(1.0, images / _STALE)).clamp(min=0.2 / classes)
        self.frequency = (usual / usual.sum()).tolist()

    def reset(self) -> None:
        """Forget the stream."""
        self.phi, self.local, self.capped = 1.0, 1.0, False
        self.frequency: list[float] = []
        self.recent: deque[list[int]] = deque()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of what is remembered."""
        remembered = {"frequency": list(self.frequency), "recent": [list(labels) for labels in self.recent]}
        return {"phi": self.phi, "local": self.local, "capped": self.capped, **remembered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.phi, self.local, self.capped = state["phi"], state["local"], state["capped"]
        self.frequency, self.recent = list(state["frequency"]), deque(list(labels) for labels in state["recent"])


def _apart(labels: Tensor, counts: Tensor) -> float:
    """Return how much the first half of labels (n,) differs from all, whose counts are (C,): about 1 by chance."""
    half = labels[: len(labels) // 2]
    share = counts * (len(half) / len(labels))
    spread = (torch.bincount(half, minlength=len(counts)) - share).square() / (share + 0.5)
    return 2 * spread.sum().item() / max(1, (counts > 0).sum().item() - 1)


_REMEMBERED = ("batches", "looks", "average", "low", "restored", "flips", "images", "sums")


class Collapse:
    """Tell when a method makes a model predict fewer classes than its parameters did before they adapted.

    ``classes(p) = exp(H(mean_b p_b))`` is the effective number of classes that a batch is taken for. Every `every`
    batches, and at once where it falls below half of its own slow average, the batch is predicted a second time with
    the unadapted parameters and the statistics of now, so that a batch of few classes is no false alarm; the share of
    predictions that changed is told beside it. Small batches are looked at more often and judged together. Below
    `_CALM` of the classes twice in a row, or below `_ALARM` once, the parameters go halfway back, and where that was
    done among the latest `patience` judgements, all the way.

    Args:
        every: Batches between two looks.
        patience: Looks.
    """

    def __init__(self, *, every: int = 20, patience: int = 5) -> None:
        self.every, self.patience = every, patience
        self.reset()

    def due(self, logits: Tensor) -> bool:
        """Tell whether to look at a batch, from its logits (n, C) on the CPU, as for `judge`."""
        now = classes_of(logits)
        self.batches += 1
        sinks = self.batches > self.every and now < 0.5 * self.average
        rate = max(0.05, 1 / self.batches)
        self.average += rate * (now - self.average)
        return sinks or self.batches % (self.every if len(logits) >= _ENOUGH else min(_OFTEN, self.every)) == 0

    def judge(self, logits: Tensor, reference: Tensor) -> tuple[str, str]:
        """Compare the logits of a batch with those of the unadapted parameters.

        Returns:
            "", "half" or "full" as what to restore, and the finding in words.
        """
        sums = [part.float().softmax(1).sum(0).double() for part in (logits, reference)]
        seen = [torch.tensor(part) + more for part, more in zip(self.sums, sums, strict=True)]
        self.flips += (logits.argmax(1) != reference.argmax(1)).sum().item()
        self.images += len(logits)
        if self.images < _ENOUGH:
            self.sums = [part.tolist() for part in seen]
            return "", ""
        now, then = (_effective(part / self.images) for part in seen)
        flips = self.flips / self.images
        self.sums, self.flips, self.images = [0.0, 0.0], 0, 0
        self.looks += 1
        low = now < _CALM * then
        verdict = ""
        if now < _ALARM * then or (low and self.low):
            recent = self.restored is not None and self.looks - self.restored <= self.patience
            verdict = "full" if recent else "half"
            self.restored, low = self.looks, False
        self.low = low
        return verdict, f"{now:.1f} classes instead of {then:.1f}, {flips:.0%} of the predictions changed"

    def reset(self) -> None:
        """Forget the stream."""
        self.batches = self.looks = self.flips = self.images = 0
        self.sums: list[Any] = [0.0, 0.0]  # of the predictions that wait for a judgement, and of their references
        self.average, self.low = 0.0, False
        self.restored: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {name: copy.copy(getattr(self, name)) for name in _REMEMBERED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for name in _REMEMBERED:
            setattr(self, name, copy.copy(state[name]))


def classes_of(logits: Tensor) -> float:
    """Return the effective number of classes of a batch, 1 to C: exp of the entropy of its mean prediction."""
    return _effective(logits.float().softmax(1).mean(0))


def _effective(mean: Tensor) -> float:
    return math.exp(-torch.special.xlogy(mean, mean).sum().item())
