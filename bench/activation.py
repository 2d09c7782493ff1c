"""The cases of activation_codes: the inputs of layers of ViT-B, on a given grid and on one that is measured a token."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from ttaq.kernels import activation_codes as ac
from ttaq.kernels import codes as cd

from ttaq import ops

from . import rivals
from .case import DTYPES, Case, Inputs, copy_bytes, drawn, forward

_SHAPES = {"ViT-B tokens": (32, 197, 768), "ViT-B fc2 input": (32, 197, 3072)}


def cases(device: str) -> Iterator[Case]:
    """List 8-bit codes and packed 4-bit codes, measured and given, of both dtypes; on a GPU one image too."""
    every = product(_SHAPES.items(), ("float32", "bfloat16"), (8, 4), (True, False))
    for (name, shape), dtype, bits, measured in every:
        yield case(name, shape, dtype, bits, measured, quick=name == "ViT-B tokens" and dtype == "bfloat16")
    if device == "cuda":
        for bits, measured in product((8, 4), (True, False)):
            yield case("ViT-B tokens of one image", (1, 197, 768), "bfloat16", bits, measured)


def case(name, shape, dtype, bits, measured, *, quick=False) -> Case:
    """Build one case; 4 bits are packed. The rivals sum no codes and count no bad inputs."""
    packed = bits == 4

    def make(generator, device):
        x = drawn(shape, generator, device, dtype)
        if measured:
            return Inputs((x,))
        grid = torch.tensor(8 / (1 << bits), device=device), torch.tensor(1 << bits - 1, device=device)
        return Inputs((x, grid[0], grid[1].int()))

    def raw(inputs):
        x, scale, zero = (*inputs.args, None, None)[:3]
        return x, scale, zero, bits, packed, True

    def exact(inputs):
        codes, *grid, sums, nonfinite = ac.reference(*raw(inputs))
        return codes, *(grid if measured else inputs.args[1:]), sums, nonfinite

    composed = partial(rivals.activation_codes, bits=bits, packed=packed)
    against = {"composed eager": composed, "torch.compile": rivals.compiled(composed)}
    if not packed and measured:
        against["torch quantize_per_token"] = rivals.quantize_per_token
    elif not packed:
        against["torch.quantize_per_tensor"] = rivals.quantize_per_tensor
    rows = torch.Size(shape[:-1]).numel()
    moved = rows * (shape[-1] * DTYPES[dtype].itemsize + cd.row_bytes(shape[-1], bits))
    return Case(
        op="activation_codes",
        name=f"{name}, {'measured per token' if measured else 'one scale'}, {bits} bits{', packed' * packed}",
        dtype=dtype,
        make=make,
        raw=raw,
        ours=forward(partial(ops.activation_codes, bits=bits, packed=packed)),
        rivals={title: forward(f) for title, f in against.items()},
        ceiling=copy_bytes(moved),
        exact=exact,
        bytes=moved,
        quick=quick,
    )
