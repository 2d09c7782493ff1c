"""Every way in which a Triton kernel is launched, for bench/aot.py; a kernel joins with one `Variant` for each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from ttaq.kernels import activation_codes as ac
from ttaq.kernels import codes as cd
from ttaq.kernels import dequantised as dq
from ttaq.kernels import log2 as lg
from ttaq.kernels import packed_conv2d as pc
from ttaq.kernels import packed_linear as pl
from ttaq.kernels import perturb as pt
from ttaq.kernels import prologue as pg
from ttaq.kernels import soft_round as sr


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched.

    `args` maps each parameter of the kernel to its type ("*fp32", "i32", "i32:16" where it is a multiple of 16) or, for
    what is constant, to its value; pointers are 16-byte aligned. `exact`: its codes must not depend on a fused
    multiply-add or an approximate division. `wide`: it must load 16 bytes at a time. `tensor_core`: the instructions
    one of which it must use, by architecture. `registers`: the ceiling that the launch names. `bytes`: those that an
    element moves, for kernels that memory should bound; 0 for the others.
    """

    module: str
    kernel: str
    name: str
    args: dict
    warps: int = 4
    stages: int = 3
    exact: bool = True
    wide: bool = True
    tensor_core: dict = field(default_factory=dict)
    registers: int | None = None
    bytes: int = 0

    @property
    def elements(self) -> int:
        """How many elements a thread takes at a time."""
        tile = self.args.get("BLOCK") or self.args.get("BLOCK_R", 1) * self.args.get("BLOCK_W", 0)
        if "CALLS" in self.args:
            tile = self.args["CALLS"] * (4 if self.args["KIND"] == pt.KINDS.index("gauss") else 8)
        return tile // (32 * self.warps)

    @property
    def tile(self) -> str:
        """The tile of a product and its warps, as 128x128x64/8: outputs, rows or pixels, contraction."""
        sizes = [self.args.get(f"BLOCK_{axis}") for axis in "NMK"]
        return "x".join(map(str, sizes)) + f"/{self.warps}" if all(sizes) else ""

    @property
    def products(self) -> int:
        """How many fused multiply-adds a thread has in a float32 `tl.dot`, which fuses whatever the launch says."""
        sizes = [self.args.get(f"BLOCK_{axis}", 0) for axis in "NMK"] if self.args.get("x_ptr") == "*fp32" else [0]
        return math.prod(sizes) // (32 * self.warps)


def _tiled(module: str, kernel: str, name: str, pointers: dict, *, moves: int = 0, **constants) -> Variant:
    """Describe a kernel over an (R, W) matrix whose columns are a multiple of 16, and the bytes an element moves."""
    sizes = {"R": "i32", "W": "i32:16", "C": "i32", "qmin": "fp32", "qmax": "fp32"}
    return Variant(module, kernel, name, {**sizes, **pointers, **constants}, bytes=moves)


_SIZE = {"fp32": 4, "bf16": 2}
_LAYOUTS = {
    "per tensor": {"R": 1, "C": 1, "BY_ROW": True, "BLOCK_R": 1},
    "per tensor, odd size": {"R": 1, "W": "i32", "C": 1, "BY_ROW": True, "BLOCK_R": 1},
    "per row": {"BY_ROW": True, "BLOCK_R": 2},
    "per column": {"BY_ROW": False, "BLOCK_R": 2},
}


