"""save, load: one safetensors file of canonical packed codes, scales, the float rest, and a JSON header."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .attention import OPENED, open_attention
from .files import fingerprint, write_atomically
from .layers import QuantConv2d, QuantLinear, QuantMatMul
from .packed_layers import PackedConv2d, PackedLinear
from .quantizers import Quantizer
from .spec import QuantSpec
from .surgery import copy_model, replace

FORMAT = 2  # 1 kept the codes of a convolution in the order of its weight, 2 keeps their channels last
_FLOAT_WEIGHT = (QuantLinear, QuantConv2d)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    reference: str | None = None,
    preprocessing: Mapping | None = None,
    classes: list[str] | None = None,
) -> Path:
    """Write a packed model to one safetensors file, whole or not at all.

    Args:
        model: A packed model; quantised layers that still hold float weights are refused.
        path: The file.
        reference: How the float architecture is built, such as "timm:vit_base_patch16_224".
        preprocessing: Plain values: size, crop, interpolation, mean and std of the images.
        classes: Their names, in the order of the logits.

    The last three a model that `load` gave, or what was adapted from it, brings along in `ttaq_origin`.

    Returns:
        The path.

    Raises:
        ValueError: The model is not packed, or what describes it is not made of plain values.
    """
    report = getattr(model, "ttaq_report", {})
    if "fused" in report:
        raise ValueError("save: the model is fused; save the packed model, and fuse what load gives back")
    layers = {name: _describe(name, m) for name, m in model.named_modules() if isinstance(m, _KINDS)}
    if not any(isinstance(m, (PackedLinear, PackedConv2d)) for m in model.modules()):
        raise ValueError("save: the model holds no packed layer; call ttaq.pack on the quantised model first")
    given = {"reference": reference, "preprocessing": preprocessing and dict(preprocessing), "classes": classes}
    origin = getattr(model, "ttaq_origin", {}) | {name: value for name, value in given.items() if value is not None}
    header = {
        "format": FORMAT,
        "fingerprint": report.get("fingerprint") or fingerprint(model),
        **dict.fromkeys(given) | origin,
        "layers": layers,
        "attention": [name for name, m in model.named_modules() if isinstance(m, OPENED)],
        "report": _timeless(report),
    }
    tensors = _apart({name: t.detach().contiguous() for name, t in _tensors(model).items()})
    try:
        text = json.dumps(header)
    except TypeError as error:
        raise ValueError(
            f"save: the header takes plain values only ({error}); convert preprocessing and classes"
        ) from None
    metadata = {"ttaq": text, "sha256": _digest(text, tensors)}
    return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load(path: str | os.PathLike, model: nn.Module, *, device: str | torch.device = "cpu") -> nn.Module:
    """Read a packed model into the architecture of `model`, without ever holding its float weights.

    Args:
        path: A file that `save` wrote.
        model: The float architecture, best built under `torch.device("meta")`; left as it is.
        device: Where the tensors go.

    Returns:
        The packed model, in eval mode; `model.ttaq_report` as it was when saved, without the seconds taken.

    Raises:
        ValueError: The file is missing, truncated, foreign or changed, or belongs to another architecture.
    """
    header, tensors = _read(path, device)
    if fingerprint(model) != header["fingerprint"]:
        raise ValueError(
            f"load: {path} was made from another architecture than this {type(model).__name__}; "
            f"build the model as it was then{' (' + header['reference'] + ')' if header['reference'] else ''}"
        )
    packed = copy_model(model, share=lambda name, tensor: True)
    for name in header.get("attention", []):
        replace(packed, name, open_attention(packed.get_submodule(name)))
    for name, described in header["layers"].items():
        replace(packed, name, _build(packed.get_submodule(name), described))
    _assign(packed, tensors, path)
    for module in packed.modules():
        if isinstance(module, Quantizer):
            module.ready = not bool(module.scale.isnan().any())
        if hasattr(module, "nonfinite"):
            module.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
    packed.ttaq_report = header["report"]
    packed.ttaq_origin = {name: header[name] for name in ("reference", "preprocessing", "classes")}
    return packed.eval()


def read_header(path: str | os.PathLike) -> dict:
    """Read what a checkpoint says of itself: format, fingerprint, reference, preprocessing, classes, layers, report.

    Raises:
        ValueError: The file is missing, truncated or not one of ours.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if "ttaq" not in metadata or "sha256" not in metadata:
        raise ValueError(f"load: {path} is a safetensors file that ttaq.save did not write; give a ttaq checkpoint")
    try:
        header = json.loads(metadata["ttaq"])
    except json.JSONDecodeError as error:
        raise ValueError(f"load: the header of {path} was changed ({error}); fetch it again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        remedy = "pack the model again" if found in range(FORMAT) else "upgrade ttaq"
        raise ValueError(f"load: {path} has format {found}, this version reads {FORMAT}; {remedy}")
    return header


def _read(path, device):
    """Read a checkpoint whole, and check it against its checksum before anything in it is believed."""
    header = read_header(path)
    with _opened(path, device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if _digest(metadata["ttaq"], tensors) != metadata["sha256"]:
        raise ValueError(f"load: the contents of {path} do not match their checksum; it was changed, fetch it again")
    return header, tensors


@contextmanager
def _opened(path, device="cpu"):
    if not Path(path).is_file():
        raise ValueError(f"load: there is no file {path}; give the path that ttaq.save wrote")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"load: {path} is truncated or no safetensors file ({error}); fetch it again") from error


def _timeless(report):
    """Leave out how long blocks and the refinement took, so that equal runs give equal contents."""
    found = dict(report)
    if "blocks" in found:
        found["blocks"] = [_without_seconds(row) for row in found["blocks"]]
    if "refinement" in found:
        found["refinement"] = _without_seconds(found["refinement"])
    return found


def _without_seconds(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def _describe(name, module):
    if isinstance(module, _FLOAT_WEIGHT) and module.weight_quantizer is not None:
        raise ValueError(f"save: layer {name} still holds its float weight; call ttaq.pack on the model first")
    x_quantizer = module.left_quantizer if isinstance(module, QuantMatMul) else module.input_quantizer
    return {
        "kind": type(module).__name__,
        "weight": asdict(module.spec) if isinstance(module, (PackedLinear, PackedConv2d)) else None,
        "activation": asdict(x_quantizer.spec) if x_quantizer is not None else None,
    }


def _build(layer, described):
    """Build the empty twin of a float layer on `meta`."""
    weight, activation = (QuantSpec(**described[k]) if described[k] else None for k in ("weight", "activation"))
    if described["kind"] == "QuantMatMul":
        return QuantMatMul(activation, auto=False, device="meta")
    if described["kind"] in ("QuantLinear", "QuantConv2d"):
        twin = QuantLinear if described["kind"] == "QuantLinear" else QuantConv2d
        return twin.from_float(layer, (None, activation), auto=False)
    twin = PackedLinear if described["kind"] == "PackedLinear" else PackedConv2d
    return twin.like(layer, (weight, activation), device="meta")


def _tensors(model):
    """Name every tensor once, buffers that state_dict leaves out included; counters of bad inputs are not state."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t for name, t in named.items() if name.rpartition(".")[2] != "nonfinite"}


def _apart(tensors):
    """Copy tensors that share memory with one before them: a file holds each by itself."""
    held = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in held else tensor
        held.add(place)
    return tensors


def _assign(model, tensors, path):
    """Put the file's tensors in the places of the model's, under all names that a shared one has."""
    wanted = _tensors(model)
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise ValueError(
            f"load: {path} and the model differ in {len(odd)} tensors, {odd[0]} among them; fetch it again"
        )
    by_id = {}
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"load: {name} in {path} has shape {tuple(tensors[name].shape)}, the model wants {tuple(tensor.shape)}"
            )
        new = tensors[name]
        by_id[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    for module in list(model.modules()):
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if id(tensor) in by_id:
                    held[key] = by_id[id(tensor)]


def _digest(text, tensors):
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(memoryview(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


_KINDS = (PackedLinear, PackedConv2d, QuantLinear, QuantConv2d, QuantMatMul)
