"""refine: the network-wide stage of PCR, which teaches the quantised model to predict the same under perturbation.

``L = T^2 KL(softmax(z_float / T) || softmax(z_quantised(x') / T))``, x' a perturbed view of x, z_float of x or of x',
the statistics of each batch live in the norm layers: the regime in which the model will adapt. Source of the aim: Xiao
et al., TTAQ, arXiv:2412.09899 (perturbation consistency reconstruction); the form is ours, with straight-through
weights (Esser et al., arXiv:1902.08153) and the distillation loss of Hinton et al., arXiv:1503.02531.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .augment import add_noise, change_light, shift_and_flip
from .batches import Forward, call, change_images, choose, collect, count, join, logits_of, pieces, take
from .distances import softened_divergence
from .distributed import Team
from .learning import (
    Learned,
    adam,
    check_ready,
    frozen,
    learned_in,
    progress_bar,
    quant_layers,
    restored_on_failure,
    seeded,
    settings,
)
from .norms import MOMENTS, batch_norms, live, measure_again
from .pacing import FEWEST, MOST, Deadline, time_calls
from .quantizers import ActivationQuantizer, clamp_scales, disabled
from .roundings import StraightThrough
from .sharding import Share
from .stepping import undone
from .surgery import device_of, evaluating

_PIECE, _VIEWS = 128, 4
_ERRORS = 2.0  # standard errors by which the loss held out may rise: as much is chance


@dataclass(frozen=True)
class Refinement:
    """How the whole network is refined.

    Args:
        steps: Of Adam, over weights, weight scales and activation scales; every rate falls to 0 along a cosine.
        batch_size: Images a step.
        weight_lr: Of the straight-through weights, as a share of their scale.
        scale_lr: Of all scales, as a share of each.
        temperature: T; softens both predictions.
        anchor: Share of the images whose target is the float model's prediction on the image as it is, which teaches to
            resist; the others' is that on the perturbed view, which teaches to follow the float model there.
        statistics: "batch" keeps the norm layers on each batch's own statistics, "source" on the stored ones.
        light: Largest change of contrast, and of brightness in standard deviations of an image.
        noise: Share of the views that get white noise, 10 to 30 dB below the image.
        holdout: Share of the images that no step sees: they decide whether the result is kept.
        seed: Of images and views.
    """

    steps: int = 300
    batch_size: int = 64
    weight_lr: float = 0.015
    scale_lr: float = 1e-3
    temperature: float = 4.0
    anchor: float = 0.5
    statistics: str = "batch"
    light: float = 0.4
    noise: float = 0.5
    holdout: float = 0.125
    seed: int = 0

    def __post_init__(self):
        if self.statistics not in ("batch", "source"):
            raise ValueError(f'refine: statistics must be "batch" or "source", got {self.statistics!r}')
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"refine: steps and batch_size must be 1 or more, got {self.steps}, {self.batch_size}")
        shares = (self.anchor, self.noise, self.light, self.holdout)
        if not all(0 <= share <= 1 for share in shares) or self.light == 1 or self.holdout == 1:
            raise ValueError(f"refine: anchor, noise, light and holdout are shares from 0 to below 1, got {shares}")


def refine(
    model: nn.Module,
    batches: Iterable,
    *,
    refinement: Refinement | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    budget: str | float | Deadline | None = None,
    team: Team | None = None,
    **options,
) -> dict:
    """Learn weights and scales of the whole network, so that perturbed images get the float model's predictions.

    The weights start inside the cells of the codes that the model has, and end as codes of the same grid. Then the
    running statistics of BatchNorm are measured again on the images, quantised (the float model's are kept for it).
    What was learned is put back where the loss on perturbed views of the images held out rose by more than two standard
    errors of the difference between images.

    Args:
        model: A calibrated or reconstructed model; its quantisers and BatchNorm statistics are changed in place.
        batches: A re-iterable of tensors, (x, y) pairs or dicts; 1,024 images are usual.
        refinement: Steps, rates and the like; or give them one by one as `options`.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.
        progress: Show a bar.
        budget: Time to take, "90s", "5min" or seconds: it decides the steps, of which those of the refinement are then
            the most, and `pacing.FEWEST` the least.
        team: Learn together with other processes, see `distributed.join`: each holds all images, and computes its share
            of every step.
        options: Fields of Refinement.

    Returns:
        `model.ttaq_report`, with "refinement": the settings, the loss held out before and after, whether it was kept.

    Raises:
        ValueError: The model is not calibrated, or the images do not serve; the model is then as it was.
    """
    deadline = Deadline.of(budget)
    if deadline and refinement is None:
        options = {"steps": MOST} | options
    chosen = settings("refine", Refinement, refinement, options)
    check_ready("refine", model)
    images = join(collect("refine", batches, device_of(model)))
    start = time.perf_counter()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        frozen(model),
        restored_on_failure(model),
        seeded(chosen.seed, device_of(model)),
    ):
        task = _Task(model, images, chosen, forward, team)
        outcome = task.run(progress and (not team or team.leads), deadline)
    report = model.ttaq_report = getattr(model, "ttaq_report", {})
    report["refinement"] = asdict(chosen) | outcome | {"seconds": round(time.perf_counter() - start, 3)}
    return report


class _Task:
    """One refinement: the images in two parts, the loss, the steps and the verdict."""

    def __init__(self, model: nn.Module, images, chosen: Refinement, forward: Forward | None, team: Team | None = None):
        self.model, self.chosen, self.forward, self.team = model, chosen, forward, team
        held = int(chosen.holdout * count(images))
        order = torch.randperm(count(images)).to(device_of(model))
        self.images, self.held = images, take(images, order[:held])
        self.seen = take(images, order[held:])
        self.norms = batch_norms(model) if chosen.statistics == "batch" else []
        self.generator = torch.Generator().manual_seed(chosen.seed)

    def run(self, progress: bool, deadline: Deadline | None = None) -> dict:
        """Learn, measure the statistics again, and keep or put back; return what to report."""
        start = time.perf_counter()
        before, state = self._held_out(), Learned(self.model)
        layers = [m for m in quant_layers(self.model).values() if m.weight_quantizer is not None]
        afterwards = 2 * (time.perf_counter() - start)  # the same once more, and the statistics
        plan = partial(_fit, self.chosen, deadline, afterwards) if deadline else None
        steps = self._learn(layers, progress, plan)
        for layer in layers:
            layer.weight_quantizer.harden()
        measure_again(batch_norms(self.model), self._passes())
        if self.team:
            self.team.follow(getattr(norm, name) for norm in batch_norms(self.model) for name in MOMENTS)
        after = self._held_out()
        worse = (after - before) if len(before) else torch.zeros(1)
        kept = bool(worse.mean() <= _ERRORS * worse.std(correction=0) / len(worse) ** 0.5)
        if self.team:
            kept = bool(self.team.choose(kept))
        if not kept:
            state.restore()
        if self.team:
            self.team.agree("refine", "the network", learned_in([self.model]))
        means = [round(values.mean().item(), 6) if len(values) else None for values in (before, after)]
        return {"held_out": dict(zip(("before", "after"), means, strict=True)), "kept": kept, "steps": steps}

    def _learn(self, layers, progress, plan):
        """Run the steps, as many as were chosen or as `plan` makes of the seconds of one; return their number."""
        optimizer, learned = _optimizer(self.model, layers, self.chosen)
        size, steps = min(self.chosen.batch_size, count(self.seen)), self.chosen.steps
        share = self._share(size) if self.team else None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def step():
            picked = torch.randint(count(self.seen), (size,), generator=self.generator)
            part = () if share is None else (share,)
            predictions = self.predict(take(self.seen, picked.to(device_of(self.model))), self.generator, *part)
            loss = softened_divergence(*predictions, self.chosen.temperature)
            optimizer.zero_grad()
            (loss if share is None else share.weight * loss).backward()
            if share is not None:
                self.team.add_up_gradients(parameters, share.weight * loss)
            optimizer.step()
            clamp_scales(learned)

        if plan:
            drawn = self.generator.get_state()
            with undone(optimizer, device_of(self.model)):
                steps = plan(time_calls(step, 3) if self.team else time_calls(step))
                steps = int(self.team.choose(steps)) if self.team else steps
            self.generator.set_state(drawn)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 + math.cos(math.pi * k / steps)) / 2)
        with progress_bar(progress) as bar:
            for _ in bar.track(range(steps), description="refine"):
                step()
                schedule.step()
        return steps

    def _share(self, size):
        """Return this process's part of every step: each W-th image of the batch."""
        mine = torch.arange(self.team.rank, size, self.team.size)
        weight = len(mine) / size
        mine = mine if len(mine) else torch.zeros(1, dtype=torch.int64)  # that counts nothing
        there = mine.to(device_of(self.model))
        return Share(size, there, there, mine, weight)

    def predict(self, entry, generator: torch.Generator, share: Share | None = None) -> tuple[Tensor, Tensor]:
        """Return the float model's logits, without a gradient, and the quantised ones of a perturbed view.

        Args:
            entry: Images.
            generator: Draws the views, of all images whatever the share.
            share: The part of a batch to answer for; None for all of it.
        """
        entry = change_images(entry, lambda x: shift_and_flip(x, generator, min(4, *(s // 8 for s in x.shape[2:]))))
        view = change_images(entry, lambda x: self._perturb(x, generator))
        anchored = torch.rand(count(entry), generator=generator) < self.chosen.anchor
        entry, summed = choose(anchored, entry, view), None
        if share is not None:
            entry, view = take(entry, share.places), take(view, share.places)
            summed = lambda sums: self.team.summed(sums if share.weight else 0.0 * sums)  # noqa: E731
        with torch.no_grad(), disabled(self.model):
            target = logits_of(call(self.model, entry, self.forward))
        with live(self.norms, summed):
            return target, logits_of(call(self.model, view, self.forward))

    def _perturb(self, x, generator):
        view = change_light(x, generator, self.chosen.light, self.chosen.light)
        decibels = 10 + 20 * torch.rand(len(x), generator=generator)
        noisy = torch.rand(len(x), generator=generator) < self.chosen.noise
        return torch.where(noisy.to(x.device).view(-1, 1, 1, 1), add_noise(view, generator, decibels), view)

    @torch.no_grad()
    def _held_out(self):
        """Return the loss of each image held out, (n,): the mean over the same four views at each call."""
        generator, rounds = torch.Generator().manual_seed(self.chosen.seed + 1), []
        for _ in range(_VIEWS if count(self.held) else 0):
            parts = [self.predict(take(self.held, piece), generator) for piece in pieces(count(self.held), _PIECE)]
            rounds.append(
                torch.cat([softened_divergence(*part, self.chosen.temperature, mean=False) for part in parts])
            )
        return torch.stack(rounds).mean(0) if rounds else torch.zeros(0)

    def _passes(self):
        for piece in pieces(count(self.images), _PIECE):
            yield lambda piece=piece: call(self.model, take(self.images, piece), self.forward)


def _fit(chosen, deadline, afterwards, seconds):
    """Choose the steps that a deadline leaves, one of which takes so many seconds."""
    fewest = min(FEWEST, chosen.steps)
    wanted = int((deadline.left - afterwards) / max(seconds, 1e-9))
    if wanted < fewest:
        deadline.miss("refine", f"{fewest} steps of the whole network; take more time or fewer images")
    return max(min(wanted, chosen.steps), fewest)


def _optimizer(model, layers, chosen):
    """Switch on weights and scales; return Adam over them, each at a rate that fits its size, and what is scaled."""
    groups = []
    for layer in layers:
        quantizer = layer.weight_quantizer
        quantizer.rounding = StraightThrough(layer.weight, quantizer)
        quantizer.codes = None
        groups.append({"params": [quantizer.rounding.v], "lr": chosen.weight_lr * quantizer.scale.mean().item()})
    activations = [m for m in model.modules() if isinstance(m, ActivationQuantizer) and m.spec.granularity == "tensor"]
    learned = [*activations, *(layer.weight_quantizer for layer in layers)]
    for quantizer in learned:
        quantizer.scale.requires_grad_(True)
        groups.append({"params": [quantizer.scale], "lr": chosen.scale_lr * quantizer.scale.mean().item()})
    return adam(groups), learned
