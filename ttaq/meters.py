"""What an evaluation counts besides errors: calibration, passes through the network, memory."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BINS = 15


class CalibrationError:
    """Gather the expected calibration error over batches, in memory of `bins` numbers.

    ``ECE = sum_k |B_k| / n |acc(B_k) - conf(B_k)|`` over equal bins ``((k - 1) / bins, k / bins]`` of the largest
    probability. Images without a finite confidence, as of NaN logits, are left out.
    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, section 2.

    Args:
        bins: How many; the paper takes 15.
    """

    def __init__(self, bins: int = BINS) -> None:
        self._count, self._hits, self._confidence = (torch.zeros(bins, dtype=torch.float64) for _ in range(3))

    def add(self, logits: Tensor, hits: Tensor) -> None:
        """Take in a batch.

        Args:
            logits: (n, classes), floating, on any device.
            hits: (n,), bool, on the CPU: whether the largest logit is that of the label.
        """
        confidence = logits.detach().float().softmax(-1).amax(-1).cpu().double()
        sure = confidence.isfinite()
        confidence, hits = confidence[sure], hits[sure].double()
        bins = len(self._count)
        place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
        self._count.index_add_(0, place, torch.ones_like(confidence))
        self._hits.index_add_(0, place, hits)
        self._confidence.index_add_(0, place, confidence)

    def join(self, other: "CalibrationError") -> None:
        """Take in what another one gathered."""
        self._count += other._count
        self._hits += other._hits
        self._confidence += other._confidence

    def percent(self) -> float | None:
        """Return the error in percent, None where no image had a confidence."""
        total = self._count.sum()
        return 100 * float((self._hits - self._confidence).abs().sum() / total) if total else None


class Passes:
    """Count the images that go forwards and backwards through a network.

    Attributes:
        forwards: Images over all forward passes: a pass of a batch counts as many as it holds.
        backwards: Images over all backward passes that reach the logits of one of those.
    """

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    @contextmanager
    def counting(self, method) -> Iterator[None]:
        """Count the calls of ``method.forward(model, x)``, through which an adaptation method runs every network."""
        forward = method.forward
        method.forward = self._counted(forward)
        try:
            yield
        finally:
            method.forward = forward

    def _counted(self, forward: Callable) -> Callable:
        def run(model, x):
            logits = forward(model, x)
            self.forwards += len(x)
            if isinstance(logits, Tensor) and logits.requires_grad:
                logits.register_hook(lambda gradient: self._returned(len(x)))
            return logits

        return run

    def _returned(self, images: int) -> None:
        self.backwards += images


class Memory:
    """Measure how much memory a stretch of work takes, from the moment this is made.

    On CUDA the peak of torch's allocator, which is reset at the start: all tensors, the model's too. On the CPU only
    the growth of the largest resident size that the process has had (``ru_maxrss``): 0 where it was larger before.

    Args:
        device: Where the model lies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = _largest_resident()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def allocated(self) -> int | None:
        """Return the peak of the CUDA allocator in bytes, None where the model is not on CUDA."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def growth(self) -> int:
        """Return the growth of the process's largest resident size, in bytes."""
        return _largest_resident() - self._before


def _largest_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
