"""Adaptation of norm layers along random directions: two forward passes a batch and no gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..norms import batch_norms
from .features import Moments, find_layer, input_quantizer, moments_of, source_moments, watching
from .guard import Guard
from .losses import entropy
from .method import Forward, Method, rate_share
from .parameters import Parameters, select

LAST_NORMS = 3  # whose stored statistics stand for the source where there is no anchor
FLOAT_STEP = 0.2  # of the root mean square of a weight, in the place of a quantiser's step where there is none


class ZerothOrder(Method):
    """Descend along a random direction of the norm layers' affine, with two forward passes a batch and no gradient.

    ``L = mean entropy + alignment * D``, ``D = (|mu - mu_s| + |sigma - sigma_s|) / |sigma_s|`` of the features of the
    batch against those of the source. One-sided SPSA with u of random signs and ``c = perturbation * s``:
    ``theta <- theta - lr (L(theta + c u) - L(theta)) c u / mean(c^2)``, the ordinary step where all c are equal.

    s is the step of the quantiser that the network calls next after the norm layer: a normalised value then moves by
    about `perturbation` steps, and about that share of the next codes flips, at any width. (A fixed 2 % flips 46 % of
    them at 8 bits and 1-2 % at 2 to 4.) A step that is measured a token counts with its mean over the first batch.
    Behind no quantiser s is 20 % of the root mean square of the layer's weight: the default then is the fixed 2 %.
    The rate falls in proportion for batches below `full_batch`, whose slope carries more noise; of a single vector only
    the mean counts.
    In the spirit of Deng et al., Test-Time Model Adaptation for Quantized Neural Networks, arXiv:2508.02180 (ZOA),
    without its bank of domains; Spall, IEEE TAC 37(3), 1992 (SPSA).

    Args:
        model: See `Method`, as is `forward`.
        forward: Returns logits.
        anchor: Batches of source images, some hundred in all, measured once; None takes the stored statistics of the
            last three BatchNorms.
        features: Name of the module whose input is compared, with an anchor; None takes the last linear layer.
        lr: Learning rate of a full batch.
        perturbation: In steps of the next quantiser.
        alignment: Weight of D.
        parameters: "norm", name patterns or a predicate, see `GradientMethod`.
        full_batch: Images from which the rate is `lr` in full; 0 never lowers it.
        seed: Of the directions.

    Raises:
        ValueError: There is neither an anchor nor a BatchNorm, no parameter is chosen, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        anchor: Iterable | None = None,
        features: str | None = None,
        lr: float = 3e-4,
        perturbation: float = 0.1,
        alignment: float = 1.0,
        parameters: Parameters = "norm",
        full_batch: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(model, forward)
        if not perturbation > 0 or not lr > 0 or alignment < 0:
            raise ValueError(
                f"adapt: zeroth-order needs lr and perturbation above 0 and alignment from 0, got {lr}, {perturbation} "
                f"and {alignment}; use 3e-4, 0.1 and 1.0"
            )
        self.lr, self.perturbation, self.alignment = lr, perturbation, alignment
        self.full_batch, self.seed = full_batch, seed
        self.parameters = select(model, parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        self._owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in self.parameters}
        self._quantised = [module for module in model.modules() if input_quantizer(module) is not None]
        self.source = self._source(anchor, features)
        self._generator = torch.Generator()
        self.reset()

    @classmethod
    def needs_anchor(cls, model: nn.Module) -> bool:
        """Tell whether there is no BatchNorm, whose statistics could stand for the source."""
        return not batch_norms(model)

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits, and keep what the update needs of this pass."""
        follow = () if self.steps else (*self._owners.values(), *self._quantised)
        self._seen: dict[nn.Module, Moments] = {}
        self._order: dict[nn.Module, float | None] = {}

        def look(module: nn.Module, given: Tensor) -> None:
            if module in self.source:
                self._seen[module] = moments_of(module, given)
            if module in follow and module not in self._order:
                quantizer = input_quantizer(module)
                self._order[module] = None if quantizer is None else quantizer.grid(given)[0].mean().item()

        with watching({*self.source, *follow}, look):
            return self.forward(self.model, x)

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor:
        """Look along one direction and step along it by what the objective says."""
        loss = self.objective(logits)
        guard.check(logits=[logits], objective=[loss])
        self.steps = self.steps or self._measure_steps()
        directions = self._draw()
        held = [parameter.clone() for parameter in self.parameters.values()]
        try:
            self._move(directions, self.perturbation)
            beside = self.objective(self.predict(x))
        finally:
            for parameter, before in zip(self.parameters.values(), held, strict=True):
                parameter.copy_(before)
        slope = (beside - loss) / self.perturbation
        guard.check(objective_beside=[slope])
        rate = self.lr * rate_share(len(x), self.full_batch)
        self._move(directions, -rate * slope / self._mean_square())
        guard.check(adapted_tensors=self.parameters.values())
        return loss

    def objective(self, logits: Tensor) -> Tensor:
        """Return L, (), of the latest pass, which gave these logits (batch, classes)."""
        apart = [
            _distance(self._seen[module], source) for module, source in self.source.items() if module in self._seen
        ]
        return entropy(logits).mean() + self.alignment * torch.stack(apart).mean()

    def tensors(self) -> dict[str, Tensor]:
        """Name the chosen parameters."""
        return dict(self.parameters)

    def reset(self) -> None:
        """Start with the first direction, and measure the steps anew."""
        self._generator.manual_seed(self.seed)
        self.steps: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator and the steps by parameter; no steps before the first batch."""
        return {"generator": self._generator.get_state(), "steps": dict(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the generator and the steps."""
        self._generator.set_state(state["generator"].cpu())
        self.steps = dict(state["steps"])

    def _source(self, anchor: Iterable | None, features: str | None) -> dict[nn.Module, Moments]:
        norms = batch_norms(self.model)[-LAST_NORMS:]
        if anchor is None and norms:
            return {norm: Moments(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms}
        layer = find_layer(self.model, features)
        found = source_moments("zeroth-order without BatchNorm", self.model, self.forward, anchor, [layer])
        if not found:
            raise ValueError("adapt: features must name a module that the model calls; name another one")
        return found

    def _measure_steps(self) -> dict[str, float]:
        """Give each parameter the step of the first quantiser called after its layer."""
        called, following, step = list(self._order), {}, None
        for module in reversed(called):
            following[module] = step
            step = step if self._order[module] is None else self._order[module]
        return {name: following.get(owner) or FLOAT_STEP * (_rms(owner) or 1.0) for name, owner in self._owners.items()}

    def _mean_square(self) -> float:
        """Return the mean square of the steps over all elements."""
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        return sum(size * self.steps[name] ** 2 for name, size in sizes.items()) / sum(sizes.values())

    def _draw(self) -> list[Tensor]:
        """Draw a random sign for every element of every parameter."""
        shapes = [parameter.shape for parameter in self.parameters.values()]
        return [torch.randint(2, shape, generator=self._generator).mul_(2).sub_(1) for shape in shapes]

    def _move(self, directions: list[Tensor], by: float | Tensor) -> None:
        for (name, parameter), signs in zip(self.parameters.items(), directions, strict=True):
            parameter.add_(signs.to(parameter) * (by * self.steps[name]))


def _distance(found: Moments, source: Moments) -> Tensor:
    """Return how far moments lie from those of the source, in the length of the source's spread, ()."""
    source = source.to(found.mean.device)
    spread = source.var.sqrt()
    apart = (found.mean - source.mean).norm()
    if found.count > 1:
        apart = apart + (found.var.sqrt() - spread).norm()
    return (apart / spread.norm().clamp(min=1e-12)).float()


def _rms(module: nn.Module) -> float:
    weight = getattr(module, "weight", None)
    return weight.float().square().mean().sqrt().item() if isinstance(weight, Tensor) else 0.0
