"""Write files whole or not at all, and tell architectures apart."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

__all__ = ["fingerprint", "write_atomically"]

# What shapes a layer's result and shows neither in its class nor in the shapes of its tensors.
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "eps", "num_heads")

# These do nothing in eval mode, and whether a model holds them depends on how it was trained.
_PASSIVE = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropPath", "StochasticDepth")


def write_atomically(path: str | os.PathLike, content: bytes | Callable[[Path], object]) -> Path:
    """Write a file so that its name only ever leads to the old content or to all of the new.

    The content goes to a hidden file in the same folder, reaches the disk, and is renamed. Folders that
    are missing are made.

    Args:
        path: Where the file is to be; links are followed.
        content: Bytes, or a function that writes them to the path it is given (same suffix as `path`).

    Returns:
        `path`.

    Raises:
        ValueError: `path` is a folder.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise ValueError(f"write_atomically: the path must be a file, got the folder {path}; add a file name")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # what the umask grants; some writers make their files private
        if isinstance(content, bytes):
            draft.write_bytes(content)
        else:
            content(draft)
        draft.chmod(mode)
        _reach_disk(draft)
        os.replace(draft, target)
        _reach_disk(target.parent)
    finally:
        draft.unlink(missing_ok=True)
    return Path(path)


def _reach_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(model: nn.Module) -> str:
    """Hash what a float model is made of, whatever it has learned.

    Covers every module's name, class and settings (stride, padding, groups, eps and the like) and the
    names and shapes of parameters and saved buffers. Values, dtype, device, mode, hooks and the presence
    of dropout change nothing, and so a model built afresh on `meta` agrees with the trained one.

    Args:
        model: A float model; layers that were swapped for quantised ones change the result.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    return hashlib.sha256("\n".join(_describe(model)).encode()).hexdigest()


def _describe(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__name__ not in _PASSIVE:
            yield f"module {name}: {type(module).__name__} {_settings(module)}"
        unsaved = module._non_persistent_buffers_set
        tensors = module._parameters | {k: b for k, b in module._buffers.items() if k not in unsaved}
        for key, tensor in tensors.items():
            if tensor is not None:
                yield f"tensor {name}.{key}: {tuple(tensor.shape)}"


def _settings(module: nn.Module) -> list[str]:
    found = ((key, getattr(module, key, None)) for key in _SETTINGS)
    return [
        f"{key}={tuple(value) if isinstance(value, list | tuple) else value}"
        for key, value in found
        if isinstance(value, int | float | str | list | tuple)
    ]
