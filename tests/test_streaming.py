"""A model whose weights stay in a file ends with the bits of one that is held, in less memory than the float one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import input_of, resnet, timm_vit, vit

import ttaq
from ttaq.models import ResNet, ViT

pytestmark = pytest.mark.filterwarnings("ignore:.* images are few")
QUICK = {"steps": 6, "batch_size": 4, "rounding_lr": 0.05}
BUILD = {"vit": vit, "resnet": resnet, "timm_vit": timm_vit}


def on_meta(name):
    with torch.device("meta"):
        if name == "vit":
            return ViT(size=16, patch=4, width=16, depth=2, heads=2, classes=6)
        return ResNet(depth=8, classes=6, width=4) if name == "resnet" else BUILD[name]().to("meta")


def written(name, path):
    save_file(BUILD[name]().state_dict(), path)
    return path


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", ["qdrop", "gptq", "rtn"])
@pytest.mark.parametrize("name", list(BUILD))
def test_the_bits_are_those_of_the_ordinary_road(name, method, tmp_path):
    options = {"method": method, "progress": False} | (QUICK if method == "qdrop" else {})
    inputs = [input_of(name, 12), input_of(name, 5, seed=3)]
    wanted = ttaq.pack(ttaq.quantize(BUILD[name](), inputs, "w3a4", safety="off", **options))
    architecture, path = on_meta(name), written(name, tmp_path / "w.safetensors")
    found = ttaq.quantize(architecture, inputs, "w3a4", weights=path, **options)
    assert same(found, wanted)
    with torch.no_grad():
        assert torch.equal(found(inputs[1]), wanted(inputs[1]))
    assert all(p.is_meta for p in architecture.parameters())
    assert not any(t.is_meta for t in [*found.parameters(), *found.buffers()])
    for key in ("layers", "left_out", "packed", "method", "fingerprint", "sqnr"):
        assert found.ttaq_report.get(key) == wanted.ttaq_report.get(key)
    loaded = ttaq.load(ttaq.save(found, tmp_path / "m.safetensors"), architecture)
    assert same(loaded, wanted)


def test_the_statistics_of_norms_and_resuming(tmp_path):
    inputs, path = [input_of("resnet", 12)], written("resnet", tmp_path / "w.safetensors")
    options = QUICK | {"method": "qdrop", "statistics": "batch", "progress": False}
    wanted = ttaq.pack(ttaq.quantize(resnet(), inputs, "w4a4", **options))
    for _ in range(2):  # the second finds all blocks done
        found = ttaq.quantize(
            on_meta("resnet"), inputs, "w4a4", weights=path, resume=tmp_path / "state.safetensors", **options
        )
        assert same(found, wanted)
    state = load_file(path)
    save_file(state | {"linear.bias": state["linear.bias"] + 1e-3, "conv1.weight": -state["conv1.weight"]}, path)
    with pytest.raises(ValueError, match=r"belongs to a model of other weights"):
        ttaq.quantize(on_meta("resnet"), inputs, "w4a4", weights=path, resume=tmp_path / "state.safetensors", **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "ttaq"}, r"^quantize: weights= reads one block at a time, .* got 'ttaq'; build the model"),
        ({"recipe": "w5a8"}, r"^quantize: weights of 5 bits are not packed, .* choose 2, 3, 4 or 8$"),
        ({"model": vit}, r'^quantize: weights= wants the architecture alone; build it under torch.device\("meta"\)$'),
        ({"weights": "nowhere.safetensors"}, r"^weights: there is no file nowhere.safetensors; give a local"),
        (
            {"state": lambda s: {k: v for k, v in s.items() if k != "norm.bias"}},
            r"^weights: .* holds no norm.bias;",
        ),
        (
            {"state": lambda s: s | {"head.weight": torch.ones(3, 3)}},
            r"^weights: head.weight in .* has shape \(3, 3\),",
        ),
    ],
)
def test_what_does_not_serve_is_refused_in_one_sentence(change, said, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(change.get("state", dict)(vit().state_dict()), path)
    model = change.get("model", lambda: on_meta("vit"))()
    with pytest.raises(ValueError, match=said):
        ttaq.quantize(
            model, [input_of("vit")], change.get("recipe", "w4a4"), method=change.get("method", "rtn"),
            weights=change.get("weights", path), progress=False,
        )  # fmt: skip


PEAK = """
import json, sys
import torch
torch.set_num_threads(1)
import ttaq
from ttaq.models import ViT

def bytes_at(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))

x, settings = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), SETTINGS
ttaq.quantize(ViT(size=16, width=16, depth=1), [x], "w4a4", progress=False, **settings)  # what libraries take
with torch.device("meta"):
    model = ViT(size=16, width=WIDTH, depth=DEPTH)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = bytes_at("VmRSS")
ttaq.quantize(model, [x], "w4a4", weights=PATH, progress=False, **settings)
print(json.dumps([bytes_at("VmHWM") - before, sum(4 * p.numel() for p in model.parameters())]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.slow
def test_the_peak_is_below_the_float_model(tmp_path):
    path, (width, depth) = tmp_path / "w.safetensors", (384, 36)
    save_file(ViT(size=16, width=width, depth=depth).state_dict(), path)
    settings = {"method": "qdrop", "steps": 1, "batch_size": 4}
    code = PEAK.replace("SETTINGS", repr(settings)).replace("WIDTH", str(width)).replace("DEPTH", str(depth))
    code = code.replace("PATH", repr(str(path)))
    alone = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # coverage takes memory
    done = subprocess.run([sys.executable, "-W", "ignore", "-P", "-c", code], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    peak, held = json.loads(done.stdout)
    print(f"peak {peak / 2**20:.0f} MiB, float model {held / 2**20:.0f} MiB")
    assert peak < 0.8 * held
