"""diagnose finds the layers that break, protect repairs them, and quantize does both where it is needed."""

import pytest
import torch
from outliers import tame, wild
from tiny import assert_unchanged, images, resnet, snapshot

import ttaq
from ttaq.models import ViT
from ttaq.pipeline import decisions
from ttaq.safety.diagnosis import bound

pytestmark = pytest.mark.filterwarnings("ignore:quantize. .* images are few")
BATCHES = list(images(96).split(32))


def error(model, like):
    """Return |z' - z| / |z| on images that were not calibrated on."""
    x = images(16, seed=7)
    with torch.no_grad():
        wanted = like(x)
        return ((model(x) - wanted).norm() / wanted.norm()).item()


def rounded(model, recipe="w8a8", safety="off"):
    return ttaq.quantize(model, BATCHES, recipe, method="rtn", safety=safety)


def test_outliers_break_eight_bits_and_every_measure_recovers_them():
    sound, model = tame(), wild(tame())
    assert error(model, sound) < 1e-5
    floor = error(rounded(sound), sound)
    assert error(rounded(model), sound) > 10 * floor
    for measure in ("reparameterisation", "migration", "rotation"):
        assert error(rounded(model, safety=measure), sound) < 1.5 * floor


def test_the_layers_recover_too():
    model = wild(tame())
    broken, mended = rounded(model), rounded(model, safety="migration")
    before, after = (ttaq.diagnose(m, BATCHES)["layers"]["layers.0.attention.qkv"] for m in (broken, mended))
    assert before["alone"] < bound(8) < 35 < after["alone"]
    assert before["ratio"] > 20 > after["ratio"]


def test_auto_takes_the_measure_that_reaches_the_values():
    model = wild(tame(), values=True)
    made = rounded(model, safety="auto")
    said = made.ttaq_report["safety"]
    assert "migration" in said["measures"]
    assert "layers.0.attention.proj" in said["broken"]
    assert said["after"] == {}
    assert said["errors"]["none"] > 5 * min(said["errors"].values())
    assert error(made, model) < error(rounded(model, safety="rotation"), model)
    assert any("safety: migration" in sentence and "breaks" in sentence for sentence in decisions(made.ttaq_report))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w3a3"])
def test_auto_leaves_a_sound_model_alone(recipe):
    model = tame()
    before = snapshot(model)
    made, plain = rounded(model, recipe, "auto"), rounded(model, recipe)
    assert made.ttaq_report["safety"] == {
        "asked": "auto", "measures": [], "broken": {}, "why": "no layer breaks of outlier channels",
    }  # fmt: skip
    assert decisions(made.ttaq_report) == []
    for key, value in plain.state_dict().items():
        assert torch.equal(made.state_dict()[key], value)
    assert_unchanged(model, before)


def test_a_network_without_layer_norm_is_not_looked_at():
    made = rounded(resnet(), safety="auto")
    assert made.ttaq_report["safety"] == {"asked": "auto", "measures": [], "why": "it has no LayerNorm"}


def test_a_protected_model_is_packed_loaded_into_its_architecture_and_adapts(tmp_path):
    model = wild(tame())
    made = ttaq.quantize(model, BATCHES, "w4a8", method="qdrop", steps=4, batch_size=4, progress=False)
    assert made.ttaq_report["safety"]["measures"]
    packed = ttaq.pack(made)
    path = ttaq.save(packed, tmp_path / "safe.safetensors")
    with torch.device("meta"):
        architecture = ViT(size=16, patch=4, width=32, depth=2, heads=2, classes=6)
    loaded = ttaq.load(path, architecture)
    x = images(8, seed=5)
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))
    assert loaded.ttaq_report["safety"]["measures"] == made.ttaq_report["safety"]["measures"]
    adapter = ttaq.adapt(loaded, "tent", lr=1e-2)
    first = adapter(x)
    assert not torch.equal(adapter(x), first)


def test_protect_returns_a_copy_whose_report_goes_on():
    model = wild(tame())
    before = snapshot(model)
    made = ttaq.protect(model, BATCHES, ["migration", "rotation"])
    assert_unchanged(model, before)
    assert error(made, model) < 1e-4
    said = ttaq.prepare(made, "w8a8").ttaq_report["safety"]
    assert said["measures"] == ["migration", "rotation"]
    assert "the residual stream" in said["done"]["rotation"]
    assert ttaq.protect(model, BATCHES, "off") is not model


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match=r"measures must be of .*migration.*got 'smooth'"):
        ttaq.protect(tame(), BATCHES, "smooth")
    with pytest.raises(ValueError, match="measures must be of"):
        rounded(tame(), safety=["auto"])
    with pytest.raises(ValueError, match="start from the float model"):
        ttaq.protect(rounded(tame()), BATCHES)
    with pytest.raises(ValueError, match="call ttaq"):
        ttaq.diagnose(ttaq.prepare(tame(), "w4a4"), BATCHES)


def test_diagnose_measures_layers_blocks_and_the_output():
    found = ttaq.diagnose(tame(), BATCHES, "w4a4")
    assert found["recipe"].startswith("w4a4")
    assert set(found["blocks"]) >= {"layers.0", "layers.1", "head"}
    assert 0 < found["output"] < 1
    row = found["layers"]["layers.1.attention.scores"]
    assert row["ratio"] is None
    assert row["bound"] == bound(4) == 9
    assert row["alone"] > row["prefix"]
    assert all(0.9 < block["cosine"] <= 1 for block in found["blocks"].values())
    assert found["broken"] == {}
