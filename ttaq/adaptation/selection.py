"""Methods that learn from chosen images alone: ETA, EATA and DeYO.

Weights and masks are one an image, and so are the terms of `loss=`, with which they multiply: ABL and DOT take the
place of the entropy that is minimised, never of the one that selects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batches import collect
from .destruction import Transform, choose_transform
from .gradient import GradientMethod
from .guard import finite
from .losses import entropy
from .method import Forward
from .statistics import aside, discard


class ETA(GradientMethod):
    """Minimise the entropy of images that are reliable and unlike what was seen, the surer the more.

    ``L = mean_b exp(E0 - H_b) H_b`` over the images with ``H_b < E0`` and ``cos(p_b, m) < d``; H the entropy,
    ``p = softmax(z)``, ``E0 = margin ln C``. ``m <- 0.9 m + 0.1 mean_b p_b`` over the same images; the first batch
    that holds a reliable one is chosen by its entropy alone. Published settings: SGD, momentum 0.9, 5e-3 at batch
    64 (CIFAR-10-C), 2.5e-4 (ImageNet-C).
    Source: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, arXiv:2204.02610, section 3.1.

    Args:
        model: See `GradientMethod`, as is `forward`.
        forward: Returns logits.
        margin: E0 as a share of ln C, the largest entropy there can be.
        d: Cosine from which an image says nothing new. The paper gives 0.4 for 10 classes and 0.05 for 1,000; None
            runs through both in proportion to a power of C, ``0.4 (10 / C)^0.4515``: 0.83 for 2, 0.14 for 100. A
            sure prediction has a cosine of ``C^-0.5`` to balanced classes, and d stays above it.
        options: Those of `GradientMethod`.
    """

    remembers = ("mean",)
    mean: Tensor | None = None

    def __init__(
        self, model: nn.Module, forward: Forward, *, margin: float = 0.4, d: float | None = None, **options: Any
    ) -> None:
        self.margin, self.d = margin, d
        super().__init__(model, forward, **options)

    def loss(self, x: Tensor, logits: Tensor) -> Tensor | None:
        """Return the weighted mean over the images that are selected."""
        return selected_mean(self.balance.terms(logits), self.weigh(logits))

    @torch.no_grad()
    def weigh(self, logits: Tensor) -> Tensor:
        """Return the weight of each image, (batch,), 0 where it is not selected; average the others into m."""
        p, unsure, bound = logits.float().softmax(-1), entropy(logits), self.margin * math.log(logits.shape[1])
        selected = unsure < bound
        if self.mean is not None:
            self.mean = self.mean.to(p.device)
            d = redundancy(logits.shape[1]) if self.d is None else self.d
            selected &= F.cosine_similarity(p, self.mean, dim=-1) < d
        if selected.any():
            new = p[selected].mean(0)
            self.mean = new if self.mean is None else 0.9 * self.mean + 0.1 * new
        return selected * (bound - unsure).exp()


class EATA(ETA):
    """Hold ETA near the source, where the source's own predictions depend on a parameter the most.

    ``L = L_ETA + beta sum_i F_i (theta_i - theta_i of the source)^2``; ``F_i`` is the mean over the batches of
    `anchor` of the squared gradient of their mean cross-entropy to the model's own predictions, under the
    statistics of each batch, taken once. The paper averages over single images: give batches of one for that, with
    a smaller beta.
    Source: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, arXiv:2204.02610, section 3.2.

    Args:
        model: See `GradientMethod`, as is `forward`.
        forward: Returns logits.
        anchor: Batches of source images, (batch, ...) or (images, labels), whose labels are not looked at; 2,000
            images in the paper. Read once.
        anchor_weight: beta; the paper gives 1 for CIFAR-10 and 2,000 for ImageNet; None takes 1 up to 100 classes
            and 2,000 beyond.
        options: Those of `ETA` and of `GradientMethod`.

    Raises:
        ValueError: There is no anchor, or it holds no image or values that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        anchor: Iterable | None = None,
        anchor_weight: float | None = None,
        **options: Any,
    ) -> None:
        if anchor is None:
            raise ValueError(
                "adapt: anchor must be batches of source images, got None; pass anchor=... or use "
                'method="eta", which is EATA without it'
            )
        super().__init__(model, forward, **options)
        self.anchor_weight = anchor_weight
        self._source = [p.detach().clone() for p in self.parameters.values()]
        self._fisher = self._measure(anchor)

    @classmethod
    def needs_anchor(cls, model: nn.Module) -> bool:
        """Tell that it does, on every model."""
        return True

    def loss(self, x: Tensor, logits: Tensor) -> Tensor | None:
        """Return the loss of ETA and the pull of the source; None where no image is selected."""
        loss = super().loss(x, logits)
        if loss is None:
            return None
        published = 1.0 if logits.shape[1] <= 100 else 2000.0
        return loss + (published if self.anchor_weight is None else self.anchor_weight) * self.drift()

    def drift(self) -> Tensor:
        """Return ``sum_i F_i (theta_i - theta_i of the source)^2``, (), float32."""
        pairs = zip(self.parameters.values(), self._source, self._fisher, strict=True)
        return sum((f.to(p.device) * (p.float() - s.to(p.device).float()).square()).sum() for p, s, f in pairs)

    def _measure(self, anchor: Iterable) -> list[Tensor]:
        parameters = list(self.parameters.values())
        sums, count = [torch.zeros_like(p, dtype=torch.float32) for p in parameters], 0
        for batch in [anchor] if isinstance(anchor, Tensor) else anchor:
            (x,) = collect("adapt", [batch], parameters[0].device)
            with torch.enable_grad():
                logits = self.predict(x.clone() if x.is_inference() else x)
                loss = F.cross_entropy(logits.float(), logits.detach().argmax(-1))
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                total += 0 if gradient is None else gradient.float().square()
            count += 1
        discard(self.norms.values())
        if not count or not finite(sums):
            what = "gradients with NaN or Inf" if count else "no batch"
            raise ValueError(f"adapt: anchor must give finite gradients, got {what}; pass clean source images")
        return [total / count for total in sums]


