"""The grid of accuracies: models, bits, ways of quantising, adapters, losses, statistics, streams and seeds."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import ttaq
from ttaq.adaptation.statistics import STATISTICS
from ttaq.evaluation import Result, evaluate
from ttaq.pipeline import decisions
from ttaq.streams import STREAMS as ORDERS
from ttaq.streams import Corrupted, Images, Stream

from . import machine

KEY = (
    "model", "bits", "method", "steps", "seed", "adapter", "loss", "statistics", "stream", "pass", "images",
)  # fmt: skip
COLUMNS = (
    "commit", "dirty", "machine", *KEY, "error", "class_error", "bytes", "seconds", "note",
)  # fmt: skip
OLD = {"iid": "continual", "correlated": "correlated", "longtail": "long-tailed"}  # as the first rows call them
STREAMS = {name: ORDERS[order] for name, order in OLD.items()}
STREAMS |= {name: make for name, make in ORDERS.items() if name not in OLD.values()}
FLOAT = "w32a32"
UNLEARNED = ("rtn", "gptq")  # ways of quantising without steps
DESCENDING = ("tent", "eta", "eata", "sar", "deyo")  # adapters that take a loss, and passes


@dataclass(frozen=True)
class Subject:
    """A model with its images.

    Args:
        name: In the rows.
        model: Float, in eval mode.
        calibration: What it is quantised on.
        test: What it is tested on.
        architecture: Builds it without weights.
    """

    name: str
    model: nn.Module
    calibration: Images
    test: Images
    architecture: Callable[[], nn.Module]


class Grid:
    """Walk the cells that have no row yet, and append one row after another.

    Args:
        subject: Model and images.
        path: The CSV file; its rows are not measured again.
        cache: Folder of packed models, made once each.
        device: Where everything runs.
        source: What has the corruptions as domains of its own, as `CifarC`; None corrupts the test images.
    """

    def __init__(self, subject: Subject, path: Path, cache: Path, device: str = "cpu", source=None):
        self.subject, self.path, self.cache, self.device, self.source = subject, path, cache, device, source
        self.done = {tuple(row[k] for k in KEY) for row in read(path)}
        self.normalised = any(isinstance(m, _BatchNorm) for m in subject.model.modules())
        self._corrupted: dict[int, object] = {}
        self._answers: dict[int, torch.Tensor] = {}

    def run(self, options) -> None:
        """Measure every cell of the product of the options that is missing."""
        triples = itertools.product(options.seeds, options.bits, options.methods)
        triples = [t for t in triples if t[1] != FLOAT or t[2] == options.methods[0]]
        for number, (seed, bits, method) in enumerate(triples):
            if number % options.shards == options.shard:
                method = "none" if bits == FLOAT else method
                self._model(seed, bits, method, options)

    def _model(self, seed, bits, method, options):
        """Measure one model, clean and in every cell."""
        base = {"model": self.subject.name, "bits": bits, "method": method, "seed": seed}
        base["steps"] = options.steps if method not in ("none", *UNLEARNED) else 0
        model = None
        cells = [("none", "", "", "clean"), *_cells(options)]
        for adapter, loss, statistics, stream in cells:
            if method == "none" and loss not in ("", "entropy"):
                continue
            if adapter == "norm" and (statistics == "source" or not self.normalised):  # it would adapt nothing
                continue
            cell = base | {"adapter": adapter, "loss": loss, "statistics": statistics, "stream": stream}
            if self._known(cell, options):
                continue
            if model is None:
                model, facts = packed_model(self.subject, self.cache, self.device, base, options.images)
                self._answers.clear()
            if stream == "clean":
                self._write(cell | facts, evaluate(model, whole(self.subject.test)), 1, options)
            else:
                self._stream(model, cell, options)

    def _stream(self, model, cell, options):
        stream = self.stream(cell["stream"], cell["seed"], options)
        if cell["adapter"] == "source":  # its answers depend on no order
            self._write(cell, evaluate(_Remembering(model, self._answers), stream), 1, options)
            return
        settings = statistics_of(cell["statistics"]) | ({"loss": cell["loss"]} if cell["loss"] else {})
        if cell["adapter"] == "eata":
            settings["anchor"] = [x.to(self.device) for x, _ in self.subject.calibration.batches(200)][:8]
        adapter = ttaq.adapt(model, cell["adapter"], guard="finite", **settings)
        for number in range(1, _passes(cell["adapter"], options) + 1):
            self._write(cell, evaluate(adapter, stream), number, options)

    def _known(self, cell, options):
        passes = _passes(cell["adapter"], options)
        images = str(len(self.subject.test) if cell["stream"] == "clean" else options.stream_images)
        rows = [cell | {"pass": number, "images": images} for number in range(1, passes + 1)]
        return all(tuple(str(row[k]) for k in KEY) in self.done for row in rows)

    def stream(self, kind: str, seed: int, options) -> Stream:
        """Build the stream of a kind and seed; the corrupted images of a seed are made once."""
        if seed not in self._corrupted:
            self._corrupted = {seed: self.source or Corrupted(self.subject.test, seed=seed, table=options.table_of)}
        return STREAMS[kind](
            self._corrupted[seed], images=options.stream_images, batch_size=options.batch_size, seed=seed
        )

    def _write(self, cell, result: Result, number: int, options) -> None:
        images = len(self.subject.test) if cell["stream"] == "clean" else options.stream_images
        row = cell | {"pass": number, "images": images, "error": round(result.mean_error, 3)}
        row |= {"class_error": round(result.mean_class_error, 3)}
        row.setdefault("seconds", round(result.seconds, 1))
        row |= machine.commit(options.commit) | {"machine": machine.facts(self.device)["machine"]}
        append(row, self.path)
        self.done.add(tuple(str(row[k]) for k in KEY))
        print("  ".join(f"{k}={row[k]}" for k in COLUMNS[4:] if row.get(k, "") != ""), flush=True)


class _Remembering(nn.Module):
    """A model that does not adapt, and so answers a whole stream once: later streams of the same images look it up."""

    def __init__(self, model: nn.Module, answers: dict):
        super().__init__()
        self.model, self.answers = model, answers

    def forward(self, x):
        """Return the logits of a batch; images seen before are not computed again."""
        keys = [hash(image.numpy().tobytes()) for image in x.cpu()]
        new = [at for at, key in enumerate(keys) if key not in self.answers]
        if new:
            self.answers.update(zip([keys[at] for at in new], self.model(x[new]).cpu(), strict=True))
        return torch.stack([self.answers[key] for key in keys]).to(x.device)


def packed_model(subject: Subject, cache: Path, device: str, base: dict, images: int) -> tuple[nn.Module, dict]:
    """Return the packed model of a row, from the cache or made now, and what making it took.

    Args:
        subject: The float model and its images.
        cache: Folder of packed models.
        device: Where it goes.
        base: The row's model, bits, method, steps and seed; the method "none" gives the float model.
        images: Calibration images, for the name of the file.
    """
    if base["method"] == "none":
        model = subject.model.to(device)
        return model, {"bytes": 4 * sum(p.numel() for p in model.parameters())}
    name = "-".join(str(base[k]) for k in ("model", "bits", "method", "steps", "seed"))
    path = cache / f"{name}-{images}.safetensors"
    facts = {}
    if not path.exists():
        settings = {} if base["method"] in UNLEARNED else {"steps": base["steps"], "seed": base["seed"]}
        batches = [x.to(device) for x, _ in subject.calibration.batches(128)]
        start = time.perf_counter()
        made = ttaq.quantize(
            subject.model.to(device),
            batches,
            base["bits"],
            method=base["method"],
            progress=False,
            **settings,
        )
        facts["seconds"] = round(time.perf_counter() - start, 1)
        facts["note"] = "; ".join(decisions(made.ttaq_report))
        path.parent.mkdir(parents=True, exist_ok=True)
        ttaq.save(ttaq.pack(made), path)
    packed = ttaq.load(path, subject.architecture(), device=device)
    return packed, facts | {"bytes": path.stat().st_size}


def statistics_of(text: str) -> dict:
    """Read "batch", "source", "ema" or "blend", the latter two also as "ema0.2" (momentum) or "blend0.5" (share)."""
    kind = text.rstrip("0123456789.")
    number, option = text.removeprefix(kind), {"ema": "momentum", "blend": "alpha"}.get(kind)
    if kind not in STATISTICS or (number and not option):
        raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, ema0.2 or blend0.5, got {text!r}")
    return {"statistics": kind} | ({option: float(number)} if number else {})


def whole(images: Images) -> Stream:
    """Make a stream of clean images, in their order."""
    return Stream([("clean", images)], [(0, list(range(len(images))))], 500)


def read(path: Path) -> list[dict]:
    """Return the rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(row: dict, path: Path, columns: tuple[str, ...] = COLUMNS) -> None:
    """Add one row, in one write, so that several processes may share a file."""
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def _cells(options) -> Iterator[tuple[str, str, str, str]]:
    for stream in options.streams:
        for adapter in options.adapters:
            if adapter == "source":
                yield adapter, "", "", stream
            else:
                losses = options.losses if adapter in DESCENDING else [""]
                for statistics, loss in itertools.product(options.statistics, losses):
                    yield adapter, loss, statistics, stream


def _passes(adapter, options):
    return options.passes if adapter in DESCENDING else 1
