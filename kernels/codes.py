"""Integer codes: quantise to them, and keep them as a little-endian bit stream.

Code k of a row occupies bits ``k * bits .. k * bits + bits - 1`` of the row's stream; bit j of the stream is bit ``j % 8``
of byte ``j // 8``; rows are padded with zeros to a whole byte. This order is the one on disk.
"""

import torch

from ._tiles import expand

PACKABLE = (2, 3, 4, 8)


def reference(x, scale, zero, qmin, qmax, axis, group):
    """Return (codes, nonfinite): ``clamp(round(x / scale) + zero, qmin, qmax)`` and how many inputs were NaN or infinite.

    A NaN has no code: it gets the code of 0.0, and is counted.
    """
    wide = x.float()
    origin = torch.round(expand(zero, x, axis, group).float())
    code = torch.round(wide / expand(scale, x, axis, group)) + origin
    code = torch.clamp(torch.where(code.isnan(), origin, code), qmin, qmax)
    codes = torch.empty_like(x, dtype=torch.uint8).copy_(code)
    return codes, (~torch.isfinite(wide)).sum(dtype=torch.int32)


def row_bytes(k: int, bits: int) -> int:
    """Count the bytes of a packed row of `k` codes."""
    return (k * bits + 7) // 8


def pack_reference(codes, bits):
    """Pack uint8 codes (..., K) into words (..., ceil(K * bits / 8))."""
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    k = codes.shape[-1]
    places = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = ((codes.unsqueeze(-1) >> places) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, row_bytes(k, bits) * 8 - k * bits))
    weights = torch.bitwise_left_shift(
        torch.ones(8, device=codes.device, dtype=torch.uint8),
        torch.arange(8, device=codes.device, dtype=torch.uint8),
    )
    return (stream.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_reference(words, bits, k):
    """Unpack words (..., bytes) into the first `k` uint8 codes of each row."""
    if bits == 8:
        return words[..., :k].clone(memory_format=torch.contiguous_format)
    places = torch.arange(8, device=words.device, dtype=torch.uint8)
    stream = ((words.unsqueeze(-1) >> places) & 1).flatten(-2)[..., : k * bits]
    weights = torch.bitwise_left_shift(
        torch.ones(bits, device=words.device, dtype=torch.uint8),
        torch.arange(bits, device=words.device, dtype=torch.uint8),
    )
    return (stream.unflatten(-1, (-1, bits)) * weights).sum(-1, dtype=torch.uint8)


def stored_codes(words, bits, k):
    """Return the codes (rows, k) behind `words`: rows of k bytes already hold one code a byte."""
    return words if words.shape[-1] == k else unpack_reference(words, bits, k)


def exact_dtype(terms: int, *bits: int) -> torch.dtype:
    """Choose the float type in which a sum of `terms` products of codes of the given widths is exact."""
    largest = terms
    for b in bits:
        largest *= (1 << b) - 1
    return torch.float32 if largest < 1 << 24 else torch.float64
