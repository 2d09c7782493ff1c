"""Compile every Triton kernel for sm_80 and sm_90, without a GPU, and read what the compiler made of it.

`python bench/aot.py` prints the table; `--json` the same rows for tests/test_aot.py. It needs a process without
TRITON_INTERPRET. A kernel joins with one `Variant` per way in which it is launched.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched.

    `args` maps each parameter of the kernel to its type ("*fp32", "i32", "i32:16" where it is a multiple of 16) or, for
    what is constant, to its value; pointers are 16-byte aligned. `exact`: its codes must not depend on a fused
    multiply-add or an approximate division. `wide`: it must load 16 bytes at a time. `tensor_core`: the instructions
    one of which it must use, by architecture.
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


@dataclass(frozen=True)
class Row:
    """What one variant became on one architecture; instructions are those of one thread."""

    kernel: str
    variant: str
    arch: int
    registers: int
    stack: int
    shared: int
    spills: int
    wide_loads: int
    wide_stores: int
    instructions: int
    fused: int
    exact_divisions: int
    approximate_divisions: int
    tensor_core: tuple[str, ...]


def _tiled(module: str, kernel: str, name: str, pointers: dict, **constants) -> Variant:
    """Describe a kernel over an (R, W) matrix whose columns are a multiple of 16."""
    sizes = {"R": "i32", "W": "i32:16", "C": "i32", "qmin": "fp32", "qmax": "fp32"}
    return Variant(module, kernel, name, {**pointers, **sizes, **constants})


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
            yield _tiled("fake_quant", "_fake_quant_kernel", name, pointers, **shape, **block)
            pointers = {"grad_ptr": x, "dx_ptr": x, "dscale_ptr": "*fp32", "dzero_ptr": "*fp32", **pointers}
            block = {"BLOCK_W": 1024 // shape["BLOCK_R"], "STEPS": 8}
            yield _tiled("fake_quant", "_fake_quant_backward_kernel", name, pointers, **shape, **block)


def _soft_round_variants() -> Iterator[Variant]:
    names = ("w_ptr", "v_ptr", "scale_ptr", "zero_ptr", "beta_ptr", "y_ptr", "penalty_ptr")
    backward = ("grad_ptr", "dpenalty_ptr", *names[:5], "dv_ptr")
    for layout in ("per tensor", "per row", "per column"):
        shape = _LAYOUTS[layout]
        constants = {"STRETCH": 1.2, "SHIFT": -0.1, "BLOCK_W": 1024 // shape["BLOCK_R"], **shape}
        for kernel, parameters in (("_soft_round_kernel", names), ("_soft_round_backward_kernel", backward)):
            yield _tiled("soft_round", kernel, layout, dict.fromkeys(parameters, "*fp32"), **constants)


VARIANTS: list[Variant] = [*_fake_quant_variants(), *_soft_round_variants()]


def collect(variants: list[Variant] | None = None) -> list[Row]:
    """Compile each variant for each architecture and read its row."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("bench/aot.py: TRITON_INTERPRET is set and nothing would be compiled; unset it")
    return [_row(variant, arch) for variant in variants or VARIANTS for arch in ARCHITECTURES]


def _row(variant, arch):
    compiled = _compile(variant, arch)
    usage, sass = _disassemble(compiled.asm["cubin"])
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, flags=re.MULTILINE)
    opcodes = [o for o in opcodes if not o.startswith("NOP")]
    ptx = compiled.asm["ptx"]

    def count(pattern):
        return sum(bool(re.match(pattern, o)) for o in opcodes)

    return Row(
        kernel=variant.kernel,
        variant=variant.name,
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=compiled.metadata.shared,
        spills=count(r"(STL|LDL)\b"),
        wide_loads=count(r"(LDG|LDGSTS|UBLKCP|UTMALDG).*(128|TMA|CP)"),
        wide_stores=count(r"(STG|UTMASTG).*(128|TMA)"),
        instructions=len(opcodes),
        fused=len(re.findall(r"\bfma\.rn\.(?!ftz)", ptx)),  # the ftz ones are those of exp and log
        exact_divisions=len(re.findall(r"\bdiv\.rn\.", ptx)),
        approximate_divisions=len(re.findall(r"\bdiv\.(full|approx)\.", ptx)),
        tensor_core=tuple(sorted({o.split(".")[0] for o in opcodes if re.match(r"(HMMA|IMMA|HGMMA|IGMMA|QGMMA)", o)})),
    )


def _compile(variant, arch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(f"ttaq.kernels.{variant.module}"), variant.kernel)
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(function.arg_names):
        value = variant.args[name]
        if not isinstance(value, str):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name], _, multiple = value.partition(":")
        if multiple or value.startswith("*"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": not variant.exact}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _disassemble(cubin):
    import triton

    tool = Path(triton.__file__).with_name("backends") / "nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}, sass


def table(rows: list[Row]) -> str:
    """Lay the rows out as a Markdown table."""
    lines = [
        "| kernel | variant | arch | registers | spills | shared | 128-bit loads | stores | SASS | tensor core |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.kernel} | {r.variant} | sm_{r.arch} | {r.registers} | {r.spills} | {r.shared} | {r.wide_loads} |"
            f" {r.wide_stores} | {r.instructions} | {', '.join(r.tensor_core) or '-'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--kernel", default="", help="only the kernels whose name holds this")
    options = parser.parse_args()
    found = collect([v for v in VARIANTS if options.kernel in v.kernel])
    sys.stdout.write(json.dumps([asdict(row) for row in found]) if options.json else table(found) + "\n")
