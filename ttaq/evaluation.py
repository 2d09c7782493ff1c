"""evaluate: what a model, adapting or not, gets wrong on a stream."""

import time
from collections import Counter
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
        class_images: Class to number of images in the whole stream, in the order of their numbers.
        class_wrong: The same classes to the number of those that were errors.
    """

    errors: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    class_images: dict[int, int] = field(default_factory=dict)
    class_wrong: dict[int, int] = field(default_factory=dict)

    @property
    def mean_error(self) -> float:
        """The mean over domains of their errors, in percent."""
        return sum(self.errors.values()) / len(self.errors)

    @property
    def sample_error(self) -> float:
        """The error over all images of the stream, in percent: large domains weigh more."""
        return sum(self.errors[d] * self.images[d] for d in self.errors) / sum(self.images[d] for d in self.errors)

    @property
    def mean_class_error(self) -> float:
        """The mean over the classes that were met of their errors in the whole stream, in percent."""
        return sum(100 * self.class_wrong[c] / n for c, n in self.class_images.items()) / len(self.class_images)


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
        Errors per domain and per class, and seconds; an image with NaN among its logits counts as an error.

    Raises:
        ValueError: The stream is empty, or `reset` is asked of a model that cannot.
    """
    if reset and not hasattr(model, "reset"):
        raise ValueError("evaluate: reset wants an Adapter; wrap the model with ttaq.adapt(model, 'source')")
    images, wrong, class_images, class_wrong = (Counter() for _ in range(4))
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
            missed = batch.labels[guesses != batch.labels].tolist()
            images[batch.domain] += len(guesses)
            wrong[batch.domain] += len(missed)
            class_images.update(batch.labels.tolist())
            class_wrong.update(missed)
            if progress is not None:
                progress(len(guesses))
    if not images:
        raise ValueError("evaluate: the stream is empty; give a source with images")
    errors = {d: 100 * wrong[d] / images[d] for d in images}
    by_class = ({c: counts[c] for c in sorted(class_images)} for counts in (class_images, class_wrong))
    return Result(errors, dict(images), seconds, *by_class)
