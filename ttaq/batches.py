"""What a user may pass as calibration data: a re-iterable of tensors, (x, y) pairs or dicts."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Tensor]


def collect(verb: str, batches: Iterable, device: torch.device) -> list:
    """Read every batch, without its labels, and check it.

    Args:
        verb: Named in messages.
        batches: Tensors (B, ...), tuples whose first entry is such a tensor, or dicts of tensors for `model(**batch)`.
        device: Where the model is.

    Returns:
        The inputs, one entry a batch, on `device`.

    Raises:
        ValueError: There is no batch, a batch is empty or not a tensor, or a value is NaN or infinite.
    """
    if isinstance(batches, Tensor):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"{verb}: wanted a re-iterable of batches, got {type(batches).__name__}; pass a list of image tensors"
        )
    if device.type == "meta":
        raise ValueError(f"{verb}: the model is on meta and holds no weights; load them first")
    inputs = [_to(_input_of(verb, batch), device) for batch in batches]
    if not inputs:
        raise ValueError(f"{verb}: the calibration set is empty; pass a re-iterable of batches, some hundred images")
    for i, entry in enumerate(inputs):
        if isinstance(entry, dict) and not entry:
            raise ValueError(f"{verb}: batch {i} is a dict without tensors; name the model's inputs in it")
        for tensor in entry.values() if isinstance(entry, dict) else (entry,):
            if tensor.shape[:1] == (0,):
                raise ValueError(f"{verb}: batch {i} holds no image; drop it")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{verb}: batch {i} holds NaN or infinite values; clean the calibration images")
    return inputs


def call(model: nn.Module, entry: Any, forward: Forward | None) -> Any:
    """Run the model on one entry of `collect`."""
    if forward is not None:
        return forward(model, entry)
    return model(**entry) if isinstance(entry, dict) else model(entry)


def logits_of(output: Any) -> Tensor:
    """Pick the logits out of what a model returned: a tensor, what names them, or the first of several.

    Raises:
        ValueError: There are none.
    """
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    found = found[0] if isinstance(found, (tuple, list)) and found else found
    if not isinstance(found, Tensor):
        raise ValueError(
            f"logits: the model must return logits, got {type(output).__name__}; pass forward=, which picks them out"
        )
    return found


def join(inputs: list) -> Any:
    """Join the entries of `collect` into one: a tensor, or a dict of tensors, whose first axis counts the images."""
    if isinstance(inputs[0], dict):
        return {key: torch.cat([entry[key] for entry in inputs]) for key in inputs[0]}
    return torch.cat(inputs)


def take(entry: Any, picked: Tensor | slice) -> Any:
    """Take some images of an entry."""
    return {k: v[picked] for k, v in entry.items()} if isinstance(entry, dict) else entry[picked]


def count(entry: Any) -> int:
    """Count the images of an entry."""
    return len(next(iter(entry.values())) if isinstance(entry, dict) else entry)


def pieces(total: int, most: int) -> list[slice]:
    """Cut images 0 .. total - 1 into as few pieces of at most `most` as there can be, all of a size but for one image.

    A small rest would count as much as a full piece where statistics are averaged, and a single vector has none.
    """
    parts = math.ceil(total / most)
    return [slice(k * total // parts, (k + 1) * total // parts) for k in range(parts)]


def change_images(entry: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a change to the images of an entry: its floating-point tensors (N, C, H, W); the rest stays."""
    if isinstance(entry, dict):
        return {k: change_images(v, change) for k, v in entry.items()}
    return change(entry) if has_images(entry) else entry


def has_images(entry: Any) -> bool:
    """Tell whether an entry holds floating-point tensors (N, C, H, W)."""
    if isinstance(entry, dict):
        return any(has_images(value) for value in entry.values())
    return entry.ndim == 4 and entry.is_floating_point()


def choose(picked: Tensor, entry: Any, other: Any) -> Any:
    """Take the images of `entry` where `picked` (N,), bool, says so, and those of `other` elsewhere."""
    if isinstance(entry, dict):
        return {k: choose(picked, v, other[k]) for k, v in entry.items()}
    return torch.where(picked.to(entry.device).view(-1, *[1] * (entry.ndim - 1)), entry, other)


def _input_of(verb, batch):
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, dict):
        return {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in ("labels", "label", "y")}
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"{verb}: a batch must be a tensor, an (x, y) pair or a dict of tensors, got {type(batch).__name__}"
        )
    return batch


def _to(entry, device):
    if isinstance(entry, dict):
        return {k: v.to(device) for k, v in entry.items()}
    return entry.to(device)
