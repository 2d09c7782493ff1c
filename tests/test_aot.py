"""Every Triton kernel of bench/variants.py, compiled ahead of time for sm_80 and sm_90: no GPU is needed."""

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

ROOT = Path(__file__).parents[1]
VARIANTS = {(v.kernel, v.name): v for v in runpy.run_path(str(ROOT / "bench/variants.py"))["VARIANTS"]}
IDS = [f"{kernel}-{name}-sm_{arch}" for kernel, name in VARIANTS for arch in (80, 90)]

ISSUED = 31 / 4  # instructions that fit under the memory floor of an H100, for each byte that an element moves


@pytest.fixture(scope="module")
def rows():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {f"{r['kernel']}-{r['variant']}-sm_{r['arch']}": r for r in json.loads(done.stdout)}


@pytest.mark.parametrize("key", IDS)
def test_kernel_compiles_to_good_code(rows, key):
    row = rows[key]
    variant = VARIANTS[row["kernel"], row["variant"]]
    assert row["spills"] == 0
    assert row["stack"] == 0
    assert row["approximate_divisions"] == 0
    if variant.exact:
        assert row["fused"] == variant.products
    if variant.wide:
        assert row["wide_loads"] > 0
    if variant.bytes:
        assert row["per_element"] <= ISSUED * variant.bytes
    if variant.tensor_core:
        assert set(row["tensor_core"]) & set(variant.tensor_core[row["arch"]])


def test_every_kernel_of_the_package_is_listed():
    listed = {kernel for kernel, _ in VARIANTS}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert node.name in listed, f"{path.name}: list {node.name} in bench/variants.py"
