"""Vision transformers of timm, torchvision and transformers, tiny and on `meta`: attention quantised, all verbs."""

import pytest
import torch
from tiny import images
from torch import nn

import ttaq
from ttaq.batches import logits_of

timm = pytest.importorskip("timm", reason="timm builds the models")
vision = pytest.importorskip("torchvision", reason="torchvision builds the models").models
SIZES = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 6}
WINDOWS = {"patch_size": 2, "window_size": 4, "depths": (1, 2), "num_heads": (1, 2), "embed_dim": 16, "num_classes": 6}


def of_timm(name, **options):
    return lambda: timm.create_model(name, **options or SIZES)


def tv_swin(version):
    from torchvision.models import swin_transformer as swin

    kinds = {} if version == 1 else {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return lambda: vision.SwinTransformer([2, 2], 16, [1, 2], [1, 2], [4, 4], num_classes=6, **kinds)


def hugging(kind, **options):
    def build():
        transformers = pytest.importorskip("transformers", reason="transformers builds the model")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
        config = getattr(transformers, f"{kind}Config")(patch_size=8, num_labels=6, **sizes, **options)
        return getattr(transformers, f"{kind}ForImageClassification")(config)

    return build


FAMILIES = {
    "vit": of_timm("vit_tiny_patch16_224"),
    "vit, normed queries": of_timm("vit_tiny_patch16_224", qk_norm=True, **SIZES),
    "deit": of_timm("deit_tiny_distilled_patch16_224"),
    "dinov2 with registers": of_timm("vit_giant_patch14_reg4_dinov2"),
    "dinov3": of_timm("vit_small_patch16_dinov3"),
    "eva": of_timm("eva_giant_patch14_224"),
    "eva02": of_timm("eva02_tiny_patch14_224"),
    "siglip": of_timm("vit_base_patch16_siglip_224"),
    "swin": of_timm("swin_tiny_patch4_window7_224", img_size=32, **WINDOWS),
    "swin v2": of_timm("swinv2_tiny_window8_256", img_size=32, **WINDOWS),
    "cait": of_timm("cait_xxs24_224"),
    "torchvision vit": lambda: vision.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=6),
    "torchvision swin": tv_swin(1),
    "torchvision swin v2": tv_swin(2),
    "transformers vit": hugging("ViT", intermediate_size=64),
    "transformers dinov2": hugging("Dinov2"),
    "transformers dinov2 with registers": hugging("Dinov2WithRegisters", use_swiglu_ffn=True),
}
PRODUCTS = {name: 6 if "swin" in name or name == "siglip" else 4 for name in FAMILIES}


