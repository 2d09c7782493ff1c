"""ttaq: quantise vision models to 2-8 bits after training, and keep them accurate while the world they look at changes.

The verbs, in the order of use:

    model = ttaq.prepare(model, "w4a4")        # quantised layers, float behaviour
    ttaq.calibrate(model, batches)             # scales set
    ttaq.reconstruct(model, batches)           # roundings and scales learned, block by block
    ttaq.refine(model, batches)                # the whole network made consistent under perturbation
    packed = ttaq.pack(model)                  # integer codes, low-bit kernels
    ttaq.save(packed, "model.safetensors")         # save_pretrained: a folder; export_onnx: for other runtimes
    packed = ttaq.load("model.safetensors", architecture)
    adapter = ttaq.adapt(packed, "tent")       # logits = adapter(x), for ever, on a changing stream
    fused = ttaq.fuse(packed, x)               # or, where nothing is to adapt: codes handed from layer to layer

`ttaq.quantize(model, batches, "w4a4")` is the first four in one. `ttaq.solve` chooses codes in closed form, seconds a
block, and `ttaq.allocate` bits for each layer under a budget. The layers serve alone, too:
`ttaq.QuantLinear`, `ttaq.QuantConv2d`, `ttaq.PackedLinear`, `ttaq.PackedConv2d`.
"""

from .adaptation import Adapter, adapt
from .allocation import allocate
from .blocks import find_blocks
from .calibration import calibrate
from .checkpoint import load, save
from .closed_form import solve
from .consistency import PCR
from .dispatch import backend, explain
from .evaluation import evaluate
from .export import export_onnx, export_torch
from .folders import from_pretrained, save_pretrained
from .fusion import fuse
from .layers import MatMul, QuantConv2d, QuantLinear, QuantMatMul
from .packed_layers import PackedConv2d, PackedLinear
from .packing import pack
from .perturbation import PEM
from .pipeline import quantize
from .preparation import prepare
from .reconstruction import reconstruct
from .refinement import Refinement, refine
from .report import evaluate_grid
from .safety import diagnose, protect
from .spec import QuantSpec, Recipe
from .streams import (
    continual,
    correlated,
    corrupt,
    gradual,
    long_tailed,
    mixed,
    mixed_correlated,
    recurring,
    shuffled,
)

__version__ = "0.1.0"

__all__ = [
    "PCR",
    "PEM",
    "Adapter",
    "MatMul",
    "PackedConv2d",
    "PackedLinear",
    "QuantConv2d",
    "QuantLinear",
    "QuantMatMul",
    "QuantSpec",
    "Recipe",
    "Refinement",
    "adapt",
    "allocate",
    "backend",
    "calibrate",
    "continual",
    "correlated",
    "corrupt",
    "diagnose",
    "evaluate",
    "evaluate_grid",
    "explain",
    "export_onnx",
    "export_torch",
    "find_blocks",
    "from_pretrained",
    "fuse",
    "gradual",
    "load",
    "long_tailed",
    "mixed",
    "mixed_correlated",
    "pack",
    "prepare",
    "protect",
    "quantize",
    "reconstruct",
    "recurring",
    "refine",
    "save",
    "save_pretrained",
    "shuffled",
    "solve",
]
