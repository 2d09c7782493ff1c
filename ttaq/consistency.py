"""PCR, perturbation consistency reconstruction: a block that answers alike when its activations are perturbed.

With u = f(x) the quantised block's output, u' = f(x') that under perturbation, z the float one's, g the float rest of
the network and p(v) = softmax(g(v) / T):

    self     T^2 KL(p(u), held fixed || p(u'))
    anchor   T^2 KL(p(z) || p(u'))
    feature  |u' - z|^2, which needs no g

Source of the aim: Xiao et al., TTAQ, arXiv:2412.09899; the formulas are ours (docs/method.md). `refinement` has the
network-wide form.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .augment import add_noise, change_light
from .batches import Forward, call, change_images, has_images, join, logits_of, take
from .blocks import Block, run_block
from .caching import BlockCache
from .distances import softened_divergence, squared_distance
from .learning import activation_quantizers
from .quantizers import disabled
from .roundings import sharing
from .sharding import Shard
from .stores import rows
from .tracing import leaves, swap

PERTURBATIONS = ("step", "gauss", "drop", "input")
OBJECTIVES = ("feature", "self", "anchor")


@dataclass(frozen=True)
class PCR:
    """How a block is made consistent.

    Args:
        strength: Of the term beside the reconstruction error.
        perturbation: Of the activations at the block's quantisers: "step", uniform within half a code; "gauss", `snr`
            dB below each channel; "drop", half of the elements unquantised, as QDrop; or "input", of light and noise of
            the images, carried through the quantised prefix.
        objective: "feature", "self" or "anchor".
        every: Steps from one evaluation to the next; the term then counts `every` times.
        snr: Of "gauss", dB.
        temperature: T.
    """

    strength: float = 0.1
    perturbation: str = "step"
    objective: str = "feature"
    every: int = 1
    snr: float = 20.0
    temperature: float = 4.0

    def __post_init__(self):
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(f"PCR: perturbation must be one of {', '.join(PERTURBATIONS)}, got {self.perturbation!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"PCR: objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.every < 1 or not self.strength >= 0:
            raise ValueError(
                f"PCR: every must be 1 or more and strength 0 or more, got {self.every} and {self.strength}"
            )


class Consistency:
    """The term for one block after another.

    Args:
        model: Calibrated; its quantisers are switched off for what belongs to the float model.
        inputs: Entries of `batches.collect`.
        forward: Runs the model on one entry.
        pcr: The form.
        shard: Of this process, where several work.
    """

    def __init__(self, model: nn.Module, inputs: list, forward: Forward | None, pcr: PCR, shard: Shard | None = None):
        self.model, self.forward, self.pcr = model, forward, pcr
        self.views = self.images = None
        if pcr.perturbation == "input":
            if not all(has_images(entry) for entry in inputs):
                raise ValueError(
                    "PCR: the inputs hold no images (N, C, H, W) to perturb; choose another perturbation than input"
                )
            generator = torch.Generator().manual_seed(torch.initial_seed())
            views = [change_images(e, lambda x: add_noise(change_light(x, generator), generator)) for e in inputs]
            self.views = BlockCache(model, views, forward, shard=shard)
        if pcr.objective != "feature":
            self.images = join(inputs if shard is None else shard.entries(inputs))

    def begin(self, block: Block, targets: Tensor) -> None:
        """Turn to a block, whose float outputs are `targets`."""
        self.block, self.targets = block, targets
        self.quantizers = activation_quantizers(block.resolve(self.model))
        if self.views is not None:
            self.perturbed, _, _ = self.views.advance(block)

    def follow(self, block: Block) -> None:
        """Pass a block that is learned already."""
        if self.views is not None:
            self.views.advance(block)

    def __call__(self, step: int, x: Tensor, output: Tensor, picked: Tensor, roundings: list) -> Tensor | float:
        """Return the weighted term of one step, 0 where this step leaves it out.

        Args:
            step: Of the block, from 0.
            x: What the block was given.
            output: What it gave.
            picked: Numbers of the images.
            roundings: Of the block's layers; the second branch takes the weights of the first.
        """
        if step % self.pcr.every:
            return 0.0
        with sharing(roundings), self._perturbed():
            other = run_block(
                self.model, self.block, x if self.views is None else rows(self.perturbed, picked, x.device)
            )
        return self.pcr.strength * self.pcr.every * self._distance(output, other, picked)

    def _distance(self, output, other, picked):
        target = rows(self.targets, picked, output.device)
        if self.pcr.objective == "feature":
            return squared_distance(other, target)
        with torch.no_grad():
            fixed = self._rest(output.detach() if self.pcr.objective == "self" else target, picked)
        return softened_divergence(fixed, self._rest(other, picked), self.pcr.temperature)

    def _rest(self, output, picked):
        """Run the float model with the block's output replaced: any network's suffix, at the cost of a forward pass."""
        last = self.block.resolve(self.model)[-1]
        hook = last.register_forward_hook(lambda module, args, result: _replaced(result, output, self.block.result))
        try:
            with disabled(self.model):
                return logits_of(call(self.model, take(self.images, picked), self.forward))
        finally:
            hook.remove()

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        kind = self.pcr.perturbation
        before = [(q.drop, q.perturbation) for q in self.quantizers]
        for quantizer in self.quantizers:
            quantizer.drop = 0.5 if kind == "drop" else 0.0
            quantizer.perturbation = {"step": ("step", 1.0), "gauss": ("gauss", self.pcr.snr)}.get(kind)
        try:
            yield
        finally:
            for quantizer, (drop, perturbation) in zip(self.quantizers, before, strict=True):
                quantizer.drop, quantizer.perturbation = drop, perturbation


def _replaced(result, output, place):
    old = list(leaves(result))[place]
    return swap(result, old, output.to(old.dtype))
