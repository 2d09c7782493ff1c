"""Find the reconstruction blocks of any CNN or ViT, and prove them by running.

Source of the idea that the block is the unit to rebuild: Li et al., BRECQ, arXiv:2102.05426, section 3.2.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from .batches import Forward, call
from .partition import Piece, partition
from .surgery import evaluating
from .tracing import Trace, fitted, leaves, swap, trace

__all__ = ["Block", "Blocks", "block_input", "find_blocks", "run_block"]

_LAYERS = (nn.Linear, nn.Conv2d)


class _Here:
    """Marks the place of the activation among the arguments of a call."""


@dataclass(frozen=True)
class Block:
    """Modules that turn one activation into one activation and hold at least one layer.

    Attributes:
        name: The module's dotted name, or "first..last" for a run; "model" for the whole model.
        modules: Dotted names; they run in this order, each on the result of the one before.
        layers: Dotted names of the linear and convolution layers inside, in the order in which they run.
        chained: The input is the very tensor that the block before returned.
        inplace: The block writes into its input; `run_block` gives it a copy.
        source: Place of the activation among the tensors that the first module is called with.
        result: Place of the activation among the tensors that the last module returns.
        extras: The (args, kwargs) that the first module was called with, the activation's place marked.
    """

    name: str
    modules: tuple[str, ...]
    layers: tuple[str, ...]
    chained: bool
    inplace: bool = False
    source: int = 0
    result: int = 0
    extras: tuple[tuple, dict] = field(default=((_Here,), {}), repr=False, compare=False)

    def resolve(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Look the modules up in `model`."""
        return tuple(model.get_submodule(name) for name in self.modules)


class Blocks(list[Block]):
    """The blocks in the order in which they run; printed as a table.

    Attributes:
        idle: Names of the linear and convolution layers that did not run and so are in no block.
    """

    def __init__(self, blocks: list[Block], idle: tuple[str, ...]):
        super().__init__(blocks)
        self.idle = idle

    def __repr__(self) -> str:
        width = max([len(block.name) for block in self], default=0)
        rows = [
            f"{block.name:<{width}}  {len(block.layers):>3} layers{'  chained' if block.chained else ''}"
            for block in self
        ]
        return "\n".join([*rows, *([f"never run: {', '.join(self.idle)}"] if self.idle else [])])


class _Reached(BaseException):
    """Ends a forward pass early; not an `Exception`, so that no model catches it."""