class DeYO(GradientMethod):
    """Minimise the entropy of images whose prediction is sure and hangs on the shape of the object.

    ``L = mean_b w_b H_b`` over the images with ``H < margin ln C`` and ``PLPD > plpd``, where
    ``w = exp(weight_margin ln C - H) + exp(PLPD)`` and PLPD is how far the probability of the predicted class
    falls when the object is destroyed. The changed images go through the network as a batch, with its statistics.
    Published settings: SGD, momentum 0.9, batch 64, 2.5e-4 (ResNet), 1e-3 (ViT).
    Source: Lee et al., Entropy is not Enough for Test-Time Adaptation, arXiv:2403.07366, section 4.

    Args:
        model: See `GradientMethod`, as is `forward`.
        forward: Returns logits.
        margin: Largest entropy as a share of ln C.
        weight_margin: Entropy of weight 1 as a share of ln C.
        plpd: Smallest fall; 0.3 is published too.
        transform: "patch" (4 x 4 patches in another order), "pixel", "occ" (the middle covered), or a function
            ``(x, generator) -> x``, see `destruction`.
        seed: Of what the transform draws; how often it has drawn is part of the state.
        options: Those of `GradientMethod`.
    """

    remembers = ("draws",)
    draws = 0

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        margin: float = 0.5,
        weight_margin: float = 0.4,
        plpd: float = 0.2,
        transform: str | Transform = "patch",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.margin, self.weight_margin, self.plpd, self.seed = margin, weight_margin, plpd, seed
        self.transform = choose_transform(transform)
        super().__init__(model, forward, **options)

    def loss(self, x: Tensor, logits: Tensor) -> Tensor | None:
        """Return the weighted mean over the images that are selected."""
        unsure, most = entropy(logits.detach()), math.log(logits.shape[1])
        selected = unsure < self.margin * most
        if not selected.any():
            return None
        fall = self.fall(x, logits)
        weight = (self.weight_margin * most - unsure).exp() + fall.exp()
        return selected_mean(self.balance.terms(logits), weight * (selected & (fall > self.plpd)))

    @torch.no_grad()
    def fall(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return PLPD, (batch,): the predicted probabilities, less those that are left without the object."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)
        self.draws += 1
        with aside(self.norms.values()):
            without = self.predict(self.transform(x, generator))
        predicted = logits.argmax(-1, keepdim=True)
        before, after = (z.float().softmax(-1).gather(-1, predicted)[:, 0] for z in (logits, without))
        return before - after


def selected_mean(terms: Tensor, weights: Tensor) -> Tensor | None:
    """Return ``sum_b w_b t_b / count(w > 0)``, (), of two (batch,); None where no weight is above 0."""
    count = (weights > 0).sum()
    return (terms * weights).sum() / count if count else None


def redundancy(classes: int) -> float:
    """Return the cosine from which ETA skips an image: the power of C through 0.4 at 10 and 0.05 at 1,000."""
    return min(1.0, 0.4 * (10 / classes) ** (math.log10(8) / 2))
