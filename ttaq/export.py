"""export_onnx and export_torch: a quantised model as a file that other runtimes read."""

import json
import os
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from .adaptation import Adapter
from .files import write_atomically
from .onnx_layers import LAYERS, Codes, codes_of, quantizers_of, twin_of
from .packed_layers import PackedConv2d, PackedLinear
from .quantizers import ActivationQuantizer
from .spec import Recipe
from .surgery import copy_model, replace

TARGETS = ("onnx", "tensorrt")
OPSETS = range(18, 24)
NARROW_FROM = 21  # opset with 4-bit types and blocks of inputs
# What torch.export raises, and the model's code makes of its tracers.
_UNTRACEABLE = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError)
_BLOCKS = (64, 128)
_SYMMETRIC = 'quantise with Recipe.parse("w8a8", symmetric=True)'
_BLOCKWISE = 'Recipe.parse("w4a16", group=64, symmetric=True)'


def export_onnx(
    model: nn.Module,
    images: Tensor,
    path: str | os.PathLike,
    *,
    fold: bool = True,
    target: str = "onnx",
    opset: int = NARROW_FROM,
    batch: int | None = None,
) -> dict:
    """Write a quantised model as an ONNX file: integers, QuantizeLinear and DequantizeLinear around float products.

    Weights are stored as integers (int8, uint8, int4, uint4; 2 and 3 bits in 4, 5 to 7 in 8) with one scale an output
    channel or a block of inputs; both operands of attention's products are quantised. Codes and grids are those of the
    model; sums are in float, so that values near the middle of two codes may fall the other way.

    Args:
        model: Prepared and calibrated, packed, or `adapter.export()`; left as it is. Computes in float32 in the file.
        images: (B, ...), an example of the input, for its shape alone.
        path: The file.
        fold: Whether a BatchNorm behind a convolution moves into the scale and the bias of that one, which only rounds
            these; False keeps it as an operator.
        target: "onnx", or "tensorrt", for which zeros are 0, weights of less than 8 bits a channel are stored as int8,
            and what TensorRT does not read is refused.
        opset: 18 to 23; from 21 on there are 4-bit types and blocks.
        batch: Images in a batch; None leaves it free.

    Returns:
        What was written: path, bytes, opset, target, "layers" (what each is stored as), "folded" (how many norms), and
        "kept" (the other norms, with the reason).

    Raises:
        ValueError: A layer cannot be exported so (each is named, with the remedy), nothing is quantised, torch.export
            cannot follow the model, or an argument is out of range.
        ImportError: onnx or onnxscript is not installed.
    """
    _check(model, images, target, opset, batch)
    _import_onnx()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    if not layers:
        raise ValueError("export_onnx: the model holds no quantised layer; call ttaq.quantize, or torch.onnx.export")
    _refuse(layers, target, opset)
    twin = copy_model(model).cpu().float().eval().requires_grad_(False)
    stored, centred = {}, target == "tensorrt"
    for name in layers:
        part = twin_of(twin.get_submodule(name), narrow=opset >= NARROW_FROM, centred=centred)
        twin = part if not name else twin
        if name:
            replace(twin, name, part)
        stored[name] = _kinds(part)
    program = _traced("export_onnx", twin.eval(), images.cpu().float(), batch)
    graph, folded, kept = _translated(program, opset, fold, centred)
    graph.model.metadata_props.update(_described(model))
    path = write_atomically(path, lambda temporary: graph.save(temporary))
    said = {"path": str(path), "bytes": path.stat().st_size, "opset": opset, "target": target}
    return said | {"layers": stored, "folded": folded, "kept": kept}


def export_torch(model: nn.Module, images: Tensor, path: str | os.PathLike, *, batch: int | None = None) -> Path:
    """Write a model as a program of torch.export, which calls ttaq's own ops: the same bits without the model's code.

    Args:
        model: In any form, best packed; left as it is.
        images: (B, ...), on the model's device, an example of the input.
        path: The file, .pt2; `torch.export.load(path).module()` reads it once ttaq is imported.
        batch: As in `export_onnx`.

    Returns:
        The path.

    Raises:
        ValueError: torch.export cannot follow the model, or an argument is out of range.
    """
    _check(model, images, "onnx", NARROW_FROM, batch)
    twin = copy_model(model, share=lambda name, tensor: True).eval()
    program = _traced("export_torch", twin, images, batch)
    return write_atomically(path, lambda temporary: torch.export.save(program, temporary))


def _check(model, images, target, opset, batch):
    if isinstance(model, Adapter):
        raise ValueError("export: an Adapter goes on learning; pass adapter.export(), the model as it is now")
    if "fused" in getattr(model, "ttaq_report", {}):
        raise ValueError("export: the model is fused; export the packed model it was made from")
    if not isinstance(images, Tensor) or images.dim() < 2 or not len(images):
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"export: images must be a batch (B, ...), got {got}; pass one as the model takes it")
    if target not in TARGETS:
        raise ValueError(f"export: target must be one of {', '.join(TARGETS)}, got {target!r}")
    if opset not in OPSETS:
        raise ValueError(f"export: opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset!r}; use {NARROW_FROM}")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"export: batch must be a number of images from 1, got {batch!r}; use None to leave it free")


