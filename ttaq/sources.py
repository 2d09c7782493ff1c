"""A user's images: how they are prepared, where they lie, and the order in which they are met."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from .streams import (
    CORRUPTIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    STREAMS,
    CifarC,
    ImageNetC,
    Images,
    Stream,
    load_image_folder,
    load_npz,
)

_LAYOUTS = (
    "<class>/<image>.png folders, an .npz file of images and labels, "
    "<corruption>.npy files of CIFAR-C, or <corruption>/<severity>/<class>/ folders of ImageNet-C"
)


def preprocessing_of(
    model: nn.Module,
    reference: str,
    *,
    size=None,
    crop=None,
    mean=None,
    std=None,
    processor: Mapping | object | None = None,
) -> dict:
    """Say how images are prepared: as timm's configuration or torchvision's weights say, else as most models.

    Args:
        model: Built by `reference`.
        reference: Of the form that `build_model` takes.
        size: Goes before what the configuration says, as do crop, mean and std.
        crop: Share of the shorter side that is cut out.
        mean: Of each channel.
        std: Of each channel.
        processor: An image processor of transformers, or its `to_dict()`; goes before the model's own configuration.

    Returns:
        size, crop, interpolation, mean, std; size is None where nothing says it.
    """
    source, _, name = reference.partition(":")
    found = {
        "size": _side(getattr(getattr(model, "config", None), "image_size", None)), "crop": 0.875,
        "interpolation": "bilinear", "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
    }  # fmt: skip
    if processor is not None:
        found |= _processed(processor if isinstance(processor, Mapping) else processor.to_dict())
    elif source == "timm":
        found = _of_timm(model)
    elif source == "torchvision":
        found |= _of_torchvision(model, name)
    given = {"size": size, "crop": crop, "mean": mean, "std": std}
    found |= {name: value for name, value in given.items() if value}
    return found | {"mean": list(found["mean"]), "std": list(found["std"])}


def describe_preprocessing(chosen: Mapping) -> str:
    """Say in a few words how images are prepared; `chosen` as `preprocessing_of` gives it."""
    side = chosen["size"] and f"{chosen['size']}x{chosen['size']}"
    cut = f"crop {chosen['crop']:.3g} ({chosen['interpolation']})" if chosen.get("crop") else None
    moments = [f"{name} {'/'.join(f'{one:.3g}' for one in chosen[name])}" for name in ("mean", "std")]
    return ", ".join(filter(None, [side, cut, *moments]))


def _of_timm(model):
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    smooth = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    found = {"size": config["input_size"][-1], "crop": config["crop_pct"], "interpolation": smooth}
    return found | {"mean": config["mean"], "std": config["std"]}


def _of_torchvision(model, name):
    """Read the transforms of the default weights, or of those made for the model's own image size."""
    from torchvision import models

    wanted, weights = getattr(model, "image_size", None), models.get_model_weights(name)
    known = [w.transforms() for w in dict.fromkeys([weights.DEFAULT, *weights])]
    chosen = next((t for t in known if wanted in (None, t.crop_size[0])), known[0])
    side, smooth = wanted or chosen.crop_size[0], chosen.interpolation.value
    return {
        "size": None if wanted is None and side == 224 else side,  # small images may also enter a network that pools
        "crop": chosen.crop_size[0] / chosen.resize_size[0],
        "interpolation": "bilinear" if smooth == "bilinear" else "bicubic",
        "mean": chosen.mean,
        "std": chosen.std,
    }


def _processed(values):
    """Read an image processor's values; 2 is bilinear there, 3 bicubic."""
    whole, cropped = values.get("size"), values.get("crop_size") if values.get("do_center_crop") else None
    side = _side(cropped) or _side(whole)
    found = {"size": side, "crop": side / _side(whole) if side and _side(whole) else 1.0}
    found["interpolation"] = "bicubic" if values.get("resample") == 3 else "bilinear"
    named = {"mean": values.get("image_mean"), "std": values.get("image_std")}
    return found | {name: value for name, value in named.items() if value}


