"""Methods that adapt with forward passes alone: they correct the logits of a batch, or the classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import LINEAR, FeatureMethod
from .guard import Guard
from .losses import entropy
from .method import Forward

_SETTLED = 1e-6  # change of a probability at which LAME stops


class LAME(FeatureMethod):
    """Correct the predictions of a batch so that images with similar features get similar ones; nothing is learned.

    ``minimise sum_i KL(z_i || p_i) - sum_ij w_ij z_i . z_j`` by ``z_i <- softmax(log p_i + sum_j w_ij z_j)`` from
    ``z = p = softmax(logits)``, with ``w_ij = 1`` for the k nearest j of i by the cosine of their features, else 0.
    What comes back is ``log z``. Each batch stands for itself, and a batch of one image stays as it is.

    It expects streams in which neighbours in time share a class. On a stream that is shuffled (i.i.d.) it pulls images
    of different classes together and ruins the predictions. With the guard it therefore corrects only where the classes
    that the model predicts vary evidently more than by chance (`watch.Correlation`); without, every batch.
    Source: Boudiaf et al., Parameter-free Online Test-time Adaptation, arXiv:2201.05718, section 4.

    Args:
        model: See `Method`, as is `forward`.
        forward: Returns logits.
        k: Neighbours of an image.
        iterations: At most so many; fewer when no probability moves by more than 1e-6.
        features: Name of the module whose input the features are; None takes the last linear layer.

    Raises:
        ValueError: An argument is out of range, or there is no such module.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        k: int = 5,
        iterations: int = 100,
        features: str | None = None,
    ) -> None:
        super().__init__(model, forward, features)
        _whole("k", k, 5)
        _whole("iterations", iterations, 100)
        self.k, self.iterations = k, iterations

    def predict(self, x: Tensor) -> Tensor:
        """Return the logarithms of the corrected probabilities, or the logits where no classes are shared."""
        logits, features = self.look(x)
        self._own = logits.detach()
        if not self.correlated:
            return logits
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        nearest = self._nearest(features)
        log_z = log_p
        for _ in range(self.iterations if nearest.numel() else 0):
            before, log_z = log_z, (log_p + log_z.exp()[nearest].sum(1)).log_softmax(-1)
            if (log_z.exp() - before.exp()).abs().max() <= _SETTLED:
                break
        return log_z.to(logits.dtype)

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> None:
        """Check the logits; nothing adapts."""
        guard.check(logits=[logits])

    def answer(self, logits: Tensor) -> tuple[Tensor, str]:
        """Return the logits, which `predict` may have corrected."""
        return logits, "log-probabilities adjusted to neighbours in the batch" if self.correlated else ""

    def evidence(self, logits: Tensor) -> Tensor:
        """Return the logits before the correction, which would make classes look shared."""
        return self._own

    def _nearest(self, features: Tensor) -> Tensor:
        """Return the indices of the neighbours of each image, (batch, min(k, batch - 1))."""
        unit = F.normalize(features.float(), dim=1)
        alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
        return alike.topk(min(self.k, len(alike) - 1)).indices


class T3A(FeatureMethod):
    """Classify by prototypes that the stream fills, in the place of the linear head.

    Each class k keeps a support set S_k of unit features, at first the row of the head's weight. An image joins the set
    of the class that the head predicts; of each set the `filter_k` with the lowest entropy of that prediction stay.
    ``logit_k = f(x) . c_k`` with ``c_k = mean of S_k``; the images of a batch join before they are predicted.
    It holds at most classes * filter_k vectors; `export` gives the model with its own head.
    Source: Iwasawa and Matsuo, Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization,
    NeurIPS 2021, section 3.

    Args:
        model: See `Method`, as is `forward`.
        forward: Returns logits.
        filter_k: Vectors that a class keeps.
        features: Name of the head, a linear layer of any kind; None takes the last one.

    Raises:
        ValueError: An argument is out of range, or the head is no linear layer whose outputs are the logits.
    """

    def __init__(self, model: nn.Module, forward: Forward, *, filter_k: int = 100, features: str | None = None) -> None:
        super().__init__(model, forward, features)
        _whole("filter_k", filter_k, 100)
        if not isinstance(self.layer, LINEAR):
            raise ValueError(
                f"adapt: t3a needs a linear head, got a {type(self.layer).__name__}; name it with features="
            )
        self.filter_k = filter_k
        weight = _weight_of(self.layer).detach().float()
        bias = None if self.layer.bias is None else self.layer.bias.detach().float()
        unsure = entropy(F.linear(weight, weight, bias))
        self._first = F.normalize(weight, dim=1), unsure, torch.arange(len(weight), device=weight.device)
        self.reset()

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits under the prototypes that this batch has joined."""
        logits, features = self.look(x)
        classes = self.layer.out_features
        if logits.shape[1:] != (classes,):
            raise ValueError(
                f"adapt: t3a needs a head that gives the logits, got {classes} outputs and logits of shape "
                f"{tuple(logits.shape)}; name the head with features="
            )
        values = features.float()
        new = F.normalize(values, dim=1), entropy(logits), logits.argmax(1)
        held = [torch.cat([old.to(x.device), more]) for old, more in zip(self.support, new, strict=True)]
        kept = _surest(held[1], held[2], classes, self.filter_k)
        self._own = logits
        self._pending = vectors, _, labels = tuple(part[kept] for part in held)
        counts = torch.bincount(labels, minlength=classes)
        prototypes = torch.segment_reduce(vectors, "mean", lengths=counts)
        return (values @ prototypes.T).to(logits.dtype)

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> None:
        """Keep the support sets that `predict` used."""
        guard.check(logits=[logits, self._own], support_sets=self._pending)
        self.support = self._pending

    def reset(self) -> None:
        """Go back to the rows of the head's weight."""
        self.support = self._pending = self._first

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the support sets: unit vectors (n, width), entropies (n,), classes (n,)."""
        return dict(zip(("vectors", "entropies", "classes"), (part.clone() for part in self.support), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the support sets."""
        width = self._first[0].shape[1]
        if state["vectors"].shape[1] != width:
            raise ValueError(
                f"Adapter.load_state_dict: support sets must have width {width}, got {state['vectors'].shape[1]}; "
                "adapt the same model first"
            )
        self.support = tuple(state[name].clone() for name in ("vectors", "entropies", "classes"))


def _surest(entropies: Tensor, labels: Tensor, classes: int, most: int) -> Tensor:
    """Return the indices of the `most` lowest entropies of each class, class by class."""
    order = entropies.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=classes)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[labels[order]]
    return order[rank < most]


def _weight_of(layer: nn.Module) -> Tensor:
    """Return the weight that a linear layer multiplies with: the quantised one where it quantises."""
    quantizer = getattr(layer, "weight_quantizer", None)
    return layer.weight if quantizer is None else quantizer(layer.weight)


def _whole(name: str, value: int, usual: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"adapt: {name} must be a whole number from 1, got {value}; use {usual}")
