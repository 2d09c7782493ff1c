"""The order in which a packed convolution keeps its codes: channels last, ``k = (r * S + s) * C + c`` of an output.

So a kernel that reads a channels-last image meets the channels of a tap one after the other in both operands.
"""


def to_rows(weight):
    """Lay a weight (O, C, R, S), or its codes, out as the rows (O, R * S * C) that are packed."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def from_rows(rows, shape):
    """Return the contiguous weight of `shape` (O, C, R, S) behind rows of R * S * C values."""
    outputs, channels, *kernel_size = shape
    return rows.reshape(outputs, *kernel_size, channels).permute(0, 3, 1, 2).contiguous()
