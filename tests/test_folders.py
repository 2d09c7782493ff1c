"""Folders: a packed model comes back from what its own file names, and other code only runs when it is asked for."""

import json

import pytest
import torch
from tiny import calibrated, input_of, resnet

import ttaq
from ttaq.models import ResNet


def small_resnet():
    """Build the network of `tiny.resnet`, for references."""
    return ResNet(depth=8, classes=6, width=4)


def test_a_folder_holds_weights_and_a_description(tmp_path):
    packed = ttaq.pack(calibrated("resnet", "w4a4"))
    place = ttaq.save_pretrained(
        packed, tmp_path / "a" / "b", reference="test_folders:small_resnet", preprocessing={"size": 16},
        classes=list("äbcdef"),
    )  # fmt: skip
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    assert config["reference"] == "test_folders:small_resnet"
    assert (config["preprocessing"], config["classes"]) == ({"size": 16}, list("äbcdef"))
    assert config["version"] == ttaq.__version__
    assert ttaq.Recipe.from_json(config["recipe"]) == ttaq.Recipe.parse("w4a4")
    x = input_of("resnet", seed=2)
    for architecture in (resnet(), "test_folders:small_resnet"):
        with torch.no_grad():
            assert torch.equal(ttaq.from_pretrained(place, architecture)(x), packed(x))


def test_a_reference_to_a_library_is_enough(tmp_path):
    pytest.importorskip("torchvision")
    model = ttaq.zoo.build_model("torchvision:squeezenet1_1")
    model = ttaq.prepare(model, "w4a8")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ttaq.calibrate(model, [x])
    packed = ttaq.pack(model)
    place = ttaq.save_pretrained(packed, tmp_path, reference="torchvision:squeezenet1_1")
    with torch.no_grad():
        assert torch.equal(ttaq.from_pretrained(place)(x), packed(x))


def test_a_file_alone_runs_no_code_of_others(tmp_path):
    packed = ttaq.pack(calibrated("resnet", "w4a4"))
    ttaq.save_pretrained(packed, tmp_path, reference="test_folders:small_resnet")
    with pytest.raises(ValueError, match="pass architecture='test_folders:small_resnet'"):
        ttaq.from_pretrained(tmp_path)
    ttaq.save_pretrained(packed, tmp_path)
    with pytest.raises(ValueError, match="names no architecture; pass the float model as architecture="):
        ttaq.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        ttaq.from_pretrained(tmp_path / "nowhere")
