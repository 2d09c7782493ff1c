"""Quantise and evaluate a user's model, named by reference, on a user's images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .adaptation import METHODS, adapt, options_of
from .checkpoint import load, read_header, save
from .distributed import Team
from .doctor import describe_machine
from .evaluation import Result, evaluate
from .packing import pack
from .pipeline import quantize
from .report import Results
from .sources import make_stream, open_data, preprocessing_of
from .spec import Recipe
from .streams import Images
from .zoo import build_model

ANCHORED = ", ".join(name for name, method in METHODS.items() if "anchor" in options_of(method))
_ANCHOR = 512  # images that stand for the source
_KNOWN = ("timm:", "torchvision:", "ttaq.")  # what a checkpoint may name: building it runs no code but these packages'


def quantize_reference(
    reference: str,
    data: str | Path,
    out: str | Path,
    *,
    bits: str = "w4a4",
    method: str = "ttaq",
    weights: str | Path | None = None,
    num_classes: int | None = None,
    images: int = 1024,
    steps: int | None = None,
    batch_size: int = 64,
    size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: list[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    budget: str | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    team: Team | None = None,
) -> dict:
    """Build a model by reference, quantise it on images of a folder, and write a packed checkpoint.

    Args:
        reference: "timm:NAME", "torchvision:NAME" or "package.module:function".
        data: Clean images: class folders or an .npz file.
        out: The checkpoint.
        bits: Such as "w4a4".
        method: One of `pipeline.METHODS`.
        weights: Local file of a state_dict; None for random weights.
        num_classes: Handed to the builder; None for its own.
        images: To calibrate on, drawn by the seed; all there are, if fewer.
        steps: Of reconstruction, for each block.
        batch_size: Images at once.
        size: Side of the images; None for what the model's own configuration says.
        mean: Of each channel, alike.
        std: Of each channel, alike.
        classes: Class folders in the order of the logits.
        seed: Of the choice of images and of reconstruction.
        device: Where to work.
        budget: Time to quantise in, such as "5min"; None for as long as the steps take.
        resume: File that is written after each block, from which a killed run goes on.
        progress: Show a bar.
        team: As in `pipeline.quantize`; the first process writes.

    Returns:
        The packed model's report, with "float_bytes" and, in the process that writes, "file_bytes".

    Raises:
        ValueError: A name, a file, the images or the recipe do not serve; nothing is written then.
    """
    Recipe.parse(bits)
    check_device(device)
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = build_model(reference, weights, **options)
    chosen = preprocessing_of(model, reference, size=size, mean=mean, std=std)
    source = open_data(data, chosen, classes)
    if not isinstance(source, Images):
        raise ValueError(f"quantize: {data} holds corrupted images; give clean ones, class folders or an .npz file")
    picked = source.take(np.random.default_rng(seed).permutation(len(source))[:images])
    batches = [x.to(device) for x, _ in picked.batches(batch_size)]
    outputs = check_outputs(model, batches[0][:1].cpu(), source, data, named=classes is not None)
    settings = {"seed": seed} | ({} if steps is None else {"steps": steps}) if method not in ("rtn", "gptq") else {}
    settings |= {name: value for name, value in (("budget", budget), ("resume", resume)) if value is not None}
    model = model.to(device)
    if team:
        team.follow(model.state_dict().values())  # without a file each process has random weights of its own
    learned = quantize(model, batches, bits, method=method, progress=progress, team=team, **settings)
    packed = pack(learned).cpu()
    packed.ttaq_report["options"] = options
    names = list(source.classes) if len(source.classes) == outputs else None
    float_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if team and not team.leads:
        return packed.ttaq_report | {"float_bytes": float_bytes}
    save(packed, out, reference=reference, preprocessing=chosen, classes=names)
    return packed.ttaq_report | {"float_bytes": float_bytes, "file_bytes": Path(out).stat().st_size}


def evaluate_file(
    path: str | Path,
    data: str | Path,
    *,
    adapter: str = "source",
    stream: str = "corruptions",
    severity: int = 5,
    images: int | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    anchor: str | Path | None = None,
    reference: str | None = None,
    classes: list[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    track: Callable[[str, int], Callable[[int], object]] | None = None,
) -> Results:
    """Load a packed checkpoint and measure it, adapting or not, on clean or corrupted images.

    Args:
        path: The checkpoint.
        data: Class folders, an .npz file, or the published CIFAR-C or ImageNet-C.
        adapter: A name in `adaptation.METHODS`.
        stream: "clean", "corruptions" (all there are), a name in `streams.STREAMS`, or names of corruptions with
            commas between.
        severity: 1 to 5.
        images: A domain; None for 1,000, or all there are if fewer.
        batch_size: Images that the adapter sees at once.
        lr: Of an adapter that has one; None for its own.
        anchor: Clean images of the source for an adapter that takes an anchor, class folders or an .npz file, of which
            the seed draws 512, or all there are if fewer; None where there are none.
        reference: Builds the architecture, in place of what the checkpoint names.
        classes: Class folders in the order of the logits, in place of the checkpoint's.
        seed: Of the choice and order of images and of the corruptions.
        device: Where to work.
        track: Called with a name and the number of images, returns what is called with each batch's number.

    Returns:
        Results of one row.

    Raises:
        ValueError: The checkpoint or the images do not serve, or the adapter needs an anchor.
    """
    model, header, reference, chosen = open_checkpoint(path, reference, device)
    classes = classes or header["classes"]
    source = open_data(data, chosen, classes)
    batches = make_stream(source, data, stream, severity=severity, images=images, batch_size=batch_size, seed=seed)
    first = next(iter(batches))
    check_outputs(model, first.images[:1].to(device), batches.domains[0][1], data, named=classes is not None)
    held = anchor_of(adapter, model, anchor, chosen | {"size": first.images.shape[-1]}, seed, device)
    adapted = adapt(model, adapter, **({} if lr is None else {"lr": lr}), **held)
    total = sum(len(index) for _, index in batches.order)
    result = evaluate(
        adapted,
        batches,
        forward=lambda own, x: own(x.to(device)),
        progress=track(f"{reference}, {adapter}", total) if track else None,
    )
    settings = {
        "data": str(data), "stream": stream, "severity": severity, "images": max(result.images.values()),
        "batch_size": batch_size, "seed": seed, "device": device,
    }  # fmt: skip
    settings |= {} if anchor is None else {"anchor": str(anchor)}
    results = Results(f"{Path(path).name} on {Path(data).name}", settings, describe_machine())
    results.notes.append(_describe(adapter, result))
    results.add(
        result,
        model=reference,
        bits=str(Recipe.from_json(header["report"]["recipe"])).partition(",")[0],
        method=header["report"]["method"],
        form="packed",
        adapter=adapter,
        clean_error=result.mean_error if stream == "clean" else None,
        bytes=Path(path).stat().st_size,
    )
    return results


def open_checkpoint(
    path: str | Path, reference: str | None = None, device: str = "cpu"
) -> tuple[nn.Module, dict, str, dict]:
    """Load a packed checkpoint into the architecture that it names.

    Args:
        path: The checkpoint.
        reference: Builds the architecture, in place of what the checkpoint names.
        device: Where the model goes.

    Returns:
        The model, the header, the reference, and how images are prepared, as `preprocessing_of` says it.

    Raises:
        ValueError: It is no checkpoint, names no architecture or one that is not trusted, or there is no such device.
    """
    check_device(device)
    header = read_header(path)
    reference = trusted_reference(path, header["reference"], reference)
    width = header["report"].get("options", {}).get("num_classes")
    with torch.device("meta"):
        architecture = build_model(reference, **({} if width is None else {"num_classes": int(width)}))
    model = load(path, architecture, device=device)
    return model, header, reference, header["preprocessing"] or preprocessing_of(model, reference)


def anchor_of(adapter: str, model: nn.Module, path, preprocessing: dict, seed: int, device: str) -> dict:
    """Return the anchor as an option of an adapter, none where none is given; refuse one too many or too few."""
    method = METHODS.get(adapter)
    if path is None:
        if method and method.needs_anchor(model):
            raise ValueError(
                f"evaluate: {adapter} needs clean images of the source for this model; pass --anchor PATH, class "
                "folders or an .npz file"
            )
        return {}
    if method and "anchor" not in options_of(method):
        raise ValueError(f"evaluate: {adapter} takes no anchor; leave out --anchor, which serves {ANCHORED}")
    source = open_data(path, preprocessing)
    if not isinstance(source, Images):
        raise ValueError(f"evaluate: {path} holds corrupted images; give clean ones, class folders or an .npz file")
    picked = source.take(np.random.default_rng(seed).permutation(len(source))[:_ANCHOR])
    return {"anchor": [x.to(device) for x, _ in picked.batches(64)]}


def _describe(adapter: str, result: Result) -> str:
    """Say what an evaluation found besides errors."""
    sure = "" if result.ece is None else f"calibration error {result.ece:.1f} %, "
    return f"{adapter}: {sure}{result.forwards:.2f} forward and {result.backwards:.2f} backward passes an image"


def trusted_reference(path: str | Path, written: str | None, given: str | None) -> str:
    """Choose what builds the architecture; a file alone never decides which code of the user's runs.

    Raises:
        ValueError: The checkpoint names none, or one outside timm, torchvision and ttaq, and none was given.
    """
    if given:
        return given
    if written is None:
        raise ValueError(f"evaluate: {path} does not name its architecture; pass --model, such as timm:NAME")
    if not written.startswith(_KNOWN):
        raise ValueError(f"evaluate: {path} names the code {written!r}; pass --model {written} to run it")
    return written


def check_outputs(model: nn.Module, x: torch.Tensor, images: Images, data, *, named: bool) -> int:
    """Try the model on one image, and refuse classes that do not go with its logits.

    Args:
        model: What is to be quantised or evaluated.
        x: (1, 3, H, W), on its device.
        images: Clean or of one domain.
        data: Where they come from, for messages.
        named: Whether somebody said which class belongs to which logit.

    Returns:
        How many logits there are.

    Raises:
        ValueError: The model cannot run on the image, gives no logits, or has other classes.
    """
    try:
        with torch.no_grad():
            logits = model(x)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        wide, tall = x.shape[3], x.shape[2]
        raise ValueError(f"data: the model cannot run on {wide}x{tall} images ({reason}); choose --size") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model: it must return logits (images, classes), got {got}; name a function that wraps it")
    outputs, count = logits.shape[1], len(images.classes)
    numbered = images.classes == tuple(str(number) for number in range(count))
    if count > outputs or (count != outputs and not named and not numbered):
        raise ValueError(
            f"data: {data} holds {count} classes, the model has {outputs} outputs; pass --classes FILE with one class "
            "folder's name a line, in the order of the outputs, or build the model with --num-classes"
        )
    return outputs


def check_device(device: str) -> None:
    """Refuse a device that is not there, in one sentence."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: {device!r} cannot be used here ({reason}); pass --device cpu") from error
