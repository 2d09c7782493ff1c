"""A user's model, named by reference, and images: opened, planned, and quantised into one packed checkpoint."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .cards import write_card
from .checkpoint import save
from .distributed import Team
from .packing import pack
from .pipeline import quantize
from .sources import describe_preprocessing, open_data, preprocessing_of
from .spec import Recipe
from .streams import Images
from .surgery import device_of
from .workbench import check_device, check_outputs
from .zoo import build_model

_COMPARED, _WRONG = 256, 50.0  # images that `check` takes, and the error in percent from which it warns


@dataclass(frozen=True)
class Job:
    """What is to be quantised, and on what.

    Attributes:
        reference: "timm:NAME", "torchvision:NAME" or "package.module:function".
        model: In eval mode on its device; on meta where its weights stay in their file.
        batches: Calibration images on the device, (B, 3, H, W) each.
        labels: Of those images, (N,); nothing learns from them.
        data: Where they come from.
        available: Images that lie there.
        preprocessing: As `sources.preprocessing_of` gives it.
        classes: Names of the classes where they go with the outputs, else None.
        options: Those of the model's builder.
        weights: File of the float weights; None for random ones.
    """

    reference: str
    model: nn.Module
    batches: list[Tensor]
    labels: Tensor
    data: Path
    available: int
    preprocessing: dict
    classes: list[str] | None
    options: Mapping[str, int]
    weights: Path | None

    @property
    def images(self) -> int:
        """How many images it is calibrated on."""
        return sum(map(len, self.batches))

    @property
    def float_bytes(self) -> int:
        """Bytes of the float model's parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))

    @property
    def streams(self) -> bool:
        """Whether the float weights stay in their file, and are read block by block."""
        return device_of(self.model).type == "meta"


