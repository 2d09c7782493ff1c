import pytest
import torch
from torch import nn

import ttaq
from ttaq.models import ResNet, ViT


@pytest.mark.parametrize(("depth", "convolutions"), [(8, 7), (14, 13), (20, 19)])
def test_resnet_has_its_depth(depth, convolutions):
    model = ResNet(depth, classes=7, width=4)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_resnet20_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ResNet(20).parameters()) == 269_722


def test_shortcuts_have_no_parameters_and_pad_channels_on_both_sides():
    block = ResNet(8, width=4).layer2[0].eval()
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
        x = torch.rand(2, 4, 6, 6)
        y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().max() == y[:, 6:].abs().max() == 0


def test_vit_attends_as_torch_does():
    torch.manual_seed(0)
    attention = ViT(size=8, width=16, depth=1, heads=2).layers[0].attention
    other = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(attention.qkv.weight)
        other.in_proj_bias.copy_(attention.qkv.bias)
        other.out_proj.weight.copy_(attention.proj.weight)
        other.out_proj.bias.copy_(attention.proj.bias)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(attention(x), other(x, x, x, need_weights=False)[0])


def test_vit_sees_the_places_of_its_patches():
    model = ViT(size=16, patch=4, width=16, depth=1, heads=2, classes=5).eval()
    x = torch.randn(2, 3, 16, 16)
    assert model(x).shape == (2, 5)
    assert not torch.allclose(model(x), model(x.flip(2)))


@pytest.mark.parametrize("build", [lambda: ResNet(8, width=4), lambda: ViT(size=16, width=16, depth=2, heads=2)])
def test_all_of_them_can_be_quantised_and_built_on_meta(build):
    model = build().eval()
    quantised = ttaq.prepare(model)
    assert quantised.ttaq_report["left_out"] == {}
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, ttaq.MatMul))}
    assert set(quantised.ttaq_report["layers"]) == layers
    blocks = ttaq.find_blocks(model, torch.randn(2, 3, 16, 16))
    assert blocks.idle == ()
    with torch.device("meta"):
        assert all(p.is_meta for p in build().parameters())
