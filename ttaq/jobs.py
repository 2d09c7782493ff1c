"""A user's model, named by reference, and images: opened, planned, and quantised into one packed checkpoint."""

import time
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
from .sources import open_data, preprocessing_of
from .spec import Recipe
from .streams import Images
from .surgery import device_of
from .workbench import check_device, check_outputs
from .zoo import build_model

_COMPARED = 256  # images on which the predictions of the packed model are set against those of the float one


@dataclass(frozen=True)
class Job:
    """What is to be quantised, and on what.

    Attributes:
        reference: "timm:NAME", "torchvision:NAME" or "package.module:function".
        model: In eval mode on its device; on meta where its weights stay in their file.
        batches: Calibration images on the device, (B, 3, H, W) each.
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
    chosen = preprocessing_of(model, reference, size=size, mean=mean, std=std)
    source = open_data(data, chosen, classes)
    if not isinstance(source, Images):
        raise ValueError(f"quantize: {data} holds corrupted images; give clean ones, class folders or an .npz file")
    picked = source.take(np.random.default_rng(seed).permutation(len(source))[:images])
    batches = [x.to(device) for x, _ in picked.batches(batch_size)]
    outputs = check_outputs(model, batches[0][:1].to(device_of(model)), source, data, named=classes is not None)
    names = list(source.classes) if len(source.classes) == outputs else None
    model = model if low_memory else model.to(device)
    return Job(
        reference, model, batches, Path(data), len(source), chosen, names, options, Path(weights) if weights else None
    )


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
        The packed model's report, with "float_bytes" and, in the process that writes, "file_bytes" and "agreement":
        the percentage of calibration images, 256 at most, on which the packed model predicts what the float one does,
        None where no float model is held.

    Raises:
        ValueError: The recipe or a setting does not serve; nothing is written then.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"seed": seed} if method not in ("rtn", "gptq") else {}
    if team and not job.streams:
        team.follow(job.model.state_dict().values())  # without a file each process has random weights of its own
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
    report["agreement"] = None if job.streams else agreement(job.model, packed, job.batches)
    save(packed.cpu(), out, reference=job.reference, preprocessing=job.preprocessing, classes=job.classes)
    report["file_bytes"] = Path(out).stat().st_size
    write_card(out, report, reference=job.reference, data=job.data.name, seed=seed, seconds=seconds)
    return report


@torch.no_grad()
def agreement(model: nn.Module, packed: nn.Module, batches: list[Tensor], images: int = _COMPARED) -> float:
    """Return on how many of the first images, in percent, two models predict the same class."""
    x = torch.cat(batches)[:images]
    parts = [model(part).argmax(-1) == packed(part).argmax(-1) for part in x.split(len(batches[0]))]
    return 100 * float(torch.cat(parts).float().mean())
