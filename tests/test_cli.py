"""The command line: quantise, evaluate and report end to end at a tiny size, and bad input in one sentence."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_datasets import noise, write_cifar_c, write_images
from torch import nn
from typer.testing import CliRunner

import ttaq
from ttaq import cli
from ttaq.adaptation import METHODS
from ttaq.checkpoint import read_header
from ttaq.models import ResNet, ViT
from ttaq.report import KEYS
from ttaq.sources import make_stream
from ttaq.streams import CORRUPTIONS, STREAMS

runner = CliRunner()


def tiny():
    """Build the network that these tests name as "test_cli:tiny"."""
    return ResNet(depth=8, classes=3, width=4)


def tiny_vit():
    """Build a network without BatchNorm."""
    return ViT(size=32, patch=16, width=16, depth=1, heads=2, classes=3)


class Bare(nn.Module):
    """A model with nothing to quantise."""

    def forward(self, x):
        return x.mean((2, 3))


def invoke(*args):
    return runner.invoke(cli.app, [str(arg) for arg in args], catch_exceptions=False)


def refused(*args):
    """Run what must be refused; give its sentence."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    sentence = result.stderr.strip()
    assert sentence.startswith("ttaq: ")
    assert "\n" not in sentence
    assert "Traceback" not in result.output
    return sentence


def write_inputs(root):
    """Write clean.npz, 24 images of three classes, and weights.safetensors for `tiny`."""
    np.savez(root / "clean.npz", images=noise(24, seed=5), labels=np.arange(24) % 3)
    torch.manual_seed(0)
    save_file(tiny().state_dict(), root / "weights.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder of data sets and a quantised checkpoint."""
    root = tmp_path_factory.mktemp("cli")
    write_inputs(root)
    result = quantize(root, root / "model.safetensors")
    assert result.exit_code == 0, result.output
    return root


def quantize(root, out, *extra):
    args = ["--data", root / "clean.npz", "--weights", root / "weights.safetensors", "--out", out, "--images", 16]
    return invoke("quantize", "test_cli:tiny", *args, *(extra or ("--steps", 2, "--mean", "0.5,0.5,0.4")))


def test_quantize_writes_a_checkpoint_that_says_how_it_was_made(folder):
    header = read_header(folder / "model.safetensors")
    assert header["reference"] == "test_cli:tiny"
    assert header["preprocessing"]["mean"] == [0.5, 0.5, 0.4]
    assert header["classes"] == ["0", "1", "2"]
    assert header["report"]["schedule"]["steps"] == header["report"]["refinement"]["steps"] == 1  # half of 2 each
    assert header["report"]["calibration"]["images"] == 16


def test_quantize_prints_size_and_layers(folder, tmp_path):
    result = quantize(folder, tmp_path / "rtn.safetensors", "--method", "rtn", "--bits", "w2a4")
    size = (tmp_path / "rtn.safetensors").stat().st_size
    assert result.exit_code == 0
    assert f"{size:,} bytes" in result.stdout
    assert "test_cli:tiny at w2a4 (rtn): 8 layers packed, calibrated on 16 images" in result.stdout


@pytest.mark.parametrize("adapter", ["source", "norm", "tent"])
def test_evaluate_agrees_with_the_library(folder, tmp_path, adapter):
    args = ["--model", "test_cli:tiny", "--data", folder / "clean.npz", "--stream", "fog,contrast", "--images", 20]
    args += ["--batch-size", 10, "--adapter", adapter, "--json", tmp_path / "out.json"]
    result = invoke("evaluate", folder / "model.safetensors", *args)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    written = json.loads((tmp_path / "out.json").read_text())
    (row,), (errors,) = written["rows"], written["errors"]
    assert tuple(row) == KEYS
    assert (row["bits"], row["method"], row["form"], row["adapter"]) == ("w4a4", "ttaq", "packed", adapter)
    model = ttaq.load(folder / "model.safetensors", tiny())
    images = ttaq.streams.load_npz(folder / "clean.npz", mean=(0.5, 0.5, 0.4))
    stream = ttaq.continual(images, corruptions=("fog", "contrast"), images=20, batch_size=10)
    wanted = ttaq.evaluate(ttaq.adapt(model, adapter), stream)
    assert errors == {name: round(error, 3) for name, error in wanted.errors.items()}
    assert f"fog{errors['fog']:>23.1f} %" in result.stdout


def test_evaluate_takes_every_order_and_writes_csv(folder, tmp_path):
    args = ["--model", "test_cli:tiny", "--data", folder / "clean.npz", "--stream", "mixed", "--images", 4]
    args += ["--adapter", "tent", "--seed", 2, "--csv", tmp_path / "out.csv"]
    result = invoke("evaluate", folder / "model.safetensors", *args)
    assert result.exit_code == 0, result.output
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*KEYS, "domain", "error")
    model = ttaq.load(folder / "model.safetensors", tiny())
    images = ttaq.streams.load_npz(folder / "clean.npz", mean=(0.5, 0.5, 0.4))
    wanted = ttaq.evaluate(ttaq.adapt(model, "tent"), ttaq.mixed(images, images=4, batch_size=64, seed=2))
    assert {row["domain"]: float(row["error"]) for row in rows} == {k: round(v, 3) for k, v in wanted.errors.items()}
    note = (
        f"• tent: expected calibration error (ECE) {wanted.ece:.1f} %, 1.00 forward and 1.00 backward passes an image"
    )
    assert note in " ".join(result.stdout.split())


