"""What a block's loss gets beside the reconstruction error: PEM and PCR, and the rule for PEM's strength."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .augment import add_noise, change_light
from .batches import Forward, change_images, count
from .blocks import Block, block_input, run_block
from .blockwise import BlockLearner, Schedule, layers_of
from .consistency import PCR, Consistency
from .distances import squared_distance
from .layers import QuantMatMul
from .learning import Learned
from .moments import depth_weights, measure_noise
from .perturbation import PEM, STRENGTHS, Propagation, preconditioned
from .quantizers import disabled
from .sharding import Shard
from .surgery import device_of

_LOOK = 256  # images that PEM's moments come from
PILOT_PART = 5  # a pilot run takes a fifth of the steps
_MARGIN = 0.02  # of the error without PEM: what chance alone makes between pilots


class Objectives:
    """The terms of all blocks of one reconstruction.

    Args:
        model: Calibrated, nothing learned yet.
        inputs: Entries of `batches.collect`.
        forward: Runs the model on one entry.
        pem: PEM, or None for none.
        pcr: PCR in the blocks, or None for none.
        shard: Of this process, where several work on what each of them has of the images.
    """

    def __init__(
        self, model: nn.Module, inputs: list, forward: Forward | None, pem: PEM | None, pcr: PCR | None,
        shard: Shard | None = None,
    ):  # fmt: skip
        self.model, self.inputs, self.forward, self.pem, self.shard = model, inputs, forward, pem, shard
        self.consistency = Consistency(model, inputs, forward, pcr, shard) if pcr and pcr.strength else None
        self.noise, self.weights, self.propagation = {}, {}, None
        if pem and (pem.snr is None or pem.depth):
            self.noise = measure_noise(model, inputs[: max(1, _LOOK // count(inputs[0]))], forward, 0)
            if shard is not None:
                shard.team.follow(self.noise.values())
        if pem and pem.depth:
            self.weights = depth_weights(self.noise)

    def bases(self, block: Block, floats: Tensor) -> dict[str, Tensor]:
        """Return the preconditioned weights of a block's layers; none unless PEM asks for them."""
        if not (self.pem and self.pem.precondition):
            return {}
        floats = self._first(floats)
        with disabled(self.model):
            return preconditioned(layers_of(self.model, block), self._run(block, floats, floats), self.pem, self.noise)

    def begin(self, block: Block, quantised: Tensor, floats: Tensor, targets: Tensor) -> None:
        """Turn to a block whose roundings have begun."""
        if self.consistency:
            self.consistency.begin(block, targets)
        self._mitigate(block, quantised, floats, targets)

    def _mitigate(self, block, quantised, floats, targets):
        """Form PEM for a block."""
        self.propagation = None
        if self.pem and self.pem.strength:
            quantised, floats, targets = (self._first(t, _LOOK) for t in (quantised, floats, targets))
            layers = layers_of(self.model, block) | _products(self.model, block)
            run = self._run(block, quantised, floats)
            self.propagation = Propagation(self.model, layers, self.pem, self.noise, run, self.weights)
            self.scale = self.pem.strength * squared_distance(targets, torch.zeros_like(targets))

    def _first(self, store, number=None):
        """Return the first rows of a store, all unless a number is given: of all images, where several work."""
        device = device_of(self.model)
        if self.shard is None:
            return store[:number].to(device)
        return self.shard.first(store, number or self.shard.rows(store), device)

    def __call__(self, step: int, x: Tensor, output: Tensor, picked: Tensor, roundings: list) -> Tensor | float:
        """Return what one step adds to the loss."""
        total = self._added_mitigation()
        if self.consistency is not None:
            total = total + self.consistency(step, x, output, picked, roundings)
        return total

    def _added_mitigation(self, *_):
        return 0.0 if self.propagation is None else self.scale * self.propagation()

    @property
    def steady(self) -> bool:
        """Whether every step adds the same terms, so that one of them can be captured and replayed."""
        return self.consistency is None

    def follow(self, block: Block) -> None:
        """Pass a block that is learned already."""
        if self.consistency is not None:
            self.consistency.follow(block)

    def choose_strength(self, blocks: list[Block], schedule: Schedule) -> dict:
        """Choose PEM's strength without labels, and return how.

        The middle block is learned for a fifth of the steps with each of `STRENGTHS`, from float inputs, without PCR,
        on seven eighths of the images. The strength that errs least wins, if it errs less by `_MARGIN` than none does:
        the squared distance to the float block's output on the other eighth under changes of light and noise. It is
        found once and serves all blocks; random numbers go on as if it had not been asked.
        """
        whole = self.shard
        try:
            with torch.random.fork_rng(_devices(self.model)):
                return self._pilots(blocks, schedule)
        finally:
            self.shard = whole

    def _pilots(self, blocks, schedule):
        block = pilot_of(blocks)
        seen, held = self._parts(block)
        if self.shard is not None:
            self.shard = Shard(self.shard.team, max(1, self.shard.total * 7 // 8))
        quick = replace(schedule, steps=max(1, schedule.steps // PILOT_PART))
        start, errors = Learned(self.model), {}
        chosen = self.pem
        for strength in STRENGTHS:
            self.pem = replace(chosen, strength=strength)
            learner = BlockLearner(self.model, block, quick, self.bases(block, seen[0]), self.shard)
            self._mitigate(block, seen[0], *seen)
            learner.learn(seen[0], *seen, self._added_mitigation)
            learner.harden(seen[0])
            errors[strength] = self._error(block, *held)
            start.restore()
        best = min(errors, key=errors.get)
        self.pem = replace(chosen, strength=best if errors[best] <= (1 - _MARGIN) * errors[0.0] else 0.0)
        return {"strength": self.pem.strength, "pilot": block.name, "errors": errors, "pilot_steps": quick.steps}

    @torch.no_grad()
    def _error(self, block, x, target):
        """Return how far the block is from its target, over all images held out."""
        error = squared_distance(run_block(self.model, block, x), target).item() if len(x) else 0.0
        return error if self.shard is None else self.shard.mean(error * len(x), len(x))

    @torch.no_grad()
    def _parts(self, block):
        """Return (inputs, outputs) of the float block on images as they are, and on other, perturbed ones."""
        generator = torch.Generator().manual_seed(0)
        view = [change_images(e, lambda x: add_noise(change_light(x, generator), generator)) for e in self.inputs]
        both = (self.inputs, view) if self.shard is None else map(self.shard.entries, (self.inputs, view))
        with disabled(self.model):
            clean, moved = (
                torch.cat([block_input(self.model, block, e, self.forward)[0] for e in entries]) for entries in both
            )
            total, each = len(clean), 1
            if self.shard is not None:
                total, each = self.shard.total, len(clean) // self.shard.count
            seen = max(1, total * 7 // 8)
            cut = (seen if self.shard is None else self.shard.below(seen)) * each
            held = moved[cut:] if seen < total else moved
            return tuple((x, run_block(self.model, block, x) if len(x) else x) for x in (clean[:cut], held))

    def _run(self, block, quantised, floats):
        return lambda coded: run_block(self.model, block, quantised if coded else floats)


def pilot_of(blocks: list[Block]) -> Block:
    """Pick the block on which strengths are tried: the middle one."""
    return blocks[len(blocks) // 2]


def _devices(model):
    device = device_of(model)
    return [device] if device.type == "cuda" else []


def _products(model, block):
    found = {}
    for name, module in zip(block.modules, block.resolve(model), strict=True):
        for inner, part in module.named_modules():
            if isinstance(part, QuantMatMul):
                found[f"{name}.{inner}".strip(".")] = part
    return found
