"""Methods whose predictions come from a teacher, the moving average of a student that learns from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..augment import distort
from .guard import Guard
from .losses import entropy
from .memory import ClassBalancedMemory
from .method import Forward
from .parameters import Parameters
from .statistics import aside, commit
from .views import Augment, Places, ViewMethod, approach, check_share, cross_entropy, places, still, worn

THRESHOLDS = ((10, 0.92), (100, 0.72), (float("inf"), 0.1))  # of CoTTA: up to so many classes


class TeacherMethod(ViewMethod):
    """Teach a student, and let the teacher follow it: ``t <- (1 - follow) t + follow s`` after every step.

    The Adapter's model is the teacher: it predicts and is what `Adapter.export` returns. The student is one more
    tensor for each that adapts ("student.NAME" in `tensors`), put into the model's place while it runs, so that
    weights and packed codes are held once. Running statistics are not averaged: each keeps those of what it saw.

    Args:
        model: See `ViewMethod`, as are `forward` and `options`.
        forward: Returns logits.
        follow: The share of the student that the teacher takes on, 0 to 1.
        options: Of `ViewMethod`.
    """

    def __init__(self, model: nn.Module, forward: Forward, *, follow: float, **options: Any) -> None:
        self.follow, self.places, self.student = follow, Places(), dict[str, Tensor]()
        super().__init__(model, forward, **options)
        self.teacher = self.parameters
        self.places = places(model, self.teacher, self.norms)
        self.student = {name: tensor.detach().clone() for name, tensor in super().tensors().items()}
        for name, parameter in self.teacher.items():
            parameter.requires_grad_(False)
            self.student[name] = nn.Parameter(self.student[name])
        self.parameters = {name: self.student[name] for name in self.teacher}
        self.reset()

    def tensors(self) -> dict[str, Tensor]:
        """Name the teacher's tensors as the model does, and the student's with "student." before."""
        own = {name: getattr(*found[0]) for name, found in self.places.items()}
        for name, tensor in own.items():  # the model may have been moved
            self.student[name].data = self.student[name].data.to(tensor)
        return own | {f"student.{name}": tensor for name, tensor in self.student.items()}

    def reset(self) -> None:
        """Start with a new optimizer of the student and without a memory of the stream."""
        with worn(self.places, self.student):
            super().reset()

    def study(
        self, x: Tensor, target: Tensor, guard: Guard, weight: Tensor | float = 1.0, **passed: list[Tensor]
    ) -> Tensor:
        """Let the student step to a target, and the teacher follow.

        Args:
            x: What the student sees, (batch, ...).
            target: Probabilities, (batch, classes).
            guard: Checks what a step is made of.
            weight: Of each image, (batch,).
            passed: What the teacher's pass left, for the guard.

        Returns:
            The loss, (), detached.
        """
        norms = self.norms.values()
        with aside(norms), worn(self.places, self.student):
            logits = super().predict(x)
            loss = (weight * cross_entropy(logits, target)).mean()
            self._differentiate(loss, guard, **passed, **{f"student's_{k}": v for k, v in self._passed(logits).items()})
            self._descend(len(x), guard)
            commit(norms)
        approach(self.teacher.values(), self.parameters.values(), self.follow)
        return loss.detach()

    def apart(self, x: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Return probabilities (batch, classes), float32, under other tensors; their statistics are forgotten."""
        with torch.no_grad(), aside(self.norms.values()), worn(self.places, tensors or {}):
            return super().predict(x).float().softmax(-1)