def built(name):
    """Build a tiny model whose layers all matter."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape) * p[0].numel() ** -0.5)
            elif "norm" not in key and "logit_scale" not in key:
                p.add_(torch.randn(p.shape) * 0.3)
    return model


def prepared(name, recipe="w4a8"):
    model = built(name)
    if name == "cait":
        with pytest.warns(UserWarning, match="TalkingHeadAttn multiplies by itself"):
            return model, ttaq.prepare(model, recipe).eval()
    return model, ttaq.prepare(model, recipe).eval()


@torch.no_grad()
def run(model, x):
    return logits_of(model(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_opened_attention_is_the_float_models(name):
    model, twin = prepared(name)
    x = images(side=32)
    products = {n: m for n, m in twin.named_modules() if isinstance(m, ttaq.QuantMatMul)}
    assert len(products) == PRODUCTS[name]
    assert {n for n, row in twin.ttaq_report["layers"].items() if row["kind"] == "MatMul"} == set(products)
    wanted, calls = run(model, x), set()
    torch.testing.assert_close(run(twin, x), wanted, rtol=1e-5, atol=1e-5)
    for key, product in products.items():  # who looks at the products sees them
        product.register_forward_hook(lambda *_, key=key: calls.add(key))
    torch.testing.assert_close(run(twin, x), wanted, rtol=1e-5, atol=1e-5)
    assert calls == set(products)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_verbs(name, tmp_path):
    model, twin = prepared(name)
    x, other = images(side=32), images(5, 32, seed=2)
    report = ttaq.calibrate(twin, [x])
    assert report["calibration"]["unseen"] == []
    packed = ttaq.pack(twin)
    wanted = run(twin, other)
    assert torch.equal(run(packed, other), wanted)
    assert torch.equal(run(packed, other[:1]), run(twin, other[:1]))
    assert 0 < (wanted - run(model, other)).norm() < 0.5 * wanted.norm()
    with torch.device("meta"):
        architecture = FAMILIES[name]()
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "m.safetensors"), architecture)
    assert torch.equal(run(loaded, other), wanted)
    assert not any(isinstance(m, ttaq.QuantMatMul) for m in architecture.modules())
    adapter = ttaq.adapt(loaded, "tent", lr=1e-2, forward=lambda net, x: logits_of(net(x)))
    assert torch.equal(adapter(other), wanted)
    again = adapter(other)
    assert torch.isfinite(again).all()
    assert not torch.equal(again, wanted)


@pytest.mark.parametrize("name", ["vit", "swin", "torchvision vit", "torchvision swin v2"])
def test_products_of_few_bits_are_felt(name):
    model, x = built(name), images(side=32)
    errors = []
    for overrides in ({}, {"*.scores": "w8a2", "*.mix": "w8a2"}):
        twin = ttaq.prepare(model, ttaq.Recipe.parse("w8a8", overrides=overrides)).eval()
        ttaq.calibrate(twin, [x])
        errors.append((run(twin, x) - run(model, x)).norm())
    assert errors[1] > 1.5 * errors[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_those_of_the_float_model(name):
    model, twin = prepared(name)
    blocks = ttaq.find_blocks(model, images(2, 32))
    assert len(blocks) >= 4
    assert [b.name for b in ttaq.find_blocks(twin, images(2, 32))] == [b.name for b in blocks]


@pytest.mark.filterwarnings("ignore:prepare")
@pytest.mark.parametrize("name", ["vit", "swin", "cait", "torchvision vit", "torchvision swin"])
def test_blocks_are_learned(name):
    x = images(side=32)
    settings = {"steps": 2, "batch_size": 3, "progress": False}  # pieces of another size than the batches
    quantised = ttaq.quantize(built(name), [x[:4], x[4:]], "w4a8", method="pem", **settings)
    assert torch.equal(run(ttaq.pack(quantised), x), run(quantised, x))


@pytest.mark.parametrize("name", ["vit", "swin", "torchvision vit"])
def test_gradients_reach_the_input_through_packed_attention(name):
    _, twin = prepared(name, "w8a8")
    ttaq.calibrate(twin, [images(side=32)])
    x = images(2, 32).requires_grad_()
    logits_of(ttaq.pack(twin)(x)).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["eva02", "torchvision vit", "torchvision swin"])
def test_packed_attention_is_one_graph(name):
    _, twin = prepared(name)
    ttaq.calibrate(twin, [images(side=32)])
    packed, x = ttaq.pack(twin), images(2, 32, seed=2)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, x), run(packed, x))


def test_eager_attention_of_transformers_is_opened_too():
    model = built("transformers vit")
    model.set_attn_implementation("eager")
    twin = ttaq.prepare(model, "w4a8").eval()
    ttaq.calibrate(twin, [images(side=32)])
    assert twin.ttaq_report["calibration"]["unseen"] == []
    assert model.config._attn_implementation == "eager"


LARGE = {
    "vit-l": (lambda: timm.create_model("vit_large_patch16_224"), 24),
    "vit-h": (lambda: timm.create_model("vit_huge_patch14_224"), 32),
    "vit-g": (lambda: timm.create_model("vit_giant_patch14_reg4_dinov2"), 40),
    "eva02-l": (lambda: timm.create_model("eva02_large_patch14_448"), 24),
    "swin-l": (lambda: timm.create_model("swin_large_patch4_window7_224"), 24),
    "torchvision vit-h": (lambda: vision.vit_h_14(), 32),
    "torchvision swin-b": (lambda: vision.swin_v2_b(), 24),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_ones_are_prepared_without_weights(name):
    build, depth = LARGE[name]
    with torch.device("meta"):
        model = build()
    report = ttaq.prepare(model, "w4a8", inplace=True).ttaq_report
    assert sum(row["kind"] == "MatMul" for row in report["layers"].values()) == 2 * depth
    assert all(p.is_meta for p in model.parameters() if isinstance(p, nn.Parameter) and p.numel() > 1 << 20)
    linear = sum(isinstance(m, ttaq.QuantLinear | ttaq.QuantConv2d) for m in model.modules())
    assert linear == len(report["layers"]) - 2 * depth
