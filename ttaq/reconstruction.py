"""reconstruct: learn roundings and activation scales block by block, so that each block repeats its float output.

Source: Li et al., BRECQ, arXiv:2102.05426 (blocks); Wei et al., QDrop, arXiv:2203.05740 (dropping quantisation while
learning); Nagel et al., arXiv:2004.10568 (learned rounding).
"""

import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import nn

from .batches import Forward, call, collect, count, take
from .blocks import Block, find_blocks
from .blockwise import BlockLearner, Schedule
from .caching import BlockCache
from .consistency import PCR
from .costs import block_costs, step_costs
from .distributed import Team
from .learning import (
    Learned,
    check_ready,
    frozen,
    generators,
    learned_in,
    progress_bar,
    quant_layers,
    restored_on_failure,
    seeded,
    set_generators,
    settings,
)
from .objectives import PILOT_PART, Objectives, pilot_of
from .pacing import MOST, PILOT, Deadline, Pace, steps_of
from .perturbation import PEM
from .quantizers import Quantizer, disabled
from .resuming import Savepoint, identity
from .sharding import Shard
from .stores import bytes_of, give_back
from .surgery import device_of, evaluating


def reconstruct(
    model: nn.Module,
    batches: Iterable,
    *,
    schedule: Schedule | None = None,
    pem: PEM | None = None,
    pcr: PCR | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    budget: str | float | Deadline | None = None,
    cache: str | int | None = None,
    resume: str | os.PathLike | None = None,
    graph: bool | None = None,
    team: Team | None = None,
    **options,
) -> dict:
    """Learn, for each block in turn, the roundings of its weights and the scales of its activations.

    ``loss = |f_q(x) - f(x_float)|^2 + penalty + PEM + PCR``, x the output of the quantised prefix mixed with that of
    the float one.

    Args:
        model: A calibrated model; its quantisers are changed in place, its float weights are not.
        batches: A re-iterable of tensors, (x, y) pairs or dicts; 1,024 images are usual.
        schedule: Steps, rates and the like; or give them one by one as `options`.
        pem: Regularise the weights against perturbations (`perturbation`); without a strength of its own the rule
            chooses it on images held out (`Objectives.choose_strength`).
        pcr: Make each block consistent under perturbation (`consistency`).
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.
        progress: Show a bar.
        budget: Time to take, "90s", "5min", "1h" or seconds: a step of each block is timed, and all get the same number
            as far as these times hold, at least `pacing.FEWEST` and at most `steps`. The clock decides, so another run
            gets other steps; give `steps=report` to repeat this one.
        cache: Bytes of a block's inputs and targets that may lie on the device, "2GiB" or a number; the others lie in
            pinned host memory or, on the CPU, in a temporary file. None for half of what is free.
        resume: A file, or a folder for one, that is written after each block; a run that finds it goes on from there
            and ends with the same bits.
        graph: Replay each block's step as a CUDA graph; None where the model is on a GPU and the step can be captured.
        team: Learn together with other processes, see `distributed.join`: each holds its share of the images alone.
        options: Fields of Schedule. `steps` may also be steps by block, or the report of a run to repeat.

    Returns:
        `model.ttaq_report`, with "blocks" (error before, after, and as "curve" in between, steps, seconds), "sqnr" (dB
        of each layer), and under "pem" how the strength was chosen.

    Raises:
        ValueError: The model is not calibrated, or the images or the file to resume from do not serve; the model is
            then as it was.
    """
    start, deadline = time.perf_counter(), Deadline.of(budget)
    given = steps_of(options.pop("steps")) if isinstance(options.get("steps"), Mapping) else None
    if given and deadline:
        raise ValueError("reconstruct: give steps by block or a budget, not both")
    if deadline and schedule is None:
        options = {"steps": MOST} | options
    schedule = settings("reconstruct", Schedule, schedule, options)
    check_ready("reconstruct", model)
    device = device_of(model)
    if graph and device.type != "cuda":
        raise ValueError(f"reconstruct: graph=True needs the model on a GPU, it is on {device.type}; leave graph=None")
    if graph and pcr and pcr.strength:
        raise ValueError("reconstruct: graph=True cannot hold PCR in blocks, whose steps differ; leave graph=None")
    if graph and team:
        raise ValueError("reconstruct: graph=True cannot hold a team's shares, whose sizes differ; leave graph=None")
    inputs = collect("reconstruct", batches, device)
    shard = Shard(team, sum(map(count, inputs))) if team else None
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        frozen(model),
        restored_on_failure(model),
        seeded(schedule.seed, device),
    ):
        blocks = find_blocks(model, take(inputs[0], slice(0, 2)), forward)
        objectives = Objectives(model, inputs, forward, pem, pcr, shard)
        kept = BlockCache(model, inputs, forward, None if cache is None else bytes_of(cache), shard)
        loop = _Loop(model, blocks, kept, objectives, schedule)
        loop.given, loop.shard = given, shard
        loop.graph = graph if device.type == "cuda" and objectives.steady and not team else False
        some = take(inputs[0], slice(-(-schedule.batch_size // (team.size if team else 1))))
        loop.costs = (step_costs if deadline else block_costs)(model, blocks, some, forward, schedule)
        if resume is not None:
            belongs = identity(model, inputs, schedule, pem=pem, pcr=pcr, steps=given)
            loop.savepoint = Savepoint(resume, model, belongs)
        loop.run(deadline, progress and (not team or team.leads))
        sqnr = layer_sqnr(model, inputs[0], forward)
    report = model.ttaq_report = getattr(model, "ttaq_report", {})
    report |= {"blocks": loop.rows, "schedule": asdict(schedule), "sqnr": sqnr}
    report |= {"pem": pem and asdict(pem) | loop.rule, "pcr": pcr and asdict(pcr)}
    if deadline:
        taken = round(time.perf_counter() - start, 3)
        report["budget"] = {"seconds": deadline.seconds, "taken": taken, "enough": not deadline.missed}
    return report


class _Loop:
    """The blocks of one reconstruction, learned one after the other."""

    def __init__(self, model, blocks: list[Block], cache: BlockCache, objectives: Objectives, schedule: Schedule):
        self.model, self.blocks, self.cache, self.objectives, self.schedule = model, blocks, cache, objectives, schedule
        self.rows, self.rule = [], {}
        self.given: dict[str, int] | None = None
        self.graph: bool | None = False
        self.costs: dict[str, float] = {}
        self.savepoint: Savepoint | None = None
        self.shard: Shard | None = None
        self.pace: Pace | None = None

    def run(self, deadline: Deadline | None, progress: bool) -> None:
        """Learn every block that a savepoint does not have; leave what is reported in `rows` and `rule`."""
        if self.given and (missing := [b.name for b in self.blocks if b.name not in self.given]):
            raise ValueError(f"reconstruct: steps has no number for {', '.join(missing)}; give one for each block")
        self.pace = Pace(deadline, self.costs, self.schedule.steps) if deadline else None
        done = self._resume(deadline)
        if self.pace and self.graph is False:  # a captured step is faster than the one that was timed
            self.pace.open("reconstruct")
        if not done and self.objectives.pem and self.objectives.pem.strength is None:
            self.rule = self._choose_strength()
        with progress_bar(progress, whole=True) as bar:
            task = bar.add_task("reconstruct", total=sum(self.costs.values()))
            for i, block in enumerate(self.blocks[done:], done):
                before = sum(self.costs[b.name] for b in self.blocks[:i])
                name = f"reconstruct {block.name} ({i + 1} of {len(self.blocks)})"
                show = partial(self._show, bar, task, before, self.costs[block.name])
                bar.update(task, description=name, completed=before)
                self.rows.append(self._learned(block, show))
                if self.savepoint and (not self.shard or self.shard.team.leads):
                    self.savepoint.write(self.rows, self.rule)
        if self.pace:
            self.pace.close("reconstruct", len(self.blocks))

    @staticmethod
    def _show(bar, task, before, cost, share):
        bar.update(task, completed=before + share * cost)

    def _resume(self, deadline):
        """Take over what a savepoint has, if there is one; return how many blocks that is."""
        if self.savepoint is None:
            return 0
        self.rows, self.rule = self.savepoint.read()
        done = len(self.rows)
        if self.shard and done != self.shard.team.choose(done):
            raise ValueError(f"resume: rank {self.shard.team.rank} sees another {self.savepoint.path} than rank 0")
        if self.rule:
            self.objectives.pem = replace(self.objectives.pem, strength=self.rule["strength"])
        if deadline:
            deadline.spend(sum(row["seconds"] for row in self.rows))
            for row in self.rows:
                self.pace.end(row["name"], 0.0, 0.0)
        if 0 < done < len(self.blocks):  # the same passes as before, from where a block last began anew
            begin = max(i for i in range(done) if i == 0 or not self.blocks[i].chained)
            for block in self.blocks[begin:done]:
                self.cache.advance(block)
                self.objectives.follow(block)
        return done

    def _steps(self, name):
        """Choose the steps of a block by the clock: that of the first process, where several work."""
        chosen = self.pace.steps(name)
        return int(self.shard.team.choose(chosen)) if self.shard else chosen

    def _choose_strength(self):
        schedule = self.schedule
        if self.given:
            steps = self.given.get(PILOT) or sum(self.given.values()) // len(self.given) // PILOT_PART
            schedule = replace(schedule, steps=PILOT_PART * max(1, steps))
        elif self.pace:
            schedule = replace(schedule, steps=self._steps(pilot_of(self.blocks).name))
        return self.objectives.choose_strength(self.blocks, schedule)

    def _learned(self, block, show):
        """Learn one block, again with a smaller cache where memory runs out; return its row of the report."""
        device, retries = device_of(self.model), 0
        state, drawn = Learned(self.model), generators(device)
        while True:
            try:
                return self._learn(block, show) | ({"retries": retries} if retries else {})
            except torch.OutOfMemoryError as error:
                if self.shard or not self.cache.shrink():
                    error.add_note(f"reconstruct: {block.name} does not fit beside an empty cache; lower batch_size")
                    raise
            state.restore()
            set_generators(device, drawn)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            retries += 1
            warnings.warn(
                f"reconstruct: memory ran out at block {block.name}; it is learned again with a cache of at most "
                f"{self.cache.room.budget / 2**20:.3g} MiB on the device, which changes nothing but the time",
                stacklevel=2,
            )

    def _learn(self, block, show):
        start = time.perf_counter()
        give_back()
        quantised, floats, targets = self.cache.advance(block)
        before = self.cache.loss(block)
        give_back()
        schedule, plan = self.schedule, None
        if self.given:
            schedule = replace(schedule, steps=max(1, self.given[block.name]))
        elif self.pace:
            schedule = replace(schedule, steps=self._steps(block.name))
            plan = partial(self.pace.steps, block.name) if self.graph is not False else None
        learner = BlockLearner(self.model, block, schedule, self.objectives.bases(block, floats), self.shard)
        self.objectives.begin(block, quantised, floats, targets)
        steps = 0
        for _ in learner.steps(quantised, floats, targets, self.objectives, plan=plan, graph=self.graph):
            steps += 1
            show(steps / learner.total)
        learning = time.perf_counter() - learner.begun
        give_back()
        learner.harden(quantised)
        if self.shard:
            self.shard.team.agree("reconstruct", f"block {block.name}", learned_in(block.resolve(self.model)))
        after = self.cache.loss(block)
        seconds = round(time.perf_counter() - start, 3)
        if self.pace:
            self.pace.end(block.name, seconds, learning)
        row = {"name": block.name, "layers": list(block.layers), "before": before, "after": after}
        curve = learner.curve.read(self.shard and self.shard.team)
        row |= {"steps": steps, "seconds": seconds} | ({"curve": curve} if curve else {})
        return row | ({"graph": True} if learner.graphed else {})


@torch.no_grad()
def layer_sqnr(model: nn.Module, entry, forward: Forward | None = None) -> dict[str, float]:
    """Measure each quantised layer alone: dB of its float output over its quantisation error, on float inputs."""
    found = {}

    def measure(name):
        def hook(layer, args, output):
            if name not in found:
                quantizers = [q for q in layer.modules() if isinstance(q, Quantizer)]
                for q in quantizers:
                    q.enabled = True
                error = (layer.forward(*args) - output).float().square().sum()
                for q in quantizers:
                    q.enabled = False
                signal = output.float().square().sum().item()
                found[name] = round(10 * math.log10(max(signal, 1e-30) / max(error.item(), 1e-30)), 2)

        return hook

    with disabled(model), evaluating(model):
        hooks = [layer.register_forward_hook(measure(name)) for name, layer in quant_layers(model).items()]
        try:
            call(model, entry, forward)
        finally:
            for hook in hooks:
                hook.remove()
    return found
