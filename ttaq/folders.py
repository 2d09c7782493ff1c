"""save_pretrained and from_pretrained: a packed model as a folder of model.safetensors and config.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from .checkpoint import load, read_header, save
from .files import write_atomically
from .workbench import open_checkpoint, trusted_reference

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    reference: str | None = None,
    preprocessing: Mapping | None = None,
    classes: list[str] | None = None,
) -> Path:
    """Write a packed model into a folder: what `save` writes, and its description as JSON for people and hubs.

    Args:
        model: A packed model.
        folder: Made where it is not there; of files in it, those two are replaced.
        reference: How the float architecture is built, such as "timm:vit_base_patch16_224".
        preprocessing: Plain values, such as mean, std and size of the images.
        classes: Their names, in the order of the logits.

    Returns:
        The folder.

    Raises:
        ValueError: As `save`.
    """
    from . import __version__

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = save(model, folder / WEIGHTS, reference=reference, preprocessing=preprocessing, classes=classes)
    header = read_header(path)
    config = {"library": "ttaq", "version": __version__, "format": header["format"]}
    config |= {name: header[name] for name in ("reference", "preprocessing", "classes")}
    config |= {name: header["report"].get(name) for name in ("recipe", "options")}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / CONFIG, text.encode())
    return folder


def from_pretrained(
    folder: str | os.PathLike, architecture: nn.Module | str | None = None, *, device: str | torch.device = "cpu"
) -> nn.Module:
    """Read a packed model from a folder that `save_pretrained` wrote.

    The header of model.safetensors counts, which a checksum guards; config.json is not read.

    Args:
        folder: The folder.
        architecture: The float model, best on "meta"; or the reference that builds it; None for the recorded one,
            where that is of timm, torchvision or ttaq: a file alone does not run other code.
        device: Where the tensors go.

    Returns:
        The packed model in eval mode.

    Raises:
        ValueError: As `load`, or nothing says, or may say, how the architecture is built.
    """
    path = Path(folder) / WEIGHTS
    if isinstance(architecture, nn.Module):
        return load(path, architecture, device=device)
    written = read_header(path)["reference"]
    try:
        trusted_reference(path, written, architecture)
    except ValueError as error:
        named = f"names the code {written!r}, which a file alone does not run" if written else "names no architecture"
        remedy = f"architecture={written!r}" if written else "the float model as architecture="
        raise ValueError(f"from_pretrained: {path} {named}; pass {remedy}") from error
    return open_checkpoint(path, architecture, str(device))[0]
