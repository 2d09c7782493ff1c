"""Find where a float transformer can be rewritten without changing what it computes, and prove it by running."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention_in, open_attention
from ..batches import Forward, call
from ..layers import MatMul
from ..surgery import copy_model, evaluating, replace
from ..tracing import leaves
from .rewriting import Heads, Joint

_JOINED = ("qkv", "in_proj")
_APART = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
_COUNTS = ("num_heads", "heads", "num_attention_heads")


@dataclass(frozen=True)
class Event:
    """One call of a layer: what a LayerNorm gave, or what another layer was given."""

    name: str
    module: nn.Module
    tensor: Tensor


@dataclass
class Structure:
    """What of a model may be rewritten.

    Attributes:
        joints: LayerNorms whose affine may be moved into what reads them.
        scores: Attention whose queries and keys may be rotated.
        values: Attention whose values may be multiplied.
        refused: Name to the reason, of what looked alike and is not.
        calls: The layers in the order in which they ran.
    """

    joints: list[Joint] = field(default_factory=list)
    scores: list[Heads] = field(default_factory=list)
    values: list[Heads] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, nn.Module]] = field(default_factory=list)


def opened(model: nn.Module) -> nn.Module:
    """Give a view of a model whose attention is opened as `prepare` opens it; both share every tensor."""
    view = copy_model(model, share=lambda name, tensor: True)
    for name in attention_in(view)[0]:
        replace(view, name, open_attention(view.get_submodule(name)))
    return view


class Proof:
    """What a model computed on one entry, output and scores of attention, for comparison once it has been rewritten.

    Args:
        model: As it is.
        entry: Of `batches.collect`; a few images do.
        forward: Runs the model on it.
    """

    def __init__(self, model: nn.Module, entry: Any, forward: Forward | None):
        self.model, self.entry, self.forward = model, entry, forward
        self.before = self._run()
        self.tolerance = 1e-4 if self.before[0].dtype in (torch.float32, torch.float64) else 3e-2

    def holds(self) -> bool:
        """Tell whether the model still computes the same, but for rounding."""
        return self.error() <= self.tolerance

    def error(self) -> float:
        """Return the largest |z' - z| / |z| over the output and the scores; infinite where they are not finite."""
        worst = torch.stack([_distance(new, old) for new, old in zip(self._run(), self.before, strict=True)]).max()
        return worst.item() if torch.isfinite(worst) else float("inf")

    def of(self, parts: Iterable, change: Callable[[Any], None]) -> tuple[list, list]:
        """Split `parts` into those that `change` may be done to, and those that it may not; nothing stays changed."""
        parts = list(parts)
        if not parts:
            return [], []
        with kept(self.model):
            for part in parts:
                change(part)
            if self.holds():
                return parts, []
        if len(parts) == 1:
            return [], parts
        halves = [self.of(half, change) for half in (parts[: len(parts) // 2], parts[len(parts) // 2 :])]
        return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]

    @torch.no_grad()
    def _run(self):
        scores = []
        products = [m for name, m in self.model.named_modules() if isinstance(m, MatMul) and name.endswith("scores")]
        hooks = [m.register_forward_hook(lambda m, args, out: scores.append(out.detach())) for m in products]
        try:
            with evaluating(self.model):
                return [flat(call(self.model, self.entry, self.forward)), *scores]
        finally:
            for hook in hooks:
                hook.remove()


def flat(output: object) -> Tensor:
    """Lay what a model returned, its tensors of floats, out in one vector."""
    found = [tensor.detach().flatten() for tensor in leaves(output) if tensor.is_floating_point()]
    return torch.cat(found) if found else torch.zeros(0)


def _distance(new, old):
    """Return |new - old| / |old|."""
    new, old = new.double(), old.double()
    return (new - old).norm() / old.norm().clamp(min=1e-30)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Put back every parameter, bit for bit, when the context ends."""
    before = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, values in before:
            parameter.data.copy_(values)


def survey(view: nn.Module, proof: Proof) -> Structure:
    """Find what may be rewritten in an opened model, and prove each by doing it, running, and undoing it."""
    events = _watch(view, proof)
    found = Structure(calls=[(event.name, event.module) for event in events])
    generator = torch.Generator().manual_seed(0)
    joints, odd = proof.of(_joints(events), lambda joint: _try_joint(joint, generator))
    found.joints = joints
    found.refused |= {joint.name: "its output is read by more than linear layers" for joint in odd}
    heads = _heads(view, events)
    found.scores, odd = proof.of(heads, lambda one: one.turn_scores(_rotations(one, one.query, generator)))
    found.refused |= {f"{one.name}: queries and keys": "its scores change when both are rotated" for one in odd}
    found.values, odd = proof.of(heads, lambda one: _try_values(one, generator))
    found.refused |= {f"{one.name}: values": "what reads them cannot take a rotation back" for one in odd}
    return found


def _watch(view, proof):
    """Run once and return what was called with what, in order; layers that ran more than once are left out."""
    events, hooks = [], []
    for name, module in view.named_modules():
        if isinstance(module, nn.LayerNorm):
            note = lambda m, args, out, name=name: events.append(Event(name, m, out))  # noqa: E731
            hooks.append(module.register_forward_hook(note))
        elif isinstance(module, nn.Linear | nn.Conv2d) or layer_scale(module) is not None:
            note = lambda m, args, name=name: events.append(Event(name, m, args[0]))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad(), evaluating(view):
            call(view, proof.entry, proof.forward)
    finally:
        for hook in hooks:
            hook.remove()
    count = Counter(event.module for event in events)
    return [event for event in events if count[event.module] == 1]


def layer_scale(module: nn.Module) -> nn.Parameter | None:
    """Return the scale of a module that holds nothing but one vector, as LayerScale does."""
    held = list(module.parameters(recurse=False))
    alone = len(held) == 1 and held[0].ndim == 1 and not any(True for _ in module.children())
    return held[0] if alone and not isinstance(module, nn.LayerNorm | nn.Linear | nn.Conv2d) else None


def _joints(events):
    """List the LayerNorms with the linear layers that are given their output, or else run next."""
    for place, event in enumerate(events):
        norm = event.module
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or len(norm.normalized_shape) != 1:
            continue
        later = [e for e in events[place + 1 :] if isinstance(e.module, nn.Linear)]
        later = [e for e in later if e.module.in_features == norm.normalized_shape[0]]
        readers = [e for e in later if _same_memory(e.tensor, event.tensor)]
        if not readers and later and later[0] is events[place + 1]:
            readers = later[:1]
        if readers:
            yield Joint(event.name, norm, {e.name: e.module for e in readers})


def _same_memory(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _heads(view, events):
    """List attention by the names that libraries give its layers."""
    order = {event.module: place for place, event in enumerate(events)}
    found = []
    for name, module in view.named_modules():
        count = next((c for c in (getattr(module, n, None) for n in _COUNTS) if isinstance(c, int)), None)
        rows = _rows(module)
        if count is None or rows is None or any(layer not in order for layer, _ in rows):
            continue
        width = rows[2][1].stop - rows[2][1].start
        later = events[max(order[layer] for layer, _ in rows) + 1 :]
        reader = next(
            (e for e in later if isinstance(e.module, nn.Linear) and e.module.in_features == width), None
        )  # fmt: skip
        even = all((part.stop - part.start) % count == 0 for _, part in rows)
        if reader is not None and even and rows[0][1].stop - rows[0][1].start == rows[1][1].stop - rows[1][1].start:
            found.append(Heads(name, count, *rows, (reader.name, reader.module)))
    return found


def _rows(module):
    """Return (layer, rows) of the queries, keys and values of an attention."""
    for name in _JOINED:
        layer = module._modules.get(name)
        if isinstance(layer, nn.Linear) and layer.out_features % 3 == 0:
            third = layer.out_features // 3
            return [(layer, slice(i * third, (i + 1) * third)) for i in range(3)]
    for names in _APART:
        layers = [module._modules.get(name) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            return [(layer, slice(0, layer.out_features)) for layer in layers]
    return None


def _try_joint(joint, generator):
    like = joint.norm.weight
    scale = (torch.rand(len(like), generator=generator).double() + 0.5).to(like.device)
    shift = torch.randn(len(like), generator=generator).double().to(like.device) if joint.shifts else None
    joint.rescale(scale, shift)


def _try_values(heads, generator):
    rotation = _rotations(heads, heads.value, generator)
    heads.turn_values(rotation, rotation.mT)


def _rotations(heads, rows, generator):
    width = heads.width(rows)
    matrix = torch.randn(heads.count, width, width, generator=generator).double()
    return torch.linalg.qr(matrix).Q.to(rows[0].weight.device)
