"""A checkpoint that is not whole, not ours or not as it was is refused in one sentence, and nothing is half done."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import assert_unchanged, calibrated, resnet, snapshot, vit
from torch import nn

import ttaq
from ttaq import checkpoint
from ttaq.models import ResNet


@pytest.fixture(scope="module")
def packed():
    return ttaq.pack(calibrated("resnet", "w4a4"))


@pytest.fixture
def saved(packed, tmp_path):
    return ttaq.save(packed, tmp_path / "model.safetensors", reference="here:resnet", classes=list("abcdef"))


def test_a_missing_file_or_folder(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(ValueError, match=r"^load: there is no file .*; give the path that ttaq.save wrote$"):
            ttaq.load(path, resnet())


def test_a_truncated_file(saved, tmp_path):
    data = saved.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^load: .*(truncated or no safetensors file).*fetch it again$"):
            ttaq.load(cut, resnet())


def test_a_foreign_file(tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.randn(3, 3)}, plain)
    with pytest.raises(ValueError, match=r"a safetensors file that ttaq.save did not write; give a ttaq checkpoint$"):
        ttaq.load(plain, resnet())
    text = tmp_path / "text.safetensors"
    text.write_text("not at all a checkpoint, but long enough to be one" * 10)
    pickled = tmp_path / "model.pth"
    torch.save({"weight": torch.randn(3, 3)}, pickled)
    for path in (text, pickled):
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            ttaq.load(path, resnet())


def rewrite(path, change_header=None, change_tensors=None, digest=False):
    """Write the file anew with another header or other tensors, and with the checksum made anew if asked."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, header = load_file(path), json.loads(metadata["ttaq"])
    if change_tensors:
        change_tensors(tensors)
    if change_header:
        header = change_header(header) or header
        metadata["ttaq"] = json.dumps(header)
    if digest:
        metadata["sha256"] = checkpoint._digest(metadata["ttaq"], tensors)
    save_file(tensors, path, metadata)


def test_one_changed_code(saved):
    def flip(tensors):
        tensors["layer2.0.conv1.words"][3, 5] ^= 1

    rewrite(saved, change_tensors=flip)
    with pytest.raises(ValueError, match=r"do not match their checksum; it was changed, fetch it again$"):
        ttaq.load(saved, resnet())


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["layers"].pop("conv1"),
        lambda h: h["layers"]["conv1"]["weight"].update(bits=2),
        lambda h: h["layers"].update(bogus=h["layers"]["conv1"]),
        lambda h: h.pop("fingerprint") and None,
        lambda h: h.update(classes=["x"]),
        lambda h: h["report"].update(recipe=None),
    ],
    ids=["less", "bits", "more", "fingerprint", "classes", "report"],
)
def test_an_edited_header(saved, change):
    rewrite(saved, change_header=lambda h: [change(h), h][1])
    with pytest.raises(ValueError, match=r"do not match their checksum"):
        ttaq.load(saved, resnet())


def test_another_format(saved):
    for found, remedy in ((3, "upgrade ttaq"), (1, "pack the model again")):
        rewrite(saved, change_header=lambda h, found=found: h.update(format=found), digest=True)
        with pytest.raises(ValueError, match=rf"has format {found}, this version reads 2; {remedy}$"):
            ttaq.load(saved, resnet())
    rewrite(saved, change_header=lambda h: [1, 2], digest=True)
    with pytest.raises(ValueError, match="has format None"):
        ttaq.load(saved, resnet())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bn1.weight"), r"differ in 1 tensors, bn1.weight among them"),
        (lambda t: t.update(more=torch.ones(2)), r"differ in 1 tensors, more among them"),
        (
            lambda t: t.update({"bn1.weight": torch.ones(9)}),
            r"bn1.weight in .* has shape \(9,\), the model wants \(4,\)",
        ),
    ],
    ids=["less", "more", "shape"],
)
def test_tensors_that_do_not_fit_the_header(saved, change, message):
    rewrite(saved, change_tensors=change, digest=True)
    with pytest.raises(ValueError, match=message):
        ttaq.load(saved, resnet())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Give the bytes of the smallest checkpoint, and a folder to write in."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    packed = ttaq.pack(ttaq.quantize(model, [torch.randn(8, 3)], "w2a8", method="rtn"))
    folder = tmp_path_factory.mktemp("small")
    return ttaq.save(packed, folder / "m.safetensors").read_bytes(), packed, folder


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_flipped_byte_passes(small, data):
    """Whatever byte is changed, the file is refused in a sentence, or gives the very same tensors."""
    content, packed, folder = small
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    path = folder / "changed.safetensors"
    path.write_bytes(changed)
    try:
        loaded = ttaq.load(path, nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    except ValueError as error:
        assert str(error).startswith("load: ")  # noqa: PT017
    else:
        mine, theirs = loaded.state_dict(), packed.state_dict()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_a_header_of_great_length_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        ttaq.load(path, resnet())


@pytest.mark.parametrize(
    "other",
    [
        lambda: ResNet(depth=14, classes=6, width=4),
        lambda: ResNet(depth=8, classes=7, width=4),
        vit,
        lambda: nn.Linear(3, 3),
    ],
)
def test_another_architecture(saved, other):
    model = other()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"made from another architecture than this \w+; build .* \(here:resnet\)$"):
        ttaq.load(saved, model)
    assert_unchanged(model, before)


def test_another_stride_is_another_architecture(saved):
    model = resnet()
    model.get_submodule("layer2.0.conv1").stride = (1, 1)
    with pytest.raises(ValueError, match="another architecture"):
        ttaq.load(saved, model)


@pytest.mark.parametrize("stage", ["float", "prepared", "calibrated"])
def test_only_packed_models_are_saved(stage, tmp_path):
    model = {
        "float": resnet,
        "prepared": lambda: ttaq.prepare(resnet()),
        "calibrated": lambda: calibrated("resnet", "w4a4"),
    }
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"^save: .*call ttaq.pack on the (quantised )?model first$"):
        ttaq.save(model[stage](), path)
    assert list(tmp_path.iterdir()) == []


def test_half_packed_models_are_refused(tmp_path):
    packed, quantised = ttaq.pack(calibrated("resnet", "w4a4")), calibrated("resnet", "w4a4")
    packed.linear = quantised.linear
    with pytest.raises(ValueError, match=r"^save: layer linear still holds its float weight"):
        ttaq.save(packed, tmp_path / "m.safetensors")


def test_headers_take_plain_values(packed, tmp_path):
    with pytest.raises(ValueError, match=r"^save: the header takes plain values only"):
        ttaq.save(packed, tmp_path / "m.safetensors", preprocessing={"mean": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_what_was_there(saved, packed, monkeypatch, failure):
    old = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise failure

    monkeypatch.setattr(checkpoint, "save_file", fail)
    before = snapshot(packed)
    with pytest.raises(type(failure)):
        ttaq.save(packed, saved)
    assert saved.read_bytes() == old
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert_unchanged(packed, before)