def find_blocks(model: nn.Module, example: object = None, forward: Forward | None = None) -> Blocks:
    """Find the blocks that post-training reconstruction rebuilds one by one.

    A residual or transformer block is one block, a plain sequence is cut before each layer; every layer that runs is
    in exactly one. The model runs once under a recorder and once more to check that every block, alone, returns
    exactly what it returned in the model; one that does not is joined with its surroundings.

    Args:
        model: Float or prepared (layers that subclass nn.Linear or nn.Conv2d); left as it was.
        example: A batch: a tensor, a tuple whose first item is one, or a dict of keyword arguments. None draws
            a random image of the model's own input size, or of 224 or 32 pixels.
        forward: Called with model and batch instead of ``model(batch)``.

    Returns:
        The blocks, with the layers that never ran in `.idle`.

    Raises:
        ValueError: No input is given and none of the usual sizes runs, or no layer runs, or a layer runs twice and
            no single module encloses both runs.
    """
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        batch, watch = _trace(model, example, forward)
        blocks = _proven(model, batch, forward, watch)
    ran = {layer for block in blocks for layer in block.layers}
    layers = [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    return Blocks(blocks, tuple(name for name in layers if name not in ran))


def run_block(
    model: nn.Module, block: Block, x: torch.Tensor, extras: tuple[tuple, dict] | None = None
) -> torch.Tensor:
    """Run one block by itself.

    Args:
        model: The model that the block was found in, or one with the same module names.
        block: From `find_blocks`.
        x: The block's input; never written to.
        extras: What else the first module is called with: from `block_input`, or (args, kwargs) that follow the
            activation. None takes `block.extras`, what was expanded along the batch fitted to `x`.

    Returns:
        The block's output.
    """
    first, *others = block.resolve(model)
    x = x.clone() if block.inplace else x
    given = fitted(block.extras, len(x)) if extras is None else extras
    args, kwargs = swap(given, _Here, x)
    result = first(*args, **kwargs) if _open(given) else first(x, *args, **kwargs)
    for module in others:
        result = module(result)
    return _pick(result, block)


def _open(tree: object) -> bool:
    if isinstance(tree, dict):
        return any(_open(item) for item in tree.values())
    return any(_open(item) for item in tree) if isinstance(tree, list | tuple) else tree is _Here


def _pick(result: object, block: Block) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else list(leaves(result))[block.result]


def block_input(
    model: nn.Module, block: Block, batch: object, forward: Forward | None = None
) -> tuple[torch.Tensor, tuple[tuple, dict]]:
    """Run the model without gradients up to a block, and return what the block is given.

    Args:
        model: In the mode in which it is to run.
        block: From `find_blocks`.
        batch: As for `find_blocks`.
        forward: As for `find_blocks`.

    Returns:
        The block's input, and whatever else its first module is called with.

    Raises:
        ValueError: The model ended without reaching the block.
    """
    found = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(_take(block, args, kwargs))
        raise _Reached

    hook = model.get_submodule(block.modules[0]).register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with torch.no_grad():
            call(model, _entry(batch), forward)
    except _Reached:
        return found[0]
    finally:
        hook.remove()
    raise ValueError(f"block_input: the model must run {block.name}, got a pass that ended without it; check forward")


def _take(block: Block, args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple[tuple, dict]]:
    x = list(leaves((args, kwargs)))[block.source]
    return x, swap((args, kwargs), x, _Here)


def _entry(batch: object) -> object:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _trace(model: nn.Module, example: object, forward: Forward | None) -> tuple[object, Trace]:
    if example is not None:
        entry = _entry(example)
        return entry, trace(model, entry, lambda: call(model, entry, forward), _LAYERS)
    tried = []
    for image in _images(model):
        tried.append(f"{tuple(image.shape)}")
        try:
            return image, trace(model, image, lambda image=image: call(model, image, forward), _LAYERS)
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            reason = error
    raise ValueError(
        f"find_blocks: the model must run on an example, got none and failed on {', '.join(tried)}; "
        "pass example=a batch that it accepts"
    ) from reason


def _images(model: nn.Module) -> Iterator[torch.Tensor]:
    preset = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    known = [
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(getattr(model, "config", None), "image_size", None),
        getattr(model, "image_size", None),
        preset["input_size"][1:] if isinstance(preset, Mapping) and "input_size" in preset else None,
    ]
    sizes = [(side, side) if isinstance(side, int) else tuple(side) for side in known if side]
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    generator = torch.Generator().manual_seed(0)
    for size in dict.fromkeys([*sizes, (224, 224), (32, 32)]):
        yield torch.randn(1, channels, *size, generator=generator).to(weight)


def _proven(model: nn.Module, batch: object, forward: Forward | None, watch: Trace) -> list[Block]:
    rejected: set[tuple[str, ...]] = set()
    while True:
        pieces, rest = partition(watch, rejected)
        if rest:
            raise ValueError(
                f"find_blocks: every layer must be in one module that runs once and passes one activation on, got "
                f"{', '.join(rest)} outside of such; wrap what shares or skips it in a module of its own"
            )
        if not pieces:
            wanted = "find_blocks: the model must run a Linear or Conv2d layer"
            raise ValueError(f"{wanted}, got none in {type(model).__name__}; there is nothing to rebuild")
        proof = _Proof(model, _blocks(pieces))
        proof.run(lambda: call(model, batch, forward))
        if not proof.failed:
            return proof.blocks
        rejected |= proof.failed


def _blocks(pieces: list[Piece]) -> list[Block]:
    blocks, before = [], None
    for piece in pieces:
        source, result = piece.calls[0].source, piece.calls[-1].result
        chained = before is not None and before.same(source)
        blocks.append(Block(_title(piece), piece.names, piece.layers, chained, False, source.index, result.index))
        before = result
    return blocks


def _title(piece: Piece) -> str:
    first, last = piece.names[0], piece.names[-1]
    if first == last:
        return first or "model"
    parent, _, child = last.rpartition(".")
    return f"{first}..{child}" if first.rpartition(".")[0] == parent else f"{first}..{last}"


class _Proof:
    """One pass in which each block, as it ends, is run again alone and compared."""

    def __init__(self, model: nn.Module, blocks: list[Block]):
        self.model, self.blocks = model, blocks
        self.failed: set[tuple[str, ...]] = set()
        self._at = 0
        self._given: tuple[torch.Tensor, tuple[tuple, dict]] | None = None
        self._alone = False

    def run(self, forward: Callable[[], object]) -> None:
        hooks = []
        for name in {name for block in self.blocks for name in (block.modules[0], block.modules[-1])}:
            module = self.model.get_submodule(name)
            hooks += [
                module.register_forward_pre_hook(partial(self._begin, name), prepend=True, with_kwargs=True),
                module.register_forward_hook(partial(self._end, name)),
            ]
        try:
            forward()
        finally:
            for hook in hooks:
                hook.remove()
        self.failed |= {block.modules for block in self.blocks[self._at :]}

    def _begin(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._alone and self._at < len(self.blocks) and name == self.blocks[self._at].modules[0]:
            x, extras = _take(self.blocks[self._at], args, kwargs)
            self._given = x.clone(), extras

    def _end(self, name: str, module: nn.Module, args: tuple, result: object) -> None:
        if not self._alone and self._given and name == self.blocks[self._at].modules[-1]:
            self._compare(result)

    def _compare(self, result: object) -> None:
        block, (x, extras) = self.blocks[self._at], self._given
        version, self._alone = x._version, True
        again = run_block(self.model, block, x, extras)
        self._alone, self._given = False, None
        expected = _pick(result, block)
        if again.shape != expected.shape or not bool(((again == expected) | (again != again)).all()):
            self.failed.add(block.modules)
        self.blocks[self._at] = replace(block, inplace=x._version != version, extras=extras)
        self._at += 1
