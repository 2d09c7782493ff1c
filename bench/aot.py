"""Compile every Triton kernel for sm_80 and sm_90, without a GPU, and read what the compiler made of it.

`python -m bench.aot` prints the table; `--json` the same rows for tests/test_aot.py. It needs a process without
TRITON_INTERPRET. The kernels are listed in variants.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import product
from pathlib import Path

from .variants import VARIANTS, Variant

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Row:
    """What one variant became on one architecture; instructions are those of one thread.

    `per_element`: of the shortest way through the loop, or without one through the kernel, which takes no slow path of
    a division; None where nothing says how many elements that is.
    """

    kernel: str
    variant: str
    tile: str
    arch: int
    registers: int
    stack: int
    shared: int
    spills: int
    wide_loads: int
    wide_stores: int
    instructions: int
    per_element: float | None
    fused: int
    exact_divisions: int
    approximate_divisions: int
    tensor_core: tuple[str, ...]


def collect(variants: list[Variant] | None = None) -> list[Row]:
    """Compile each variant for each architecture and read its row."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("bench/aot.py: TRITON_INTERPRET is set and nothing would be compiled; unset it")
    wanted = list(product(VARIANTS if variants is None else variants, ARCHITECTURES))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_row, [variant for variant, _ in wanted], [arch for _, arch in wanted]))


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
        tile=variant.tile,
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=compiled.metadata.shared,
        spills=count(r"(STL|LDL)\b"),
        wide_loads=count(r"(LDG|LDGSTS|UBLKCP|UTMALDG).*(128|TMA|CP)"),
        wide_stores=count(r"(STG|UTMASTG).*(128|TMA)"),
        instructions=len(opcodes),
        per_element=shortest_way(sass) / variant.elements if variant.elements else None,
        fused=len(re.findall(r"\bfma\.rn\.(?!ftz|bf16)", ptx)),  # ftz: in exp and log; bf16: x * 1 + y, a sum
        exact_divisions=len(re.findall(r"\bdiv\.rn\.", ptx)),
        approximate_divisions=len(re.findall(r"\bdiv\.(full|approx)\.", ptx)),
        tensor_core=tuple(sorted({o.split(".")[0] for o in opcodes if re.match(r"(HMMA|IMMA|HGMMA|IGMMA|QGMMA)", o)})),
    )


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", flags=re.MULTILINE)


def shortest_way(sass: str) -> int:
    """Count the instructions of the shortest way once through the longest loop of a kernel, or through all of it.

    Args:
        sass: Of cuobjdump.
    """
    found = _INSTRUCTION.findall(sass)  # a branch is guarded by a predicate before it or among its operands
    code = {int(at, 16): (bool(guard) or "," in rest, name, rest) for at, guard, name, rest in found}
    order = sorted(code)
    following = dict(zip(order, [*order[1:], None], strict=True))
    ways = {}
    for at, (guarded, name, rest) in code.items():
        what = name.split(".")[0]
        goes_on = guarded or what not in ("BRA", "EXIT", "RET")
        ways[at] = [following[at]] if goes_on and following[at] is not None else []
        if what == "BRA" or (what == "CALL" and guarded):  # a guarded call leaves for good; others come back
            ways[at].append(int(re.findall(r"0x([0-9a-f]+)", rest)[-1], 16))
    reachable = _distances(ways, order[0])
    bodies = [_distances(ways, way)[at] for at in reachable for way in ways[at] if way <= at]
    ends = {at for at, (_, name, _) in code.items() if name == "EXIT"}
    return max(bodies, default=0) or min(reachable[end] for end in ends if end in reachable)


def _distances(ways, start):
    """Count the instructions from `start` to each instruction, both included."""
    found, edge = {start: 1}, [start]
    while edge:
        edge = [
            n for at in edge for n in ways[at] if found.setdefault(n, found[at] + 1) == found[at] + 1 and n != start
        ]
        edge = list(dict.fromkeys(edge))
    return found


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
    options |= {} if variant.registers is None else {"maxnreg": variant.registers}
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
        "| kernel | variant | tile/warps | arch | registers | spills | shared | wide loads | stores | SASS | each"
        " | tensor core |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        each = f"{r.per_element:.1f}" if r.per_element else "-"
        lines.append(
            f"| {r.kernel} | {r.variant} | {r.tile or '-'} | sm_{r.arch} | {r.registers} | {r.spills} | {r.shared} |"
            f" {r.wide_loads} | {r.wide_stores} | {r.instructions} | {each} |"
            f" {', '.join(r.tensor_core) or '-'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--kernel", default="", help="only the kernels whose name holds this")
    options = parser.parse_args()
    found = collect([v for v in VARIANTS if options.kernel in v.kernel])
    sys.stdout.write(json.dumps([asdict(row) for row in found]) if options.json else table(found) + "\n")
