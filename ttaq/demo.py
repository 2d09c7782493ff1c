"""demo: the whole road on scikit-learn's digits, from two float models to packed ones that adapt on a stream."""

import importlib.util
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .adaptation import adapt, write_history
from .checkpoint import load, save
from .doctor import describe_machine
from .evaluation import Result, evaluate
from .files import write_atomically
from .models import ResNet, ViT
from .packing import pack
from .pipeline import quantize
from .report import Results, draw, read, render
from .streams import CORRUPTIONS, Corrupted, Images, Stream, continual, load_digits
from .training import Training, fetch_trained


def build_resnet() -> ResNet:
    """Build the demo's residual CNN, with random weights."""
    return ResNet(depth=8, classes=10, width=16)


def build_vit() -> ViT:
    """Build the demo's vision transformer, with random weights."""
    return ViT(size=32, patch=8, width=64, depth=3, heads=4, classes=10)


NETWORKS = {"resnet": build_resnet, "vit": build_vit}
RATES = {"resnet": 3e-3, "vit": 2e-3}
EPOCHS = {"resnet": 10, "vit": 30}
WHOLE = {"size": 32, "crop": 1.0, "interpolation": "bilinear"}


@dataclass(frozen=True)
class Settings:
    """What the demo measures.

    Args:
        images: Of each corruption, at most 500.
        clean: Images of the clean test set, at most 500.
        batch_size: Images that the adapter sees at once.
        severity: 1 to 5.
        steps: Of reconstruction, for each block.
        train: Images that the networks learn from, at most 1,041.
        calibration: Images that quantisation sees, at most 256.
        epochs: Of training; None for as many as each network needs.
        bits: Widths.
        adapters: Methods of adaptation.
        lr: Of those that descend a gradient.
        corruptions: In the order in which they are met.
        seed: Of training, reconstruction and the stream.
    """

    images: int = 100
    clean: int = 200
    batch_size: int = 50
    severity: int = 5
    steps: int = 150
    train: int = 1041
    calibration: int = 256
    epochs: int | None = None
    bits: tuple[str, ...] = ("w8a8", "w4a4", "w2a4")
    adapters: tuple[str, ...] = ("source", "norm", "tent")
    lr: float = 3e-3
    corruptions: tuple[str, ...] = CORRUPTIONS
    seed: int = 0


def run_demo(out: str | Path = "ttaq-demo", settings: Settings | None = None, *, console: Console | None = None):
    """Train, quantise, pack, adapt and report; the same numbers for the same seed.

    Args:
        out: Folder of results.json, figure.png, index.html, the trained networks, the packed checkpoints,
            drift.jsonl, what telemetry saw, and digits.npz, the clean test images for `ttaq evaluate`.
        settings: What to measure.
        console: Where the progress bars go; None, or no terminal, for silence.

    Returns:
        `report.Results`, as written.

    Raises:
        ValueError: matplotlib or scikit-learn is missing, or a setting is out of range.
    """
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'demo: {" and ".join(missing)} must be installed; pip install "ttaq[demo]"')
    demo = _Demo(Path(out), settings or Settings(), console)
    with demo.bars:
        for name in NETWORKS:
            demo.run(name)
    demo.note_equality()
    write_images(load_digits("test"), demo.out / "digits.npz")
    demo.results.stages["streams"] = round(sum(row["seconds"] for row in demo.results.rows), 3)
    demo.results.stages["whole demo"] = round(time.perf_counter() - demo.start, 3)
    write_report(demo.results, demo.out, demo.checkpoints, demo.drift)
    return demo.results


def write_images(images: Images, path: Path) -> None:
    """Write images as an .npz file that `ttaq evaluate --data` reads."""
    arrays = {"images": images.pixels(), "labels": images.labels, "classes": np.array(images.classes)}
    write_atomically(path, lambda draft: np.savez_compressed(draft, **arrays))


def write_report(results: Results, out: Path, checkpoints: list[Path], stream: Path) -> None:
    """Write results.json, figure.png and index.html into a folder; the page shows the checkpoints and a stream, too."""
    results.write(out / "results.json")
    write_atomically(out / "figure.png", draw(results))
    write_atomically(out / "index.html", render(results, *read(*checkpoints, stream)[1:]))


