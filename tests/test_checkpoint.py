import hashlib
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import BUILDERS, Tied, assert_unchanged, calibrated, images, input_of, resnet, settle, snapshot
from torch import nn

import ttaq
from ttaq import PackedLinear, Recipe, checkpoint
from ttaq.layers import QuantMatMul
from ttaq.models import ResNet, ViT

ON_META = {
    "resnet": lambda: ResNet(depth=8, classes=6, width=4),
    "vit": lambda: ViT(size=16, patch=4, width=16, depth=2, heads=2, classes=6),
}


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.fixture(scope="module")
def packed():
    return ttaq.pack(calibrated("resnet", "w4a4"))


@pytest.fixture
def saved(packed, tmp_path):
    return ttaq.save(packed, tmp_path / "model.safetensors", reference="here:resnet", classes=list("abcdef"))


@pytest.mark.parametrize("name", list(ON_META))
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("w4a4", {}),
        ("w3a8", {"token": True}),
        ("w2a4", {"overrides": {"*conv2": "w8a16", "*mlp.0": "w3a3"}, "exclude": ("*conv1", "*proj")}),
        ("w4a16", {"first_last": None}),
        ("w8a8", {"overrides": {"*2*": "w16a8"}}),
    ],
)
def test_a_loaded_model_gives_the_same_bits(name, recipe, options, tmp_path):
    packed = ttaq.pack(calibrated(name, recipe, **options))
    path = ttaq.save(packed, tmp_path / "model.safetensors")
    loaded = ttaq.load(path, on_meta(ON_META[name]))
    x = input_of(name, seed=2)
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert not loaded.training
    mine, theirs = loaded.state_dict(), packed.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k].nan_to_num(7e7), theirs[k].nan_to_num(7e7)) for k in mine)
    assert json.dumps(loaded.ttaq_report, sort_keys=True) == json.dumps(packed.ttaq_report, sort_keys=True)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tied_modules_and_buffers_out_of_state_dict(device, tmp_path):
    model = ttaq.prepare(settle(Tied(), torch.randn(8, 12)), "w4a8")
    ttaq.calibrate(model, [torch.randn(8, 12)])
    packed = ttaq.pack(model)
    with torch.no_grad():
        packed.offsets.add_(0.5)
    path = ttaq.save(packed, tmp_path / "tied.safetensors")
    with torch.device(device):
        fresh = Tied()
    before = snapshot(fresh) if device == "cpu" else None
    loaded = ttaq.load(path, fresh)
    x = torch.randn(5, 12)
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
    assert loaded.first is loaded.inner["again"]
    assert isinstance(loaded.first, PackedLinear)
    assert type(fresh.first) is nn.Linear
    if before:
        assert_unchanged(fresh, before)


@pytest.mark.slow
def test_swin_with_its_index_buffers(tmp_path):
    timm = pytest.importorskip("timm")
    config = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (1, 2), "num_heads": (1, 2)}
    build = lambda: timm.models.swin_transformer.SwinTransformer(embed_dim=16, num_classes=5, **config)  # noqa: E731
    model = settle(build(), images(side=32))
    packed = ttaq.pack(ttaq.quantize(model, [images(side=32)], "w4a8", method="rtn"))
    unsaved = set(dict(packed.named_buffers())) - set(packed.state_dict())
    assert any("relative_position_index" in name for name in unsaved)
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "swin.safetensors"), on_meta(build))
    x = images(3, 32, seed=2)
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))


def test_the_file_holds_packed_codes_and_a_header(saved, packed):
    tensors = load_file(saved)
    assert tensors["layer2.0.conv1.words"].dtype == torch.uint8
    assert tensors["layer2.0.conv1.words"].shape == (8, 4 * 9 // 2)
    assert not [n for n, t in tensors.items() if t.is_floating_point() and t.ndim > 1]
    assert not [n for n in tensors if n.endswith("nonfinite")]
    header = checkpoint.read_header(saved)
    assert header["format"] == 2
    assert header["reference"] == "here:resnet"
    assert header["classes"] == list("abcdef")
    assert Recipe.from_json(header["report"]["recipe"]) == Recipe.parse("w4a4")


def test_the_order_of_overrides_survives(tmp_path):
    overrides = {"z*": "w8a8", "layer2*": "w4a4", "*": "w3a8"}
    packed = ttaq.pack(calibrated("resnet", "w4a4", overrides=overrides))
    path = ttaq.save(packed, tmp_path / "model.safetensors")
    recipe = Recipe.from_json(checkpoint.read_header(path)["report"]["recipe"])
    assert list(recipe.overrides) == list(overrides)
    assert recipe.specs("layer2.0.conv1")[0].bits == 3


def assert_same_file(one, other):
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    assert all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine)
    with safe_open(one, framework="pt") as a, safe_open(other, framework="pt") as b:
        assert a.metadata() == b.metadata()


def test_saving_twice_gives_the_same_contents(saved, packed, tmp_path):
    again = ttaq.save(packed, tmp_path / "again.safetensors", reference="here:resnet", classes=list("abcdef"))
    assert_same_file(again, saved)


def test_a_loaded_model_can_be_saved_again(saved, tmp_path):
    loaded = ttaq.load(saved, on_meta(ON_META["resnet"]))
    again = ttaq.save(loaded, tmp_path / "again.safetensors", reference="here:resnet", classes=list("abcdef"))
    assert_same_file(again, saved)


