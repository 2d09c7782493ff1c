"""What the packed products share: the codes of both operands, ready for a tensor core, and the sum they stand for."""

from ._triton import jit, tl


@jit
def load_codes(row_ptr, start, row_bytes, BITS: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """Load the codes ``start .. start + COUNT - 1`` of the packed rows that start at `row_ptr`, each byte once.

    Args:
        row_ptr: (R,) pointers.
        start: A multiple of the codes that fill whole bytes: 8 for 3 bits, else 8 / BITS.
        row_bytes: Bytes of a row; what lies beyond reads as 0.
        BITS: 2, 3, 4 or 8.
        COUNT: Codes of a row, a power of two, at least 8.
        EVEN: Every byte asked for lies in its row.

    Returns:
        (R, COUNT), uint8.
    """
    RUN: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    BYTES: tl.constexpr = RUN * BITS // 8
    byte = (start * BITS // 8 + tl.arange(0, COUNT // RUN) * BYTES)[None, :]
    word = tl.load(row_ptr[:, None] + byte) if EVEN else tl.load(row_ptr[:, None] + byte, byte < row_bytes, 0)
    if BITS == 3:
        word = word.to(tl.int32)
        for i in tl.static_range(1, BYTES):
            pointers = row_ptr[:, None] + byte + i
            more = tl.load(pointers) if EVEN else tl.load(pointers, byte + i < row_bytes, 0)
            word |= more.to(tl.int32) << (8 * i)
    if BITS == 8:
        codes = word
    elif BITS == 4:  # codes that are joined stay with the thread that has their word; broadcast shifts would not
        codes = _pair(word, 0, 1, BITS)
    elif BITS == 2:
        codes = tl.join(_pair(word, 0, 2, BITS), _pair(word, 1, 2, BITS))
    else:
        even = tl.join(_pair(word, 0, 4, BITS), _pair(word, 2, 4, BITS))
        codes = tl.join(even, tl.join(_pair(word, 1, 4, BITS), _pair(word, 3, 4, BITS)))
    return tl.reshape(codes, (word.shape[0], COUNT))


@jit
def _pair(word, at: tl.constexpr, step: tl.constexpr, BITS: tl.constexpr):
    """Take the codes `at` and ``at + step`` out of each word, along a new last axis."""
    first, second = word >> (at * BITS), word >> ((at + step) * BITS)
    return tl.join((first & ((1 << BITS) - 1)).to(tl.uint8), (second & ((1 << BITS) - 1)).to(tl.uint8))


@jit
def weight_operand(code, zero, WIDE: tl.constexpr):
    """Turn the codes (N, K) of a weight into int8 for a tensor core: ``code - 128`` at 8 bits, else ``code - zero``."""
    if WIDE:
        return (code ^ 128).to(tl.int8, bitcast=True)
    return (code.to(tl.int32) - zero[:, None]).to(tl.int8)


@jit
def activation_operand(code, WIDE: tl.constexpr):
    """Turn the uint8 codes of an activation into int8 for a tensor core: ``code - 128`` at 8 bits, else ``code``."""
    if WIDE:
        code = code ^ 128
    return code.to(tl.int8, bitcast=True)


@jit
def exact_sum(products, sum_w, sum_x, zero_w, zero_x, count, WIDE_W: tl.constexpr, WIDE_X: tl.constexpr):
    """Correct the sum over k of operand products to that of ``(code_w - zero_w) * (code_x - zero_x)``.

    With operands ``w = code_w - o`` and ``x = code_x - p`` and what the shifts left of the zeros, ``d = zero_w - o``
    and ``e = zero_x - p``, it is ``sum w x - e sum w - d sum x + count d e``. All is modulo 2^32, so only the result
    has to fit int32.

    Args:
        products: (N, M), int32: sum w x.
        sum_w: (N,), int32: sum w.
        sum_x: (M,), int32: sum x; read for wide weights alone, the others have d = 0.
        zero_w: (N,), int32.
        zero_x: (M,), int32, or a scalar.
        count: How many k were summed.
        WIDE_W: `weight_operand` shifted by 128.
        WIDE_X: `activation_operand` shifted by 128.
    """
    if WIDE_X:
        zero_x -= 128
    zero_x += tl.zeros(sum_x.shape, tl.int32)
    products -= sum_w[:, None] * zero_x[None, :]
    if WIDE_W:
        products += (zero_w - 128)[:, None] * (count * zero_x - sum_x)[None, :]
    return products
