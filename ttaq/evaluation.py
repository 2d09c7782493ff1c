"""evaluate: what a model, adapting or not, gets wrong on a stream, and what that takes."""

import csv
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from .adaptation import Adapter, Source
from .distributed import Team
from .files import write_atomically
from .meters import CalibrationError, Memory, Passes
from .streams import Stream
from .surgery import device_of, evaluating

FORMAT = 1
SCALARS = (
    "mean_error", "sample_error", "mean_class_error", "ece", "forwards", "backwards", "seconds", "allocated_bytes",
    "resident_growth_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What `evaluate` measured.

    Attributes:
        errors: Domain to error in percent of its images, in the order of the stream.
        images: Domain to number of images.
        seconds: Time spent predicting and adapting, the stream's own work left out.
        class_images: Class to number of images in the whole stream, in the order of their numbers.
        class_wrong: The same classes to the number of those that were errors.
        visit_errors: Visit of the sequence, from 0, to error in percent of its images; one but for `recurring`.
        ece: Expected calibration error in percent, 15 bins (Guo et al., arXiv:1706.04599), over the images that have
            a confidence; None where none has.
        forwards: Forward passes an image of the stream: those of the method, its teacher and the guard.
        backwards: Backward passes an image of the stream.
        allocated_bytes: Peak of CUDA's allocator, the model's own tensors included; None off CUDA.
        resident_growth_bytes: Growth of the process's largest resident size, the stream's own work included; 0
            where the process was larger before.
    """

    errors: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    class_images: dict[int, int] = field(default_factory=dict)
    class_wrong: dict[int, int] = field(default_factory=dict)
    visit_errors: dict[int, float] = field(default_factory=dict)
    ece: float | None = None
    forwards: float | None = None
    backwards: float | None = None
    allocated_bytes: int | None = None
    resident_growth_bytes: int | None = None

    @property
    def mean_error(self) -> float:
        """The mean over domains of their errors, in percent."""
        return sum(self.errors.values()) / len(self.errors)

    @property
    def sample_error(self) -> float:
        """The error over all images of the stream, in percent: large domains weigh more."""
        return sum(self.errors[d] * self.images[d] for d in self.errors) / sum(self.images[d] for d in self.errors)

    @property
    def mean_class_error(self) -> float | None:
        """The mean over the classes that were met of their errors in the whole stream, in percent."""
        if not self.class_images:
            return None
        return sum(100 * self.class_wrong[c] / n for c, n in self.class_images.items()) / len(self.class_images)

    def rows(self) -> list[dict]:
        """Return a row a domain: domain, images, error, and then `SCALARS`, the same in each."""
        scalars = {name: getattr(self, name) for name in SCALARS}
        return [{"domain": d, "images": self.images[d], "error": e} | scalars for d, e in self.errors.items()]

    def to_dict(self) -> dict:
        """Return everything as JSON takes it; `from_dict` reads it back."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict) -> "Result":
        """Read what `to_dict` gave, also after JSON has made the keys of its mappings text.

        Raises:
            ValueError: It holds something else.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.keys() - {"format"} != names:
            raise ValueError(f"Result: expected what to_dict gives, in format {FORMAT}; evaluate again")
        values = {name: content[name] for name in names}
        for name in ("class_images", "class_wrong", "visit_errors"):
            values[name] = {int(key): value for key, value in values[name].items()}
        return cls(**values)

    def write(self, path: str | os.PathLike) -> Path:
        """Write a .json file, which `read` takes, or a .csv file of `rows`, whole or not at all.

        Raises:
            ValueError: The path ends otherwise.
        """
        kind = Path(path).suffix
        if kind == ".csv":
            return write_atomically(path, as_csv(self.rows()))
        if kind != ".json":
            raise ValueError(f"Result.write: the path must end in .json or .csv, got {path}; name it so")
        return write_atomically(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Result":
        """Read a .json file that `write` wrote.

        Raises:
            ValueError: It holds something else.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def as_csv(rows: list[dict]) -> bytes:
    """Write rows of the same keys as CSV, UTF-8; None is left empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def evaluate(
    model: nn.Module,
    stream: Iterable,
    *,
    reset: bool = False,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
    team: Team | None = None,
) -> Result:
    """Predict a stream in its order and count the errors of each domain.

    Forward and backward passes are those of the stream alone: what a method does when it is made, as EATA's Fisher
    information, is not among them. Of a model that is no Adapter, a call is a forward pass.

    Args:
        model: A model, run in eval mode, or an Adapter, which goes on adapting while it predicts.
        stream: Of `streams.Batch`: images (B, C, H, W), labels (B,), domain, first; where they are given also
            domains (B names; then errors are counted by them) and visit.
        reset: Reset the adapter where a domain begins; False lets it carry on (continual adaptation).
        forward: Runs the model on images, when `model(x)` does not give logits.
        progress: Called with the number of images after each batch.
        team: Processes that take the batches in turn, each with the same model; all of them return the same result,
            whose seconds are those of the slowest. An Adapter that adapts meets one batch after the other, and so
            takes no team.

    Returns:
        Errors per domain, class and visit, calibration, passes, memory and seconds; an image with NaN among its
        logits counts as an error.

    Raises:
        ValueError: The stream is empty, `reset` is asked of a model that cannot, or a team is to adapt.
    """
    if team and isinstance(model, Adapter) and not isinstance(model.method, Source):
        raise ValueError("evaluate: an adapter learns from one batch after the other; leave out team=")
    if reset and not hasattr(model, "reset"):
        raise ValueError("evaluate: reset wants an Adapter; wrap the model with ttaq.adapt(model, 'source')")
    device = device_of(model)
    tally, passes, memory = _Tally(), Passes(), Memory(device)
    adapts = isinstance(model, Adapter)
    counted = passes.counting(model.method) if adapts else nullcontext()
    with torch.no_grad(), evaluating(model), counted:
        for batch in _dealt(stream, team):
            if reset and batch.first:
                model.reset()
            start = time.perf_counter()
            x = batch.images.to(device)
            logits = model(x) if forward is None else forward(model, x)
            guesses = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).cpu()
            tally.seconds += time.perf_counter() - start
            passes.forwards += 0 if adapts else len(x)
            tally.add(batch, logits, guesses == batch.labels)
            if progress is not None:
                progress(len(guesses))
    if team:
        tally = _Tally.gather(team.share((tally, passes.forwards, passes.backwards)), passes)
    return tally.result(passes, memory)


def _dealt(stream: Iterable, team: Team | None) -> Iterable:
    """Give this process its batches; a Stream does not read those of the others."""
    if team is None:
        return stream
    if isinstance(stream, Stream):
        return stream.part(team.rank, team.size)
    return islice(stream, team.rank, None, team.size)


class _Tally:
    """Count images and errors by domain, class and visit."""

    def __init__(self) -> None:
        self.images, self.wrong, self.class_images, self.class_wrong = (Counter() for _ in range(4))
        self.visit_images, self.visit_wrong = Counter(), Counter()
        self.first: dict[str, int] = {}  # domain to the number of the batch in which it was met first
        self.batches = 0
        self.calibration = CalibrationError()
        self.seconds = 0.0

    def add(self, batch, logits: Tensor, hits: Tensor) -> None:
        """Count a batch: its (n, classes) logits, and (n,) bool, whether they are right."""
        names = getattr(batch, "domains", None) or (batch.domain,) * len(hits)
        visit, right = getattr(batch, "visit", 0), hits.tolist()
        self.images.update(names)
        for name in names:
            self.first.setdefault(name, self.batches)
        self.batches += 1
        self.wrong.update(name for name, hit in zip(names, right, strict=True) if not hit)
        self.class_images.update(batch.labels.tolist())
        self.class_wrong.update(batch.labels[~hits].tolist())
        self.visit_images[visit] += len(right)
        self.visit_wrong[visit] += right.count(False)
        self.calibration.add(logits, hits)

    @classmethod
    def gather(cls, parts: list[tuple["_Tally", int, int]], passes: Passes) -> "_Tally":
        """Add up what each process counted, and its passes; domains come in the order of the stream."""
        whole = cls()
        for tally, *_ in parts:
            for name in ("images", "wrong", "class_images", "class_wrong", "visit_images", "visit_wrong"):
                getattr(whole, name).update(getattr(tally, name))
            whole.calibration.join(tally.calibration)
            whole.seconds = max(whole.seconds, tally.seconds)
        passes.forwards, passes.backwards = (sum(part[i] for part in parts) for i in (1, 2))
        met = {}
        for rank, (tally, *_) in enumerate(parts):
            for name, batch in tally.first.items():
                met[name] = min(met.get(name, (batch * len(parts) + rank, 0)), (batch * len(parts) + rank, len(met)))
        whole.images = Counter({name: whole.images[name] for name in sorted(met, key=met.get)})
        return whole

    def result(self, passes: Passes, memory: Memory) -> Result:
        """Sum up, refusing where nothing was met."""
        total = sum(self.images.values())
        if not total:
            raise ValueError("evaluate: the stream is empty; give a source with images")
        classes = sorted(self.class_images)
        return Result(
            errors=_percent(self.wrong, self.images),
            images=dict(self.images),
            seconds=self.seconds,
            class_images={c: self.class_images[c] for c in classes},
            class_wrong={c: self.class_wrong[c] for c in classes},
            visit_errors=_percent(self.visit_wrong, self.visit_images),
            ece=self.calibration.percent(),
            forwards=passes.forwards / total,
            backwards=passes.backwards / total,
            allocated_bytes=memory.allocated(),
            resident_growth_bytes=memory.growth(),
        )


def _percent(wrong: Counter, images: Counter) -> dict:
    return {key: 100 * wrong[key] / count for key, count in images.items() if count}
