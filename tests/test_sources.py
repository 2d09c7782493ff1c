"""What models say of the preparation of their images."""

import types

import pytest
from torch import nn

from ttaq.sources import preprocessing_of
from ttaq.zoo import build_model

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vit_b_16", {"size": 224, "crop": 224 / 256, "interpolation": "bilinear"}),
        ("vit_h_14", {"size": 224, "crop": 1.0, "interpolation": "bicubic"}),  # its default weights are for 518 pixels
        ("swin_v2_t", {"size": 256, "crop": 256 / 260, "interpolation": "bicubic"}),
        ("resnet18", {"size": None, "crop": 224 / 256, "interpolation": "bilinear"}),
    ],
)
def test_torchvisions_weights_say_it(name, wanted):
    pytest.importorskip("torchvision")
    model = types.SimpleNamespace(**({"image_size": 224} if name.startswith("vit") else {}))
    found = preprocessing_of(model, f"torchvision:{name}")
    assert found == wanted | {"mean": MEAN, "std": STD}
    assert preprocessing_of(model, f"torchvision:{name}", size=96, std=(1, 2, 3)) == found | {
        "size": 96, "std": [1, 2, 3],
    }  # fmt: skip


def test_timms_configuration_says_it():
    timm = pytest.importorskip("timm")
    config = timm.create_model("test_vit").default_cfg
    found = preprocessing_of(build_model("timm:test_vit"), "timm:test_vit")
    assert (found["size"], found["crop"]) == (config["input_size"][-1], config["crop_pct"])
    assert (found["mean"], found["std"]) == (list(config["mean"]), list(config["std"]))


def test_an_image_processor_says_it():
    transformers = pytest.importorskip("transformers")
    model = nn.Module()
    model.config = transformers.ViTConfig(image_size=48)
    assert preprocessing_of(model, "some:model") == {
        "size": 48, "crop": 0.875, "interpolation": "bilinear", "mean": MEAN, "std": STD,
    }  # fmt: skip
    half = [0.5, 0.5, 0.5]
    plain = {"size": {"height": 224, "width": 224}, "resample": 2, "image_mean": half, "image_std": half}
    wanted = {"size": 224, "crop": 1.0, "interpolation": "bilinear", "mean": half, "std": half}
    assert preprocessing_of(model, "some:model", processor=plain) == wanted
    cut = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    processor = types.SimpleNamespace(to_dict=lambda: cut | {"resample": 3})
    wanted = {"size": 224, "crop": 224 / 256, "interpolation": "bicubic", "mean": MEAN, "std": STD}
    assert preprocessing_of(model, "some:model", processor=processor) == wanted
