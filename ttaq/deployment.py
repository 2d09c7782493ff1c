"""Adapt a packed checkpoint to images as they come, for ever: predictions and events out, state kept.

Images come from a folder, or from standard input as paths, one a line, or as a tar archive. Each gets one JSON object:
a prediction, or why there is none. Nothing is held but the batch at hand and what the adapter remembers.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image

from .adaptation import Adapter
from .streams import Images
from .streams.datasets import fit_image

T = TypeVar("T")

MOST_PIXELS = 1 << 26  # of one image: what is larger is refused by name before it is decoded
_BEGINNINGS = (b'{"image": ', b'{"event": ', b'{"drift": ')  # of the lines that `serve` emits
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, MemoryError)


class Stop:
    """Let a signal end `serve` between two images: raised while it waits for one, else only remembered."""

    def __init__(self) -> None:
        self.asked = self._waits = False

    def handle(self, *_: object) -> None:
        """Ask for the end; a handler for `signal.signal`."""
        self.asked = True
        if self._waits:
            raise _Woken

    def take(self, images: Iterator[T]) -> T | None:
        """Return the next image; None at the end, or once the end was asked for."""
        try:
            self._waits = True
            return None if self.asked else next(images, None)
        except _Woken:
            return None
        finally:
            self._waits = False


class _Woken(BaseException):
    """Ends a wait for the next image; not an `Exception`, so that no reader catches it."""


@dataclass
class Reader:
    """Decode images to what the model eats, refusing what is none.

    Args:
        size: Side of the model's images.
        crop: As in `fit_image`, as is interpolation.
        interpolation: "bilinear" or "bicubic".
        most_pixels: Of an image as it lies in its file.
    """

    size: int
    crop: float = 0.875
    interpolation: str = "bilinear"
    most_pixels: int = MOST_PIXELS

    def read(self, item: Path | bytes) -> np.ndarray:
        """Return uint8 (size, size, 3).

        Args:
            item: A file, or the bytes of one. Grey, 16-bit, palette, CMYK and transparent images are converted.

        Raises:
            ValueError: It is no image, a broken one, or one of too many pixels; the message says which.
        """
        try:
            with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as picture:
                wide, tall = picture.size
                if wide * tall > self.most_pixels:
                    raise ValueError(f"{wide}x{tall} pixels are more than {self.most_pixels}; raise --most-pixels")
                picture.draft("RGB", (4 * self.size, 4 * self.size))  # JPEG: decoded at a fraction where that suffices
                if picture.mode.startswith("I"):
                    picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
                fitted = fit_image(
                    picture.convert("RGB"), size=self.size, crop=self.crop, interpolation=self.interpolation
                )
                return np.asarray(fitted)
        except _UNREADABLE as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Give the name and path of every file below a folder, sorted."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield str(path.relative_to(folder)), path


def answered(path: Path) -> set[str]:
    """Return the names of the images that the JSON lines in a file answer, by predictions or refusals.

    A last line that was cut off, as by a full disk, is taken out of the file: its image is answered anew.

    Args:
        path: What `ttaq adapt --out` wrote; a file that is not there answers none.

    Raises:
        ValueError: The file holds something else.
    """
    names: set[str] = set()
    if not path.exists():
        return names
    with open(path, "r+b") as file:
        whole = 0
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n") and any(text.startswith(b) or b.startswith(text) for b in _BEGINNINGS):
                file.truncate(whole)
                break
            whole += len(text)
            try:
                found = json.loads(text)
                names.update({found["image"]} if "image" in found else ())
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"adapt: line {number} of {path} is none that ttaq adapt writes; give --out the file of this stream"
                ) from error
    return names


def receive(stream: BinaryIO) -> Iterator[tuple[str, Path | bytes]]:
    """Give names and images as they come through a pipe: a tar archive, or paths, one a line.

    Args:
        stream: Buffered, as `sys.stdin.buffer`.
    """
    if stream.peek(512)[257:262] == b"ustar":
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                archive.members = []  # which would else grow for ever
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
        return
    for line in stream:
        if name := line.decode(errors="surrogateescape").rstrip("\r\n"):
            yield name, Path(name)


def serve(
    adapter: Adapter,
    images: Iterable[tuple[str, Path | bytes]],
    reader: Reader,
    emit: Callable[[dict[str, Any]], None],
    *,
    preprocess: Callable[[np.ndarray], torch.Tensor],
    classes: list[str] | None = None,
    batch_size: int = 32,
    save: Callable[[], object] | None = None,
    save_every: int = 50,
    stop: Stop | None = None,
) -> dict[str, int]:
    """Predict and adapt until the images end or the end is asked for; the last batch may be short.

    Args:
        adapter: Made by `ttaq.adapt`.
        images: Names, with paths or bytes.
        reader: Decodes them.
        emit: Called once an image, with {"image", "class", "label", "confidence"} or {"image", "error"}; once an
            event, with {"event", "batch"}; and once a measurement, with {"drift", "entropy", "batch"}, as in `Step`.
        preprocess: Makes (n, 3, H, W) of uint8 (n, H, W, 3).
        classes: Names of the labels.
        batch_size: Images that adapt at once.
        save: Keeps the adapter's state; called every `save_every` batches and at the end.
        save_every: Batches.
        stop: Asks for the end: what waits is then predicted, and the state saved.

    Returns:
        How many images were "predicted" and "refused", and the "batches".
    """
    counts = {"predicted": 0, "refused": 0, "batches": 0}
    waiting: list[tuple[str, np.ndarray]] = []

    def flush():
        if not waiting:
            return
        pixels = np.stack([image for _, image in waiting])
        logits = adapter(preprocess(pixels))
        shares, labels = logits.float().softmax(1).max(1)
        for (name, _), share, label in zip(waiting, shares.tolist(), labels.tolist(), strict=True):
            named = {"class": classes[label]} if classes else {}
            emit({"image": name, **named, "label": label, "confidence": round(share, 4)})
        step = adapter.history[-1]
        for event in (*step.events, *([f"skipped: {step.reason}"] if step.reason else [])):
            emit({"event": event, "batch": counts["batches"]})
        if step.drift:
            emit({"drift": _rounded(step.drift), "entropy": _rounded(step.entropy), "batch": counts["batches"]})
        counts["predicted"] += len(waiting)
        counts["batches"] += 1
        waiting.clear()
        if save and counts["batches"] % save_every == 0:
            save()

    stop, images = stop or Stop(), iter(images)
    while (found := stop.take(images)) is not None:
        name, item = found
        try:
            waiting.append((name, reader.read(item)))
        except ValueError as error:
            emit({"image": name, "error": str(error)})
            counts["refused"] += 1
        if len(waiting) == batch_size:
            flush()
    flush()
    if save:
        save()
    return counts


def line(found: dict[str, Any]) -> str:
    """Write an object as one line of JSON; names that are no text keep their bytes as escapes."""
    return json.dumps(found, ensure_ascii=True)


def _rounded(found):
    """Round every number in nested dicts to four decimals; None stands for what is not finite."""
    if isinstance(found, dict):
        return {name: _rounded(value) for name, value in found.items()}
    return round(found, 4) if found is not None and math.isfinite(found) else None


def preprocessor(mean: Iterable[float], std: Iterable[float]) -> Callable[[np.ndarray], torch.Tensor]:
    """Return what makes (n, 3, H, W) of uint8 (n, H, W, 3), as the model was trained."""
    return Images(np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, int), [], mean=mean, std=std).preprocess
