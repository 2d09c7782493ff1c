"""The rewritings that leave a transformer's function as it is: what one layer gains, its reader takes back."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Joint:
    """A LayerNorm and the linear layers that read it.

    Attributes:
        name: The norm's dotted name.
        norm: With affine parameters.
        readers: Name to layer; nothing else reads the norm.
    """

    name: str
    norm: nn.LayerNorm
    readers: dict[str, nn.Linear]

    @property
    def shifts(self) -> bool:
        """Whether a shift can be taken back: every reader, and the norm, has a bias."""
        return self.norm.bias is not None and all(layer.bias is not None for layer in self.readers.values())

    def rescale(self, scale: Tensor, shift: Tensor | None = None) -> None:
        """Make the norm's output ``scale y + shift``, both (C,), and its readers undo that."""
        _scale_rows(self.norm, scale)
        if shift is not None:
            _add(self.norm.bias, shift)
        for layer in self.readers.values():
            _assign(layer.weight, layer.weight.double() / scale)
            if shift is not None:
                _add(layer.bias, -(layer.weight.double() @ shift))

    def fold(self) -> None:
        """Hand the norm's affine over to its readers: weight 1 and bias 0 remain, as parameters."""
        gain = self.norm.weight.detach().double()
        for layer in self.readers.values():
            if self.shifts:
                _add(layer.bias, layer.weight.double() @ self.norm.bias.double())
            _assign(layer.weight, layer.weight.double() * gain)
        self.norm.weight.data.fill_(1)
        if self.norm.bias is not None:
            self.norm.bias.data.zero_()


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of an attention: where its queries, keys and values come from, and what reads their mix.

    Attributes:
        name: The attention's dotted name.
        count: Heads.
        query: Layer and the rows of its weight, as are `key` and `value`.
        reader: Name and layer that reads the heads, joined.
    """

    name: str
    count: int
    query: tuple[nn.Linear, slice]
    key: tuple[nn.Linear, slice]
    value: tuple[nn.Linear, slice]
    reader: tuple[str, nn.Linear]

    def width(self, rows: tuple[nn.Linear, slice]) -> int:
        """Return the size of a head in `query`, `key` or `value`."""
        return (rows[1].stop - rows[1].start) // self.count

    def turn_scores(self, rotation: Tensor) -> None:
        """Rotate the queries and keys of every head, (heads, D, D), which leaves their products."""
        _turn_rows(*self.query, rotation)
        _turn_rows(*self.key, rotation)

    def turn_values(self, matrix: Tensor, inverse: Tensor) -> None:
        """Multiply the values of every head by a matrix, (heads, D, D), and let the reader take it back."""
        _turn_rows(*self.value, matrix)
        weight = self.reader[1].weight
        by_head = weight.detach().double().unflatten(1, (self.count, -1))
        _assign(weight, torch.einsum("ohd,hde->ohe", by_head, inverse).flatten(1))


def turn_outputs(layer: nn.Module, rotation: Tensor) -> None:
    """Rotate what a linear layer or a convolution gives: ``Q y`` instead of y."""
    _assign(layer.weight, torch.tensordot(rotation, layer.weight.double(), 1))
    if layer.bias is not None:
        _assign(layer.bias, rotation @ layer.bias.double())


def turn_inputs(layer: nn.Linear, rotation: Tensor) -> None:
    """Make a linear layer expect ``Q x`` in the place of x."""
    _assign(layer.weight, layer.weight.double() @ rotation.mT)


def turn_tokens(tokens: nn.Parameter, rotation: Tensor) -> None:
    """Rotate embeddings along their last axis."""
    _assign(tokens, tokens.double() @ rotation.mT)


def absorb(layer: nn.Module, scale: nn.Parameter) -> None:
    """Hand a scale of the outputs, (C,), over to the layer; ones remain, as a parameter."""
    _scale_rows(layer, scale.detach().double())
    scale.data.fill_(1)


def _scale_rows(layer, scale):
    _assign(layer.weight, layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        _assign(layer.bias, layer.bias.double() * scale)


def _turn_rows(layer, rows, matrix):
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            part = parameter.detach().double()[rows].unflatten(0, (len(matrix), -1))
            whole = parameter.detach().double()
            whole[rows] = torch.einsum("hde,he...->hd...", matrix, part).flatten(0, 1)
            _assign(parameter, whole)


def _assign(parameter, values):
    parameter.data.copy_(values.detach())


def _add(parameter, values):
    _assign(parameter, parameter.double() + values)
