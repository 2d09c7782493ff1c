"""Watch one forward pass: which values flow, and where each module call begins and ends.

A value is what a storage holds between two writes: views of it are the same value, an in-place write makes a new
one. Only activations are followed, that is the inputs and what is computed from them; whatever comes from
parameters, buffers and shapes alone is constant. Time counts the operators that have run.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Call", "Port", "Trace", "fitted", "leaves", "swap", "trace"]

# These look at the shape of their argument alone.
_SHAPE_ONLY = frozenset(
    [
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_empty",
        "new_empty_strided",
        "new_zeros",
        "new_ones",
        "new_full",
    ]
)


@dataclass(eq=False)
class Value:
    """What one storage holds from the operator that wrote it, `birth`, to the last of its `reads`."""

    birth: int
    reads: list[tuple[int, int, int]] = field(default_factory=list)  # operator, first byte, byte after the last


@dataclass(frozen=True)
class Port:
    """The one activation that goes into or comes out of a call: its value, its place, the view it is."""

    value: Value
    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    span: tuple[int, int]

    def same(self, other: "Port") -> bool:
        """Tell whether the other end holds the very same elements in the same order."""
        return (self.value, self.shape, self.stride, self.span) == (
            other.value,
            other.shape,
            other.stride,
            other.span,
        )


@dataclass(eq=False)
class Call:
    """One call of a module; `source` and `result` are None unless there is exactly one activation."""

    name: str
    kind: type
    start: int
    layer: bool = False
    end: int = 0
    bare: bool = False  # called with one tensor and nothing else
    source: Port | None = None
    result: Port | None = None
    children: list["Call"] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)  # layers whose weight is read here without calling them


def leaves(tree: object) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from leaves(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves(item)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield from leaves([getattr(tree, part.name) for part in dataclasses.fields(tree)])


def swap(tree: object, old: object, new: object) -> object:
    """Return nested tuples, lists, dicts and dataclasses, kinds kept, with every `old` (by identity) made `new`."""
    if tree is old:
        return new
    if isinstance(tree, dict):
        twin = copy.copy(tree)
        for key, item in tree.items():
            twin[key] = swap(item, old, new)
        return twin
    if isinstance(tree, list | tuple):
        items = [swap(item, old, new) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = {part.name: getattr(tree, part.name) for part in dataclasses.fields(tree) if part.init}
        return dataclasses.replace(tree, **{name: swap(item, old, new) for name, item in parts.items()})
    return tree


def fitted(tree: object, count: int) -> object:
    """Expand what was expanded to the images of one batch, such as a class token, to those of another."""
    for tensor in list(leaves(tree)):
        if tensor.ndim and tensor.shape[0] not in (1, count) and tensor.stride(0) == 0:
            tree = swap(tree, tensor, tensor[:1].expand(count, *tensor.shape[1:]))
    return tree


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first, width = tensor.storage_offset(), tensor.element_size()
    return first * width, (first + reach + 1) * width


class Trace(TorchDispatchMode):
    """What happened in one forward pass: `root`, the outermost call, and which values are live when."""

    def __init__(self, weights: dict[tuple[int, int], list[str]]):
        super().__init__()
        self.time = 0
        self.root = Call("", object, 0)
        self.stack = [self.root]
        self._weights = weights
        self._values: dict[int, Value] = {}
        self._history: list[Value] = []
        self._kept: list[StorageWeakRef] = []  # an address cannot be given away again while it is referred to
        self._alive: list[set[Value]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func, args: tuple, kwargs: dict, result: object) -> None:
        now, self.time = self.time, self.time + 1
        tensors = list(leaves((args, kwargs)))
        for tensor in tensors:
            self._note_weight(tensor)
        if func.overloadpacket.__name__ in _SHAPE_ONLY:
            return
        active = [tensor for tensor in tensors if self.value_of(tensor)]
        written = [tensor for place in _written(func, args, kwargs) for tensor in leaves(place)]
        fresh = [tensor for tensor in leaves(result) if not self.value_of(tensor)]
        if not active or not (written or fresh):  # a constant, or nothing but a view
            return
        for tensor in active:
            self.value_of(tensor).reads.append((now, *_span(tensor)))
        for tensor in [*written, *fresh]:
            self.add(tensor)

    def _note_weight(self, tensor: torch.Tensor) -> None:
        owners = self._weights.get((tensor.untyped_storage()._cdata, tensor.storage_offset()), [])
        if owners and self.stack[-1].name not in owners:
            self.stack[-1].uses += owners

    def add(self, tensor: torch.Tensor) -> None:
        """Take what the tensor's storage holds from now on as a new value."""
        storage = tensor.untyped_storage()
        value = Value(self.time)
        self._values[storage._cdata] = value
        self._history.append(value)
        self._kept.append(StorageWeakRef(storage))

    def value_of(self, tensor: torch.Tensor) -> Value | None:
        """Return the value that the tensor shows now, None for a constant."""
        return self._values.get(tensor.untyped_storage()._cdata)

    def port(self, tree: object) -> Port | None:
        """Find the one activation among the tensors of `tree`; None when there are several or none."""
        found = [(index, tensor) for index, tensor in enumerate(leaves(tree)) if self.value_of(tensor)]
        if len({id(tensor) for _, tensor in found}) != 1:
            return None
        index, tensor = found[0]
        return Port(self.value_of(tensor), index, tensor.shape, tensor.stride(), _span(tensor))

    def finish(self, result: object) -> None:
        """Close the pass; what it returns and nobody consumed is read at the very end."""
        self.root.end = self.time + 1
        for tensor in leaves(result):
            value = self.value_of(tensor)
            if value and not any(when < self.time for when, _, _ in value.reads):
                value.reads.append((self.time, *_span(tensor)))
        self._alive = [set() for _ in range(self.time + 1)]
        for value in self._history:
            last = max((when for when, _, _ in value.reads), default=-1)
            for when in range(value.birth, last + 1):
                self._alive[when].add(value)

    def live(self, when: int, frame: Call) -> set[Value]:
        """Return the values made by `when` and read later, leaving out those that pass `frame` by."""
        return {
            value
            for value in self._alive[when]
            if value.birth > frame.start or any(when <= read < frame.end for read, _, _ in value.reads)
        }

    def enter(self, name: str, layer: bool, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Begin a call; with name and layer filled in, a forward pre-hook."""
        call = Call(name, type(module), self.time, layer, source=self.port((args, kwargs)))
        call.bare = not kwargs and len(args) == 1 and isinstance(args[0], torch.Tensor)
        self.stack[-1].children.append(call)
        self.stack.append(call)

    def leave(self, module: nn.Module, args: tuple, result: object) -> None:
        """End the innermost call; a forward hook."""
        call = self.stack.pop()
        call.end, call.result = self.time, self.port(result)


def _written(func, args: tuple, kwargs: dict) -> list[object]:
    marked = [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in marked]


def trace(
    model: nn.Module, example: object, run: Callable[[], object], layer_types: tuple[type[nn.Module], ...]
) -> Trace:
    """Run once and record it.

    Args:
        model: In eval mode; its modules are hooked while it runs.
        example: What `run` feeds to the model; its floating-point tensors are where activations begin.
        run: Calls the model, whole or in parts.
        layer_types: Classes that are looked at from outside only; they have a `weight`.

    Returns:
        The finished trace.
    """
    modules = [(name, module, isinstance(module, layer_types)) for name, module in model.named_modules()]
    inside = {part for _, module, layer in modules if layer for part in list(module.modules())[1:]}
    weights: dict[tuple[int, int], list[str]] = {}
    for name, module, layer in modules:
        made_anew = isinstance(getattr(type(module), "weight", None), property)  # its address is given away again
        if layer and module not in inside and not made_anew:
            key = (module.weight.untyped_storage()._cdata, module.weight.storage_offset())
            weights.setdefault(key, []).append(name)
    watch, hooks = Trace(weights), []
    for tensor in leaves(example):
        if tensor.is_floating_point():
            watch.add(tensor)
    for name, module, layer in modules:
        if module not in inside:
            before = partial(watch.enter, name, layer)
            hooks += [
                module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                module.register_forward_hook(watch.leave),
            ]
    try:
        with watch:
            result = run()
        watch.finish(result)
    finally:
        for hook in hooks:
            hook.remove()
    return watch