def _fake_quant_variants() -> Iterator[Variant]:
    for dtype in ("fp32", "bf16"):
        x, scales = f"*{dtype}", {"scale_ptr": "*fp32", "zero_ptr": "*fp32"}
        for layout, shape in _LAYOUTS.items():
            name = f"{dtype}, {layout}"
            pointers = {"x_ptr": x, "y_ptr": x, **scales}
            block = {"BLOCK_W": 2048 // shape["BLOCK_R"]}
            yield _tiled("fake_quant", "_fake_quant_kernel", name, pointers, moves=2 * _SIZE[dtype], **shape, **block)
            pointers = {"grad_ptr": x, "dx_ptr": x, "dscale_ptr": "*fp32", "dzero_ptr": "*fp32", **pointers}
            block = {"BLOCK_W": 1024 // shape["BLOCK_R"], "STEPS": 8}
            moves = 3 * _SIZE[dtype]
            yield _tiled("fake_quant", "_fake_quant_backward_kernel", name, pointers, moves=moves, **shape, **block)


def _perturb_variants() -> Iterator[Variant]:
    names = ("scale_ptr", "zero_ptr", "spread_ptr", "dscale_ptr", "dzero_ptr")
    sizes = {"seed_ptr": "*i64", "n": "i32:16", "C": "i32", "inner": "i32", "qmin": "fp32", "qmax": "fp32"}
    constants = {**dict.fromkeys(names, "*fp32"), **sizes, "UNIT": pt.UNIT, "CALLS": pt.CALLS, "STEPS": 2}
    for dtype, kind, bits in [*product(("fp32",), pt.KINDS, (0, 32)), ("bf16", "drop", 0)]:
        pointers = dict.fromkeys(("grad_ptr", "x_ptr", "y_ptr", "dx_ptr"), f"*{dtype}")
        args = {**pointers, **constants, "KIND": pt.KINDS.index(kind), "CHANNELS": bits}
        bound = dtype == "fp32" and not bits  # bf16 and spreads by channel issue more than memory would hide
        for kernel, moves in (("_perturb_kernel", 8), ("_perturb_backward_kernel", 12)):
            name = f"{dtype}, {kind}" + (", per channel" if bits else "")
            yield Variant("perturb", kernel, name, args, wide=dtype == "fp32", bytes=moves if bound else 0)


def _prologue_variants() -> Iterator[Variant]:
    names = ("gain_ptr", "shift_ptr", "scale_ptr", "zero_ptr", "seen_ptr", "dgrid_ptr", "dalign_ptr")
    sizes = {**dict.fromkeys(names, "*fp32"), "parts": "i32", "eps": "fp32", "STEPS": 2}
    everything = {"ADD": True, "ALIGN": True, "OBSERVE": True}
    wanted = [("none", layout, everything) for layout in ("per row", "per column")]
    wanted += [("gelu", "per column", dict.fromkeys(everything, False)), ("gelu", "per column", everything)]
    wanted += [(f"layer_norm over {n}", "per column", everything) for n in (768, 1024, 1536, 4096)]
    for dtype, (before, layout, flags) in product(("fp32", "bf16"), wanted):
        kind, _, width = before.partition(" over ")
        block = max(1024, 1 << (int(width or 1) - 1).bit_length())
        shape = {**_LAYOUTS[layout], "BLOCK_R": 1 if width else 2, "BLOCK_W": block if width else 512}
        pointers = dict.fromkeys(
            ("x_ptr", "residual_ptr", "y_ptr", "u_ptr", "grad_ptr", "du_ptr", "dx_ptr"), f"*{dtype}"
        )
        rest = {**sizes, **shape, **flags, "BEFORE": pg.KINDS.index(kind)}
        name = f"{dtype}, {before}, {layout}" + (", all" if flags["ADD"] else "")
        for kernel, alone in (("_prologue_kernel", 2), ("_prologue_backward_kernel", 3)):
            moves = 4 * (4 if flags["ADD"] else alone) if dtype == "fp32" else 0
            tiled = _tiled("prologue", kernel, name, pointers, moves=moves, **rest)
            yield replace(tiled, warps=pg._warps(shape["BLOCK_R"] * shape["BLOCK_W"], _TORCH[dtype]))


def _log2_variants() -> Iterator[Variant]:
    sizes = {"scale_ptr": "*fp32", "dscale_ptr": "*fp32", "code_ptr": "*u8", "partial_ptr": "*i32", "n": "i32:16"}
    constants = {**sizes, "qmax": "i32", "BLOCK": lg.TILE, "STEPS": 2}
    for dtype, roots in product(("fp32", "bf16"), (1, 2)):
        args = {**dict.fromkeys(("grad_ptr", "x_ptr", "y_ptr", "dx_ptr"), f"*{dtype}"), **constants, "ROOTS": roots}
        for kernel, moves in (("fake_quant", 8), ("fake_quant_backward", 12), ("codes", 5)):
            bound = moves if dtype == "fp32" else 0
            yield Variant("log2", f"_log2_{kernel}_kernel", f"{dtype}, roots {roots}", args, bytes=bound)


def _soft_round_variants() -> Iterator[Variant]:
    names = ("w_ptr", "v_ptr", "scale_ptr", "zero_ptr", "beta_ptr", "y_ptr", "penalty_ptr", "energy_ptr")
    backward = ("grad_ptr", "dpenalty_ptr", "denergy_ptr", *names[:5], "dv_ptr")
    curve = {"STRETCH": 1.2, "SHIFT": -0.1}
    columns = dict.fromkeys(("stride_o", "outputs", "outputs_a_group", "stride_i", "inputs"), "i32")
    for layout, energy in product(("per tensor", "per row", "per column"), (False, True)):
        shape = {**_LAYOUTS[layout], **curve, "ENERGY": energy, "BLOCK_W": 1024 // _LAYOUTS[layout]["BLOCK_R"]}
        name = layout + (", energy" if energy else "")
        args = {**dict.fromkeys(backward, "*fp32"), **columns, **shape}
        yield _tiled("soft_round", "_soft_round_backward_kernel", name, args)
        rows = {"P": 1 if layout == "per tensor" else "i32", "inner": "i32:16", "STEPS": 1}
        rows |= {"STEPS": 2, "P": "i32", "BLOCK_R": 8, "BLOCK_W": sr.WIDTH} if energy else {}
        args = {**dict.fromkeys(names, "*fp32"), **shape, **rows}
        yield _tiled("soft_round", "_soft_round_kernel", name, args)


def _codes_variants() -> Iterator[Variant]:
    pointers = {"scale_ptr": "*fp32", "zero_ptr": "*i32", "code_ptr": "*u8", "partial_ptr": "*i32"}
    for dtype in ("fp32", "bf16"):
        for layout in ("per tensor", "per row", "per column"):
            constants = {"x_ptr": f"*{dtype}", "BLOCK_W": cd.TILE // _LAYOUTS[layout]["BLOCK_R"], **_LAYOUTS[layout]}
            yield _tiled("codes", "_quantize_codes_kernel", f"{dtype}, {layout}", pointers, **constants)
    sizes = {"code_ptr": "*u8", "word_ptr": "*u8", "n": "i32:16", "k": "i32:16", "row_bytes": "i32:16"}
    for verb, bits in product(("pack", "unpack"), cd.PACKABLE):
        args = {**sizes, "BITS": bits, "BLOCK": cd.BLOCK}
        yield Variant("codes", f"_{verb}_codes_kernel", f"{bits} bits", args, wide=False)


def _activation_codes_variants() -> Iterator[Variant]:
    pointers = {"scale_ptr": "*fp32", "zero_ptr": "*i32", "code_ptr": "*u8", "sum_ptr": "*i32", "partial_ptr": "*i32"}
    sizes = {"M": "i32", "K": "i32:16", "row_bytes": "i32:16", "stride_xm": "i32:16", "token": "i32", "qmax": "fp32"}
    constants = {"EPSILON": ac.EPSILON, "SUMS": True}
    taken = [(x, *row, True) for x in ("fp32", "bf16") for row in ((768, 8), (3072, 4), (8192, 4), (12288, 8))]
    taken += [("bf16", 64, 2, True), ("fp32", 771, 4, True), ("fp32", 768, 8, False), ("bf16", 768, 4, False)]
    for x, k, bits, measure in taken:
        m, block, warps = ac._tiles(k)
        args = {"x_ptr": f"*{x}", **pointers, **sizes, **constants, "MEASURE": measure, "BITS": bits, "LONG": k > block}
        args |= {"BLOCK_M": m, "BLOCK_K": block}
        if k % 16:
            args |= dict.fromkeys(("K", "row_bytes", "stride_xm"), "i32")
        name = f"{x}, {bits} bits, K {k}, " + ("measured" if measure else "given")
        yield Variant("activation_codes", "_activation_codes_kernel", name, args, warps, wide=k % 16 == 0)


_MMA = {"u8": {80: ("IMMA",), 90: ("IGMMA",)}, "bf16": {80: ("HMMA",), 90: ("HGMMA",)}, "fp32": {}}
_TORCH = {"u8": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}
_WEIGHT = {"word_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*i32"}


_FOLLOWS = ("gain_ptr", "shift_ptr", "residual_ptr", "y_scale_ptr", "y_zero_ptr", "moments_ptr", "nonfinite_ptr")
_EPILOGUES = {  # what follows a product: nothing, or all there is
    "": {**dict.fromkeys(_FOLLOWS), "qmax": "fp32", "AFTER": 0},
    ", epilogue": {
        **dict.fromkeys(_FOLLOWS, "*fp32"), "residual_ptr": "*bf16", "y_ptr": "*u8", "y_zero_ptr": "*i32",
        "nonfinite_ptr": "*i32", "qmax": "fp32", "AFTER": 2,
    },
}  # fmt: skip


def _packed_args(x, bits, even, follows):
    """Describe what the forward kernels of both packed layers take; codes of activations have 8 bits."""
    integer, rows = x == "u8", "i32:16" if even else "i32"
    pointers = {"x_ptr": f"*{x}", **_WEIGHT, "bias_ptr": "*fp32", "y_ptr": "*bf16" if integer else f"*{x}"}
    grid = {"x_scale_ptr": "*fp32" if integer else None, "x_zero_ptr": "*i32" if integer else None}
    sizes = {"M": "i32", "N": "i32:16", "K": rows, "row_bytes": rows, "EVEN": even}
    wide = {"INTEGER": integer, "BITS": bits, "WIDE_W": bits == 8, "WIDE_X": True, "BIAS": True}
    return {**pointers, **grid, **sizes, **wide, **_EPILOGUES[follows]}


def _packed_linear_variants() -> Iterator[Variant]:
    large = [(x, bits, 4096, 0, 768) for x, bits in product(("u8", "bf16"), cd.PACKABLE)]
    special = [("u8", 4, m, 0, 768) for m in (16, 32, 64)] + [("u8", 8, 64, 0, 768)]
    special += [("u8", 4, 200, 128, 768), ("u8", 4, 4096, 48, 768), ("u8", 8, 4096, 0, 771)]
    special += [("bf16", 4, 16, 0, 768), ("bf16", 3, 4096, 128, 768), ("bf16", 4, 4096, 0, 770)]
    special += [("fp32", 4, 4096, 0, 768), ("fp32", 3, 4096, 32, 768)]
    for (x, bits, m, group, k), follows in product([*large, *special], _EPILOGUES):
        n, rows, depth, warps, stages = pl._tiles(m, group or k, _TORCH[x], group, bool(follows))
        even = (group or k) % depth == 0
        args = {**_packed_args(x, bits, even, follows), "group": "i32:16", "stride_xm": "i32:16" if even else "i32"}
        args |= {"token": "i32", "GROUPED": group > 0, "BLOCK_N": n, "BLOCK_M": rows, "BLOCK_K": depth}
        name = f"{x}, {bits} bits, M {m}, K {k}" + (f", groups of {group}" if group else "") + follows
        exact = x == "u8" or bool(follows)
        ceiling = pl.FLOAT32_REGISTERS if x == "fp32" else None
        yield Variant(
            "packed_linear", "_packed_linear_kernel", name, args, warps, stages, exact, even, _MMA[x], ceiling
        )
    sizes = {"M": "i32", "N": "i32:16", "K": "i32:16", "row_bytes": "i32:16", "group": "i32:16", "stride_gm": "i32:16"}
    for x, bits, grouped in [("bf16", b, False) for b in cd.PACKABLE] + [("bf16", 4, True), ("fp32", 3, True)]:
        m, n, k = pl._backward_tiles(_TORCH[x])
        tiles = {"BITS": bits, "GROUPED": grouped, "BLOCK_N": n, "BLOCK_M": m, "BLOCK_K": k}
        args = {"grad_ptr": f"*{x}", "dx_ptr": f"*{x}", **_WEIGHT, **sizes, **tiles}
        name = f"{x}, {bits} bits" + (", groups" if grouped else "")
        yield Variant("packed_linear", "_packed_linear_backward_kernel", name, args, 4, 2, False, False, _MMA[x])


def _dequantised_variants() -> Iterator[Variant]:
    sizes = dict.fromkeys(("N", "K", "row_bytes", "group"), "i32:16")
    for to, bits, grouped in [("bf16", b, False) for b in cd.PACKABLE] + [("bf16", 4, True), ("fp32", 3, True)]:
        tiles = {"BITS": bits, "GROUPED": grouped, "BLOCK_N": dq._ROWS, "BLOCK_K": dq._COLUMNS}
        name = f"{to}, {bits} bits" + (", groups" if grouped else "")
        args = {**_WEIGHT, "weight_ptr": f"*{to}", **sizes, **tiles}
        yield Variant("dequantised", "_dequantise_kernel", name, args, 4, 3, True, False)


def _packed_conv2d_variants() -> Iterator[Variant]:
    strides = [f"stride_{of}" for of in ("xb", "xc", "xh", "xw", "yb", "yc", "yp", "gb", "gc", "gh", "gw")]
    pairs = [f"{of}_{side}" for of in ("step", "pad", "dilation") for side in "hw"]
    sizes = dict.fromkeys(("H", "W", "OH", "OW", *strides, *pairs), "i32")
    near = {name: 1 if name.endswith("c") else "i32:16" for name in strides}
    taken = [("u8", bits, 3, channels, near) for bits, channels in product(cd.PACKABLE, (64, 256))]
    taken += [("u8", 4, 3, 32, near), ("u8", 4, 3, 256, {}), ("u8", 8, 7, 3, {}), ("u8", 4, 3, 1, near)]
    taken += [("bf16", 3, 3, 64, near), ("bf16", 4, 1, 64, near), ("bf16", 4, 3, 256, near)]
    taken += [("fp32", 4, 3, 64, near), ("fp32", 3, 3, 1, near)]
    for (x, bits, taps, channels, last), follows in product(taken, _EPILOGUES):
        outputs, order = 64 if channels == 3 else channels, torch.channels_last if last else torch.contiguous_format
        image = torch.empty((64, channels, 14, 14), dtype=_TORCH[x], device="meta").to(memory_format=order)
        rows, m, depth, warps, stages = pc._tiles(outputs, channels, 64 * 14 * 14, image, bool(follows))
        shape = {**sizes, **last, "S": taps, "BLOCK_M": m, "C": "i32:16" if channels > 3 else channels}
        name = f"{x}, {bits} bits, {taps}x{taps} of {channels}" + (", channels last" if last else "") + follows
        mma = _MMA[x] if outputs >= 64 else dict.fromkeys(_MMA[x], ("IMMA",))  # wgmma wants 64 outputs
        whole = channels % depth == 0
        args = {**_packed_args(x, bits, whole, follows), **shape, "BY_TAP": whole, "BLOCK_N": rows, "BLOCK_K": depth}
        exact = x == "u8" or bool(follows)
        most = None if x == "u8" else pc.FLOAT_REGISTERS
        wide = bool(last) and channels > 16
        yield Variant("packed_conv2d", "_packed_conv2d_kernel", name, args, warps, stages, exact, wide, mma, most)
        if x != "u8" and not follows:
            rows, m, depth = pc._small_tile(channels, _TORCH[x])
            args = {"grad_ptr": f"*{x}", "dx_ptr": f"*{x}", **_WEIGHT, **shape, "M": "i32", "N": "i32:16"}
            args |= {"row_bytes": "i32", "R": taps, "BITS": bits, "WHOLE": channels > 1}
            args |= {"BLOCK_C": rows, "BLOCK_M": m, "BLOCK_N": depth}
            kernel, warps = "_packed_conv2d_backward_kernel", pc._backward_warps(_TORCH[x])
            yield Variant("packed_conv2d", kernel, name, args, warps, 2, False, False, _MMA[x])


VARIANTS: list[Variant] = [
    *_fake_quant_variants(),
    *_perturb_variants(),
    *_prologue_variants(),
    *_log2_variants(),
    *_soft_round_variants(),
    *_codes_variants(),
    *_activation_codes_variants(),
    *_packed_linear_variants(),
    *_dequantised_variants(),
    *_packed_conv2d_variants(),
]
