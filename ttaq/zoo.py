"""Build models by reference: "timm:NAME", "torchvision:NAME" or "package.module:function"."""

import importlib
import pickle
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# What the two readers raise on files that are damaged or hold more than tensors.
_UNREADABLE = (
    SafetensorError, pickle.UnpicklingError, struct.error, OSError, EOFError, RuntimeError, ValueError, TypeError,
    LookupError, AttributeError, AssertionError,
)  # fmt: skip


def build_model(reference: str, weights: str | Path | None = None, **options) -> nn.Module:
    """Build the float model that `reference` names, with weights from a local file.

    Args:
        reference: "timm:vit_base_patch16_224", "torchvision:resnet50" or "package.module:function".
        weights: A .safetensors or .pth file of a state_dict; None leaves the weights random. Nothing is downloaded.
        options: Arguments of the function that builds the model, such as num_classes.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: The reference or the file cannot be read, or the weights do not fit.
    """
    source, _, name = reference.partition(":")
    if not name or not source or source.startswith("."):
        raise ValueError(
            f'model: wanted "timm:NAME", "torchvision:NAME" or "package.module:function", got {reference!r}'
        )
    model = _function(source, name)(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {reference} gives a {type(model).__name__}; name a function that returns a nn.Module")
    if weights is not None:
        _load_weights(model, Path(weights))
    return model.eval()


def _function(source, name):
    try:
        if source == "timm":
            timm = importlib.import_module("timm")
            if name not in timm.list_models():
                raise ValueError(f"model: timm has no {name!r}; timm.list_models() lists what there is")
            return lambda **options: timm.create_model(name, pretrained=False, **options)
        if source == "torchvision":
            models = importlib.import_module("torchvision.models")
            if name not in models.list_models():
                raise ValueError(f"model: torchvision has no {name!r}; torchvision.models.list_models() lists them")
            return lambda **options: models.get_model(name, weights=None, **options)
        return getattr(importlib.import_module(source), name)
    except ImportError as error:
        raise ValueError(f"model: cannot import {source!r} ({error}); install it or correct the reference") from error
    except AttributeError as error:
        raise ValueError(f"model: {source} has no function {name!r}; correct the reference") from error


def _load_weights(model, path):
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}; give a local .safetensors or .pth file")
    state = _read_state(path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name in shapes and tensor.shape != shapes[name]:
            head = name in list(shapes)[-2:] and tensor.shape[1:] == shapes[name][1:]
            remedy = f"pass --num-classes {len(tensor)}" if head else "check the reference and its options"
            got, wanted = tuple(tensor.shape), tuple(shapes[name])
            raise ValueError(f"weights: {name} in {path} has shape {got}, the model wants {wanted}; {remedy}")
    # num_batches_tracked counts training steps, and files written elsewhere may lack it
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        odd = (missing + unexpected)[0]
        raise ValueError(
            f"weights: {path} does not fit the model: {len(missing)} tensors missing, {len(unexpected)} too many, "
            f"{odd} among them; check the reference and its options"
        )


def _read_state(path):
    """Read a state_dict; nothing but tensors and plain values is ever unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"weights: {path} holds no state_dict that can be read safely ({reason})") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: {path} is no state_dict; save model.state_dict() into a .safetensors or .pth file")
    return state
