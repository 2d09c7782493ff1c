"""`python -m bench accuracy`: errors of quantised, packed and adapting models on streams of corrupted images.

Walks a grid and appends a row a cell; a second call goes on where the first one stopped. `--data` with
cifar10_train.npz, cifar10_test.npz and resnet20_cifar10.safetensors gives the CIFAR ResNet-20; `--model digits-resnet`
and `digits-vit` are the networks of the demo; any other `--model` is a reference such as timm:NAME, with `--weights`,
`--calibration` and `--data` (a labelled folder, CIFAR-C or ImageNet-C).
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from ttaq import demo, distributed, zoo
from ttaq.adaptation.losses import LOSSES
from ttaq.models import ResNet
from ttaq.pipeline import METHODS
from ttaq.sources import open_data, preprocessing_of
from ttaq.spec import Recipe
from ttaq.streams import Images, load_digits, load_npz
from ttaq.training import Training, fetch_trained

from . import machine, summary
from .grid import DESCENDING, FLOAT, OLD, STREAMS, Grid, Subject, statistics_of

FOLDER = machine.ROOT / "bench/results/accuracy"
AXES = {
    "bits": [FLOAT, "w2a2", "w2a4"],
    "methods": ["qdrop", "ttaq", "pcr", "pem", "rtn"],
    "adapters": ["source", "norm", "tent"],
    "losses": ["entropy"],
    "statistics": ["batch"],
    "streams": list(OLD),
    "seeds": [0, 1, 2],
}
KNOWN = {"methods": METHODS, "adapters": ["source", "norm", *DESCENDING], "losses": LOSSES, "streams": STREAMS}


def whole(text):
    """Read a whole number."""
    if not text.isdigit():
        raise ValueError(f"takes whole numbers, got {text!r}")
    return int(text)


READ = {"seeds": whole, "bits": Recipe.parse, "statistics": statistics_of}


def main(options: argparse.Namespace) -> int:
    """Measure the cells that are missing; or draw what has been measured."""
    path = Path(options.out or FOLDER / f"grid-{options.model.replace(':', '-')}.csv")
    if options.table or options.figure:
        return summary.show(path, options)
    if options.shards == 1:  # torchrun's processes share the models, too
        options.shard, options.shards = distributed.placed()
    if not 0 <= options.shard < options.shards:
        raise ValueError(f"bench accuracy: --shard must be 0 to {options.shards - 1}, got {options.shard}")
    subject, source = open_subject(options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and distributed.placed()[1] > 1:
        torch.cuda.set_device(torch.distributed.get_node_local_rank(0))
    Grid(subject, path, Path(options.cache), device, source).run(options)
    return 0


def open_subject(options):
    """Return the model with its images, and the source of its corruptions where it brings them."""
    if options.model == "resnet20":
        return _resnet20(options), None
    if options.model in ("digits-resnet", "digits-vit"):
        return _digits(options), None
    if not options.calibration or not options.data:
        raise ValueError("bench accuracy: --model NAME wants --calibration DIR and --data DIR")
    model, preprocessing = _user_model(options)
    calibration = open_data(options.calibration, preprocessing).take(slice(options.images))
    data = open_data(options.data, preprocessing)
    test, source = (data, None) if isinstance(data, Images) else (data.domain(data.corruptions[0], 5), data)
    architecture = lambda: zoo.build_model(options.model)  # noqa: E731
    return Subject(options.model.replace(":", "-"), model, calibration, test, architecture), source


def _resnet20(options):
    if options.data is None:
        raise ValueError("bench accuracy: --data wants the folder with the images and the weights")
    folder = Path(options.data)
    model = ResNet(20)
    model.load_state_dict(load_file(folder / "resnet20_cifar10.safetensors"), strict=False)
    train, test = (load_npz(folder / f"cifar10_{part}.npz") for part in ("train", "test"))
    return Subject("resnet20", model.eval(), train.take(slice(options.images)), test, lambda: ResNet(20))


def _digits(options):
    name = options.model.removeprefix("digits-")
    build = demo.NETWORKS[name]
    training = Training(epochs=demo.EPOCHS[name], lr=demo.RATES[name])
    model, _ = fetch_trained(build, load_digits("train"), training, options.cache, name)
    return Subject(
        options.model, model, load_digits("calibration").take(slice(options.images)), load_digits("test"), build
    )


def _user_model(options):
    model = zoo.build_model(options.model, options.weights)
    return model, preprocessing_of(model, options.model)


def add_command(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("accuracy", help="errors on streams of corrupted images, over a grid")
    parser.add_argument("--model", default="resnet20", help="resnet20, digits-resnet, digits-vit, or a reference")
    parser.add_argument("--data", help="folder of the ResNet-20, or the test images of a model of your own")
    parser.add_argument("--calibration", help="folder of unlabelled images for a model of your own")
    parser.add_argument("--weights", help="file of its weights")
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--steps", type=int, default=500, help="steps a block")
    parser.add_argument("--stream-images", type=int, default=1000, help="images a corruption")
    parser.add_argument("--batch-size", type=int, default=200, help="images a batch of a stream")
    parser.add_argument("--passes", type=int, default=1, help="walks through each stream of what takes a loss")
    parser.add_argument("--table-of", dest="table_of", default="cifar", help="table of corruptions: cifar or imagenet")
    for name, default in AXES.items():
        parser.add_argument(f"--{name}", type=_list(name), default=default, help=_help(name, default))
    parser.add_argument("--shard", type=int, default=0, help="which of --shards this process measures")
    parser.add_argument("--shards", type=int, default=1, help="processes that share the models of the grid")
    parser.add_argument("--threads", type=int, help="of torch, in this process")
    parser.add_argument("--cache", default=str(machine.ROOT / ".cache"), help="folder of packed models, made once each")
    parser.add_argument("--commit", help="of a tree that travels without its history")
    parser.add_argument(
        "--out", help="rows are appended to this file; by default bench/results/accuracy/grid-MODEL.csv"
    )
    parser.add_argument("--table", action="store_true", help="print the rows of --out as Markdown and measure nothing")
    parser.add_argument("--figure", help="draw the rows of --out into this file and measure nothing")
    parser.set_defaults(command=main)


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Declare what chooses a model, quantises it and keeps it, for the commands that measure how it adapts."""
    parser.add_argument(
        "--model", default="resnet20", help="as for `bench accuracy`, and so data, calibration, weights"
    )
    for name in ("data", "calibration", "weights", "commit", "out"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--steps", type=int, default=500, help="steps a block")
    parser.add_argument("--method", default="ttaq", help="how models are quantised")
    parser.add_argument("--cache", default=str(machine.ROOT / ".cache"), help="folder of packed models")
    parser.add_argument("--threads", type=int, default=0)


def _help(name, default):
    there = [str(value) for value in dict.fromkeys([*default, *KNOWN.get(name, ())])]
    return f"of {', '.join(there)}; default: {', '.join(map(str, default))}"


def _list(name):
    return list_of(KNOWN.get(name), READ.get(name, str), name == "seeds")


def list_of(known=None, read=str, made=False):
    """Return what reads an option with commas between its values.

    Args:
        known: The values there are; None for any.
        read: Called on each; a ValueError refuses it.
        made: Whether what `read` returns is given on, and not the text.
    """

    def read_all(text):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if known and (odd := sorted(set(parts) - set(known))):
            raise argparse.ArgumentTypeError(f"takes {', '.join(known)}, got {', '.join(odd)}")
        try:
            values = [read(part) for part in parts]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if not parts:
            raise argparse.ArgumentTypeError("wants at least one")
        return values if made else parts

    return read_all
