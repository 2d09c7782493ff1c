"""What an unlabelled batch can say about a classifier: losses computed from logits alone.

A loss gives one term an image, so that the weights and masks of sample-selecting methods multiply in. What it remembers
of the stream it takes up in `observe`, once a step has proved sound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

FORMS = ("entropy", "pseudo", "debiased")
_CHANCE = (2.0, 4.0)  # of the divergence to expect by chance: from where the stream's imbalance counts, and in full
_BATCH_CHANCE = (3.0, 6.0)  # that of one batch, whose prior is fitted to it
_BIAS = (
    0.0035,
    0.007,
)  # of log C: divergence of the stream's frequency beyond what a biased model shows on balanced ones
_ROUNDS, _SOFTER, _SMOOTH = 10, 2.0, 10.0  # of expectation and maximisation; temperature; images of a uniform prior


def entropy(logits: Tensor) -> Tensor:
    """Measure how unsure every prediction is.

    ``H = -sum_c p_c log p_c`` with ``p = softmax(logits)``, in float32.
    Source: Wang et al., Tent, arXiv:2006.10726, section 3.1.

    Args:
        logits: (batch, classes), any float dtype.

    Returns:
        (batch,), float32, in nats.
    """
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class Loss:
    """The entropy of each prediction, and the shape of every other loss."""

    name = "entropy"

    def terms(self, logits: Tensor) -> Tensor:
        """Return the loss of each image, (batch,), float32, differentiable in the logits (batch, classes)."""
        return entropy(logits)

    def observe(self, logits: Tensor) -> None:
        """Take up what a batch says of the stream."""

    def answer(self, logits: Tensor) -> tuple[Tensor, str]:
        """Return the logits that the caller is to get, and what was done to them, "" for nothing."""
        return logits, ""

    def reset(self) -> None:
        """Forget the stream."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of what is remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; refuse what another loss remembers."""
        if state:
            raise ValueError(_foreign(self, state))


