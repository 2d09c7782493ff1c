"""Integer codes: quantise to them, and keep them as a little-endian bit stream.

Code k of a row occupies bits ``k * bits .. k * bits + bits - 1`` of the row's stream; bit j of the stream is bit
``j % 8`` of byte ``j // 8``; rows are padded with zeros to a whole byte. This order is the one on disk.
"""

from functools import partial

import torch

from . import _native
from ._tiles import (
    canonical,
    clamp,
    expand,
    gather_codes,
    in_order_of,
    load_scales,
    load_tile,
    matrix,
    round_half_even,
    store_tile,
    tile_shape,
    walkable,
)
from ._triton import jit, tl, triton
from ._triton import refuses as refuses_triton

PACKABLE = (2, 3, 4, 8)


def reference(x, scale, zero, qmin, qmax, axis, group):
    """Return ``clamp(round(x / scale) + zero, qmin, qmax)`` and how many inputs were NaN or infinite.

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


def exact_product(multiply, x, weight, terms: int, x_bits: int, bits: int):
    """Multiply centred codes with exact sums, rounded once to float32.

    In float32 where every sum of `terms` products stays below 2^24; else with the weight in two parts of at most 16, at
    a third of the price of float64; in float64 beyond.

    Args:
        multiply: Linear in both arguments, such as a matrix product or a convolution.
        x: Codes minus their zero, float32.
        weight: Likewise.
        terms: Products in one sum.
        x_bits: Width of the codes behind `x`, and so `bits` behind `weight`; zeros lie among the codes.
    """
    largest = terms * ((1 << x_bits) - 1)
    if largest * ((1 << bits) - 1) < 1 << 24:
        sums = multiply(x, weight)
    elif largest * 16 < 1 << 24:
        high = torch.floor(weight / 16)
        sums = multiply(x, high).double() * 16 + multiply(x, weight - high * 16)
    else:
        sums = multiply(x.double(), weight.double())
    return sums.float() + 0.0  # an integer has no negative zero


def refuses_sum(terms: int, bits: int, x_bits: int) -> str | None:
    """Say why a sum of products of codes may not fit int32, or None; zeros lie among the codes."""
    if terms * ((1 << bits) - 1) * ((1 << x_bits) - 1) >= 1 << 31:
        return f"{terms} products of {bits}- and {x_bits}-bit codes can pass 2^31; the kernel sums in int32"
    return None


def refuses_words(words, bits, group, k) -> str | None:
    """Say why a Triton kernel cannot read rows of `k` codes, or None."""
    if words.shape[-1] != k:
        if bits not in PACKABLE:
            return f"the words hold {bits} bits a code; the kernel reads 2, 3, 4 and 8"
        run = 8 if bits == 3 else 8 // bits
        if group % run:
            return f"groups of {group} codes of {bits} bits start inside bytes; the kernel wants multiples of {run}"
    return refuses_triton()


@jit
def _quantize_codes_kernel(
    x_ptr,
    scale_ptr,
    zero_ptr,
    code_ptr,
    partial_ptr,
    R,
    W,
    C,
    qmin,
    qmax,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tiles = tl.cdiv(W, BLOCK_W)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_W
    scale, zero = load_scales(scale_ptr, zero_ptr, row, column, C, W, BY_ROW, BLOCK_R, BLOCK_W)
    x = load_tile(x_ptr, row, column, R, W, BLOCK_R, BLOCK_W)
    code = round_half_even(tl.div_rn(x, scale)) + zero
    code = clamp(tl.where(code == code, code, zero), qmin, qmax)
    store_tile(code_ptr, code.to(tl.uint8), row, column, R, W, BLOCK_R, BLOCK_W)
    nonfinite = tl.where(x - x == 0.0, 0, 1)  # NaN and infinity alike
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(nonfinite, axis=1), axis=0))


@jit
def _pack_codes_kernel(code_ptr, word_ptr, n, k, row_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    row, byte = offs // row_bytes, offs % row_bytes
    first = byte * 8 // BITS  # the code that holds the lowest bit of the byte
    word = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(8 // BITS + (2 if 8 % BITS else 0)):
        code = tl.load(code_ptr + row * k + first + i, mask=mask & (first + i < k), other=0).to(tl.int32)
        word |= (code & ((1 << BITS) - 1)) << (i * BITS)
    word >>= (byte * 8 - first * BITS).to(tl.int32)
    tl.store(word_ptr + offs, word.to(tl.uint8), mask=mask)


@jit
def _unpack_codes_kernel(word_ptr, code_ptr, n, k, row_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    row, position = offs // k, offs % k
    code = gather_codes(word_ptr + row * row_bytes, position, mask, BITS)
    tl.store(code_ptr + offs, code.to(tl.uint8), mask=mask)


BLOCK = 1024
TILE = 2048  # elements that a program quantises, 16 a thread


def launch(x, scale, zero, qmin, qmax, axis, group):
    """Run the Triton kernel: codes in one pass, the count from one int32 a program."""
    codes, source, target = _allocate(x, group)
    outer, channels, inner = canonical(target, axis, group)
    rows, columns, by_row = matrix(outer, channels, inner)
    block_r, block_w = tile_shape(rows, columns, TILE)
    programs = triton.cdiv(rows, block_r) * triton.cdiv(columns, block_w)
    partial = torch.empty(programs, dtype=torch.int32, device=x.device)
    if programs:
        with torch.cuda.device_of(x):
            _quantize_codes_kernel[(programs,)](
                source,
                scale.contiguous(),
                zero.contiguous(),
                target,
                partial,
                rows,
                columns,
                channels,
                float(qmin),
                float(qmax),
                BY_ROW=by_row,
                BLOCK_R=block_r,
                BLOCK_W=block_w,
                enable_fp_fusion=False,
            )
    return codes if target is codes else codes.copy_(target), partial.sum(dtype=torch.int32)


def refuses(x, *args):
    """Say why the Triton kernel cannot quantise, or None."""
    return refuses_triton()


def launch_cpu(x, scale, zero, qmin, qmax, axis, group):
    """Run the native CPU kernel."""
    codes, source, target = _allocate(x, group)
    nonfinite = torch.empty((), dtype=torch.int32)
    form = canonical(target, axis, group)
    _native.quantize_codes(source, target, scale.contiguous(), zero.contiguous(), nonfinite, qmin, qmax, *form)
    return codes if target is codes else codes.copy_(target), nonfinite


def refuses_cpu(x, scale, zero, *args):
    """Say why the native CPU kernel cannot quantise, or None."""
    if x.dtype not in _native.DTYPES or zero.dtype not in (torch.float32, torch.int32):
        return f"x is {x.dtype} and zero {zero.dtype}; the kernel takes 16- and 32-bit floats, zero float32 or int32"
    return _native.reason("cpu")


def pack_launch(codes, bits):
    """Run the Triton kernel that packs, a byte of words a thread."""
    codes, words = _allocate_words(codes, bits)
    if words.numel():
        with torch.cuda.device_of(codes):
            _pack_codes_kernel[(triton.cdiv(words.numel(), BLOCK),)](
                codes, words, words.numel(), codes.shape[-1], words.shape[-1], BITS=bits, BLOCK=BLOCK
            )
    return words


def pack_refuses(codes, bits):
    """Say why the Triton kernel cannot pack, or None."""
    return refuses_triton()


def unpack_launch(words, bits, k):
    """Run the Triton kernel that unpacks, a code a thread."""
    words = words.contiguous()
    codes = words.new_empty((*words.shape[:-1], k))
    if codes.numel():
        with torch.cuda.device_of(words):
            _unpack_codes_kernel[(triton.cdiv(codes.numel(), BLOCK),)](
                words, codes, codes.numel(), k, words.shape[-1], BITS=bits, BLOCK=BLOCK
            )
    return codes


def unpack_refuses(words, bits, k):
    """Say why the Triton kernel cannot unpack, or None."""
    return refuses_triton()


def pack_launch_native(codes, bits):
    """Run the native kernel that packs, on the CPU or the GPU, wherever `codes` are."""
    codes, words = _allocate_words(codes, bits)
    _native.pack_codes(codes, words, bits)
    return words


def unpack_launch_native(words, bits, k):
    """Run the native kernel that unpacks, on the CPU or the GPU, wherever `words` are."""
    codes = words.new_empty((*words.shape[:-1], k))
    _native.unpack_codes(words.contiguous(), codes, bits)
    return codes


def unpacked(words, bits, k):
    """Return words of one code a byte for `words` on the CPU, unpacked by the native kernel where they are packed."""
    return words if words.shape[-1] == k else unpack_launch_native(words, bits, k)


def _allocate(x, group):
    """Return the codes as the op allocates them, and `x` and the codes in the memory order that a kernel walks."""
    codes = torch.empty_like(x, dtype=torch.uint8)
    target = walkable(codes, group)
    return codes, in_order_of(x, target), target


def _allocate_words(codes, bits):
    return codes.contiguous(), codes.new_empty((*codes.shape[:-1], row_bytes(codes.shape[-1], bits)))


def _refuses_native(device, tensor, bits, k=None):
    """Say why the native kernel of `device` cannot pack, or unpack rows of `k` codes, or None."""
    if tensor.device.type != device:
        return f"the tensor is on {tensor.device.type}; this implementation needs it on {device}"
    if bits not in _native.BITS:
        return f"bits is {bits}; the native kernels take 2, 3, 4 and 8"
    if k is not None and tensor.shape[-1] != row_bytes(k, bits):
        return f"the rows have {tensor.shape[-1]} bytes; {k} codes of {bits} bits fill {row_bytes(k, bits)}"
    return _native.reason(device)


pack_refuses_cpu = unpack_refuses_cpu = partial(_refuses_native, "cpu")
pack_refuses_cuda = unpack_refuses_cuda = partial(_refuses_native, "cuda")