def _side(size):
    """Return the one side that a size has: a number, a pair, or {height, width} or {shortest_edge}."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    return size[0] if isinstance(size, (tuple, list)) and size else size


def open_data(path: str | Path, preprocessing: dict, classes: list[str] | None = None) -> Images | CifarC | ImageNetC:
    """Open images as they lie on disk, whichever of the layouts it is.

    Args:
        path: Class folders, an .npz file, CIFAR-C or ImageNet-C.
        preprocessing: As `preprocessing_of` gives it.
        classes: Class folders in the order of the logits; of an .npz file that has only numbers, their names.

    Returns:
        Clean `Images`, or what has domains.

    Raises:
        ValueError: Nothing is there, or it has another layout.
    """
    path = Path(path)
    moments = {"mean": preprocessing["mean"], "std": preprocessing["std"]}
    if path.is_file() and path.suffix == ".npz":
        found = load_npz(path, **moments)
        count = len(found.classes)
        if count <= len(classes or ()) and found.classes == tuple(map(str, range(count))):  # the file names none
            found = Images(found.images, found.labels, classes, **moments)
        return _sized(found, preprocessing["size"], path)
    if not path.is_dir():
        raise ValueError(f"data: there is no folder or .npz file {path}; wanted {_LAYOUTS}")
    if any((path / f"{name}.npy").is_file() for name in CORRUPTIONS):
        return CifarC(path, **moments)
    if any(folder.name in CORRUPTIONS for pattern in ("*", "*/*") for folder in path.glob(pattern) if folder.is_dir()):
        return ImageNetC(path, classes, **moments)
    crop, interpolation = preprocessing["crop"], preprocessing["interpolation"]
    return load_image_folder(
        path, preprocessing["size"] or 224, crop=crop, interpolation=interpolation, classes=classes, **moments
    )


def make_stream(source, data, stream: str, *, severity: int, images: int | None, batch_size: int, seed: int) -> Stream:
    """Put images in the order in which they are met: clean and shuffled, or under corruptions.

    Args:
        source: Clean `Images`, or what has corruptions of its own.
        data: Where it lies, for messages.
        stream: "clean", "corruptions" (all there are, one after another), a name in `STREAMS`, or names of corruptions
            with commas between.
        severity: 1 to 5.
        images: A domain; None for 1,000, or all there are if fewer.
        batch_size: Images at once.
        seed: Of the order and of the corruptions.

    Raises:
        ValueError: The data do not hold what the stream asks for.
    """
    if stream == "clean":
        if not isinstance(source, Images):
            raise ValueError(f"evaluate: {data} holds no clean images; pass --stream corruptions")
        count = min(len(source), images or 1000)
        order = np.random.default_rng(seed).permutation(len(source))[:count]
        return Stream([("clean", source)], [(0, order)], batch_size)
    there = CORRUPTIONS if isinstance(source, Images) else source.corruptions
    names = there if stream in ("corruptions", *STREAMS) else tuple(name.strip() for name in stream.split(","))
    if isinstance(source, Images):
        counts, table = [len(source)], "cifar" if source.pixels([0]).shape[1] < 100 else "imagenet"
    else:
        counts, table = [len(source.domain(name, severity)) for name in names], "cifar"
    return STREAMS.get(stream, STREAMS["continual"])(
        source, corruptions=names, severity=severity, images=images or min(1000, *counts), batch_size=batch_size,
        seed=seed, table=table, cache=stream == "recurring",
    )  # fmt: skip


def _sized(images, size, path):
    tall, wide = images.pixels([0]).shape[1:3]
    if size is not None and (tall, wide) != (size, size):
        raise ValueError(f"data: the images of {path} are {wide}x{tall}, the model takes {size}; pass --size {wide}")
    return images
