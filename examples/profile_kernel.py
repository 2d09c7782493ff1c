"""Time an op of ttaq.ops with every implementation that runs on this machine, and say why the others do not.

    python examples/profile_kernel.py packed_linear --rows 197 --columns 768

On a GPU: --device cuda.
"""

import argparse

import torch
from torch.utils.benchmark import Timer

import ttaq
from ttaq import ops


def fake_quant(x, scale, zero):
    """Give the arguments of the raw op, and a call of the typed one: quantise and dequantise, one scale a row."""
    return (x, scale, zero, 0, 15, 0, 0), lambda: ops.fake_quant(x, scale, zero, qmin=0, qmax=15, axis=0)


def pack_codes(x, scale, zero):
    """The same for a bit stream of 4-bit codes."""
    codes, _ = ops.quantize_codes(x, scale, zero, qmax=15, axis=0)
    return (codes, 4), lambda: ops.pack_codes(codes, 4)


def packed_linear(x, scale, zero):
    """The same for a square linear layer of 4-bit codes on 8-bit activations."""
    k = x.shape[1]
    weight = torch.randint(16, (k, k), dtype=torch.uint8, device=x.device)
    words, scales, zeros = ops.pack_codes(weight, 4), scale.new_full((k,), 0.01), zero.new_full((k,), 8)
    x_scale, x_zero = scale.new_tensor(0.03), zero.new_tensor(128)
    codes, _ = ops.quantize_codes(x, x_scale, x_zero, qmax=255)
    grid = {"x_scale": x_scale, "x_zero": x_zero, "x_bits": 8}
    raw = (codes, words, scales, zeros, None, 4, 0, x_scale, x_zero, 8, torch.float32)
    return raw, lambda: ops.packed_linear(codes, words, scales, zeros, bits=4, **grid)[0]


OPS = {f.__name__: f for f in (fake_quant, pack_codes, packed_linear)}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("op", nargs="?", choices=OPS, default="fake_quant")
parser.add_argument("--rows", type=int, default=1024, help="of the input")
parser.add_argument("--columns", type=int, default=768, help="of the input")
parser.add_argument("--device", default="cpu", help="cpu or cuda")
parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
parser.add_argument("--seconds", type=float, default=0.5, help="of measuring, for each implementation")
options = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(options.threads)
x = torch.randn(options.rows, options.columns, device=options.device)
scale = torch.full((options.rows,), 0.25, device=options.device)
raw, call = OPS[options.op](x, scale, torch.full_like(scale, 8, dtype=torch.int32))
with ttaq.backend("reference"):
    wanted = call()

print(f"{options.op} of {options.rows} x {options.columns} on {options.device}, {options.threads} threads")
found = {}
for line in ttaq.explain(options.op, *raw).splitlines():
    name, verdict = line.split(": ", 1)  # "runs", "could run, but ...", or "refuses, ..." with the reason
    if verdict.startswith("refuses"):
        print(f"{name:<12}{verdict}")
        continue
    with ttaq.backend(name):
        same = torch.equal(call(), wanted)
        taken = Timer("call()", globals={"call": call}, num_threads=options.threads)
        found[name] = taken.blocked_autorange(min_run_time=options.seconds)
    chosen = ", the one that runs unasked" if verdict == "runs" else ""
    bits = "the bits of the reference" if same else "NOT the bits of the reference"
    median, spread = 1e6 * found[name].median, 1e6 * found[name].iqr
    print(f"{name:<12}{median:10.1f} us (quartiles {spread:.1f} apart), {bits}{chosen}")
fastest = min(found, key=lambda name: found[name].median)
ratio = found["reference"].median / found[fastest].median
print(f"{fastest} is the fastest, {ratio:.1f} times as fast as the plain-torch reference")