def _described(model) -> dict[str, str]:
    """Give the file what the checkpoint says of itself, as JSON: preprocessing, classes, reference; and the recipe."""
    recipe = getattr(model, "ttaq_report", {}).get("recipe")
    found = getattr(model, "ttaq_origin", {}) | {"recipe": recipe and str(Recipe.from_json(recipe))}
    return {f"ttaq.{name}": json.dumps(value) for name, value in found.items() if value is not None}


def _import_onnx():
    """Say what to install where the packages are missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export_onnx: {error.name} is not installed; run pip install 'ttaq[export]'") from error


def _refuse(layers, target, opset):
    """Name every layer that cannot be exported, once for each reason."""
    found = defaultdict(list)
    for name, layer in layers.items():
        reason = _unready(layer, opset) or (_foreign(layer) if target == "tensorrt" else None)
        if reason:
            found[reason].append(name or type(layer).__name__)
    if found:
        said = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in found.items())
        raise ValueError(f"export_onnx: {target} cannot take these layers: {said}")


def _unready(layer, opset):
    """Say why a layer has no grid that opset could write, or None."""
    weight = getattr(layer, "weight_quantizer", None)
    quantizers = [q for q in (weight, *quantizers_of(layer)) if q is not None and q.enabled]
    if any(not q.ready and (not q.auto or isinstance(q, ActivationQuantizer)) for q in quantizers):
        return "without calibrated ranges; run ttaq.calibrate first"
    if weight is not None and weight.rounding is not None:
        return "its rounding is being learned; let ttaq.reconstruct end first"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks, which a file cannot hold; remove them first"
    spec = layer.spec if isinstance(layer, (PackedLinear, PackedConv2d)) else weight and weight.spec
    if spec is not None and spec.group and opset < NARROW_FROM:
        return f"groups of {spec.group} inputs share a scale; use opset={NARROW_FROM} or weights without groups"
    return None


def _foreign(layer):
    """Say what of a layer TensorRT does not read, or None."""
    for quantizer in quantizers_of(layer):
        spec = quantizer.spec
        if not quantizer.active:
            continue
        if spec.granularity == "token":
            return f"its input has one scale a token; calibrate one for all, {_SYMMETRIC}"
        if spec.bits != 8:
            return f"its input has {spec.bits} bits and not 8; {_SYMMETRIC}"
        if int(quantizer.zero) != 128:
            return f"the zero of its input is not in the middle; {_SYMMETRIC}"
    held = None if not hasattr(layer, "input_quantizer") else codes_of(layer)
    return None if held is None else _foreign_weight(held, any(q.active for q in quantizers_of(layer)))


def _foreign_weight(held: Codes, quantised_input: bool):
    spec = held.spec
    if spec.group and (spec.bits != 4 or spec.group not in _BLOCKS or quantised_input):
        return f"groups are read of 64 or 128 4-bit weights on inputs in float; quantise with {_BLOCKWISE}"
    low, high = (-8, 7) if spec.group else (-128, 127)
    if held.centred.min() < low or held.centred.max() > high:
        remedy = f"quantise with {_BLOCKWISE}" if spec.group else _SYMMETRIC
        return f"the zeros of its weight are not in the middle; {remedy}"
    return None


def _kinds(part):
    """Say what a twin's operands are stored as."""
    names = {"steps": "input", "left": "left", "right": "right", "stored": "weight"}
    return {said: part._modules[n].kind for n, said in names.items() if hasattr(part._modules.get(n), "kind")}


def _traced(verb, model, images, batch):
    """Run torch.export; the number of images is free where `batch` is None."""
    rows = max(2, len(images)) if batch is None else batch  # one image alone would fix the number at one
    images = torch.zeros((rows, *images.shape[1:]), dtype=images.dtype, device=images.device)
    free = None if batch is not None else ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=free, strict=False)
    except _UNTRACEABLE as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        remedy = "pass batch= to fix the number of images" if batch is None else "run the model as it is"
        raise ValueError(f"{verb}: torch.export cannot follow {type(model).__name__} ({reason}); {remedy}") from error


def _translated(program, opset, fold, centred):
    """Translate a program into ONNX; return it with the number of folded norms and the reasons of the others."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript import optimizer

    from . import onnx_graph

    graph = torch.onnx.export(
        program, dynamo=True, optimize=False, opset_version=opset, input_names=["images"], verbose=False
    )
    onnx_graph.narrow(graph.model)
    optimizer.optimize_ir(graph.model)
    folded, kept = onnx_graph.fold(graph.model, centred) if fold else (0, {})
    onnx_graph.part_biases(graph.model)
    onnx_graph.open_clips(graph.model)
    RemoveUnusedNodesPass()(graph.model)
    onnx_graph.forget(graph.model)
    if len(graph.model.graph.outputs) == 1:
        graph.model.graph.outputs[0].name = "logits"
    onnx_graph.name_batch(graph.model)
    return graph, folded, kept
