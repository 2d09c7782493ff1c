import pytest
import torch
from nets import Net, check, conv, head, images, names
from torch import nn

from ttaq.blocks import block_input, find_blocks, run_block

timm = pytest.importorskip("timm", reason="timm builds the models")
vision = pytest.importorskip("torchvision", reason="torchvision builds the models").models
transformers = pytest.importorskip("transformers", reason="transformers builds the models")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_vit(name="vit_tiny_patch16_224", **options):
    return timm.create_model(name, img_size=32, depth=2, **options)


def hf_vit(kind, **options):
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=7,
    )
    return kind(config, **options)


RESNET18 = ["conv1..relu", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2)), "fc"]
VIT = ["patch_embed", "blocks.0", "blocks.1", "head"]
SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}

ZOO = {
    "resnet18": (vision.resnet18, 64, RESNET18),
    "timm resnet18": (lambda: timm.create_model("resnet18"), 64, ["conv1..act1", *RESNET18[1:]]),
    "mobilenet_v2": (vision.mobilenet_v2, 32, [*(f"features.{i}" for i in range(19)), "classifier.1"]),
    "vgg11": (
        vision.vgg11,
        32,
        [
            *("features.0..1", "features.3..4", "features.6..7", "features.8..9", "features.11..12"),
            *("features.13..14", "features.16..17", "features.18..19"),
            *("classifier.0..1", "classifier.3..4", "classifier.6"),
        ],
    ),
    "regnet": (
        vision.regnet_x_400mf,
        32,
        [
            "stem",
            *(
                f"trunk_output.block{i + 1}.block{i + 1}-{j}"
                for i, depth in enumerate((1, 2, 7, 12))
                for j in range(depth)
            ),
            "fc",
        ],
    ),
    "efficientnet_b0": (
        vision.efficientnet_b0,
        64,
        [
            "features.0",
            *(f"features.{i + 1}.{j}" for i, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for j in range(depth)),
            "features.8",
            "classifier.1",
        ],
    ),
    "timm convnext": (
        lambda: timm.create_model("convnext_atto", depths=(1, 2, 1, 1)),
        32,
        [
            *("stem", "stages.0.blocks.0", "stages.1.downsample.1", "stages.1.blocks.0", "stages.1.blocks.1"),
            *("stages.2.downsample.1", "stages.2.blocks.0", "stages.3.downsample.1", "stages.3.blocks.0", "head"),
        ],
    ),
    "torchvision convnext": (
        lambda: vision.ConvNeXt([vision.convnext.CNBlockConfig(16, 32, 2), vision.convnext.CNBlockConfig(32, None, 1)]),
        32,
        ["features.0", "features.1.0", "features.1.1", "features.2.1", "features.3.0", "classifier.2"],
    ),
    "timm vit": (tiny_vit, 32, VIT),
    "timm deit": (lambda: tiny_vit("deit_tiny_patch16_224"), 32, VIT),
    "two heads": (lambda: tiny_vit("deit_tiny_distilled_patch16_224"), 32, [*VIT, "head_dist"]),
    "timm swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **SWIN),
        32,
        [
            *("patch_embed", "layers.0.blocks.0", "layers.0.blocks.1", "layers.1.downsample"),
            *("layers.1.blocks.0", "layers.1.blocks.1", "head"),
        ],
    ),
    "torchvision swin": (
        lambda: vision.SwinTransformer([4, 4], 24, [2, 1], [2, 2], [4, 4]),
        32,
        ["features.0", "features.1.0", "features.1.1", "features.2", "features.3.0", "head"],
    ),
    "torchvision vit": (
        lambda: vision.VisionTransformer(32, 8, 2, 2, 32, 64),
        32,
        ["conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "heads.head"],
    ),
    "shufflenet": (
        lambda: vision.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 128]),
        64,
        ["conv1", *(f"stage{i}.{j}" for i in (2, 3, 4) for j in (0, 1)), "conv5", "fc"],
    ),
    "densenet": (
        lambda: vision.DenseNet(8, (2, 3, 2, 2), 16),
        64,
        [
            *("features.conv0..relu0", "features.denseblock1", "features.transition1.conv", "features.denseblock2"),
            *("features.transition2.conv", "features.denseblock3", "features.transition3.conv"),
            *("features.denseblock4", "classifier"),
        ],
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_blocks_of_known_models(name):
    build, side, expected = ZOO[name]
    model = build()
    blocks = find_blocks(model, images(side))
    assert names(blocks) == expected
    if len(blocks) < 10:
        check(model, images(side), blocks)


def test_attention_without_the_fused_operator():
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    assert names(find_blocks(model, images())) == VIT


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_face_models_return_dataclasses(kind, attention):
    model = hf_vit(getattr(transformers, kind))
    model.set_attn_implementation(attention)
    blocks = find_blocks(model, {"pixel_values": images()})
    last = "classifier" if kind == "ViTForImageClassification" else "pooler.dense..activation"
    stem, first, second, head = names(blocks)
    assert stem.endswith("embeddings")
    assert first.endswith("layers.0")
    assert second.endswith("layers.1")
    assert head in (last, "pooler")
    assert [block.chained for block in blocks] == [False, True, True, False]
    check(model, {"pixel_values": images()}, blocks, lambda model, batch: model(**batch))


def test_chains_and_layers_of_a_resnet():
    blocks = find_blocks(vision.resnet18(), images(64))
    assert [block.chained for block in blocks] == [False, False, *[True] * 7, False]
    assert blocks[3].layers == ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0")
    assert blocks[0].modules == ("conv1", "bn1", "relu")
    assert "layer4.1" in repr(blocks)


def test_a_block_of_one_batch_runs_on_another():
    model = vision.resnet18().eval()
    blocks = find_blocks(model, images(64))
    x, extras = block_input(model, blocks[4], images(64, count=5))
    assert len(run_block(model, blocks[4], x, extras)) == 5
    assert torch.equal(run_block(model, blocks[4], x, ((), {})), run_block(model, blocks[4], x))


def test_modes_and_hooks_are_left_as_found():
    model = vision.resnet18()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    find_blocks(model, images())
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_hooks_go_when_the_model_fails():
    model = Net(lambda net, x: net.fc(net.conv(x)), conv=conv(), fc=nn.Linear(7, 2))
    with pytest.raises(RuntimeError, match="shape"):
        find_blocks(model, images())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert model.training


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1), (3, 48, 48)),
        (lambda: hf_vit(transformers.ViTForImageClassification), (3, 32, 32)),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten(), nn.Linear(2 * 28 * 28, 3)), (1, 32, 32)),
        (lambda: nn.Sequential(nn.Conv2d(3, 2, 7, stride=7), nn.Flatten(), nn.Linear(2 * 32 * 32, 3)), (3, 224, 224)),
    ],
    ids=["timm", "transformers", "grey", "224"],
)
def test_an_example_is_drawn_when_none_is_given(build, shape):
    model = build()
    seen = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, args, result: seen.append(args[0].shape))
    assert find_blocks(model)
    assert seen[-1] == (1, *shape)


def test_no_size_runs():
    model = nn.Sequential(nn.Flatten(), nn.Linear(11, 3))
    with pytest.raises(ValueError, match=r"failed on \(1, 3, 224, 224\), \(1, 3, 32, 32\); pass example="):
        find_blocks(model)


def test_nothing_to_rebuild():
    with pytest.raises(ValueError, match="there is nothing to rebuild"):
        find_blocks(nn.Sequential(nn.ReLU(), nn.Flatten()), images())


def test_a_block_that_is_not_reached():
    def flow(net, x):
        return net.head(net.a(x))

    model = Net(flow, a=conv(), head=head())
    last = find_blocks(model, images())[-1]
    with pytest.raises(ValueError, match=r"must run head\.2, got a pass that ended without it"):
        block_input(model, last, images(), lambda model, x: model.a(x))


def test_pairs_and_inference_mode():
    model = Net(lambda net, x: net.head(net.a(x)), a=conv(), head=head())
    with torch.inference_mode():
        assert names(find_blocks(model, (images(), torch.tensor([0, 1])))) == ["a", "head.2"]
