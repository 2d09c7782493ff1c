"""What a user may pass as calibration data: a re-iterable of tensors, (x, y) pairs or dicts."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Tensor]


def collect(verb: str, batches: Iterable, device: torch.device | None) -> list:
    """Read every batch, without its labels, and check it.

    Args:
        verb: Named in messages.
        batches: Tensors (B, ...), tuples whose first entry is such a tensor, or dicts of tensors for `model(**batch)`.
        device: Where the model is; None leaves them where they are.

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
    if device is not None and device.type == "meta":
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
    if device is None:
        return entry
    if isinstance(entry, dict):
        return {k: v.to(device) for k, v in entry.items()}
    return entry.to(device)


class Extent:
    """Gather what a model is given: of each channel the extremes, the moments and how many values are clipped."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._values = 0

    def add(self, x: Any) -> None:
        """Look at images (N, C, H, W) of floats, and pass over anything else; nothing is transferred to the host."""
        if not isinstance(x, Tensor) or not has_images(x) or not x.numel():
            return
        flat = x.detach().movedim(1, 0).flatten(1)
        low, high = torch.aminmax(flat, dim=1)
        ends = [low, high, (flat == low[:, None]).sum(1), (flat == high[:, None]).sum(1)]
        moments = [power.sum(1, dtype=torch.float64) for power in (flat, flat.float().square())]
        self._rows.append(torch.stack([row.double() for row in (*ends, *moments)]))
        self._values += flat.shape[1]

    def watch(self, model: nn.Module) -> Any:
        """Look at the first argument of every call of a model, until the handle that this returns is removed."""

        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for first in (*args, *kwargs.values())[:1]:
                self.add(first)

        return model.register_forward_pre_hook(look, with_kwargs=True)

    def record(self) -> dict[str, list[float]] | None:
        """Return "low", "high", "mean", "std" and "clipped" of each channel, to six digits; None without images.

        "clipped" is the share of the values that equal the lowest or the highest, whichever is the smaller.
        """
        if not self._rows or len({row.shape for row in self._rows}) > 1:
            return None
        lows, highs, at_low, at_high, sums, squares = torch.stack(self._rows, 1).cpu()
        low, high, mean = lows.amin(0), highs.amax(0), sums.sum(0) / self._values
        clipped = torch.minimum((at_low * (lows == low)).sum(0), (at_high * (highs == high)).sum(0)) / self._values
        std = (squares.sum(0) / self._values - mean.square()).clamp(min=0).sqrt()
        found = {"low": low, "high": high, "mean": mean, "std": std, "clipped": clipped}
        return {key: [float(f"{value:.6g}") for value in row.tolist()] for key, row in found.items()}
