"""Small networks, images, and the check that blocks do what they promise."""

from collections import Counter

import torch
from torch import nn

from ttaq.blocks import block_input, run_block


def images(side=32, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def names(blocks):
    return [block.name for block in blocks]


def check(model, x, blocks, forward=None):
    """Every layer is in one block; each block repeats the model, from its own input and along the chain."""
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    held = Counter(layer for block in blocks for layer in block.layers)
    assert set(held) == layers - set(blocks.idle)
    assert set(held.values()) == {1}
    seen = {}

    def keep(module, args, result):
        result = result if isinstance(result, torch.Tensor) else next(iter(result.values()))
        seen.setdefault(module, result.clone())

    hooks = [block.resolve(model.eval())[-1].register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        model(x) if forward is None else forward(model, x)
        for hook in hooks:
            hook.remove()
        before = None
        for block in blocks:
            given, extras = block_input(model, block, x, forward)
            given = given.clone()
            if block.chained:
                assert torch.equal(before, given)
            before = run_block(model, block, given.clone(), extras)
            assert torch.equal(run_block(model, block, given), before)
            assert torch.equal(before, seen[block.resolve(model)[-1]])


class Net(nn.Module):
    """Parts by name; the forward pass is a function of them and the images."""

    def __init__(self, flow, **parts):
        super().__init__()
        self.flow = flow
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.flow(self, x)


def conv(width=3, groups=1):
    return nn.Conv2d(width, width, 3, padding=1, groups=groups)


def head():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