def open_job(
    reference: str,
    data: str | Path,
    *,
    weights: str | Path | None = None,
    low_memory: bool = False,
    num_classes: int | None = None,
    images: int = 1024,
    batch_size: int = 64,
    size: int | None = None,
    crop: float | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: list[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Job:
    """Build a model by reference and draw its calibration images.

    Args:
        reference: "timm:NAME", "torchvision:NAME" or "package.module:function".
        data: Clean images: class folders or an .npz file.
        weights: Local file of a state_dict; None for random weights.
        low_memory: Leave the weights in their file, a .safetensors.
        num_classes: Handed to the builder; None for its own.
        images: To calibrate on, drawn by the seed; all there are, if fewer.
        batch_size: Images at once.
        size: Side of the images; None for what the model's own configuration says.
        crop: Share of the shorter side that is cut out, alike.
        mean: Of each channel, alike.
        std: Of each channel, alike.
        classes: Class folders in the order of the logits.
        seed: Of the choice of images.
        device: Where to work.

    Raises:
        ValueError: A name, a file or the images do not serve.
    """
    check_device(device)
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = _build(reference, weights, low_memory, options)
    chosen = preprocessing_of(model, reference, size=size, crop=crop, mean=mean, std=std)
    source = open_data(data, chosen, classes)
    if not isinstance(source, Images):
        raise ValueError(f"quantize: {data} holds corrupted images; give clean ones, class folders or an .npz file")
    picked = source.take(np.random.default_rng(seed).permutation(len(source))[:images])
    pairs = [(x.to(device), y) for x, y in picked.batches(batch_size)]
    batches, labels = [x for x, _ in pairs], torch.cat([y for _, y in pairs])
    outputs = check_outputs(model, batches[0][:1].to(device_of(model)), source, data, named=classes is not None)
    names = list(source.classes) if len(source.classes) == outputs else None
    model = model if low_memory else model.to(device)
    file = Path(weights) if weights else None
    return Job(reference, model, batches, labels, Path(data), len(source), chosen, names, options, file)


def _build(reference, weights, low_memory, options):
    if not low_memory:
        return build_model(reference, weights, **options)
    if weights is None or Path(weights).suffix != ".safetensors":
        raise ValueError("quantize: --low-memory reads weights block by block; pass --weights FILE.safetensors")
    with torch.device("meta"):
        return build_model(reference, **options)


def carry_out(
    job: Job,
    out: str | Path,
    recipe: str | Recipe = "w4a4",
    *,
    method: str = "ttaq",
    seed: int = 0,
    progress: bool = True,
    team: Team | None = None,
    **settings,
) -> dict:
    """Quantise, pack and write one checkpoint, and its card beside it.

    Args:
        job: From `open_job`.
        out: The checkpoint; its card is `cards.card_path(out)`.
        recipe: "w4a4" and the like, or a Recipe.
        method: One of `pipeline.METHODS`.
        seed: Of reconstruction.
        progress: Show a bar.
        team: As in `pipeline.quantize`; the first process writes.
        settings: Further arguments of `pipeline.quantize`, such as steps, budget or cache; None leaves one out.

    Returns:
        The packed model's report, with "float_bytes" and, in the process that writes, "file_bytes" and "check": on how
        many calibration "images" the "float_error", the "error" of the packed model, and the "agreement" of both, in
        percent, were measured; None where no float model is held.

    Raises:
        ValueError: The recipe or a setting does not serve; nothing is written then.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"seed": seed} if method not in ("rtn", "gptq") else {}
    if team and not job.streams:
        team.follow(job.model.state_dict().values())  # without a file each process has random weights of its own
    found = check(job) if team is None or team.leads else None
    start = time.perf_counter()
    streamed = {"weights": job.weights} if job.streams else {}
    learned = quantize(
        job.model, job.batches, recipe, method=method, progress=progress, team=team, **streamed, **settings
    )
    packed = learned if job.streams else pack(learned)
    seconds = time.perf_counter() - start
    packed.ttaq_report["options"] = dict(job.options)
    report = packed.ttaq_report | {"float_bytes": job.float_bytes}
    if team and not team.leads:
        return report
    report["check"] = _compare(job, found, packed)
    save(packed.cpu(), out, reference=job.reference, preprocessing=job.preprocessing, classes=job.classes)
    report["file_bytes"] = Path(out).stat().st_size
    write_card(out, report, reference=job.reference, data=job.data.name, seed=seed, seconds=seconds)
    return report


@torch.no_grad()
def predict(model: nn.Module, job: Job) -> Tensor:
    """Return the classes, (n,), that a model predicts for the first calibration images, 256 at most."""
    parts = torch.cat(job.batches)[:_COMPARED].split(len(job.batches[0]))
    return torch.cat([model(part).argmax(-1) for part in parts]).cpu()


def check(job: Job) -> dict | None:
    """Predict calibration images by the float model; their labels are known, if quantisation never looks at them.

    Warns where a model with weights of its own gets half of them wrong: then images are not prepared as those it was
    trained on, or classes stand in another order.

    Returns:
        "images", how many; "float_error", in percent; and "floats", the predictions. None where no float model is held.
    """
    if job.streams:
        return None
    floats = predict(job.model, job)
    error = _percent(floats != job.labels[:_COMPARED])
    if job.weights and error >= _WRONG:
        warnings.warn(
            f"quantize: the float model errs on {error:.1f} % of {len(floats)} calibration images, prepared as "
            f"{describe_preprocessing(job.preprocessing)}; check these (--size, --crop, --mean, --std), the weights "
            "and the order of classes (--classes)",
            stacklevel=2,
        )
    return {"images": len(floats), "float_error": error, "floats": floats}


def _compare(job, found, packed):
    """Complete what `check` found by the error of the packed model, and on how many both predict the same."""
    if found is None:
        return None
    guesses, floats = predict(packed, job), found.pop("floats")
    return found | {"error": _percent(guesses != job.labels[:_COMPARED]), "agreement": _percent(guesses == floats)}


def _percent(hits):
    return 100 * float(hits.float().mean())
