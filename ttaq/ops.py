"""Every op as a typed function: what it computes, what it checks, with its gradient.

Call these: a raw torch.ops.ttaq call has no gradient. Each op is opaque to torch.compile. The implementations are
listed in `declarations`, the gradients in `gradients`.
"""

from .code_ops import activation_codes, log2_codes, pack_codes, quantize_codes, unpack_codes
from .fake_ops import fake_quant, log2_fake_quant, perturbed_fake_quant, prologue_fake_quant, soft_round
from .kernels import codes as cd
from .kernels._taps import from_rows, to_rows
from .product_ops import packed_conv2d, packed_linear, quantized_matmul

__all__ = (
    "activation_codes", "fake_quant", "from_rows", "log2_codes", "log2_fake_quant", "pack_codes", "packed_conv2d",
    "packed_linear", "perturbed_fake_quant", "prologue_fake_quant", "quantize_codes", "quantized_matmul", "soft_round",
    "to_rows", "unpack_codes",
)  # fmt: skip

PACKABLE = cd.PACKABLE
row_bytes = cd.row_bytes
