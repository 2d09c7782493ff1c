"""What the blocks cost in relation to one another: in a pass of the float model, or in steps that are undone."""

import torch
from torch import nn

from .batches import Forward, call
from .blocks import Block
from .blockwise import BlockLearner, Schedule
from .caching import BlockCache
from .learning import Learned, generators, set_generators
from .pacing import now
from .quantizers import disabled
from .surgery import device_of

__all__ = ["block_costs", "step_costs"]


@torch.no_grad()
def block_costs(
    model: nn.Module, blocks: list[Block], entry: object, forward: Forward | None, schedule: Schedule | None = None
) -> dict[str, float]:
    """Time every block in one pass of the float model, which goes for any schedule.

    Returns:
        Block to its share of the sum, never 0.
    """
    begun, taken, hooks = {}, {}, []

    def begin(name):
        def note(*_):
            begun.setdefault(name, now())

        return note

    def end(name):
        def note(*_):
            if name in begun:
                taken.setdefault(name, now() - begun[name])

        return note

    for block in blocks:
        modules = block.resolve(model)
        hooks.append(modules[0].register_forward_pre_hook(begin(block.name)))
        hooks.append(modules[-1].register_forward_hook(end(block.name)))
    try:
        with disabled(model):
            call(model, entry, forward)
    finally:
        for hook in hooks:
            hook.remove()
    total = sum(taken.values()) or 1.0
    return {block.name: max(taken.get(block.name, 0.0) / total, 1e-3 / len(blocks)) for block in blocks}


def step_costs(
    model: nn.Module, blocks: list[Block], entry: object, forward: Forward | None, schedule: Schedule
) -> dict[str, float]:
    """Time a step of every block, on the images of one entry; the model and the random numbers stay as they are.

    Returns:
        Block to the seconds of a step, never 0.
    """
    device, found = device_of(model), {}
    cache, state, drawn = BlockCache(model, [entry], forward), Learned(model), generators(device)
    for block in blocks:
        given = cache.advance(block)
        learner, seconds = BlockLearner(model, block, schedule), []
        learner.learn(*given, plan=lambda taken, seconds=seconds: seconds.append(taken) or 0)
        found[block.name] = max([*seconds, 1e-6])
        state.restore()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_generators(device, drawn)
    return found
