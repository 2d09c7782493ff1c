"""The ops that make, pack and unpack codes, as typed functions; `ops` has them beside the others."""

from torch import Tensor

from .checks import check_activation, check_log2, check_packable, check_rows, check_scales
from .declarations import RAW


def quantize_codes(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmax: int, axis: int | None = None, group: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantise to integer codes, ``clamp(round(x / scale) + zero, 0, qmax)``.

    Args:
        x: Any shape, float16, bfloat16 or float32.
        scale: As in `fake_quant`.
        zero: Shape of `scale`.
        qmax: Highest code, at most 255.
        axis: The axis `scale` runs along, or None.
        group: Elements of the last axis that share a scale, or 0.

    Returns:
        (codes, nonfinite): uint8, shape of `x`; int32 (), the NaN and infinite inputs. A NaN gets the code of 0.0.

    Raises:
        ValueError: `scale` does not fit, or qmax is beyond 255.
    """
    axis = check_scales("quantize_codes", x, scale, zero, axis, group)
    if not 0 < qmax < 256:
        raise ValueError(f"quantize_codes: qmax must be 1 to 255 to fit a byte, got {qmax}; use 2 to 8 bits")
    return RAW.quantize_codes(x, scale, zero, 0, qmax, axis, group)


def activation_codes(
    x: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    bits: int,
    packed: bool = False,
    sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turn the rows of an activation into codes, measuring the range of each row in the same pass.

    ``code = clamp(round(x / scale) + zero, 0, qmax)``, qmax = 2^bits - 1. Without `scale`, over each row and with 0.0:
    ``scale = max((max - min) / qmax, 1e-8)``, ``zero = clamp(round(-min / scale), 0, qmax)``.

    Args:
        x: (..., K), float16, bfloat16 or float32.
        scale: () or x.shape[:-1], float32, positive; None to measure one a row.
        zero: Shape of `scale`, int32.
        bits: Width of the codes, 2 to 8.
        packed: Return the words that `pack_codes` would make of the codes; 2, 4 or 8 bits.
        sums: Sum the codes of each row, as a product with codes whose zeros are not 0 needs.

    Returns:
        (codes, scale, zero, sums, nonfinite): (..., K), or words (..., ceil(K * bits / 8)), uint8; what was given or
        measured, float32 and int32; x.shape[:-1], or (0,) without, int32; (), int32, the NaN and infinite inputs. A NaN
        gets the code of 0.0. A measured row that holds a NaN or an infinity, or whose range overflows, has a scale of
        NaN or infinity, and codes and zero of 0.

    Raises:
        ValueError: `scale`, `zero` or `bits` does not fit.
    """
    check_activation("activation_codes", x, scale, zero, bits, packed)
    codes, row_scale, row_zero, row_sums, nonfinite = RAW.activation_codes(x.detach(), scale, zero, bits, packed, sums)
    if scale is None:
        return codes, row_scale, row_zero, row_sums, nonfinite
    return codes, scale, zero, row_sums, nonfinite


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., K), uint8, into words (..., ceil(K * bits / 8)): a little-endian bit stream a row.

    Args:
        codes: uint8, each below 2^bits.
        bits: 2, 3, 4 or 8.

    Raises:
        ValueError: `bits` or the dtype does not fit.
    """
    check_packable("pack_codes", codes, bits)
    return RAW.pack_codes(codes, bits)


def unpack_codes(words: Tensor, bits: int, k: int) -> Tensor:
    """Unpack words (..., ceil(k * bits / 8)), uint8, into codes (..., k): the inverse of `pack_codes`.

    Raises:
        ValueError: `bits`, the dtype or the row length does not fit.
    """
    check_rows("unpack_codes", words, bits, k)
    return RAW.unpack_codes(words, bits, k)


def log2_codes(x: Tensor, scale: Tensor, *, qmax: int, roots: int = 1) -> tuple[Tensor, Tensor]:
    """Quantise to the codes of `log2_fake_quant`, which takes the same arguments.

    Returns:
        (codes, nonfinite): uint8, shape of `x`; int32 (), the NaN and infinite inputs. A NaN gets the code of 0.0.

    Raises:
        ValueError: `scale`, `qmax` or `roots` does not fit.
    """
    check_log2("log2_codes", x, scale, qmax, roots)
    return RAW.log2_codes(x, scale, qmax, roots)
