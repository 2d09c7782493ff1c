"""A bounded memory of the stream, balanced over the predicted classes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Entry:
    """One image with its predicted class, its entropy as a share of log C, and the number of images before it."""

    image: Tensor
    label: int
    unsure: float
    born: int


class ClassBalancedMemory:
    """Keep images that are recent and sure, as many of each predicted class as there is room for.

    A class with fewer than ``N / C`` images gets a place, a free one or that of the worst image of the fullest
    classes; a class that has its share replaces its own worst. The worst has the largest
    ``h = lambda_t / (1 + exp(-age / N)) + lambda_u H / log C`` with its age in images; a newcomer (age 0) that is no
    better than the worst is not taken.
    Source: Yuan et al., Robust Test-Time Adaptation in Dynamic Scenarios (RoTTA), arXiv:2303.13899, section 3.3.

    Args:
        capacity: N, the most images held.
        lambda_t: Weight of age.
        lambda_u: Weight of uncertainty.
    """

    def __init__(self, capacity: int, lambda_t: float, lambda_u: float) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"adapt: capacity must be a number of images from 1, got {capacity}; use 64")
        self.capacity, self.lambda_t, self.lambda_u = capacity, lambda_t, lambda_u
        self.entries: list[Entry] = []
        self.seen = 0

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the images held."""
        return sum(entry.image.nbytes for entry in self.entries)

    def copy(self) -> ClassBalancedMemory:
        """Return a memory of its own that holds the same images."""
        twin = ClassBalancedMemory(self.capacity, self.lambda_t, self.lambda_u)
        twin.entries, twin.seen = list(self.entries), self.seen
        return twin

    def add(self, image: Tensor, label: int, entropy: float, classes: int) -> None:
        """Offer an image; a copy is kept if it is taken.

        Args:
            image: (C, H, W), or any shape that is always the same.
            label: Its predicted class.
            entropy: Of its prediction, in nats.
            classes: C.

        Raises:
            ValueError: The shape is not that of the images held.
        """
        if self.entries and image.shape != self.entries[0].image.shape:
            raise ValueError(
                f"adapt: rotta's memory holds images of shape {tuple(self.entries[0].image.shape)}, got "
                f"{tuple(image.shape)}; resize the stream to one size, or call reset()"
            )
        unsure = entropy / math.log(max(classes, 2))
        if self._make_room(label, self._badness(0, unsure), classes):
            self.entries.append(Entry(image.detach().clone(), label, unsure, self.seen))
        self.seen += 1

    def batch(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, (n, ...), and how timely each is.

        ``E = exp(-age / N) / (1 + exp(-age / N))``.

        Args:
            like: Gives device and dtype.

        Returns:
            (n, ...) and (n,), float32.
        """
        ages = torch.tensor([(self.seen - entry.born) / self.capacity for entry in self.entries])
        return torch.stack([entry.image.to(like) for entry in self.entries]), torch.sigmoid(-ages).to(like.device)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of what is held."""
        return {
            "images": [entry.image.clone() for entry in self.entries],
            "labels": [entry.label for entry in self.entries],
            "unsure": [entry.unsure for entry in self.entries],
            "born": [entry.born for entry in self.entries],
            "seen": self.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; refuse more than there is room for."""
        if len(state["images"]) > self.capacity:
            raise ValueError(
                f"adapt: the state remembers {len(state['images'])} images, and capacity is {self.capacity}; "
                "adapt with the capacity that it was saved from"
            )
        columns = zip(state["images"], state["labels"], state["unsure"], state["born"], strict=True)
        self.entries = [Entry(image.clone(), *rest) for image, *rest in columns]
        self.seen = state["seen"]

    def _badness(self, age: int, unsure: float) -> float:
        return self.lambda_t / (1 + math.exp(-age / self.capacity)) + self.lambda_u * unsure

    def _make_room(self, label: int, badness: float, classes: int) -> bool:
        counts = Counter(entry.label for entry in self.entries)
        if counts[label] >= self.capacity / classes:
            crowded = {label}
        elif len(self.entries) < self.capacity:
            return True
        else:
            most = max(counts.values())
            crowded = {name for name, count in counts.items() if count == most}
        rivals = [
            (self._badness(self.seen - entry.born, entry.unsure), place)
            for place, entry in enumerate(self.entries)
            if entry.label in crowded
        ]
        worst, place = max(rivals)
        if worst > badness:
            del self.entries[place]
        return worst > badness
