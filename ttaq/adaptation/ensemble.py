"""ROID: weighted self-training that is drawn back to the source after every step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..augment import distort
from .guard import Guard
from .losses import entropy
from .method import Forward
from .parameters import Parameters
from .statistics import aside
from .views import Augment, ViewMethod, approach, check_share, cross_entropy


class ROID(ViewMethod):
    """Learn from images that are certain and diverse, consistently over views, and stay near the source.

    With p the probabilities of an image, each weight below scaled to 0 to 1 over the batch:

        d = 1 - cos(p, f),  f <- b f + (1 - b) mean_b p       diversity; f starts uniform
        c = -H(p)                                             certainty
        w = exp(d c / tau), and 0 where d < mean d
        L = 1/n sum_b w [slr(p) + sce(p, p')]                 p' of an augmented view
        slr(p) = -sum_c p_c log(p_c / (1 - p_c)),  sce(p, q) = -1/2 sum_c (p_c log q_c + q_c log p_c)
        theta <- m theta + (1 - m) theta_source               after the step
        z + log((r + g) / (1 + g C))                          logits returned; r = mean_b p, g = max(1/n, 1/C) / max r

    p is clipped to `clip` in slr. A batch whose images are all as diverse (one image is) has w = 1: no scaling divides
    by zero. Images whose logits are not finite say nothing of r.
    Source: Marsden et al., Universal Test-Time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
    Correction (ROID), arXiv:2306.00650, section 3.

    Args:
        model: See `GradientMethod`, as are `forward` to `full_batch`.
        forward: Returns logits.
        lr: Learning rate of a full batch.
        optimizer: Called as ``optimizer(parameters, lr=lr)``.
        parameters: What adapts.
        statistics: What BatchNorm normalises with.
        alpha: Share of the batch under "blend".
        prior: Images that the source counts for.
        momentum: Share of the batch under "ema".
        full_batch: Images from which the rate is `lr` in full.
        temperature: tau, above 0.
        source_momentum: m, 0 to 1.
        frequency_momentum: b, 0 to 1.
        clip: Largest probability in slr, above 0 and below 1.
        correct: Whether the logits returned are corrected for the class prior of the batch.
        augment: Called as ``augment(x, generator)``; the default takes images (N, C, H, W).
        seed: Of the views.

    Raises:
        ValueError: No parameter is chosen, or an argument is out of range.
    """

    remembers = ("draws", "frequency")
    frequency: Tensor | None = None

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        lr: float = 1e-3,
        optimizer: Callable[..., Optimizer] = Adam,
        parameters: Parameters = "norm",
        statistics: str = "batch",
        alpha: float | None = None,
        prior: float = 16,
        momentum: float = 0.1,
        full_batch: int = 64,
        temperature: float = 1 / 3,
        source_momentum: float = 0.99,
        frequency_momentum: float = 0.9,
        clip: float = 0.99,
        correct: bool = True,
        augment: Augment = distort,
        seed: int = 0,
    ) -> None:
        check_share("source_momentum", source_momentum, 0.99)
        check_share("frequency_momentum", frequency_momentum, 0.9)
        if not temperature > 0:
            raise ValueError(f"adapt: temperature must be above 0, got {temperature}; use 1 / 3")
        if not 0 < clip < 1:
            raise ValueError(f"adapt: clip must lie above 0 and below 1, got {clip}; use 0.99")
        self.temperature, self.clip, self.correct = temperature, clip, correct
        self.source_momentum, self.frequency_momentum = source_momentum, frequency_momentum
        super().__init__(
            model, forward, augment=augment, seed=seed, lr=lr, optimizer=optimizer, parameters=parameters,
            statistics=statistics, alpha=alpha, prior=prior, momentum=momentum, full_batch=full_batch,
        )  # fmt: skip
        self.source = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def step(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor:
        """Take a step on the weighted losses and draw the parameters back to the source."""
        weight, kept = self.weigh(logits)
        with aside(self.norms.values()):
            other = self.predict(self.view(x[kept]))
        loss = likelihood_ratio(logits[kept], self.clip) + symmetric_cross_entropy(logits[kept], other)
        loss = (weight[kept] * loss).sum() / len(x)
        self._differentiate(loss, guard, **self._passed(logits), logits_of_views=[other])
        self._descend(len(x), guard)
        approach(self.parameters.values(), self.source.values(), 1 - self.source_momentum)
        return loss.detach()

    @torch.no_grad()
    def answer(self, logits: Tensor) -> tuple[Tensor, str]:
        """Return the logits corrected for the class prior of the batch."""
        known = logits[logits.isfinite().all(-1)]
        if not self.correct or not len(known):
            return logits, ""
        prior = known.float().softmax(-1).mean(0)
        smooth = max(1 / len(known), 1 / len(prior)) / prior.max()
        prior = (prior + smooth) / (1 + smooth * len(prior))
        return (logits.float() + prior.log()).to(logits.dtype), "corrected for the class prior of the batch"

    @torch.no_grad()
    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return w and whether it counts, both (batch,), and average the batch into f."""
        p = logits.float().softmax(-1)
        frequency = p.new_full(p.shape[1:], 1 / p.shape[1]) if self.frequency is None else self.frequency.to(p.device)
        diverse = _unit(1 - F.cosine_similarity(p, frequency[None], dim=-1))
        certain = _unit(-entropy(logits))
        self.frequency = torch.lerp(p.mean(0), frequency, self.frequency_momentum)
        return torch.exp(diverse * certain / self.temperature), ~(diverse < diverse.mean())


def likelihood_ratio(logits: Tensor, clip: float = 0.99) -> Tensor:
    """Return ``-sum_c p_c log(p_c / (1 - p_c))`` of each image, with p at most `clip`.

    Source: Mummadi et al., Test-Time Adaptation to Distribution Shift by Confidence Maximization and Input
    Transformation, arXiv:2106.14999, section 3.

    Args:
        logits: (batch, classes), any float dtype.
        clip: Above 0 and below 1; a probability beyond gives no gradient.

    Returns:
        (batch,), float32.
    """
    log_p = logits.float().log_softmax(-1).clamp(max=math.log(clip))
    p = log_p.exp()
    return -(p * (log_p - torch.log1p(-p))).sum(-1)


def symmetric_cross_entropy(logits: Tensor, others: Tensor) -> Tensor:
    """Return half the cross entropy of each image's two predictions in both directions.

    Args:
        logits: (batch, classes); the gradient flows through both.
        others: Alike.

    Returns:
        (batch,), float32.
    """
    p, q = logits.float().softmax(-1), others.float().softmax(-1)
    return (cross_entropy(logits, q) + cross_entropy(others, p)) / 2


def _unit(values: Tensor) -> Tensor:
    """Scale values (batch,) to 0 to 1; equal ones give 0."""
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
