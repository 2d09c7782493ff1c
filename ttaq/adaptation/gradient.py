"""Methods that descend a loss of their own predictions over a few tensors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Adam, Optimizer

from .guard import Guard
from .losses import Loss, choose_loss
from .method import Forward, Method
from .statistics import AdaptiveBatchNorm, adapt_statistics, commit, discard, pending, running

NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, AdaptiveBatchNorm)
NORM_NAME = re.compile(r"norm(act)?([123]d)?$", re.IGNORECASE)

Parameters = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


class GradientMethod(Method):
    """Minimise `loss` over chosen parameters, one backward pass a step; a subclass gives the loss.

    The logits returned are those of the first forward pass, before any step. The rate falls in proportion for
    batches below `full_batch`, where a gradient carries more noise.

    Args:
        model: See `Method`, as is `forward`.
        forward: Returns logits.
        lr: Learning rate of a full batch.
        optimizer: Called as ``optimizer(parameters, lr=lr)``; any torch Optimizer or a function that makes one.
        parameters: "norm" (affine of every norm layer), name patterns such as ``["*.bias"]``, or a predicate
            ``(name, parameter) -> bool``.
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
        self.lr, self.steps, self.full_batch = lr, steps, full_batch
        self._make_optimizer = optimizer
        self.balance = copy.deepcopy(choose_loss(loss))
        self.reset()

    def loss(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return what to minimise, (), from a batch and its logits."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits under the present parameters and the statistics of this batch."""
        discard(self.norms.values())
        return super().predict(x)

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor:
        """Take `steps` steps, then keep the statistics of the last forward pass."""
        for step in range(self.steps):
            if step:
                logits = self.predict(x)
            loss = self.loss(x, logits)
            self._step(loss, len(x), guard, logits=[logits], statistics=pending(self.norms.values()))
        self.balance.observe(logits)
        commit(self.norms.values())
        return loss.detach()

    def answer(self, logits: Tensor) -> tuple[Tensor, str]:
        """Return the logits as the loss corrects them, and what it did."""
        return self.balance.answer(logits)

    def _step(self, loss: Tensor, images: int, guard: Guard, **groups: list[Tensor]) -> None:
        if not loss.requires_grad:
            raise ValueError(
                "adapt: the logits carry no gradient of the parameters that adapt; "
                "let the model and forward= run without torch.no_grad and detach"
            )
        parameters = list(self.parameters.values())
        self.optimizer.zero_grad()
        loss.backward()
        guard.check(**groups, loss=[loss], gradients=[p.grad for p in parameters])
        share = min(1.0, images / self.full_batch) if self.full_batch else 1.0
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        state = [v for values in self.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        moments = [v for v in state if v.device == loss.device]
        guard.check(adapted_tensors=parameters, optimizer_state=moments)

    def tensors(self) -> dict[str, Tensor]:
        """Name the chosen parameters and the running statistics."""
        return {**self.parameters, **running(self.norms)}

    def reset(self) -> None:
        """Start with a new optimizer and without a memory of the stream."""
        self.balance.reset()
        for parameter in self.parameters.values():
            parameter.grad = None
        self.optimizer = self._make_optimizer(list(self.parameters.values()), lr=self.lr)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state and of what the loss remembers."""
        return {"optimizer": copy.deepcopy(self.optimizer.state_dict()), "loss": self.balance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the optimizer's state and what the loss remembers."""
        self.balance.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


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


def select(model: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """Choose the parameters that adapt: give each memory of its own and let it require a gradient.

    Args:
        model: The Adapter's copy.
        parameters: See `GradientMethod`.

    Returns:
        The floating-point parameters chosen, by name, each once.

    Raises:
        ValueError: Nothing is chosen, with what the model does hold.
    """
    if parameters == "norm":
        names = {
            f"{name}.{key}".lstrip(".") for name, m in model.named_modules() if is_norm(m) for key in m._parameters
        }

        def wanted(name: str, parameter: nn.Parameter) -> bool:
            return name in names
    elif callable(parameters):
        wanted = parameters
    else:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)

        def wanted(name: str, parameter: nn.Parameter) -> bool:
            return any(fnmatch(name, pattern) for pattern in patterns)

    chosen = {name: p for name, p in model.named_parameters() if p.is_floating_point() and wanted(name, p)}
    if not chosen:
        some = ", ".join([name for name, _ in model.named_parameters()][:3]) or "none"
        raise ValueError(
            f"adapt: parameters={parameters!r} matches no parameter of {type(model).__name__} (it has {some}, ...); "
            'name others with parameters=["*.bias"], or use method="source"'
        )
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
    return chosen


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises: a norm layer of torch, or one that is named so (RmsNorm, LayerNorm2d)."""
    return isinstance(module, NORMS) or bool(NORM_NAME.search(type(module).__name__))