class _Demo:
    """One run: the images it shares among its models, and what it has measured so far."""

    def __init__(self, out, settings, console):
        self.start = time.perf_counter()
        self.out, self.settings = out, settings
        seed = settings.seed
        self.train, test = load_digits("train").take(slice(settings.train)), load_digits("test")
        calibration = load_digits("calibration").take(slice(settings.calibration))
        self.calibration = [x for x, _ in calibration.batches(64)]
        self.clean = whole_stream("clean", test.take(slice(settings.clean)), 100)
        self.stream = continual(
            Corrupted(test, seed=seed), corruptions=settings.corruptions, severity=settings.severity,
            images=settings.images, batch_size=settings.batch_size, seed=seed,
        )  # fmt: skip
        shown = {key: value for key, value in asdict(settings).items() if value is not None}
        shown["corruptions"] = len(settings.corruptions)
        self.results = Results("ttaq demo: digits that change", shown, describe_machine())
        self.differences: dict[str, float] = {}
        self.checkpoints: list[Path] = []
        self.drift = self.out / "drift.jsonl"
        self.bars = make_bars(console)
        rows = len(settings.adapters) * (1 + 3 * len(settings.bits))
        self.whole = self.bars.add_task("demo", total=len(NETWORKS) * (1 + len(settings.bits) + rows))
        self.now = self.bars.add_task("", total=None)

    def run(self, name: str) -> None:
        """Measure one network: in float, then at each width."""
        bits = self.settings.bits
        with self.stage(f"{name}: train", self.epochs(name)) as advance:
            model, path = fetch_trained(
                NETWORKS[name], self.train, self.training(name), self.out / "models", name, progress=advance
            )
        if not has_batch_statistics(model) and "norm" in self.settings.adapters:
            self.results.notes.append(f"{name} has no batch statistics, so norm has nothing to do and is left out.")
        row = {"model": name, "bits": "float", "method": "none"}
        self.measure(model, row | {"form": "float", "bytes": path.stat().st_size})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "quantize: .* images are few")  # the digits hold no more
            for width in bits:
                self.quantise(name, model, width)

    def quantise(self, name: str, model: nn.Module, bits: str) -> None:
        """Measure one width: rounded to nearest, reconstructed, and packed, saved and loaded again."""
        row = {"model": name, "bits": bits, "form": "fake-quantised", "bytes": None}
        nearest = quantize(model, self.calibration, bits, method="rtn", progress=False)
        self.measure(nearest, row | {"method": "rtn"})
        with self.stage(f"{name}: reconstruct {bits}"):
            learned = quantize(
                model, self.calibration, bits, progress=False, steps=self.settings.steps, seed=self.settings.seed
            )
        self.measure(learned, row | {"method": "ttaq"})
        path = save(
            pack(learned),
            self.out / "checkpoints" / f"{name}-{bits}.safetensors",
            reference=f"ttaq.demo:{NETWORKS[name].__name__}",
            preprocessing=WHOLE | {"mean": list(self.train.mean), "std": list(self.train.std)},
            classes=list(self.train.classes),
        )
        with torch.device("meta"):
            architecture = NETWORKS[name]()
        packed = load(path, architecture)
        self.compare(f"{name} {bits}", learned, packed)
        self.checkpoints.append(path)
        if (name, bits) == (next(iter(NETWORKS)), "w4a4" if "w4a4" in self.settings.bits else self.settings.bits[0]):
            self.watch(packed)
        self.measure(packed, row | {"method": "ttaq", "form": "packed", "bytes": path.stat().st_size})

    def measure(self, model: nn.Module, row: dict) -> None:
        """Add a row for each adapter that has something to adapt."""
        for adapter in self.settings.adapters:
            self.bars.advance(self.whole)
            if adapter == "norm" and not has_batch_statistics(model):
                continue
            options = {} if adapter in ("source", "norm") else {"lr": self.settings.lr}
            clean = evaluate(adapt(model, adapter, **options), self.clean).mean_error
            result = self.evaluate(adapt(model, adapter, **options), f"{row['model']} {row['bits']}, {adapter}")
            self.results.add(result, clean_error=clean, adapter=adapter, **row)

    def evaluate(self, model: nn.Module, what: str) -> Result:
        """Run a model over the stream, with a bar."""
        total = self.settings.images * len(self.settings.corruptions)
        self.bars.reset(self.now, total=total, description=what)
        return evaluate(model, self.stream, progress=lambda images: self.bars.advance(self.now, images))

    def watch(self, model: nn.Module) -> None:
        """Adapt once more, watched by telemetry against calibration, and write what it saw; no row counts the time."""
        method = self.settings.adapters[-1]
        options = {} if method in ("source", "norm") else {"lr": self.settings.lr}
        adapter = adapt(model, method, telemetry=1, reference=self.calibration, **options)
        self.evaluate(adapter, "drift")
        write_history(adapter.history, self.drift)

    def compare(self, what: str, simulated: nn.Module, packed: nn.Module) -> None:
        """Measure how far a packed model, read from its file, is from the fake-quantised one on clean images."""
        with torch.no_grad():
            largest = max(float((simulated(b.images) - packed(b.images)).abs().max()) for b in self.clean)
        self.differences[what] = largest

    def note_equality(self) -> None:
        """Say how packed models compare with the fake-quantised ones they were made from."""
        equal = [what for what, largest in self.differences.items() if largest == 0]
        notes = [f"The packed logits of {', '.join(equal)} equal the fake-quantised ones bit for bit."] if equal else []
        for what, largest in self.differences.items():
            if largest:
                notes.append(f"The packed logits of {what} differ from the fake-quantised ones by up to {largest:.2g}.")
        self.results.notes += notes

    def epochs(self, name: str) -> int:
        """Give the number of epochs that a network is trained for."""
        return self.settings.epochs or EPOCHS[name]

    def training(self, name: str) -> Training:
        """Give a network's way of training."""
        return Training(epochs=self.epochs(name), lr=RATES[name], seed=self.settings.seed)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator:
        """Time a stage and show it on the lower bar."""
        self.bars.reset(self.now, total=total, description=name)
        start = time.perf_counter()
        yield lambda step: self.bars.advance(self.now, step)
        self.results.stages[name] = round(time.perf_counter() - start, 3)
        self.bars.advance(self.whole)


def has_batch_statistics(model: nn.Module) -> bool:
    """Tell whether a model holds a BatchNorm with running statistics."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())


def whole_stream(name: str, images: Images, batch_size: int) -> Stream:
    """Make a stream of one domain that holds all images in their order."""
    return Stream([(name, images)], [(0, np.arange(len(images)))], batch_size)


def make_bars(console: Console | None) -> Progress:
    """Make progress bars that stay silent without a console or a terminal."""
    silent = console is None or not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=silent, transient=True)
