"""evaluate: what a model, adapting or not, gets wrong on a stream."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .surgery import device_of, evaluating


@dataclass(frozen=True)
class Result:
    """What `evaluate` measured.

    Attributes:
        errors: Domain to error in percent of its images, in the order of the stream.
        images: Domain to number of images.
        seconds: Time spent predicting and adapting, the stream's own work left out.
    """

    errors: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def mean_error(self) -> float:
        """The mean over domains of their errors, in percent."""
        return sum(self.errors.values()) / len(self.errors)


def evaluate(
    model: nn.Module,
    stream: Iterable,
    *,
    reset: bool = False,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Result:
    """Predict a stream in its order and count the errors of each domain.

    Args:
        model: A model, run in eval mode, or an Adapter, which goes on adapting while it predicts.
        stream: Of `streams.Batch`: images (B, C, H, W), labels (B,), domain, first.
        reset: Reset the adapter where a domain begins; False lets it carry on (continual adaptation).
        forward: Runs the model on images, when `model(x)` does not give logits.
        progress: Called with the number of images after each batch.

    Returns:
        Errors per domain, and seconds; an image with NaN among its logits counts as an error.

    Raises:
        ValueError: The stream is empty, or `reset` is asked of a model that cannot.
    """
    if reset and not hasattr(model, "reset"):
        raise ValueError("evaluate: reset wants an Adapter; wrap the model with ttaq.adapt(model, 'source')")
    wrong: dict[str, int] = {}
    images: dict[str, int] = {}
    seconds = 0.0
    device = device_of(model)
    with torch.no_grad(), evaluating(model):
        for batch in stream:
            if reset and batch.first:
                model.reset()
            start = time.perf_counter()
            x = batch.images.to(device)
            logits = model(x) if forward is None else forward(model, x)
            guesses = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).cpu()
            seconds += time.perf_counter() - start
            wrong[batch.domain] = wrong.get(batch.domain, 0) + int((guesses != batch.labels).sum())
            images[batch.domain] = images.get(batch.domain, 0) + len(guesses)
            if progress is not None:
                progress(len(guesses))
    if not images:
        raise ValueError("evaluate: the stream is empty; give a source with images")
    return Result({d: 100 * wrong[d] / images[d] for d in images}, images, seconds)
