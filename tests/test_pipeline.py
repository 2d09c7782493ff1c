"""Every verb, one after the other, on a small CNN and a small ViT; and quantize, the first three in one."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import assert_unchanged, calibrated, images, input_of, resnet, snapshot, vit
from torch import nn

import ttaq
from ttaq.models import ResNet, ViT
from ttaq.packed_layers import PackedConv2d, PackedLinear

BUILD = {
    "resnet": (resnet, lambda: ResNet(depth=8, classes=6, width=4)),
    "vit": (vit, lambda: ViT(size=16, patch=4, width=16, depth=2, heads=2, classes=6)),
}
QUICK = {"steps": 8, "batch_size": 4, "rounding_lr": 0.05, "progress": False}


def stream(count=4):
    labels = torch.arange(8) % 6
    return [
        SimpleNamespace(images=images(seed=10 + i) + i, labels=labels, domain=f"shift {i // 2}", first=i % 2 == 0)
        for i in range(count)
    ]


@pytest.mark.parametrize("name", list(BUILD))
def test_the_whole_road(name, tmp_path):
    build, empty = BUILD[name]
    model, x = build(), input_of(name, seed=2)
    before = snapshot(model)
    prepared = ttaq.prepare(model, "w4a4")
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))
    ttaq.calibrate(prepared, [input_of(name)])
    ttaq.reconstruct(prepared, [input_of(name)], **QUICK)
    packed = ttaq.pack(prepared)
    path = ttaq.save(packed, tmp_path / "model.safetensors")
    with torch.device("meta"):
        architecture = empty()
    loaded = ttaq.load(path, architecture)
    with torch.no_grad():
        wanted = prepared(x)
        assert torch.equal(packed(x), wanted)
        assert torch.equal(loaded(x), wanted)
    assert_unchanged(model, before)
    for method in ("source", "norm", "tent") if name == "resnet" else ("source", "tent"):
        results = []
        for form in (prepared, packed, loaded):
            state = {k: v.clone() for k, v in form.state_dict().items()}
            adapter = ttaq.adapt(form, method)
            logits = [adapter(batch.images) for batch in stream()]
            adapter.reset()
            assert torch.equal(adapter(stream()[0].images), logits[0])
            results.append(torch.stack(logits))
            assert all(torch.equal(v, form.state_dict()[k]) for k, v in state.items())
            assert adapter.skipped == 0
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[1], results[2])
        if method != "source":
            with torch.no_grad():
                assert not torch.equal(results[0][-1], packed(stream()[-1].images))


@pytest.mark.parametrize("name", list(BUILD))
def test_evaluation_of_every_form(name):
    model = BUILD[name][0]()
    quantised = ttaq.quantize(model, [input_of(name)], "w8a8", method="rtn")
    results = [ttaq.evaluate(net, stream()) for net in (model, quantised, ttaq.pack(quantised))]
    assert results[1].errors == results[2].errors
    assert list(results[0].errors) == ["shift 0", "shift 1"]


def test_qdrop_is_the_first_three_verbs():
    model, x = resnet().train(), input_of("resnet", seed=2)
    before = snapshot(model)
    quantised = ttaq.quantize(model, [input_of("resnet")], "w3a4", method="qdrop", **QUICK)
    assert_unchanged(model, before)
    assert not quantised.training
    assert quantised.ttaq_report["method"] == "qdrop"
    assert quantised.ttaq_report["schedule"]["steps"] == 8
    by_hand = calibrated("resnet", "w3a4")
    ttaq.reconstruct(by_hand, [input_of("resnet")], **QUICK)
    assert torch.equal(quantised(x), by_hand(x))
    nearest = ttaq.quantize(resnet(), [input_of("resnet")], "w3a4", method="rtn")
    assert torch.equal(nearest(x), calibrated("resnet", "w3a4")(x))
    assert "blocks" not in nearest.ttaq_report


def test_the_report_can_be_written_as_json():
    quantised = ttaq.quantize(vit(), [input_of("vit")], ttaq.Recipe.parse("w4a4", exclude="head"), **QUICK)
    report = json.loads(json.dumps(ttaq.pack(quantised).ttaq_report))
    keys = {
        "recipe",
        "fingerprint",
        "layers",
        "left_out",
        "calibration",
        "blocks",
        "schedule",
        "sqnr",
        "pem",
        "pcr",
        "refinement",
        "method",
        "safety",
        "packed",
    }
    assert set(report) == keys
    assert "packed" not in quantised.ttaq_report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awq"}, "^quantize: method must be one of ttaq, pem, pcr, qdrop, gptq, rtn, got 'awq'"),
        ({"method": "rtn", "steps": 3}, "^quantize: rounding to nearest takes no steps; use method='ttaq'"),
        ({"recipe": "w9a9"}, "^recipe 'w9a9': bits must be 2 to 8"),
        ({"step": 3}, "^reconstruct: there is no option step; there are steps, batch_size"),
        ({"batches": []}, "^quantize: the calibration set is empty"),
        ({"batches": [images() * torch.nan]}, "^quantize: batch 0 holds NaN"),
        ({"model": nn.Sequential(nn.ReLU())}, "^prepare: Sequential has no nn.Linear or nn.Conv2d"),
    ],
    ids=["method", "rtn", "recipe", "option", "empty", "nan", "model"],
)
def test_what_quantize_refuses(options, message):
    given = {"model": resnet(), "batches": [images()]} | options
    before = snapshot(given["model"])
    with pytest.raises(ValueError, match=message):
        ttaq.quantize(**given)
    assert_unchanged(given["model"], before)


def test_batches_that_can_be_read_only_once():
    one = ttaq.quantize(resnet(), (x for x in [images(), images(seed=4)]), "w4a4", **QUICK)
    other = ttaq.quantize(resnet(), [images(), images(seed=4)], "w4a4", **QUICK)
    assert torch.equal(one(images(seed=2)), other(images(seed=2)))


@pytest.mark.parametrize("learn", [False, True])
def test_layers_alone_make_a_model_that_packs_saves_and_loads(learn, tmp_path):
    def build():
        return nn.Sequential(ttaq.QuantConv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), ttaq.QuantLinear(4 * 14 * 14, 5))

    model, x = build().eval(), images()
    if learn:
        ttaq.calibrate(model, [x])
        ttaq.reconstruct(model, [x], **QUICK)
    with torch.no_grad():
        wanted = model(x)
    packed = ttaq.pack(model)
    assert isinstance(packed[0], PackedConv2d)
    assert isinstance(packed[3], PackedLinear)
    assert torch.equal(packed(x), wanted)
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "m.safetensors"), build())
    assert torch.equal(loaded(x), wanted)


@pytest.mark.slow
def test_a_hugging_face_vit(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **sizes)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    batches = [{"pixel_values": images(), "labels": torch.zeros(8, dtype=torch.long)}]
    quantised = ttaq.quantize(model, batches, "w4a8", **QUICK)
    assert len(quantised.ttaq_report["blocks"]) >= 3
    packed = ttaq.pack(quantised)
    with torch.device("meta"):
        architecture = transformers.ViTForImageClassification(config)
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "m.safetensors"), architecture)
    x = images(seed=2)
    with torch.no_grad():
        wanted = quantised(pixel_values=x).logits
        assert torch.equal(packed(pixel_values=x).logits, wanted)
        assert torch.equal(loaded(pixel_values=x).logits, wanted)
    adapter = ttaq.adapt(loaded, "tent", forward=lambda net, x: net(pixel_values=x).logits)
    assert torch.equal(adapter(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["adaround", "ste"])
@pytest.mark.parametrize("name", list(BUILD))
def test_half_precision_models(name, rounding, dtype):
    model, x = BUILD[name][0]().to(dtype), input_of(name).to(dtype)
    settings = QUICK | {"rounding": rounding, "rounding_lr": 0.01, "method": "qdrop"}
    quantised = ttaq.quantize(model, [x], "w4a8", **settings)
    packed = ttaq.pack(quantised)
    with torch.no_grad():
        y, wanted = packed(x), model(x)
    assert y.dtype == dtype
    assert torch.equal(y, quantised(x))
    assert (y - wanted).float().square().mean() < 0.2 * wanted.float().var()
    assert torch.isfinite(ttaq.adapt(packed, "tent")(x)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BUILD))
def test_the_road_on_a_gpu(name, tmp_path):
    model, x = BUILD[name][0]().cuda(), input_of(name, seed=2).cuda()
    quantised = ttaq.quantize(model, [input_of(name)], "w4a4", **QUICK)
    packed = ttaq.pack(quantised)
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "m.safetensors"), BUILD[name][1](), device="cuda")
    with torch.no_grad():
        wanted = quantised(x)
        assert torch.equal(packed(x), wanted)
        assert torch.equal(loaded(x), wanted)
    assert all(t.is_cuda for t in [*loaded.parameters(), *loaded.buffers()])
    assert torch.isfinite(ttaq.adapt(loaded, "tent")(x)).all()


def test_in_place_verbs_give_the_same_as_copies():
    x, batches = input_of("resnet", seed=2), [input_of("resnet")]
    model = resnet()
    assert ttaq.prepare(model, "w4a4", inplace=True) is model
    ttaq.calibrate(model, batches)
    assert ttaq.pack(model, inplace=True) is model
    assert torch.equal(model(x), ttaq.pack(calibrated("resnet", "w4a4"))(x))
