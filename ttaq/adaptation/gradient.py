"""Methods that descend a loss of their own predictions over a few tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..quantizers import clamp_scales
from .guard import Guard, Settled
from .losses import Loss, choose_loss
from .method import Forward, Method, rate_share
from .parameters import Parameters, scales, select
from .statistics import adapt_statistics, commit, discard, pending, running


class GradientMethod(Method):
    """Minimise `loss` over chosen parameters, one backward pass a step; a subclass gives the loss.

    The logits returned are those of the first forward pass, before any step. The rate falls in proportion for
    batches below `full_batch`, where a gradient carries more noise. Activation scales learn at a rate in proportion
    to their size and stay positive.

    Args:
        model: See `Method`, as is `forward`.
        forward: Returns logits.
        lr: Learning rate of a full batch.
        optimizer: Called as ``optimizer(parameters, lr=lr)``; any torch Optimizer or a function that makes one.
        parameters: "norm" (affine of every norm layer), "bias", "activation_scales", several as in "norm+bias",
            a list of these and of name patterns, ``["norm", "!layer4.*"]``, or a predicate
            ``(name, parameter) -> bool``; see `parameters.choose`.
        steps: Steps a batch; each beyond the first costs a forward pass.
        statistics: "batch", "blend", "ema" or "source": what BatchNorm normalises with, see `AdaptiveBatchNorm`.
        alpha: Share of the batch under "blend"; None for ``n / (n + prior)``.
        prior: Images that the source counts for.
        momentum: Share of the batch under "ema".
        full_batch: Images from which the rate is `lr` in full; 0 never lowers it.
        loss: Of each image: "entropy", "abl" (`losses.ABL`), "abl-corrected", "dot" (`losses.DOT`), or any
            `losses.Loss`.

    Raises:
        ValueError: No parameter is chosen, or an argument is out of range.
    """

    needs_graph = True
    remembers: tuple[str, ...] = ()  # attributes that belong to the state; assigned anew, never changed in place

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        lr: float = 1e-3,
        optimizer: Callable[..., Optimizer] = Adam,
        parameters: Parameters = "norm",
        steps: int = 1,
        statistics: str = "batch",
        alpha: float | None = None,
        prior: float = 16,
        momentum: float = 0.1,
        full_batch: int = 64,
        loss: str | Loss = "entropy",
    ) -> None:
        super().__init__(model, forward)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"adapt: steps must be a whole number from 1, got {steps}; use 1")
        self.norms = adapt_statistics(model, statistics, alpha, prior, momentum)
        self.parameters = select(model, parameters)
        self._scales = [q for q in scales(model).values() if q.scale.requires_grad]
        self.lr, self.steps, self.full_batch = lr, steps, full_batch
        self._make_optimizer = optimizer
        self.balance = copy.deepcopy(choose_loss(loss))
        self.reset()

    def loss(self, x: Tensor, logits: Tensor) -> Tensor | None:
        """Return what to minimise, (), from a batch and its logits; None where no image is worth a step."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits under the present parameters and the statistics of this batch."""
        discard(self.norms.values())
        return super().predict(x)

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor:
        """Take up to `steps` steps, then keep the statistics of the last forward pass.

        Raises:
            Skip: A check failed; what the method remembers is as before.
            Settled: No image was worth a step; the statistics and the averages of the batch are kept.
        """
        before = {name: getattr(self, name) for name in self.remembers}
        try:
            loss = self._take_steps(x, logits, guard)
        except BaseException:
            vars(self).update(before)
            raise
        if loss is None:
            raise Settled("no image was selected")
        return loss

    def answer(self, logits: Tensor) -> tuple[Tensor, str]:
        """Return the logits as the loss corrects them, and what it did."""
        return self.balance.answer(logits)

    def step(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor | None:
        """Take one step down `loss` and return it, (), detached; None where there is none, and no step."""
        loss = self.loss(x, logits)
        if loss is not None:
            self._differentiate(loss, guard, **self._passed(logits))
            self._descend(len(x), guard)
            loss = loss.detach()
        return loss

    def _take_steps(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor | None:
        last = None
        for step in range(self.steps):
            if step:
                logits = self.predict(x)
            loss = self.step(x, logits, guard)
            if loss is None:
                guard.check(**self._passed(logits))
                break
            last = loss
        self.balance.observe(logits)
        commit(self.norms.values())
        return last

    def _passed(self, logits: Tensor) -> dict[str, list[Tensor]]:
        """Name what a forward pass left, for the guard."""
        return {"logits": [logits], "statistics": pending(self.norms.values())}

    def _differentiate(self, loss: Tensor, guard: Guard, **groups: list[Tensor]) -> None:
        """Give the parameters the gradients of a loss, checked."""
        if not loss.requires_grad:
            raise ValueError(
                "adapt: the logits carry no gradient of the parameters that adapt; "
                "let the model and forward= run without torch.no_grad and detach"
            )
        self.optimizer.zero_grad()
        loss.backward()
        guard.check(**groups, loss=[loss], gradients=[p.grad for p in self.parameters.values()])

    def _descend(self, images: int, guard: Guard) -> None:
        """Let the optimizer step along the gradients, at the rate of so many images."""
        parameters = list(self.parameters.values())
        share = rate_share(images, self.full_batch)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        clamp_scales(self._scales)
        state = [v for values in self.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        moments = [v for v in state if v.device == parameters[0].device]
        guard.check(adapted_tensors=parameters, optimizer_state=moments)

    def tensors(self) -> dict[str, Tensor]:
        """Name the chosen parameters and the running statistics."""
        return {**self.parameters, **running(self.norms)}

    def reset(self) -> None:
        """Start with a new optimizer and without a memory of the stream."""
        self.balance.reset()
        for name in self.remembers:
            setattr(self, name, getattr(type(self), name))
        for parameter in self.parameters.values():
            parameter.grad = None
        self.optimizer = self._make_optimizer(self._groups(), lr=self.lr)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def _groups(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        """Return the parameters; with activation scales among them in groups, each scale at a rate of its own."""
        learning = {quantizer.scale: self.lr * quantizer.scale.item() for quantizer in self._scales}
        others = [p for p in self.parameters.values() if p not in learning]
        if not learning:
            return others
        groups: list[dict[str, Any]] = [{"params": [scale], "lr": rate} for scale, rate in learning.items()]
        return [{"params": others}, *groups] if others else groups

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state, of what the loss remembers and of what the method does."""
        memory = {name: copy.deepcopy(getattr(self, name)) for name in self.remembers}
        return {"optimizer": copy.deepcopy(self.optimizer.state_dict()), "loss": self.balance.state_dict(), **memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.balance.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for name in self.remembers:
            setattr(self, name, copy.deepcopy(state[name]))


class Tent(GradientMethod):
    """Minimise the mean entropy of the predictions, or another loss, over the affine of the norm layers.

    ``L = mean_b H(softmax(z_b))``, BatchNorm on the statistics of the batch; networks with LayerNorm or GroupNorm
    adapt the affine alone. Published settings: Adam 1e-3 at batch 200 (CIFAR-C); SGD 2.5e-4, momentum 0.9 at
    batch 64 (ImageNet-C).
    Source: Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization, arXiv:2006.10726, section 3.
    """

    def loss(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return the mean over the batch of the loss of each image."""
        return self.balance.terms(logits).mean()
