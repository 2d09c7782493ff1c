"""Every op: its schema, its implementations in the order in which they are tried, and its shapes on meta tensors."""

import torch

from .dispatch import Implementation, cpu, declare, gpu, never
from .kernels import _epilogue as ep
from .kernels import activation_codes as ac
from .kernels import codes as cd
from .kernels import dequantised as dq
from .kernels import fake_quant as fq
from .kernels import log2 as lg
from .kernels import packed_conv2d as pc
from .kernels import packed_linear as pl
from .kernels import perturb as pt
from .kernels import prologue as pg
from .kernels import skinny_linear as sl
from .kernels import soft_round as sr

RAW = torch.ops.ttaq
_SCALES = "Tensor scale, Tensor zero, int qmin, int qmax, int? axis, int group"
_PERTURBED = "Tensor scale, Tensor zero, Tensor spread, Tensor seed, int qmin, int qmax, int? axis, str kind"
_PROLOGUE = "Tensor? gain, Tensor? shift, Tensor scale, Tensor zero, str before, float eps"
_CONV = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
_FINISHED = "(Tensor y, Tensor moments, Tensor nonfinite)"


FAKE_QUANT = declare(
    f"fake_quant(Tensor x, {_SCALES}) -> Tensor",
    Implementation("triton", fq.launch, gpu(fq.refuses)),
    Implementation("cpu", fq.launch_cpu, cpu(fq.refuses_cpu)),
    Implementation("reference", fq.reference, never),
    fake=lambda x, *_: torch.empty_like(x),
)
FAKE_QUANT_BACKWARD = declare(
    f"fake_quant_backward(Tensor grad, Tensor x, {_SCALES}) -> (Tensor dx, Tensor dscale, Tensor dzero)",
    Implementation("triton", fq.launch_backward, gpu(fq.refuses_backward)),
    Implementation("cpu", fq.launch_cpu_backward, cpu(fq.refuses_cpu_backward)),
    Implementation("reference", fq.reference_backward, never),
    fake=lambda grad, x, scale, *_: (torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)),
)
PERTURBED_FAKE_QUANT = declare(
    f"perturbed_fake_quant(Tensor x, {_PERTURBED}) -> Tensor",
    Implementation("triton", pt.launch, gpu(pt.refuses)),
    Implementation("cpu", pt.launch_cpu, cpu(pt.refuses_cpu)),
    Implementation("reference", pt.reference, never),
    fake=lambda x, *_: torch.empty_like(x),
)
PERTURBED_FAKE_QUANT_BACKWARD = declare(
    f"perturbed_fake_quant_backward(Tensor grad, Tensor x, {_PERTURBED}) -> (Tensor dx, Tensor dscale, Tensor dzero)",
    Implementation("triton", pt.launch_backward, gpu(pt.refuses_backward)),
    Implementation("cpu", pt.launch_cpu_backward, cpu(pt.refuses_cpu_backward)),
    Implementation("reference", pt.reference_backward, never),
    fake=lambda grad, x, scale, *_: (torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)),
)
PROLOGUE_FAKE_QUANT = declare(
    f"prologue_fake_quant(Tensor x, Tensor? residual, {_PROLOGUE}, bool observe, int qmin, int qmax, int? axis)"
    " -> (Tensor y, Tensor u, Tensor seen)",
    Implementation("triton", pg.launch, gpu(pg.refuses)),
    Implementation("cpu", pg.launch_cpu, cpu(pg.refuses_cpu)),
    Implementation("reference", pg.reference, never),
    fake=pg.fake,
)
PROLOGUE_FAKE_QUANT_BACKWARD = declare(
    f"prologue_fake_quant_backward(Tensor grad, Tensor? du, Tensor u, {_PROLOGUE}, int qmin, int qmax, int? axis)"
    " -> (Tensor dx, Tensor dgain, Tensor dshift, Tensor dscale, Tensor dzero)",
    Implementation("triton", pg.launch_backward, gpu(pg.refuses_backward)),
    Implementation("cpu", pg.launch_cpu_backward, cpu(pg.refuses_cpu_backward)),
    Implementation("reference", pg.reference_backward, never),
    fake=pg.fake_backward,
)
LOG2_FAKE_QUANT = declare(
    "log2_fake_quant(Tensor x, Tensor scale, int qmax, int roots) -> Tensor",
    Implementation("triton", lg.launch, gpu(lg.refuses)),
    Implementation("cpu", lg.launch_cpu, cpu(lg.refuses_cpu)),
    Implementation("reference", lg.reference, never),
    fake=lambda x, *_: torch.empty_like(x),
)
LOG2_FAKE_QUANT_BACKWARD = declare(
    "log2_fake_quant_backward(Tensor grad, Tensor x, Tensor scale, int qmax, int roots) -> (Tensor dx, Tensor dscale)",
    Implementation("triton", lg.launch_backward, gpu(lg.refuses_backward)),
    Implementation("cpu", lg.launch_cpu_backward, cpu(lg.refuses_cpu_backward)),
    Implementation("reference", lg.reference_backward, never),
    fake=lambda grad, x, scale, *_: (torch.empty_like(x), torch.empty_like(scale)),
)
LOG2_CODES = declare(
    "log2_codes(Tensor x, Tensor scale, int qmax, int roots) -> (Tensor codes, Tensor nonfinite)",
    Implementation("triton", lg.launch_codes, gpu(lg.refuses)),
    Implementation("cpu", lg.launch_cpu_codes, cpu(lg.refuses_cpu)),
    Implementation("reference", lg.codes_reference, never),
    fake=lambda x, *_: (torch.empty_like(x, dtype=torch.uint8), x.new_empty((), dtype=torch.int32)),
)
SOFT_ROUND = declare(
    "soft_round(Tensor w, Tensor v, Tensor scale, Tensor zero, Tensor beta, int qmin, int qmax, int? axis, int group,"
    " int conv_groups) -> (Tensor y, Tensor penalty, Tensor energy)",
    Implementation("triton", sr.launch, gpu(sr.refuses)),
    Implementation("cpu", sr.launch_cpu, cpu(sr.refuses_cpu)),
    Implementation("reference", sr.reference, never),
    fake=lambda w, v, *rest: (
        torch.empty_like(w),
        v.new_empty((), dtype=torch.float32),
        v.new_empty(rest[-1] * w.shape[1] if rest[-1] else 0, dtype=torch.float32),
    ),
)
SOFT_ROUND_BACKWARD = declare(
    "soft_round_backward(Tensor grad, Tensor dpenalty, Tensor denergy, Tensor w, Tensor v, Tensor scale, Tensor zero,"
    " Tensor beta, int qmin, int qmax, int? axis, int group, int conv_groups) -> Tensor",
    Implementation("triton", sr.launch_backward, gpu(sr.refuses_backward)),
    Implementation("cpu", sr.launch_cpu_backward, cpu(sr.refuses_cpu_backward)),
    Implementation("reference", sr.reference_backward, never),
    fake=lambda grad, dpenalty, denergy, w, v, *_: torch.empty_like(v),
)
QUANTIZE_CODES = declare(
    f"quantize_codes(Tensor x, {_SCALES}) -> (Tensor codes, Tensor nonfinite)",
    Implementation("triton", cd.launch, gpu(cd.refuses)),
    Implementation("cpu", cd.launch_cpu, cpu(cd.refuses_cpu)),
    Implementation("reference", cd.reference, never),
    fake=lambda x, *_: (torch.empty_like(x, dtype=torch.uint8), x.new_empty((), dtype=torch.int32)),
)
ACTIVATION_CODES = declare(
    "activation_codes(Tensor x, Tensor? scale, Tensor? zero, int bits, bool packed, bool sums)"
    " -> (Tensor codes, Tensor row_scale, Tensor row_zero, Tensor row_sums, Tensor nonfinite)",
    Implementation("triton", ac.launch, gpu(ac.refuses)),
    Implementation("cpu", ac.launch_cpu, cpu(ac.refuses_cpu)),
    Implementation("reference", ac.reference, never),
    fake=ac.allocate,
)
PACK_CODES = declare(
    "pack_codes(Tensor codes, int bits) -> Tensor",
    Implementation("cuda", cd.pack_launch_native, gpu(cd.pack_refuses_cuda)),
    Implementation("triton", cd.pack_launch, gpu(cd.pack_refuses)),
    Implementation("cpu", cd.pack_launch_native, cpu(cd.pack_refuses_cpu)),
    Implementation("reference", cd.pack_reference, never),
    fake=lambda codes, bits: codes.new_empty((*codes.shape[:-1], cd.row_bytes(codes.shape[-1], bits))),
)
UNPACK_CODES = declare(
    "unpack_codes(Tensor words, int bits, int k) -> Tensor",
    Implementation("cuda", cd.unpack_launch_native, gpu(cd.unpack_refuses_cuda)),
    Implementation("triton", cd.unpack_launch, gpu(cd.unpack_refuses)),
    Implementation("cpu", cd.unpack_launch_native, cpu(cd.unpack_refuses_cpu)),
    Implementation("reference", cd.unpack_reference, never),
    fake=lambda words, bits, k: words.new_empty((*words.shape[:-1], k)),
)
PACKED_LINEAR = declare(
    "packed_linear(Tensor x, Tensor words, Tensor scale, Tensor zero, Tensor? bias, int bits, int group,"
    f" Tensor? x_scale, Tensor? x_zero, int x_bits, ScalarType dtype, {ep.SCHEMA}) -> {_FINISHED}",
    Implementation("cuda", sl.launch, gpu(sl.refuses)),
    Implementation("dequantised", dq.launch, gpu(dq.refuses), dq.WHY),
    Implementation("triton", pl.launch, gpu(pl.refuses)),
    Implementation("cpu", pl.launch_cpu, cpu(pl.refuses_cpu)),
    Implementation("unpacked", pl.launch_unpacked, cpu(pl.refuses_unpacked)),
    Implementation("reference", pl.reference, never),
    fake=pl.fake,
)
PACKED_LINEAR_BACKWARD = declare(
    "packed_linear_backward(Tensor grad, Tensor words, Tensor scale, Tensor zero, int bits, int group, int k)"
    " -> Tensor",
    Implementation("cuda", pl.launch_backward, gpu(sl.refuses_backward)),
    Implementation("dequantised", dq.launch_backward, gpu(dq.refuses_backward), dq.WHY),
    Implementation("triton", pl.launch_backward, gpu(pl.refuses_backward)),
    Implementation("cpu", pl.launch_cpu_backward, cpu(pl.refuses_cpu_backward)),
    Implementation("unpacked", pl.launch_unpacked_backward, cpu(pl.refuses_unpacked)),
    Implementation("reference", pl.reference_backward, never),
    fake=lambda grad, *rest: grad.new_empty((*grad.shape[:-1], rest[-1])),
)
PACKED_CONV2D = declare(
    "packed_conv2d(Tensor x, Tensor words, Tensor scale, Tensor zero, Tensor? bias, int bits, Tensor? x_scale,"
    f" Tensor? x_zero, int x_bits, {_CONV}, ScalarType dtype, {ep.SCHEMA}) -> {_FINISHED}",
    Implementation("triton", pc.launch, gpu(pc.refuses)),
    Implementation("cpu", pc.launch_cpu, cpu(pc.refuses_cpu)),
    Implementation("unpacked", pc.launch_unpacked, cpu(pc.refuses_unpacked)),
    Implementation("reference", pc.reference, never),
    fake=pc.fake,
)
PACKED_CONV2D_BACKWARD = declare(
    "packed_conv2d_backward(Tensor grad, Tensor words, Tensor scale, Tensor zero, int bits, int[] input_shape,"
    f" {_CONV}) -> Tensor",
    Implementation("triton", pc.launch_backward, gpu(pc.refuses_backward)),
    Implementation("cpu", pc.launch_cpu_backward, cpu(pc.refuses_cpu_backward)),
    Implementation("unpacked", pc.launch_unpacked_backward, cpu(pc.refuses_unpacked)),
    Implementation("reference", pc.reference_backward, never),
    fake=lambda grad, words, scale, zero, bits, input_shape, *_: grad.new_empty(input_shape),
)
