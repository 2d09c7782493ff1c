"""SAR: a step towards flat minima, and the way back from a collapse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .gradient import GradientMethod
from .guard import Guard, Settled
from .losses import entropy
from .method import Forward
from .selection import selected_mean
from .statistics import aside


class SAR(GradientMethod):
    """Minimise the entropy of reliable images where the loss is flat, and start again when the model collapses.

    ``g`` is the gradient of the mean entropy over the images with ``H < E0 = margin ln C``. At
    ``theta + rho g / |g|`` the gradient is taken again, over those of them that are reliable there too, and the
    optimizer steps along it from theta. When the moving average of that second entropy, ``0.9 e + 0.1 H``, falls
    below ``recovery ln C / ln 1000``, parameters and statistics go back to the source, with a new optimizer.
    Two deliberate differences to the public code: the bound scales with the number of classes, as 0.2 nats are
    for 1,000 of them; and the average starts anew after a recovery, where a stale one would ask for the next.

    Published settings: SGD, momentum 0.9, batch 64, 2.5e-4 (ResNet), 1e-3 (ViT), the last part frozen:
    ``parameters=["norm", "!layer4.*"]`` for a ResNet, ``["norm", "!blocks.9.*", "!blocks.10.*", "!blocks.11.*",
    "!norm.*"]`` for a ViT of 12 blocks. Activation scales adapt, but are not perturbed.
    Source: Niu et al., Towards Stable Test-Time Adaptation in Dynamic Wild World, arXiv:2302.12400, section 4.

    Args:
        model: See `GradientMethod`, as is `forward`.
        forward: Returns logits.
        margin: E0 as a share of ln C.
        rho: Length of the step up.
        recovery: Nats for 1,000 classes; 0 never recovers.
        options: Those of `GradientMethod`.
    """

    remembers = ("average",)
    average: float | None = None

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        margin: float = 0.4,
        rho: float = 0.05,
        recovery: float = 0.2,
        **options: Any,
    ) -> None:
        self.margin, self.rho, self.recovery = margin, rho, recovery
        super().__init__(model, forward, **options)
        self._source = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor:
        """Take the steps, then recover where the model has collapsed: `Settled` says so."""
        loss = super().update(x, logits, guard)
        average, bound = self.average, self.recovery * math.log(logits.shape[1]) / math.log(1000)
        if average is None or average >= bound:
            return loss
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(self._source[name])
        self.reset()
        raise Settled(f"collapse: the entropy averaged {average:.3g}, below {bound:.3g}; went back to the source")

    def step(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor | None:
        """Climb, look again, return, and step along the second gradient."""
        reliable = self._reliable(logits)
        loss = selected_mean(self.balance.terms(logits), reliable)
        if loss is None:
            return None
        self._differentiate(loss, guard, **self._passed(logits))
        with self._climbed(), aside(self.norms.values()):
            logits = self.predict(x)
            reliable = reliable * self._reliable(logits)
            loss = selected_mean(self.balance.terms(logits), reliable)
            if loss is None:
                guard.check(logits=[logits])
                return None
            self._differentiate(loss, guard, logits=[logits])
        self._descend(len(x), guard)
        unsure = selected_mean(entropy(logits.detach()), reliable).item()
        self.average = unsure if self.average is None else 0.9 * self.average + 0.1 * unsure
        return loss.detach()

    def _reliable(self, logits: Tensor) -> Tensor:
        return (entropy(logits.detach()) < self.margin * math.log(logits.shape[1])).float()

    @contextmanager
    def _climbed(self) -> Iterator[None]:
        """Hold the parameters `rho` up their gradients, and put them back bit for bit."""
        fixed = {quantizer.scale for quantizer in self._scales}
        moving = [p for p in self.parameters.values() if p.grad is not None and p not in fixed]
        before = [p.detach().clone() for p in moving]
        with torch.no_grad():
            norms = [torch.linalg.vector_norm(p.grad.float()) for p in moving]
            length = self.rho / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-12) if norms else 0.0
        try:
            with torch.no_grad():
                for p in moving:
                    p.add_(p.grad * length)
            self.optimizer.zero_grad()
            yield
        finally:
            with torch.no_grad():
                for p, held in zip(moving, before, strict=True):
                    p.copy_(held)
