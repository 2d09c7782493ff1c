"""A stream: domains, an order of segments, and the batches that they are cut into."""

from dataclasses import dataclass

import numpy as np
import torch

from ._images import check_batch_size

MIXED = "mixed"


@dataclass(frozen=True)
class Batch:
    """One step of a stream.

    Attributes:
        images: (n, 3, H, W), float32, preprocessed.
        labels: (n,), int64.
        domain: Name of the domain, as "fog"; "mixed" where images of several stand side by side.
        index: (n,), int64, of each image in its source.
        first: Whether this batch opens a domain: the moment to reset an adapter that is to start afresh.
        domains: Name of the domain of each image, n; empty stands for `domain` n times.
        visit: How often the whole sequence of domains was met before, from 0.
    """

    images: torch.Tensor
    labels: torch.Tensor
    domain: str
    index: np.ndarray
    first: bool
    domains: tuple[str, ...] = ()
    visit: int = 0

    def __post_init__(self):
        if not self.domains:
            object.__setattr__(self, "domains", (self.domain,) * len(self.labels))


class Stream:
    """Batches of one segment after another; the same ones each time it is walked through.

    Args:
        domains: Pairs of a name and its `Images`; the same name may stand for several, as for severities.
        order: Segments in the order they are met: (number of the domain, (n,) indices into it), or
            ((n,) numbers, (n,) indices) where domains are mixed.
        batch_size: Images a batch; the last of a segment may be short.
        visits: How often `order` walks through its domains, in parts of as many segments each.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    def __init__(self, domains, order, batch_size, visits=1):
        check_batch_size("Stream", batch_size)
        self.domains, self.order, self.batch_size, self.visits = list(domains), list(order), batch_size, visits

    def __len__(self):
        return sum(-(-len(index) // self.batch_size) for _, index in self.order)

    def __iter__(self):
        return self.part(0, 1)

    def part(self, rank, size):
        """Give every size-th batch from number `rank` on; the others are not read."""
        for number, (visit, first, domain, index) in enumerate(self._cuts()):
            if number % size != rank:
                continue
            if np.ndim(domain):
                name, names, *rest = MIXED, *self._gather(domain, index)
            else:
                name, names, *rest = self.domains[domain][0], (), *_read(self.domains[domain][1], index)
            pixels, labels, origin = rest
            yield Batch(pixels, labels, name, origin, first, names, visit)

    def _cuts(self):
        """Cut the segments: give (visit, whether a domain begins, number or numbers of domains, indices)."""
        before = None
        for place, (number, index) in enumerate(self.order):
            visit = place * self.visits // len(self.order)
            name = MIXED if np.ndim(number) else self.domains[number][0]
            for start in range(0, len(index), self.batch_size):
                part = slice(start, start + self.batch_size)
                yield visit, name != before, number[part] if np.ndim(number) else number, index[part]
                before = name

    def _gather(self, numbers, index):
        """Put images of several domains into one batch, each in its place, and name the domain of each."""
        images = labels = None
        origin = np.empty(len(index), dtype=np.int64)
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            pixels, classes, origin[here] = _read(self.domains[number][1], index[here])
            if images is None:
                images = pixels.new_empty((len(index), *pixels.shape[1:]))
                labels = classes.new_empty(len(index))
            images[here], labels[here] = pixels, classes
        return tuple(self.domains[number][0] for number in numbers), images, labels, origin


def _read(images, index):
    """Return the preprocessed images, labels and origins at `index`."""
    part = images.take(index)
    return part.preprocess(part.pixels()), torch.tensor(part.labels), part.index