ANCHORED = ("eata", "zeroth-order", "align")


@pytest.mark.parametrize("adapter", METHODS)
def test_evaluate_serves_every_method(folder, tmp_path, adapter):
    args = ["--model", "test_cli:tiny", "--data", folder / "clean.npz", "--stream", "fog", "--images", 12]
    args += ["--batch-size", 6, "--adapter", adapter, "--json", tmp_path / "out.json", "--seed", 3]
    anchor = ["--anchor", folder / "clean.npz"] if adapter in ANCHORED else []
    result = invoke("evaluate", folder / "model.safetensors", *args, *anchor)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    images = ttaq.streams.load_npz(folder / "clean.npz", mean=(0.5, 0.5, 0.4))
    order = np.random.default_rng(3).permutation(24)
    options = {"anchor": [x for x, _ in images.take(order).batches(64)]} if anchor else {}
    model = ttaq.load(folder / "model.safetensors", tiny())
    stream = ttaq.continual(images, corruptions=("fog",), images=12, batch_size=6, seed=3)
    wanted = ttaq.evaluate(ttaq.adapt(model, adapter, **options), stream)
    assert written["errors"][0] == {"fog": round(wanted.errors["fog"], 3)}
    assert written["settings"].get("anchor") == (str(folder / "clean.npz") if anchor else None)


def test_an_anchor_is_asked_for_where_it_is_needed_and_nowhere_else(folder, tmp_path):
    path, ask = folder / "model.safetensors", ["--data", folder / "clean.npz", "--model", "test_cli:tiny"]
    ask += ["--stream", "fog", "--images", 4, "--adapter"]
    for adapter in ("eata", "align"):
        sentence = refused("evaluate", path, *ask, adapter)
        assert f"{adapter} needs clean images of the source for this model; pass --anchor PATH" in sentence
    assert invoke("evaluate", path, *ask, "zeroth-order").exit_code == 0
    sentence = refused("evaluate", path, *ask, "tent", "--anchor", folder / "clean.npz")
    assert "tent takes no anchor; leave out --anchor, which serves eata, zeroth-order, align" in sentence
    assert "no folder or .npz file nowhere" in refused("evaluate", path, *ask, "eata", "--anchor", "nowhere")
    write_cifar_c(tmp_path, count=6)
    assert "holds corrupted images; give clean ones" in refused("evaluate", path, *ask, "eata", "--anchor", tmp_path)
    out = tmp_path / "vit.safetensors"
    made = ["--data", folder / "clean.npz", "--out", out, "--method", "rtn"]
    assert invoke("quantize", "test_cli:tiny_vit", *made).exit_code == 0
    ask[3] = "test_cli:tiny_vit"
    assert "zeroth-order needs clean images" in refused("evaluate", out, *ask, "zeroth-order")
    write_images(tmp_path / "other", ("owl",), 3, (40, 40))  # of any classes: their labels are not looked at
    for anchor in (folder / "clean.npz", tmp_path / "other"):
        assert invoke("evaluate", out, *ask, "zeroth-order", "--anchor", anchor).exit_code == 0


