"""What reconstruction keeps of a block: the inputs that reach it in the quantised and in the float model, and its target."""

import torch
from torch import Tensor

from .batches import call
from .blocks import Block, run_block
from .quantizers import disabled


class BlockCache:
    """Inputs and targets of the block at hand, advanced block by block where the blocks follow one another."""

    def __init__(self, model, inputs, forward):
        self.model, self.inputs, self.forward = model, inputs, forward
        self.previous: Block | None = None
        self.quantised = self.floats = self.targets = None
        self.extras = ((), {})

    @torch.no_grad()
    def advance(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Return (input from the quantised prefix, input from the float prefix, float output) of all images."""
        if block.chained and self.previous is not None:
            self.quantised = self.run(self.previous, self.quantised)
            self.floats = self.targets
        else:
            self.quantised = self._capture(block)
            with disabled(self.model):
                self.floats = self._capture(block)
        self.previous = block
        with disabled(self.model):
            self.targets = self.run(block, self.floats)
        return self.quantised, self.floats, self.targets

    @torch.no_grad()
    def run(self, block: Block, x: Tensor, size: int = 64) -> Tensor:
        """Run one block over all images in pieces."""
        return torch.cat([run_block(self.model, block, part, self.extras) for part in x.split(size)])

    def _capture(self, block):
        found = []
        first = self.model.get_submodule(block.modules[0]) if block.modules[0] else self.model

        def stop(module, args, kwargs):
            found.append(args[0])
            self.extras = (args[1:], kwargs)
            raise _Captured

        hook = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for entry in self.inputs:
                try:
                    call(self.model, entry, self.forward)
                except _Captured:
                    continue
        finally:
            hook.remove()
        return torch.cat(found)


class _Captured(Exception):
    """Ends a forward pass once the input of a block is known."""