def test_parameters_that_share_memory_are_saved_apart(tmp_path):
    model = resnet()
    model.bn1.weight.data = model.bn1.bias.data
    packed = ttaq.pack(ttaq.quantize(model, [images()], "w8a8", method="rtn"))
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "m.safetensors"), on_meta(ON_META["resnet"]))
    assert torch.equal(loaded(images()), packed(images()))


def test_a_product_that_calibration_never_saw_stays_in_float(tmp_path):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.product = nn.Linear(4, 4), ttaq.MatMul()

        def forward(self, x, multiply=False):
            x = self.fc(x)
            return self.product(x, x.T) if multiply else x

    model = ttaq.prepare(Aside(), "w8a8")
    ttaq.calibrate(model, [torch.randn(6, 4)])
    packed = ttaq.pack(model)
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "m.safetensors"), on_meta(Aside))
    assert isinstance(loaded.product, QuantMatMul)
    x = torch.randn(3, 4)
    assert torch.isfinite(packed(x, multiply=True)).all()
    assert torch.equal(loaded(x, multiply=True), packed(x, multiply=True))


def test_no_float_weight_is_ever_held_while_loading(saved, monkeypatch):
    """Of what is read or allocated, nothing is as large as a float weight of the model would be."""
    largest = max(p.numel() for p in resnet().parameters())
    sizes = []
    real = checkpoint._assign
    monkeypatch.setattr(
        checkpoint, "_assign", lambda m, t, p: sizes.extend(x.nbytes for x in t.values()) or real(m, t, p)
    )
    loaded = ttaq.load(saved, on_meta(ON_META["resnet"]))
    held = [t.nbytes for t in [*loaded.parameters(), *loaded.buffers()]]
    assert max(sizes + held) <= math.ceil(largest / 2) < 4 * largest


def test_the_digest_is_of_names_types_shapes_and_bytes():
    one = {"a": torch.arange(6, dtype=torch.int32)}
    digests = {
        checkpoint._digest("h", one),
        checkpoint._digest("g", one),
        checkpoint._digest("h", {"b": one["a"]}),
        checkpoint._digest("h", {"a": one["a"].reshape(2, 3)}),
        checkpoint._digest("h", {"a": one["a"].view(torch.float32)}),
        checkpoint._digest("h", {"a": one["a"] + 1}),
    }
    assert len(digests) == 6
    assert all(len(d) == len(hashlib.sha256().hexdigest()) for d in digests)


def test_half_precision_rests_come_back(tmp_path):
    packed = ttaq.pack(calibrated("vit", "w4a4")).bfloat16()
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "m.safetensors"), on_meta(ON_META["vit"]))
    x = input_of("vit", seed=2).bfloat16()
    assert loaded.norm.weight.dtype == torch.bfloat16
    assert loaded.head.scale.dtype == torch.float32
    assert torch.equal(loaded(x), packed(x))


def test_every_builder_packs_and_returns(tmp_path):
    for name in ("variety", "timm_vit"):
        packed = ttaq.pack(calibrated(name, "w4a4"))
        loaded = ttaq.load(ttaq.save(packed, tmp_path / f"{name}.safetensors"), BUILDERS[name]())
        x = input_of(name, seed=2)
        with torch.no_grad():
            assert torch.equal(loaded(x), packed(x))


def test_equal_runs_give_equal_contents(tmp_path):
    paths = []
    for run in ("one", "other"):
        model = calibrated("resnet", "w4a4")
        ttaq.reconstruct(model, [images(4)], steps=1, progress=False)
        paths.append(ttaq.save(ttaq.pack(model), tmp_path / f"{run}.safetensors"))
    one, other = paths
    assert one.stat().st_size == other.stat().st_size
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        assert first.metadata() == second.metadata()  # the checksum over every tensor among them


def test_what_a_file_says_of_its_images_goes_on_with_what_was_loaded(tmp_path):
    """Through adaptation too: an adapted model saved again is evaluated on images prepared as before."""
    x = torch.randn(8, 3, 32, 32)
    model = ttaq.models.ResNet(depth=8, width=4)
    packed = ttaq.pack(ttaq.quantize(model, [x], "w4a4", method="rtn", progress=False))
    said = {"reference": "ttaq.models:ResNet", "preprocessing": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}}
    ttaq.save(packed, tmp_path / "one.safetensors", **said, classes=["a", "b"])
    with torch.device("meta"):
        architecture = ttaq.models.ResNet(depth=8, width=4)
    adapter = ttaq.adapt(ttaq.load(tmp_path / "one.safetensors", architecture), "tent")
    adapter(x)
    ttaq.save(adapter.export(), tmp_path / "two.safetensors", classes=["c", "d"])
    header = checkpoint.read_header(tmp_path / "two.safetensors")
    assert {name: header[name] for name in said} == said
    assert header["classes"] == ["c", "d"]


def test_equal_runs_give_equal_files(tmp_path):
    """However long blocks and the refinement took."""
    model = ttaq.quantize(ResNet(depth=8, width=4), [images(4)], "w4a4", steps=2, progress=False)
    packed = ttaq.pack(model)
    held = ttaq.save(packed, tmp_path / "one.safetensors")
    packed.ttaq_report["refinement"]["seconds"] = 1234.5678
    packed.ttaq_report["blocks"][0]["seconds"] = 1234.5678
    other = ttaq.save(packed, tmp_path / "two.safetensors")
    assert checkpoint.read_header(other) == checkpoint.read_header(held)
    assert other.stat().st_size == held.stat().st_size
    assert packed.ttaq_report["refinement"]["seconds"] == 1234.5678
