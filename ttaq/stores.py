"""Tensors of all images under a byte budget: on the device while they fit, then in host memory or a mapped file."""

import ctypes
import os
import re
import tempfile
import weakref

import torch
from torch import Tensor

__all__ = ["Room", "bytes_of", "give_back", "rows"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_UNLIMITED = 1 << 62
_LIBC = ctypes.CDLL(None)


def bytes_of(size: str | int) -> int:
    """Read a number of bytes: 2147483648, "2GiB", "500 MB".

    Raises:
        ValueError: It is none, or negative.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size.strip().lower()) if isinstance(size, str) else None
    if not found or found[2] not in _UNITS:
        raise ValueError(f'cache: wanted bytes, as a number or as in "2GiB" or "500MB", got {size!r}')
    return int(float(found[1]) * _UNITS[found[2]])


def give_back() -> None:
    """Return freed host memory to the system, which glibc keeps: holes that one phase left do not fit the next."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


class Room:
    """Give room to tensors whose first axis counts images; those beyond the budget lie outside the device's memory.

    Outside is pinned host memory for a GPU, and for the CPU a file in the folder for temporary files (TMPDIR) that
    loses its name at once, so that nothing is left of it however the process ends.

    Args:
        device: Where the tensors are used.
        budget: Bytes that may lie there; None for half of what is free.
        parts: Processes that share what is free.
    """

    def __init__(self, device: torch.device, budget: int | None = None, parts: int = 1):
        self.device = device
        self.budget = _free(device) // (2 * parts) if budget is None else budget
        self._inside: list[weakref.ref] = []
        self._outside: list[weakref.ref] = []

    @property
    def held(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for t in _alive(self._inside))

    @property
    def spilled(self) -> int:
        """Bytes outside."""
        return sum(t.nbytes for t in _alive(self._outside))

    def empty(self, count: int, like: Tensor) -> Tensor:
        """Return room for `count` images like those of (B, ...), laid out as they are: plain or channels-last."""
        shape = (count, *like.shape[1:])
        size = count * like[:1].numel() * like.element_size()
        channels_last = like.ndim == 4 and not like.is_contiguous()
        channels_last = channels_last and like.is_contiguous(memory_format=torch.channels_last)
        fits = self.held + size <= self.budget
        layout = {"memory_format": torch.channels_last if channels_last else torch.contiguous_format}
        if fits or self.device.type == "cuda":
            place = {"device": self.device} if fits else {"pin_memory": True}
            tensor = torch.empty(shape, dtype=like.dtype, **place, **layout)
        else:
            tensor = _mapped(shape, like.dtype, channels_last)
        (self._inside if fits else self._outside).append(weakref.ref(tensor))
        return tensor

    def shrink(self) -> bool:
        """Halve the budget, or what is held where that is less; say whether anything was left to move outside."""
        if not self.held:
            return False
        self.budget = min(self.budget, self.held) // 2
        return True

    def move(self, tensor: Tensor) -> Tensor:
        """Return the tensor, outside where the budget is exceeded."""
        inside = any(t is tensor for t in _alive(self._inside))
        if not inside or self.held <= self.budget:
            return tensor
        self._inside = [held for held in self._inside if held() is not tensor]
        budget, self.budget = self.budget, -1
        try:
            return self.empty(len(tensor), tensor).copy_(tensor)
        finally:
            self.budget = budget


def rows(store: Tensor, picked: Tensor | slice, device: torch.device, on_host: Tensor | None = None) -> Tensor:
    """Take some images of a store to the device.

    Args:
        store: There, or outside.
        picked: Their numbers (B,) on the device, or a slice.
        device: Where they are used.
        on_host: The same numbers on the host; without them a store outside waits for the device.
    """
    if isinstance(picked, slice):
        return store[picked].to(device, non_blocking=True)
    if store.device.type == device.type:
        return store.index_select(0, picked)
    staged = torch.empty((len(picked), *store.shape[1:]), dtype=store.dtype, pin_memory=True)
    torch.index_select(store, 0, picked.cpu() if on_host is None else on_host, out=staged)
    return staged.to(device, non_blocking=True)


def _alive(references):
    return [tensor for tensor in (reference() for reference in references) if tensor is not None]


def _mapped(shape, dtype, channels_last):
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="ttaq-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk ends the process
        except OSError as error:
            place = f"{tempfile.gettempdir()} cannot take {size >> 20} MiB ({error.strerror})"
            raise ValueError(f"cache: {place}; set TMPDIR, or give a larger cache or fewer images") from error
        flat = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    if not channels_last:
        return flat.view(shape)
    batch, channels, height, width = shape
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _free(device):
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for reuse
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return _UNLIMITED
