"""Cut a recorded forward pass into the pieces that can be rebuilt one by one.

A cut is a moment at which a single activation is live. A piece is the innermost module call between two cuts that
holds a layer, or, in a plain sequence, the run from one layer up to just before the next that changes neither
the number of elements nor the path of the tensor. What no pair of cuts encloses is looked at once more with the
values that pass it by left out, so that a branch can be cut within itself.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .tracing import Call, Trace

__all__ = ["Piece", "layers_in", "partition"]

# A custom module of a few plain layers (a separable convolution, an embedding) is more useful whole.
_PLAIN_LAYERS = 6

# A module with layers between which nothing can be cut is taken whole up to this size even if parts could be.
_JOINED_LAYERS = 16


@dataclass(frozen=True)
class Piece:
    """Module calls that run one after the other, each on the result of the one before."""

    calls: tuple[Call, ...]
    layers: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the modules."""
        return tuple(call.name for call in self.calls)


@dataclass(frozen=True)
class _Use:
    """A layer that belongs to no piece yet, and the call that uses it."""

    layer: str
    call: Call


def layers_in(call: Call) -> tuple[str, ...]:
    """Name the layers that run in a call, in order, each once."""
    return tuple(dict.fromkeys(_layers_in(call)))


def _layers_in(call: Call) -> Iterator[str]:
    if call.layer:
        yield call.name
    else:
        yield from call.uses
        for child in call.children:
            yield from _layers_in(child)


def partition(trace: Trace, rejected: set[tuple[str, ...]]) -> tuple[list[Piece], tuple[str, ...]]:
    """Cut the pass into pieces, none of them in `rejected`.

    Args:
        trace: A finished trace.
        rejected: Names of the modules of pieces that proved wrong.

    Returns:
        The pieces in the order in which they run, and the layers that are in none of them.
    """
    cutter = _Cutter(trace, rejected)
    pieces, rest = cutter.split(trace.root, trace.root)
    if rest:
        tied = cutter.tied(pieces, rest)
        branches = cutter.branches(trace.root, {use.layer for use in rest} - tied)
        pieces += branches
        covered = {layer for piece in branches for layer in piece.layers}
        rest = [use for use in rest if use.layer not in covered]
    pieces = sorted(map(_without_idle_end, pieces), key=lambda piece: piece.calls[0].start)
    whole = trace.root.children[:1]
    if rest and len(trace.root.children) == 1 and cutter.valid(whole[0], trace.root):
        return [Piece(tuple(whole), layers_in(whole[0]))], ()
    return pieces, tuple(dict.fromkeys(use.layer for use in rest))


def _without_idle_end(piece: Piece) -> Piece:
    calls = piece.calls
    while len(calls) > 1 and calls[-1].source.same(calls[-1].result):
        calls = calls[:-1]
    return Piece(calls, piece.layers)


class _Cutter:
    def __init__(self, trace: Trace, rejected: set[tuple[str, ...]]):
        self.trace, self.rejected = trace, rejected
        self.total = len(layers_in(trace.root))

    def valid(self, call: Call, frame: Call) -> bool:
        """Tell whether a call, seen within `frame`, takes all that is live and leaves all that is live."""
        source, result = call.source, call.result
        return (
            source is not None
            and result is not None
            and (call.name,) not in self.rejected
            and self.trace.live(call.start, frame) == {source.value}
            and self.trace.live(call.end, frame) == {result.value}
            and all(
                result.span[0] <= low and high <= result.span[1]
                for when, low, high in result.value.reads
                if when >= call.end
            )
        )

    def split(self, call: Call, frame: Call) -> tuple[list[Piece], list[_Use]]:
        """Cut a call into pieces; the layers that are left over come second."""
        if call.layer:
            if self.valid(call, frame):
                return [Piece((call,), (call.name,))], []
            return [], [_Use(call.name, call)]
        pieces, rest = [], [_Use(name, call) for name in call.uses]
        for child in call.children:
            if layers_in(child):
                inner = self.split(child, frame)
                pieces += inner[0]
                rest += inner[1]
            elif pieces and self.continues(pieces[-1], child, frame):
                pieces[-1] = Piece((*pieces[-1].calls, child), pieces[-1].layers)
        tied = self.tied(pieces, rest)
        if (pieces or rest) and self.valid(call, frame) and self.whole(call, frame, pieces, rest, tied):
            return [Piece((call,), layers_in(call))], []
        broken = [piece for piece in pieces if tied & set(piece.layers)]
        rest += [_Use(layer, piece.calls[0]) for piece in broken for layer in piece.layers]
        return [piece for piece in pieces if piece not in broken], rest

    def tied(self, pieces: list[Piece], rest: list[_Use]) -> set[str]:
        """Name the layers that run in more than one place."""
        held = [layer for piece in pieces for layer in piece.layers] + [use.layer for use in rest]
        return {layer for layer, count in Counter(held).items() if count > 1}

    def continues(self, piece: Piece, call: Call, frame: Call) -> bool:
        """Tell whether a call without layers belongs to the plain run before it."""
        last = piece.calls[-1].result
        return (
            len(piece.layers) == 1
            and call.bare
            and self.valid(call, frame)
            and last.same(call.source)
            and last.shape.numel() == call.result.shape.numel()
            and (*piece.names, call.name) not in self.rejected
        )

    def whole(self, call: Call, frame: Call, pieces: list[Piece], rest: list[_Use], tied: set[str]) -> bool:
        """Tell whether a valid call is one piece rather than the pieces found in it."""
        size = len(layers_in(call))
        if tied:
            return True
        if rest:
            small = size <= _JOINED_LAYERS and not (pieces and size == self.total)
            return small or not (pieces or self.separable(rest, frame))
        first, last = pieces[0].calls[0].source, pieces[-1].calls[-1].result
        if size == self.total:
            return False
        if len(pieces) == 1 and len(pieces[0].calls) > 1 and first.same(call.source) and last.same(call.result):
            return True
        plain = sum(len(piece.layers) == 1 for piece in pieces)
        return not issubclass(call.kind, nn.Sequential) and size <= _PLAIN_LAYERS and 2 * plain >= size

    def separable(self, rest: list[_Use], frame: Call) -> bool:
        """Tell whether there is a cut anywhere between the first and the last of the layers."""
        begin = min(use.call.end for use in rest)
        end = max(use.call.start for use in rest)
        return any(len(self.trace.live(when, frame)) == 1 for when in range(begin, end + 1))

    def branches(self, call: Call, wanted: set[str]) -> list[Piece]:
        """Cut the outermost calls that hold nothing but wanted layers, each seen by itself."""
        pieces = []
        for child in call.children:
            inside = set(layers_in(child))
            if inside and inside <= wanted and self.valid(child, child):
                found, rest = self.split(child, child)
                pieces += found
                if rest and not child.layer:
                    pieces += self.branches(child, {use.layer for use in rest} - self.tied(found, rest))
            elif inside & wanted and not child.layer:
                pieces += self.branches(child, wanted)
        return pieces
