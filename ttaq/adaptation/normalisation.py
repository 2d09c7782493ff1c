"""Notice that a stream is normalised otherwise than the images of calibration, by its clipped pixels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..batches import Extent

# mean and std of each channel, in units of the full scale, as images are commonly normalised
KNOWN = (
    ((0.0,), (1 / 255,)),
    ((0.0,), (1.0,)),
    ((0.5,), (0.5,)),
    ((0.1307,), (0.3081,)),  # MNIST
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
    ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10
    ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),  # CIFAR-100
)
_CLIPPED = 0.001  # share of all values at either end that makes them clipped pixels, black and white
_EXACT, _BEYOND = 0.001, 0.1  # in widths of a range: its bounds are those of a normalisation; values lie outside
_RAW = 20.0  # no normalisation in use reaches so far

Record = dict[str, list[float]]
Bounds = list[tuple[float, float]]


class Normalisation:
    """Compare the first batch that a model is given with the images of calibration, once.

    Images of one normalisation lie in ``(0 - mean) / std`` to ``(1 - mean) / std``, whatever corrupts them, and reach
    both ends exactly where pixels are clipped.

    Args:
        model: Whose argument is looked at.
        before: What `batches.Extent.record` gave in calibration; None where nobody knows.
    """

    def __init__(self, model: nn.Module, before: Record | None = None) -> None:
        self.model, self.before = model, before
        self.reset()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at what the model is given inside, where it has not been done."""
        self._seen = Extent()
        handle = None if self.looked else self._seen.watch(self.model)
        try:
            yield
        finally:
            if handle:
                handle.remove()

    def report(self) -> list[str]:
        """Return what the latest look found, warn of it, and look no more."""
        record = None if self.looked else self._seen.record()
        self.looked = True
        found = None if record is None else judge(record, self.before)
        if found:
            warnings.warn(f"adapt: {found}", UserWarning, stacklevel=2)
        return [f"normalisation: {found}"] if found else []

    def reset(self) -> None:
        """Look again."""
        self.looked, self._seen = False, Extent()


def judge(found: Record, before: Record | None) -> str | None:
    """Say in a sentence that images are normalised otherwise than those before; None without strong evidence."""
    now, then = _bounds(found), _bounds(before) if before else None
    raw = min(found["low"]) >= 0 and _RAW < max(found["high"]) <= 255
    if raw and (then is None or max(abs(end) for ends in then for end in ends) <= _RAW):
        wanted = _words(before) if then and min(before["clipped"]) >= _CLIPPED else "with the mean and std of training"
        return f"the images look like pixels from 0 to 255; give the model (x / 255 - mean) / std {wanted}"
    if then is None or len(now) != len(then) or min(*found["clipped"], *before["clipped"]) < _CLIPPED:
        return None
    below, above = zip(*_excess(now, then), strict=True)
    below, above = max(below) > _BEYOND, max(above) > _BEYOND
    # a range that is not of a known normalisation may be that of images without black or without white
    outside = (below or above) if _known(before) else (below and above)
    here = _known(found)
    contradicted = here and any(reach > _BEYOND for row in _excess(then, _range(here, len(now))) for reach in row)
    if not outside and not contradicted:
        return None
    both = f"{_words(found)}, those of calibration {_words(before)}"
    return f"the images look like pixels from 0 to 1 normalised {both}; normalise both alike"


def _bounds(record: Record) -> Bounds:
    return list(zip(record["low"], record["high"], strict=True))


def _range(known: tuple, channels: int) -> Bounds:
    mean, std = (values * channels if len(values) == 1 else values for values in known)
    return [((0 - m) / s, (1 - m) / s) for m, s in zip(mean, std, strict=True)]


def _excess(inner: Bounds, outer: Bounds) -> list[tuple[float, float]]:
    """Return by channel how far a range reaches below and above another, in widths of that one."""
    pairs = zip(inner, outer, strict=True)
    return [((o[0] - i[0]) / ((o[1] - o[0]) or 1.0), (i[1] - o[1]) / ((o[1] - o[0]) or 1.0)) for i, o in pairs]


def _known(record: Record) -> tuple | None:
    """Find the normalisation whose bounds clipped images meet in every channel."""
    bounds = _bounds(record)
    for known in (one for one in KNOWN if len(one[0]) in (1, len(bounds))):
        if all(abs(gap) <= _EXACT for row in _excess(bounds, _range(known, len(bounds))) for gap in row):
            return known
    return None


def _words(record: Record) -> str:
    """Say which mean and std clipped images have, of pixels in 0..1."""
    widths = [(low, high - low or 1.0) for low, high in _bounds(record)]
    shown = []
    for values in _known(record) or ([-low / width for low, width in widths], [1 / width for _, width in widths]):
        texts = [f"{value:.3g}" for value in values]
        shown.append(texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})")
    return f"with mean {shown[0]} and std {shown[1]}"
