"""The state of an Adapter on disk: written whole or not at all, read without running what is in it."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically

FORMAT = 3
PARTS = {"format", "method", "tensors", "memory", "parts", "counters"}


def check_state(state: dict[str, Any], name: str, live: dict[str, torch.Tensor], parts: Iterable[str]) -> None:
    """Raise ValueError where a state is none of an Adapter with this method, these tensors and these parts."""
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise ValueError("Adapter.load_state_dict: this is no state of an Adapter; pass what its state_dict() gave")
    if state["format"] != FORMAT or state["method"] != name:
        raise ValueError(
            f"Adapter.load_state_dict: expected format {FORMAT} of method {name!r}, got "
            f"{state['format']} of {state['method']!r}; adapt the model with the method it was saved from"
        )
    shapes, given = ({name: tuple(t.shape) for name, t in held.items()} for held in (live, state["tensors"]))
    if odd := sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)):
        raise ValueError(
            f"Adapter.load_state_dict: {odd[0]} must have shape {shapes.get(odd[0])}, got {given.get(odd[0])}; "
            "adapt the same model with the same arguments first"
        )
    if set(parts) != state["parts"].keys():
        raise ValueError(
            f"Adapter.load_state_dict: the state has {', '.join(state['parts'])}, this Adapter "
            f"{', '.join(parts)}; adapt with {_arguments(state['parts'])}"
        )


def _arguments(parts: dict[str, Any]) -> str:
    """Write the arguments of `adapt` that make the parts of a state; states of before do not hold the numbers."""
    telemetry, bank = (parts.get(name) for name in ("telemetry", "bank"))
    every = 0 if telemetry is None else telemetry.get("every", 10)  # what `ttaq adapt` gives unless told otherwise
    domains = 0 if bank is None else bank.get("capacity", max(32, len(bank["entries"])))
    return f"telemetry={every} and bank={domains}"


def write_state(state: dict[str, Any], path: str | os.PathLike) -> Path:
    """Write a state so that `path` only ever leads to the old one or to all of the new, whenever the process dies.

    Args:
        state: What `Adapter.state_dict` gave: tensors, numbers and text, in dicts, lists and tuples.
        path: The file.

    Returns:
        `path`.
    """
    return write_atomically(path, lambda draft: torch.save(state, draft))


def read_state(path: str | os.PathLike, device: torch.device) -> dict[str, Any]:
    """Read a state; tensors and plain values are taken, nothing else.

    Args:
        path: A file that `write_state` wrote.
        device: Where its tensors go.

    Raises:
        ValueError: There is no such file, or it holds no state.
    """
    if not Path(path).is_file():
        raise ValueError(f"Adapter.resume: there is no file {path}; give the path that Adapter.save wrote")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Adapter.resume: {path} holds no state of an Adapter, or a part of one; start afresh")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Adapter.resume: {path} holds no state of an Adapter ({reason}); start afresh") from error
