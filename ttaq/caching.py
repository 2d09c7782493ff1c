"""What reconstruction keeps of a block: its inputs in the quantised and in the float model, and its targets."""

import torch
from torch import Tensor, nn

from .batches import Forward
from .blocks import Block, block_input, run_block
from .quantizers import disabled


class BlockCache:
    """Inputs and targets of the block at hand, advanced block by block where the blocks follow one another.

    Args:
        model: Its quantisers are switched off for what belongs to the float model.
        inputs: Entries of `collect`.
        forward: Runs the model on one entry.
    """

    def __init__(self, model: nn.Module, inputs: list, forward: Forward | None):
        self.model, self.inputs, self.forward = model, inputs, forward
        self.previous: Block | None = None
        self.quantised = self.floats = self.targets = None

    @torch.no_grad()
    def advance(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Return (input from the quantised prefix, input from the float prefix, float output) of all images."""
        if block.chained and self.previous not in (None, block):
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
    def run(self, block: Block, x: Tensor, size: int = 128) -> Tensor:
        """Run one block over all images in pieces."""
        return torch.cat([run_block(self.model, block, part) for part in x.split(size)])

    def _capture(self, block):
        return torch.cat([block_input(self.model, block, entry, self.forward)[0] for entry in self.inputs])
