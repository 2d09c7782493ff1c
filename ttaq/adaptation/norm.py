"""The two methods that need no gradient: the model as it is, and BatchNorm with statistics of the test data."""

from __future__ import annotations

from torch import Tensor, nn

from .guard import Guard
from .method import Forward, Method
from .statistics import adapt_statistics, commit, discard, pending, running


class Source(Method):
    """Predict with the model as it is; the line that every method is measured against."""

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> None:
        """Check the logits; nothing adapts."""
        guard.check(logits=[logits])


class Norm(Method):
    """Normalise with statistics of the test data; one forward pass, no gradient.

    Source: Schneider et al., arXiv:2006.16971 ("batch", and "blend" with N = 16 source images); "blend" with
    alpha and "ema" serve small batches.

    Args:
        model: See `Method`, as is `forward`.
        forward: Returns logits.
        statistics: "batch", "blend" or "ema"; the rest as in `AdaptiveBatchNorm`.
        alpha: Share of the batch under "blend"; None for ``n / (n + prior)``.
        prior: Images that the source counts for.
        momentum: Share of the batch under "ema".

    Raises:
        ValueError: The model has no BatchNorm with running statistics, or statistics is "source".
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        statistics: str = "batch",
        alpha: float | None = None,
        prior: float = 16,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(model, forward)
        if statistics == "source":
            raise ValueError('adapt: norm with statistics="source" adapts nothing; use method="source"')
        self.norms = adapt_statistics(model, statistics, alpha, prior, momentum)
        if not self.norms:
            raise ValueError(
                f"adapt: norm needs BatchNorm layers with running statistics, {type(model).__name__} has none; "
                'use method="tent", which adapts the affine of LayerNorm and GroupNorm too'
            )

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits under the statistics of this batch."""
        discard(self.norms.values())
        return super().predict(x)

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> None:
        """Keep the statistics that `predict` used."""
        guard.check(statistics=pending(self.norms.values()), logits=[logits])
        commit(self.norms.values())

    def tensors(self) -> dict[str, Tensor]:
        """Name the running statistics."""
        return running(self.norms)
