"""Vision transformers with outlier channels that change nothing in float: what one layer gains, its readers undo."""

import torch

from ttaq.models import ViT


def tame(width=32, depth=2, seed=0):
    """Build a ViT with random weights and affine parameters that are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViT(size=16, patch=4, width=width, depth=depth, heads=2, classes=6).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim == 1:
                    p.add_(torch.randn_like(p) * 0.1)
                elif name.startswith(("patches", "head")):  # images and classes that count
                    p.mul_(3)
    return model


def wild(model, factor=80.0, values=False, seed=0):
    """Multiply two channels of every LayerNorm by a factor and divide what reads them; so with `values`, if asked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.layers:
            for norm, reader in ((layer.norm1, layer.attention.qkv), (layer.norm2, layer.mlp[0])):
                picked = torch.randperm(len(norm.weight), generator=generator)[:2]
                norm.weight[picked] *= factor
                norm.bias[picked] *= factor
                reader.weight[:, picked] /= factor
            if values:
                width = layer.attention.proj.in_features
                picked = torch.randperm(width, generator=generator)[:2]
                layer.attention.qkv.weight[2 * width + picked] *= factor
                layer.attention.qkv.bias[2 * width + picked] *= factor
                layer.attention.proj.weight[:, picked] /= factor
    return model