class CoTTA(TeacherMethod):
    """Learn from a teacher's predictions, averaged over views where the source is unsure, and forget a little.

    ``L = mean_b -sum_c q_bc log p_bc`` with p the student's probabilities and q the teacher's, or where
    ``mean_b max_c p_source < threshold`` the mean of the teacher's over `views` views. Then ``t <- m t + (1 - m) s``,
    and each element of the student goes back to the source's with probability `restore`. The logits returned are the
    teacher's for the images themselves, before the update.

    The paper adapts all parameters. The weights of packed layers are codes that never change, so the default is what
    can learn in every form of a network: the affine of the norm layers and all biases; ``parameters="*"`` follows the
    paper on a float network. A batch takes 3 forward passes, or 3 + `views`.
    Source: Wang et al., Continual Test-Time Domain Adaptation (CoTTA), arXiv:2203.13591, section 3.

    Args:
        model: See `GradientMethod`, as are `forward` to `full_batch`.
        forward: Returns logits.
        lr: Learning rate of a full batch.
        optimizer: Called as ``optimizer(parameters, lr=lr)``.
        parameters: What adapts.
        statistics: What BatchNorm normalises with, in teacher, student and source.
        alpha: Share of the batch under "blend".
        prior: Images that the source counts for.
        momentum: Share of the batch under "ema".
        full_batch: Images from which the rate is `lr` in full.
        teacher_momentum: m, 0 to 1.
        threshold: Confidence of the source below which views are averaged, 0 to 1; None for that of the published
            data set with as many classes: 0.92 up to 10, 0.72 up to 100, 0.1 beyond.
        views: Views to average.
        restore: Probability, 0 to 1; 0.001 was published for ImageNet.
        augment: Called as ``augment(x, generator)``; the default takes images (N, C, H, W).
        seed: Of the views and of what is restored.

    Raises:
        ValueError: No parameter is chosen, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        lr: float = 1e-3,
        optimizer: Callable[..., Optimizer] = Adam,
        parameters: Parameters = "norm+bias",
        statistics: str = "batch",
        alpha: float | None = None,
        prior: float = 16,
        momentum: float = 0.1,
        full_batch: int = 64,
        teacher_momentum: float = 0.999,
        threshold: float | None = None,
        views: int = 32,
        restore: float = 0.01,
        augment: Augment = distort,
        seed: int = 0,
    ) -> None:
        check_share("teacher_momentum", teacher_momentum, 0.999)
        check_share("threshold", 0.0 if threshold is None else threshold, 0.92)
        check_share("restore", restore, 0.01)
        if not isinstance(views, int) or views < 1:
            raise ValueError(f"adapt: views must be a whole number from 1, got {views}; use 32")
        self.threshold, self.count, self.restore = threshold, views, restore
        super().__init__(
            model, forward, follow=1 - teacher_momentum, augment=augment, seed=seed, lr=lr, optimizer=optimizer,
            parameters=parameters, statistics=statistics, alpha=alpha, prior=prior, momentum=momentum,
            full_batch=full_batch,
        )  # fmt: skip
        self.source = {name: tensor.detach().clone() for name, tensor in self.student.items()}

    def step(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor:
        """Teach the student this batch, let the teacher follow, and restore some of the student."""
        loss = self.study(x, self.target(x, logits), guard, **self._passed(logits))
        self._restore(x.device)
        return loss

    def target(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return q, (batch, classes), float32, of a batch and the teacher's logits for it."""
        bound = self.threshold
        if bound is None:
            bound = next(bound for most, bound in THRESHOLDS if logits.shape[1] <= most)
        if self.apart(x, self.source).amax(-1).mean() >= bound:
            return logits.float().softmax(-1)
        return sum(self.apart(self.view(x)) for _ in range(self.count)) / self.count

    @torch.no_grad()
    def _restore(self, device: torch.device) -> None:
        generator = self.generator(device)
        for name, parameter in self.parameters.items():
            back = torch.rand(parameter.shape, generator=generator, device=device) < self.restore
            parameter.copy_(torch.where(back, self.source[name], parameter))

    def tensors(self) -> dict[str, Tensor]:
        """Name the teacher's tensors and the student's."""
        named = super().tensors()
        self.source = {name: tensor.to(named[name]) for name, tensor in self.source.items()}
        return named


