"""Learn one block: its roundings and its activation scales, so that it repeats its float output.

Source: Li et al., BRECQ, arXiv:2102.05426 (blocks); Wei et al., QDrop, arXiv:2203.05740 (dropping quantisation while
learning); Nagel et al., arXiv:2004.10568 (learned rounding).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from .batches import pieces
from .blocks import Block, run_block
from .distances import squared_distance
from .layers import QuantConv2d, QuantLinear
from .learning import activation_quantizers, adam, quant_layers
from .norms import batch_norms, live, measure_again
from .pacing import time_calls
from .quantizers import clamp_scales
from .schedules import ROUNDINGS, Schedule
from .sharding import Shard, Share
from .stepping import Captured, Curve, cosine, draws, mix, set_rates, steady, undone
from .stores import rows
from .surgery import device_of

Extra = Callable[[int, Tensor, Tensor, Tensor, list], Tensor | float]
"""What a step adds to the loss: called with the step, what the block was given, what it gave, the numbers of the images
and the roundings."""

Plan = Callable[[float], int]
"""Chooses the steps of a block by the seconds that one of them takes."""


class BlockLearner:
    """One block at work: begin its roundings, run the steps, decide the codes.

    Args:
        model: Its quantisers are ready.
        block: Of the model.
        schedule: Steps and rates.
        bases: Weights to round in place of the float ones, by layer; see `perturbation.precondition`.
        shard: Of this process, where several learn the block together on what each of them has of the images.
    """

    def __init__(
        self, model: nn.Module, block: Block, schedule: Schedule, bases: dict[str, Tensor] | None = None,
        shard: Shard | None = None,
    ):  # fmt: skip
        self.model, self.block, self.schedule, self.shard = model, block, schedule, shard
        self.share: Share | None = None  # of the batch at hand
        self.device = device_of(model)
        self.step, self.total = 0, schedule.steps
        self.factor: Tensor | float | None = None  # of the regulariser; a tensor where a graph reads it
        self.graphed, self.begun = False, time.perf_counter()
        self.error, self.curve = torch.zeros((), device=self.device), Curve(self.device)  # of the latest step, of all
        self.layers = layers_of(model, block)
        self.activations = activation_quantizers(block.resolve(model))
        self.norms = [n for m in block.resolve(model) for n in batch_norms(m)] if schedule.statistics == "batch" else []
        for name, layer in self.layers.items():
            quantizer, base = layer.weight_quantizer, (bases or {}).get(name, layer.weight)
            if base is not layer.weight:
                quantizer.fit(base)
            quantizer.codes = None
            quantizer.rounding = ROUNDINGS[schedule.rounding](base, quantizer)

    @property
    def roundings(self) -> list:
        """The roundings of the block's layers."""
        return [layer.weight_quantizer.rounding for layer in self.layers.values()]

    def learn(self, quantised: Tensor, floats: Tensor, targets: Tensor, extra: Extra | None = None, **options) -> None:
        """Run the steps: images at random, part of the input and of the activations left unquantised.

        Args:
            quantised: The block's inputs from the quantised prefix, all images.
            floats: Those from the float prefix.
            targets: The float block's outputs.
            extra: Adds to the loss of each step.
            options: `plan` and `graph` of `steps`.
        """
        for _ in self.steps(quantised, floats, targets, extra, **options):
            pass

    def steps(
        self,
        quantised: Tensor,
        floats: Tensor,
        targets: Tensor,
        extra: Extra | None = None,
        *,
        plan: Plan | None = None,
        graph: bool | None = False,
    ) -> Iterator[Tensor]:
        """Run one step of `learn` after the other, and give the loss of each, (), which holds until the next.

        Args:
            quantised: As in `learn`; each of the three may lie outside the device, see `stores.Room`.
            floats: As in `learn`.
            targets: As in `learn`.
            extra: As in `learn`.
            plan: Chooses the number of steps, in place of the schedule, once the first ones were timed and undone.
            graph: Replay the step as a CUDA graph; None where it is on a GPU and can be captured.
        """
        learned = self._learned()
        if not self.layers and not learned:
            return
        optimizer, rates = self._optimizers(learned)
        count = len(targets) if self.shard is None else self.shard.rows(targets)
        size = min(self.schedule.batch_size, count)

        def given(picked, on_host):
            picked, on_host = self._own(picked, on_host, targets)
            x, target = (rows(store, picked, self.device, on_host) for store in (quantised, targets))
            return picked, x, rows(floats, picked, self.device, on_host) if self.schedule.drop else None, target

        with self._dropping():
            run = self._step(optimizer, learned, extra)
            if plan or graph is not False:
                numbers = torch.arange(size)
                first = given(numbers.to(self.device), numbers)
            if graph is not False:
                run = self._captured(run, first, optimizer, graph)
            if plan:
                with undone(optimizer, self.device):
                    self.total = plan(time_calls(lambda: run(*first)))
            self.begun = time.perf_counter()
            for step, picks in enumerate(draws(count, size, self.total, self.device)):
                self._turn_to(step)
                set_rates(optimizer, [rate(step, self.total) for rate in rates])
                loss = run(*given(*picks))
                self.curve.add(step, self.total, self.error)
                yield loss

    def _own(self, picked, on_host, store):
        """Return the numbers of the images of a step, twice; those of this process where several work."""
        if self.shard is None:
            return picked, on_host
        self.share = self.shard.share(on_host, store, self.device)
        for quantizer in self.activations:
            quantizer.share = self.share
        return self.share.picked, self.share.on_host

    def _step(self, optimizer, learned, extra):
        """Return what runs one step, given the numbers of the images, their two inputs and their targets."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def run(picked, x, other, target):
            if other is not None:
                mix(x, other, self.schedule.drop, self.share)
            optimizer.zero_grad()
            loss = self._loss(x, target, picked, extra)
            loss.backward()
            loss = loss.detach()
            if self.shard is not None:
                loss = self.shard.team.add_up_gradients(parameters, loss)
            optimizer.step()
            clamp_scales(learned)
            return loss

        return run

    def _captured(self, run, first, optimizer, graph):
        """Return the step as a graph; where it cannot be captured and need not, as it is."""
        self.factor = torch.zeros((), device=self.device)
        try:
            captured = Captured(run, first, optimizer)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if graph:
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(
                    f"reconstruct: block {self.block.name} cannot be captured ({reason}); leave graph=None"
                ) from error
            self.factor = None
            return run
        self.graphed = True
        return captured

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        for quantizer in self.activations:
            quantizer.drop = self.schedule.drop
        try:
            yield
        finally:
            for quantizer in self.activations:
                quantizer.drop, quantizer.share = 0.0, None

    def harden(self, inputs: Tensor, size: int = 128) -> None:
        """Decide the codes; where batches brought their own statistics, measure the stored ones on `inputs`."""
        for layer in self.layers.values():
            layer.weight_quantizer.harden()
        measure_again(self.norms, self._passes(inputs, size), self._summed)

    def _passes(self, inputs, size):
        """Give what runs the block on one piece of the images after the other."""
        for piece in pieces(len(inputs) if self.shard is None else self.shard.rows(inputs), size):
            if self.shard is not None:
                self.share, piece = self.shard.part(piece, inputs, self.device)
            x = rows(inputs, piece, self.device)
            yield partial(run_block, self.model, self.block, x)

    @property
    def _summed(self):
        """Sum over the processes what those give that have a part of the batch."""
        if self.shard is None:
            return None
        return lambda sums: self.shard.team.summed(sums if self.share.weight else 0.0 * sums)

    def _loss(self, x, target, picked, extra):
        with live(self.norms, self._summed):
            with self._autocast():
                output = run_block(self.model, self.block, x)
            loss = squared_distance(output, target)
            self.error.copy_(loss.detach() if self.share is None else self.share.weight * loss.detach())
            if extra is not None:
                loss = loss + extra(self.step, x, output, picked, self.roundings)
        if self.factor is not None:
            loss = loss + self.factor * sum(r.penalty for r in self.roundings if r.penalty is not None)
        return loss if self.share is None else self.share.weight * loss  # the weights of all processes add up to 1

    def _autocast(self):
        if self.schedule.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.schedule.dtype))

    def _learned(self):
        """List the quantisers whose scales learn: those of activations, and under "ste" those of weights."""
        learned = [q for q in self.activations if q.spec.granularity == "tensor"]
        return learned + [m.weight_quantizer for m in self.layers.values() if self.schedule.rounding == "ste"]

    def _optimizers(self, learned):
        """Give one Adam, and for each of its groups what gives its rate at a step of so many.

        Roundings keep theirs, that of scales falls to 0 along a cosine.
        """
        schedule, groups, decays = self.schedule, [], []
        for layer in self.layers.values():
            quantizer = layer.weight_quantizer
            unit = 1.0 if schedule.rounding == "adaround" else quantizer.scale.mean().item()
            groups.append({"params": [quantizer.rounding.v], "lr": schedule.rounding_lr * unit})
            decays.append(schedule.rounding == "ste")
        for quantizer in learned:
            quantizer.scale.requires_grad_(True)
            groups.append({"params": [quantizer.scale], "lr": schedule.scale_lr * quantizer.scale.mean().item()})
            decays.append(True)
        kinds = [cosine if decay else steady for decay in decays]
        rates = [kind(group["lr"]) for kind, group in zip(kinds, groups, strict=True)]
        return adam(groups, capturable=self.device.type == "cuda"), rates

    def _turn_to(self, step):
        """Set what depends on the step: the regulariser, which begins after the warm-up, and how sharp it is."""
        self.step, schedule = step, self.schedule
        done = (step / self.total - schedule.warmup) / max(1 - schedule.warmup, 1e-9)
        if schedule.rounding == "adaround":
            for rounding in self.roundings:
                rounding.beta.fill_(20.0 if done < 0 else 2 + 18 * max(0.0, 1 - done))
        factor = schedule.penalty if done >= 0 else 0.0
        if isinstance(self.factor, Tensor):
            self.factor.fill_(factor)
        else:
            self.factor = factor if done >= 0 else None


def layers_of(model: nn.Module, block: Block) -> dict[str, QuantLinear | QuantConv2d]:
    """Name the block's layers whose weights are quantised, in the order in which they run."""
    named = quant_layers(model)
    return {n: named[n] for n in block.layers if n in named and named[n].weight_quantizer is not None}
