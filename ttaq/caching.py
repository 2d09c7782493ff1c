"""What reconstruction keeps of a block: its inputs in the quantised and in the float model, and its targets."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .batches import Forward, count
from .blocks import Block, block_input, run_block
from .distances import squared_distance
from .quantizers import disabled
from .sharding import Shard
from .stores import Room, rows
from .surgery import device_of

_PIECE, _ROOM = 128, 2**23  # rows that run at once, and bytes of them: a block's inside is a dozen times as large


class BlockCache:
    """Inputs and targets of the block at hand, advanced block by block where the blocks follow one another.

    Three tensors are kept and no more: while a block follows another, what the last one no longer needs gives room to
    the next. An advance that failed half-way may be asked for again.

    Args:
        model: Its quantisers are switched off for what belongs to the float model.
        inputs: Entries of `collect`.
        forward: Runs the model on one entry.
        budget: Bytes that may lie on the device, as in `stores.Room`.
        shard: Keeps this process's images alone; losses are still those over all images.
    """

    def __init__(
        self, model: nn.Module, inputs: list, forward: Forward | None, budget: int | None = None,
        shard: Shard | None = None,
    ):  # fmt: skip
        self.model, self.forward, self.shard = model, forward, shard
        self.inputs = inputs if shard is None else shard.entries(inputs)
        device = device_of(model)
        self.room = Room(device, budget, shard.team.size if shard and device.type == "cpu" else 1)
        self.previous: Block | None = None  # the last whose targets are there
        self._entered: Block | None = None  # the last whose inputs are
        self.quantised = self.floats = self.targets = None

    @torch.no_grad()
    def advance(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Return (input from the quantised prefix, input from the float prefix, float output) of all images.

        Each lies on the model's device or, beyond the budget, outside: `stores.rows` takes images from both.
        """
        if self._entered != block:
            self._enter(block)
        if self.previous != block:
            spare, self.targets = self.targets, None
            with disabled(self.model):
                self.targets = self._keep(len(self.floats), self._outputs(block, self.floats), spare)
            self.previous = block
        return self.quantised, self.floats, self.targets

    def _enter(self, block):
        """Have the inputs of a block; what is spare lies at `targets`."""
        if block.chained and self.previous is not None and self._entered == self.previous:
            ready = self._keep(len(self.quantised), self._outputs(self.previous, self.quantised), self.floats)
            self.quantised, self.floats, self.targets = ready, self.targets, self.quantised
        else:
            self.quantised = self.floats = self.targets = None
            total = sum(count(entry) for entry in self.inputs)
            self.quantised = self._keep(total, self._capture(block))
            with disabled(self.model):
                self.floats = self._keep(total, self._capture(block))
        self._entered = block

    @torch.no_grad()
    def run(self, block: Block, x: Tensor) -> Iterator[Tensor]:
        """Run one block over all images, and give the output of one piece after the other."""
        size = _piece(x)
        for start in range(0, len(x), size):
            yield run_block(self.model, block, rows(x, slice(start, start + size), self.room.device))

    def loss(self, block: Block) -> float:
        """Return how far a block's outputs on the quantised prefix are from its targets, see `squared_distance`."""
        total, at = 0.0, 0
        for output in self.run(block, self.quantised):
            target = rows(self.targets, slice(at, at + len(output)), output.device)
            total, at = total + squared_distance(output, target) * len(output), at + len(output)
        return round((total / at).item() if self.shard is None else self.shard.mean(total, at), 6)

    def shrink(self) -> bool:
        """Move part of what is on the device outside; say whether there was any."""
        if not self.room.shrink():
            return False
        for name in ("floats", "targets", "quantised"):
            if getattr(self, name) is not None:
                setattr(self, name, self.room.move(getattr(self, name)))
        return True

    def _capture(self, block):
        for entry in self.inputs:
            yield count(entry), block_input(self.model, block, entry, self.forward)[0]

    def _outputs(self, block, x):
        size = _piece(x)
        for start, part in zip(range(0, len(x), size), self.run(block, x), strict=True):
            yield min(size, len(x) - start), part

    def _keep(self, total, parts, spare=None):
        """Write pieces one after the other into one tensor: `spare`, where they fit it.

        Args:
            total: How many there are of what the pieces come from.
            parts: Pairs of (how many a piece comes from, the piece); a module may see several rows an image.
        """
        kept, at = None, 0
        for given, part in parts:
            if kept is None:
                wanted = max(total * len(part) // given, len(part))
                kept = spare if _fits(spare, part, wanted) else None
                spare = None
                kept = self.room.empty(wanted, part) if kept is None else kept
            if at + len(part) > len(kept):
                kept, old = self.room.empty(max(2 * len(kept), at + len(part)), part), kept
                kept[:at] = old[:at]
            kept[at : at + len(part)] = part
            at += len(part)
        return kept if at == len(kept) else kept[:at]


def _piece(x):
    """Choose how many rows run at once."""
    return max(1, min(_PIECE, _ROOM * len(x) // max(1, x.numel() * x.element_size())))


def _fits(spare, part, total):
    return (
        spare is not None
        and (spare.shape, spare.dtype) == ((total, *part.shape[1:]), part.dtype)
        and spare[:1].stride() == part[:1].stride()
    )