class RoTTA(TeacherMethod):
    """Learn from a class-balanced memory of the stream under slowly moving statistics, for correlated streams.

    Every image, with its label and entropy by the teacher, is offered to a `ClassBalancedMemory`. After each
    `frequency` images the student learns: ``L = mean_i E_i (-sum_c q_ic log p_ic)`` over the memory, p the student's
    probabilities for strong views, q the teacher's for the images, E their timeliness; then
    ``t <- (1 - nu) t + nu s``. BatchNorm normalises with moving averages that only the memory moves ("ema" of
    `AdaptiveBatchNorm`, one each for teacher and student); the logits returned are the teacher's under them, which
    never depend on the other images of a batch. A batch whose step is skipped leaves no image in memory.
    Source: Yuan et al., Robust Test-Time Adaptation in Dynamic Scenarios (RoTTA), arXiv:2303.13899, section 3.

    Args:
        model: See `GradientMethod`, as are `forward`, `lr`, `optimizer`, `parameters` and `full_batch`.
        forward: Returns logits.
        lr: Learning rate of a full memory.
        optimizer: Called as ``optimizer(parameters, lr=lr)``.
        parameters: What adapts.
        momentum: alpha of the paper, the share of the memory's moments in the moving averages, above 0 to 1.
        full_batch: Images in memory from which the rate is `lr` in full.
        capacity: Most images in memory: that many times the bytes of one is all it takes.
        frequency: Images from one step to the next.
        nu: The share of the student that the teacher takes on, 0 to 1.
        lambda_t: Weight of age in memory.
        lambda_u: Weight of uncertainty in memory.
        augment: Called as ``augment(x, generator)``; the default takes images (N, C, H, W).
        seed: Of the views.

    Raises:
        ValueError: No parameter is chosen, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        lr: float = 1e-3,
        optimizer: Callable[..., Optimizer] = Adam,
        parameters: Parameters = "norm",
        momentum: float = 0.05,
        full_batch: int = 64,
        capacity: int = 64,
        frequency: int = 64,
        nu: float = 0.001,
        lambda_t: float = 1.0,
        lambda_u: float = 1.0,
        augment: Augment = distort,
        seed: int = 0,
    ) -> None:
        check_share("nu", nu, 0.001)
        if not isinstance(frequency, int) or frequency < 1:
            raise ValueError(f"adapt: frequency must be a number of images from 1, got {frequency}; use 64")
        self.frequency = frequency
        self.memory = ClassBalancedMemory(capacity, lambda_t, lambda_u)
        super().__init__(
            model, forward, follow=nu, augment=augment, seed=seed, lr=lr, optimizer=optimizer, parameters=parameters,
            statistics="ema", momentum=momentum, full_batch=full_batch,
        )  # fmt: skip

    def predict(self, x: Tensor) -> Tensor:
        """Return the teacher's logits under its stored statistics."""
        with still(self.norms.values()):
            return super().predict(x)

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor | None:
        """Offer the images to the memory, and learn from it whenever `frequency` have been seen."""
        guard.check(logits=[logits])
        memory, draws, loss = self.memory.copy(), self.draws, None
        labels, unsure = logits.argmax(-1).tolist(), entropy(logits).tolist()
        try:
            for image, label, nats in zip(x, labels, unsure, strict=True):
                memory.add(image, label, nats, logits.shape[1])
                if memory.seen % self.frequency == 0:
                    loss = self._learn(*memory.batch(x), guard)
        except BaseException:
            self.draws = draws
            raise
        self.memory = memory
        return loss

    def _learn(self, images: Tensor, timely: Tensor, guard: Guard) -> Tensor:
        logits = super().predict(images)
        target, view = logits.float().softmax(-1), self.view(images)
        loss = self.study(view, target, guard, timely, **self._passed(logits))
        commit(self.norms.values())
        return loss

    def reset(self) -> None:
        """Start with a new optimizer of the student, the first view and an empty memory."""
        super().reset()
        self.memory = ClassBalancedMemory(self.memory.capacity, self.memory.lambda_t, self.memory.lambda_u)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state, the number of draws and the images in memory."""
        return {**super().state_dict(), "memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        memory = self.memory.copy()
        memory.load_state_dict(state["memory"])
        super().load_state_dict(state)
        self.memory = memory
