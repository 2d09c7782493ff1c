"""What every command on a checkpoint or a user's model needs: open it, trust it, try it on an image."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .adaptation import METHODS, options_of
from .checkpoint import load, read_header
from .sources import describe_preprocessing, open_data, preprocessing_of
from .streams import Images
from .zoo import build_model

ANCHORED = ", ".join(name for name, method in METHODS.items() if "anchor" in options_of(method))
_ANCHOR = 512  # images that stand for the source
_KNOWN = ("timm:", "torchvision:", "ttaq.")  # what a checkpoint may name: building it runs no code but these packages'


def open_checkpoint(
    path: str | Path, reference: str | None = None, device: str = "cpu"
) -> tuple[nn.Module, dict, str, dict]:
    """Load a packed checkpoint into the architecture that it names.

    Args:
        path: The checkpoint.
        reference: Builds the architecture, in place of what the checkpoint names.
        device: Where the model goes.

    Returns:
        The model, the header, the reference, and how images are prepared, as `preprocessing_of` says it.

    Raises:
        ValueError: It is no checkpoint, names no architecture or one that is not trusted, or there is no such device.
    """
    check_device(device)
    header = read_header(path)
    reference = trusted_reference(path, header["reference"], reference)
    width = header["report"].get("options", {}).get("num_classes")
    with torch.device("meta"):
        architecture = build_model(reference, **({} if width is None else {"num_classes": int(width)}))
    model = load(path, architecture, device=device)
    chosen = preprocessing_of(model, reference)
    if header["preprocessing"] is None:
        warnings.warn(
            f"{path} does not say how its images are prepared, so {describe_preprocessing(chosen)} is assumed; save it "
            "with preprocessing=",
            stacklevel=2,
        )
    return model, header, reference, chosen | (header["preprocessing"] or {})


def anchor_of(adapter: str, model: nn.Module, path, preprocessing: dict, seed: int, device: str) -> dict:
    """Return the anchor as an option of an adapter, none where none is given; refuse one too many or too few."""
    method = METHODS.get(adapter)
    if path is None:
        if method and method.needs_anchor(model):
            raise ValueError(
                f"evaluate: {adapter} needs clean images of the source for this model; pass --anchor PATH, class "
                "folders or an .npz file"
            )
        return {}
    if method and "anchor" not in options_of(method):
        raise ValueError(f"evaluate: {adapter} takes no anchor; leave out --anchor, which serves {ANCHORED}")
    source = open_data(path, preprocessing)
    if not isinstance(source, Images):
        raise ValueError(f"evaluate: {path} holds corrupted images; give clean ones, class folders or an .npz file")
    picked = source.take(np.random.default_rng(seed).permutation(len(source))[:_ANCHOR])
    return {"anchor": [x.to(device) for x, _ in picked.batches(64)]}


def trusted_reference(path: str | Path, written: str | None, given: str | None) -> str:
    """Choose what builds the architecture; a file alone never decides which code of the user's runs.

    Raises:
        ValueError: The checkpoint names none, or one outside timm, torchvision and ttaq, and none was given.
    """
    if given:
        return given
    if written is None:
        raise ValueError(f"evaluate: {path} does not name its architecture; pass --model, such as timm:NAME")
    if not written.startswith(_KNOWN):
        raise ValueError(f"evaluate: {path} names the code {written!r}; pass --model {written} to run it")
    return written


def check_outputs(model: nn.Module, x: torch.Tensor, images: Images, data, *, named: bool) -> int:
    """Try the model on one image, and refuse classes that do not go with its logits.

    Args:
        model: What is to be quantised or evaluated.
        x: (1, 3, H, W), on its device.
        images: Clean or of one domain.
        data: Where they come from, for messages.
        named: Whether somebody said which class belongs to which logit.

    Returns:
        How many logits there are.

    Raises:
        ValueError: The model cannot run on the image, gives no logits, or has other classes.
    """
    try:
        with torch.no_grad():
            logits = model(x)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        wide, tall = x.shape[3], x.shape[2]
        raise ValueError(f"data: the model cannot run on {wide}x{tall} images ({reason}); choose --size") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model: it must return logits (images, classes), got {got}; name a function that wraps it")
    outputs, count = logits.shape[1], len(images.classes)
    numbered = images.classes == tuple(str(number) for number in range(count))
    if count > outputs or (count != outputs and not named and not numbered):
        raise ValueError(
            f"data: {data} holds {count} classes, the model has {outputs} outputs; pass --classes FILE with one class "
            "folder's name a line, in the order of the outputs, or build the model with --num-classes"
        )
    return outputs


def check_device(device: str) -> None:
    """Refuse a device that is not there, in one sentence."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: {device!r} cannot be used here ({reason}); pass --device cpu") from error