class _Averaging(Loss):
    """A loss that keeps moving averages of class statistics, which start at their neutral values."""

    averages: tuple[str, ...] = ("frequency",)
    frequency: Tensor | None

    def __init__(self, momentum: float) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"{type(self).__name__}: momentum must lie in 0 to below 1, got {momentum}; use 0.95")
        self.momentum = momentum
        self.reset()

    def reset(self) -> None:
        """Forget the averages."""
        for name in self.averages:
            setattr(self, name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the averages; empty before the first batch."""
        held = {name: getattr(self, name) for name in self.averages}
        return {name: value.clone() for name, value in held.items() if value is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the averages."""
        if state and state.keys() != set(self.averages):
            raise ValueError(_foreign(self, state))
        self.reset()
        for name, value in state.items():
            setattr(self, name, value.clone())

    def _recall(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the averages where the logits are: before the first batch, the neutral ones."""
        if self.frequency is None:
            return self._neutral(logits.new_ones(logits.shape[1], dtype=torch.float32))
        return {name: getattr(self, name).to(logits.device) for name in self.averages}

    def _neutral(self, ones: Tensor) -> dict[str, Tensor]:
        return {"frequency": ones / len(ones)}

    def _average(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.lerp(new, old, self.momentum)


class DOT(_Averaging):
    """Weigh the entropy of each image against the frequency of its predicted class, for comparison with `ABL`.

    ``w_b = 1 / pi_argmax(b)``, scaled to mean 1 over the batch; ``pi <- m pi + (1 - m) mean_b p_b``.
    Source: Zhao et al., DELTA, arXiv:2301.13018, section 3.3 (dynamic online re-weighting).

    Args:
        momentum: m.
    """

    name = "dot"

    def __init__(self, momentum: float = 0.95) -> None:
        super().__init__(momentum)

    def terms(self, logits: Tensor) -> Tensor:
        """Return the weighted entropies, (batch,)."""
        weight = 1 / (self._recall(logits)["frequency"][logits.argmax(-1)] + 1e-6)
        return entropy(logits) * (weight / weight.mean())

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:
        """Average the frequencies of a batch in."""
        self.frequency = self._average(self._recall(logits)["frequency"], logits.float().softmax(-1).mean(0))


class ABL(_Averaging):
    """Adaptive balanced loss: logits adjusted by the frequency and the complexity of each class.

    ``a_c = tau g log(C pi_c) - beta log(kappa_c / mean kappa)``, centred, clipped to 3. With ``p = softmax(z)``:
    "entropy" minimises ``-sum_c p_c log softmax(z + a)_c``, "pseudo" the same with p held fixed, and "debiased" the
    entropy of ``softmax(z - a)``. Frequency ``pi`` averages the predictions, complexity ``kappa`` the normalised
    entropy of the images of a class. g follows the evidence of imbalance: ``2 n KL(pi || uniform) / (C - 1)``, 1 by
    chance, lets it rise from 0 at 2 to 1 at 4, n the images that the average stands for.

    With `correct` the caller's logits are adjusted as well: ``z / T + g log(pi_batch)``, where pi_batch is the class
    prior of the batch by expectation and maximisation. This g is the larger of the batch's evidence (3 to 6) and of
    that of a skewed stream, ``KL(pi || uniform) / log C`` (from 0.0035 to 0.007); a balanced batch of a balanced
    stream is left as it is, and so is one of fewer images than classes. It serves where norm layers follow the stream:
    with the source's statistics, or in a ViT, a shifted domain alone skews the predictions and is taken for classes.

    Source of the aim: Xiao et al., TTAQ, arXiv:2412.09899 (ABL); the formulas are ours (docs/method.md). Source of the
    prior's estimate: Saerens et al., Adjusting the Outputs of a Classifier, Neural Computation 14 (2002).

    Args:
        form: "entropy", "pseudo" or "debiased".
        tau: Weight of frequency.
        beta: Weight of complexity.
        momentum: Of both averages.
        correct: Adjust the logits that are returned, not only the loss.
    """

    name = "abl"
    averages = ("frequency", "complexity", "seen")
    complexity: Tensor | None
    seen: Tensor | None

    def __init__(
        self,
        form: str = "debiased",
        *,
        tau: float = 1.0,
        beta: float = 0.5,
        momentum: float = 0.95,
        correct: bool = False,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"ABL: form must be one of {', '.join(FORMS)}, got {form!r}")
        self.form, self.tau, self.beta, self.correct = form, tau, beta, correct
        super().__init__(momentum)

    def terms(self, logits: Tensor) -> Tensor:
        """Return the balanced loss of each image, (batch,)."""
        z, shift = logits.float(), self.shift(logits)
        if self.form == "debiased":
            return entropy(z - shift)
        p = z.softmax(-1)
        return -((p.detach() if self.form == "pseudo" else p) * (z + shift).log_softmax(-1)).sum(-1)

    @torch.no_grad()
    def shift(self, logits: Tensor) -> Tensor:
        """Return a, (classes,), float32, as the stream up to now has it."""
        frequency, complexity, seen = self._recall(logits).values()
        tau = self.tau * evidence(frequency, seen)
        adjusted = tau * (len(frequency) * frequency).clamp(min=1e-6).log()
        adjusted = adjusted - self.beta * (complexity / complexity.mean()).clamp(min=1e-6).log()
        return (adjusted - adjusted.mean()).clamp(-3, 3)

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:
        """Average the frequencies and complexities of a batch in."""
        frequency, complexity, seen = self._recall(logits).values()
        p = logits.float().softmax(-1)
        mass = p.sum(0)
        unsure = (p * entropy(logits)[:, None]).sum(0) / mass.clamp(min=1e-6) / math.log(len(frequency))
        self.frequency = self._average(frequency, p.mean(0))
        self.complexity = torch.where(mass > 0.5, self._average(complexity, unsure), complexity)
        most = len(logits) * (1 + self.momentum) / (1 - self.momentum)  # images that a moving average stands for
        self.seen = torch.clamp(seen + len(logits), max=most)

    def _neutral(self, ones: Tensor) -> dict[str, Tensor]:
        return {"frequency": ones / len(ones), "complexity": ones, "seen": torch.zeros_like(ones[0])}

    @torch.no_grad()
    def answer(self, logits: Tensor) -> tuple[Tensor, str]:
        """Return the logits, adjusted to the class prior of the batch where `correct` says so.

        Images whose logits are not finite say nothing of the prior.
        """
        if not self.correct:
            return logits, ""
        finite = logits[logits.isfinite().all(-1)]
        if len(finite) < logits.shape[1]:  # so few would fit their prior to themselves
            return logits, ""
        prior = batch_prior(finite)
        skew = divergence(self._recall(logits)["frequency"]) / math.log(logits.shape[1])
        certain = torch.maximum(evidence(prior, len(finite), _BATCH_CHANCE), _ramp(skew, _BIAS))
        if not certain > 0:
            return logits, ""
        adjusted = logits.float() / _SOFTER + certain * prior.log()
        return adjusted.to(logits.dtype), "adjusted to the class prior of the batch"


def divergence(frequency: Tensor) -> Tensor:
    """Return ``KL(frequency || uniform)``, (), in nats, of (classes,)."""
    return (frequency * (len(frequency) * frequency).clamp(min=1e-9).log()).sum()


def evidence(frequency: Tensor, images: Tensor | float, bounds: tuple[float, float] = _CHANCE) -> Tensor:
    """Say how certain it is that a frequency (classes,) of so many images is not chance about uniform, (), 0 to 1.

    ``2 n KL(pi || uniform)`` is chi-square with C - 1 degrees of freedom by chance (the G test).
    """
    return _ramp(2 * images * divergence(frequency) / (len(frequency) - 1), bounds)


def _ramp(value, bounds):
    return ((value - bounds[0]) / (bounds[1] - bounds[0])).clamp(0, 1)


def batch_prior(logits: Tensor) -> Tensor:
    """Estimate the class prior of a batch.

    Expectation: ``p_b = softmax(z_b / T + log pi)``; maximisation: ``pi = (sum_b p_b + s / C) / (n + s)``.
    Source: Saerens et al., Neural Computation 14 (2002), section 2.2.

    Args:
        logits: (batch, classes).

    Returns:
        (classes,), float32.
    """
    z = logits.float() / _SOFTER
    count, classes = z.shape
    prior = z.new_full((classes,), 1 / classes)
    for _ in range(_ROUNDS):
        prior = ((z + prior.log()).softmax(-1).sum(0) + _SMOOTH / classes) / (count + _SMOOTH)
    return prior


LOSSES: dict[str, Callable[[], Loss]] = {
    "entropy": Loss,
    "abl": ABL,
    "abl-corrected": partial(ABL, correct=True),
    "dot": DOT,
}


def choose_loss(loss: str | Loss) -> Loss:
    """Return a loss given by name, or as it is."""
    chosen = LOSSES[loss]() if isinstance(loss, str) and loss in LOSSES else loss
    if not isinstance(chosen, Loss):
        raise ValueError(f"adapt: loss must be one of {', '.join(LOSSES)} or a Loss such as ABL(), got {loss!r}")
    return chosen


def _foreign(loss: Loss, state: dict[str, Any]) -> str:
    return (
        f"adapt: the state remembers {', '.join(state)}, which the loss {loss.name!r} does not; "
        "adapt with the loss that it was saved from"
    )