def test_the_help_names_every_method_and_who_takes_an_anchor():
    text = " ".join(invoke("evaluate", "--help").stdout.replace("│", " ").split())
    assert ", ".join(METHODS) in text
    assert ", ".join(ANCHORED) in text


@pytest.mark.parametrize("name", STREAMS)
def test_every_order_can_be_asked_for(folder, name):
    images = ttaq.streams.load_npz(folder / "clean.npz").take(slice(3))
    asked = {"severity": 1, "images": None, "batch_size": 2, "seed": 0}
    stream = make_stream(images, "clean.npz", name, **asked)
    assert {domain for domain, _ in stream.domains} == set(CORRUPTIONS)


def test_evaluate_clean_images_in_an_order_without_classes_in_sequence(folder, tmp_path):
    args = ["--model", "test_cli:tiny", "--data", folder / "clean.npz", "--stream", "clean"]
    result = invoke("evaluate", folder / "model.safetensors", *args, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["clean_error"] == row["mean_error"]


def test_evaluate_reads_the_published_layout(folder, tmp_path):
    write_cifar_c(tmp_path, count=6)
    labels = np.load(tmp_path / "labels.npy")
    np.save(tmp_path / "labels.npy", labels % 3)
    args = ["--model", "test_cli:tiny", "--data", tmp_path, "--batch-size", 6, "--severity", 3]
    result = invoke("evaluate", folder / "model.safetensors", *args)
    assert result.exit_code == 0, result.output
    sentence = refused("evaluate", folder / "model.safetensors", *args, "--stream", "clean")
    assert "holds no clean images; pass --stream corruptions" in sentence
    assert "give clean ones" in refused("quantize", "test_cli:tiny", "--data", tmp_path, "--out", tmp_path / "x")


def test_class_folders_follow_the_checkpoint_and_must_fit_it(folder, tmp_path):
    write_images(tmp_path / "three", ("ant", "bee", "cat"), 4, (40, 40))
    write_images(tmp_path / "two", ("ant", "cat"), 3, (40, 40))
    out = tmp_path / "named.safetensors"
    args = ["--steps", 1, "--size", 32, "--batch-size", 4]
    data = ["--data", tmp_path / "three", "--weights", folder / "weights.safetensors"]
    result = invoke("quantize", "test_cli:tiny", *data, "--out", out, *args[:4])
    assert result.exit_code == 0, result.output
    assert read_header(out)["classes"] == ["ant", "bee", "cat"]
    ask = ["--model", "test_cli:tiny", "--data", tmp_path / "two", "--stream", "clean"]
    assert invoke("evaluate", out, *ask).exit_code == 0
    sentence = refused("quantize", "test_cli:tiny", "--data", tmp_path / "two", "--out", tmp_path / "x", "--size", 32)
    assert "holds 2 classes, the model has 3 outputs; pass --classes FILE" in sentence
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    result = invoke("quantize", "test_cli:tiny", "--data", tmp_path / "two", "--out", tmp_path / "x.safetensors",
                    "--classes", tmp_path / "names.txt", *args[:4])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "weights are random" in result.stderr


def test_a_timm_model_brings_its_own_preprocessing(tmp_path):
    timm = pytest.importorskip("timm")
    config = timm.create_model("test_resnet").default_cfg
    write_images(tmp_path / "data", ("0", "1"), 2, (70, 70))
    out = tmp_path / "timm.safetensors"
    args = ["--data", tmp_path / "data", "--out", out, "--num-classes", 2, "--size", 64, "--method", "rtn"]
    result = invoke("quantize", "timm:test_resnet", *args)
    assert result.exit_code == 0, result.output
    wanted = {"size": 64, "crop": config["crop_pct"], "interpolation": config["interpolation"]}
    wanted |= {"mean": list(config["mean"]), "std": list(config["std"])}
    assert read_header(out)["preprocessing"] == wanted
    result = invoke("evaluate", out, "--data", tmp_path / "data", "--stream", "clean")
    assert result.exit_code == 0, result.output
    assert "timm:test_resnet" in result.stdout


def test_report_renders_the_page_again(folder, tmp_path):
    pytest.importorskip("matplotlib")
    ask = ["--model", "test_cli:tiny", "--data", folder / "clean.npz", "--stream", "fog", "--images", 6]
    for adapter in ("source", "norm"):
        out = tmp_path / f"{adapter}.json"
        invoke("evaluate", folder / "model.safetensors", *ask, "--adapter", adapter, "--json", out)
    result = invoke("report", tmp_path / "source.json", tmp_path / "norm.json", "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert '<th class="n" scope="col">source</th><th class="n" scope="col">norm</th>' in page


def test_report_takes_checkpoints_and_streams_and_writes_figures(folder, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"image": "a", "label": 1, "confidence": 0.5}, {"image": "b", "error": "no image"}]
    (tmp_path / "said.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    out, figures = tmp_path / "page.html", tmp_path / "figures"
    files = [folder / "model.safetensors", tmp_path / "said.jsonl"]
    result = invoke("report", *files, "--out", out, "--figures", figures)
    assert result.exit_code == 0, result.output
    assert "said.jsonl: 1 images predicted, 1 refused." in result.stdout
    assert f"{out.stat().st_size:,} bytes" in result.stdout
    assert "layer3.0.conv2" in out.read_text()
    assert sorted(path.name for path in figures.iterdir()) == [
        f"{name}.{kind}" for name in ("layers", "reconstruction") for kind in ("png", "svg")
    ]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["quantize", "resnet50", "--data", "."], 'wanted "timm:NAME"'),
        (["quantize", "torchvision:nothing", "--data", "."], "torchvision has no 'nothing'"),
        (["quantize", "no_such_package:build", "--data", "."], "cannot import 'no_such_package'"),
        (["quantize", "test_cli:tiny", "--data", "nowhere"], "no folder or .npz file nowhere; wanted <class>/<image>"),
        (["quantize", "test_cli:tiny", "--data", ".", "--bits", "w1a4"], "bits must be 2 to 8"),
        (["quantize", "test_cli:tiny", "--data", ".", "--mean", "1,2"], "--mean: wanted three numbers"),
        (["quantize", "test_cli:tiny", "--data", ".", "--weights", "none.pth"], "there is no file none.pth"),
        (["evaluate", "none.safetensors", "--data", "."], "there is no file none.safetensors"),
        (["report", "none.json"], "cannot read none.json"),
        (["report", "none.jsonl"], "cannot read none.jsonl"),
        (["report", "none.safetensors"], "there is no file none.safetensors"),
    ],
)
def test_bad_input_is_one_sentence(args, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(*args)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_about_the_checkpoint_and_its_data(folder, tmp_path):
    path, ask = folder / "model.safetensors", ["--data", folder / "clean.npz"]
    assert "pass --model test_cli:tiny to run it" in refused("evaluate", path, *ask)
    ask += ["--model", "test_cli:tiny"]
    assert "name must be one of gaussian_noise" in refused("evaluate", path, *ask, "--stream", "rain")
    assert "method must be one of source, norm, tent" in refused("evaluate", path, *ask, "--adapter", "luck")
    assert "source does not know lr" in refused("evaluate", path, *ask, "--lr", "0.1")
    assert "device: 'warp' cannot be used here" in refused("evaluate", path, *ask, "--device", "warp")
    assert "images must be 1 to 24" in refused("evaluate", path, *ask, "--images", 25)
    assert "another architecture" in refused("evaluate", path, "--data", folder, "--model", "ttaq.models:ViT")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    assert "truncated" in refused("evaluate", tmp_path / "cut.safetensors", *ask)
    np.savez(tmp_path / "many.npz", images=noise(8, seed=5), labels=np.arange(8))
    assert "holds 8 classes" in refused("evaluate", path, "--data", tmp_path / "many.npz", *ask[2:])
    sized = quantize(folder, tmp_path / "sized.safetensors", "--size", 16)
    assert sized.exit_code == 2
    assert "are 32x32, the model takes 16; pass --size 32" in sized.stderr


def test_a_model_with_nothing_to_quantise_is_refused_and_nothing_written(folder, tmp_path):
    args = ["--data", folder / "clean.npz", "--out", tmp_path / "out.safetensors"]
    assert "no nn.Linear or nn.Conv2d" in refused("quantize", "test_cli:Bare", *args)
    assert list(tmp_path.iterdir()) == []


class Picky(nn.Module):
    """A model for images of one size, and one that returns something else than logits."""

    def __init__(self, wrapped=False):
        super().__init__()
        self.head, self.wrapped = nn.Linear(3 * 64, 3), wrapped

    def forward(self, x):
        y = self.head(x[:, :, :8, :8].flatten(1) if self.wrapped else x.flatten(1))
        return {"logits": y} if self.wrapped else y


def wrapped():
    """Build the one that returns a dict."""
    return Picky(wrapped=True)


def test_a_model_that_cannot_serve_the_images_is_refused_before_any_work(folder, tmp_path):
    args = ["--data", folder / "clean.npz", "--out", tmp_path / "out.safetensors"]
    assert "the model cannot run on 32x32 images (" in refused("quantize", "test_cli:Picky", *args)
    assert "it must return logits (images, classes), got dict" in refused("quantize", "test_cli:wrapped", *args)


def test_broken_images_are_named(tmp_path):
    write_images(tmp_path / "data", ("ant", "bee", "cat"), 2, (40, 40))
    next((tmp_path / "data/bee").iterdir()).write_bytes(b"no picture")
    sentence = refused("quantize", "test_cli:tiny", "--data", tmp_path / "data", "--out", tmp_path / "x.safetensors")
    assert "must be an image that Pillow can read" in sentence


def test_doctor_and_version():
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "packed_conv2d_backward" in result.stdout
    assert invoke("--version").stdout.strip() == f"ttaq {ttaq.__version__}"
    assert invoke("no_such_command").exit_code == 2


def test_demo_hands_its_options_on(monkeypatch, tmp_path):
    from ttaq.demo import Settings

    asked = {}

    def run(out, settings, console):
        asked.update(out=out, settings=settings, console=console)
        raise ValueError("demo: enough")

    monkeypatch.setattr(cli.making, "run_demo", run)
    args = ["--out", tmp_path, "--images", 30, "--steps", 5, "--seed", 4, "--epochs", 2, "--quiet"]
    assert refused("demo", *args) == "ttaq: demo: enough"
    assert asked == {"out": tmp_path, "settings": Settings(images=30, steps=5, seed=4, epochs=2), "console": None}


def test_python_m_ttaq_finds_functions_where_the_user_stands(tmp_path):
    """The process as a user starts it: no traceback, one sentence, exit code 2."""
    (tmp_path / "mine.py").write_text("def build():\n    return 3\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "ttaq", "quantize", "mine:build", "--data", "."]
    environment = {**os.environ, "PYTHONPATH": str(Path(ttaq.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.strip() == "ttaq: model: mine:build gives a int; name a function that returns a nn.Module"
