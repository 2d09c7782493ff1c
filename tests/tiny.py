"""Tiny networks with sound statistics, images, and comparisons of whole models."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

import ttaq
from ttaq.models import ResNet, ViT

SIDE = 16


def images(count=8, side=SIDE, seed=1, channels=3):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


class Variety(nn.Module):
    """Convolutions of every kind: grouped, depthwise, dilated, strided, padded by name, by reflection, unequally."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.dilated = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.circular = nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular")
        self.unequal = nn.Conv2d(8, 8, 2, padding="same")
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        convolutions = (self.grouped, self.depthwise, self.dilated, self.reflected, self.circular, self.unequal)
        for conv, norm in zip(convolutions, self.norms, strict=True):
            x = F.relu(norm(conv(x))) + x
        return self.fc(x.mean((2, 3)))


class Tied(nn.Module):
    """A layer under two names, two layers with one weight, and a buffer that state_dict leaves out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"again": self.first})
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.register_buffer("offsets", torch.linspace(-1, 1, 12), persistent=False)
        self.register_buffer("seen", torch.tensor(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.gelu(self.first(x)) + self.offsets
        return self.head(F.gelu(self.second(self.inner["again"](x))))


def settle(model, x):
    """Give the norms running statistics and the biases values that are not zero; return the model in eval mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
            elif "head" in name:  # some libraries start heads at zero
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        model.train()
        for _ in range(8):
            model(x)
    return model.eval()


def _made_once(build):
    """Build a network once, from a seed of its own, and give copies of it."""

    @functools.cache
    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return lambda: copy.deepcopy(made())


@_made_once
def resnet():
    return settle(ResNet(depth=8, classes=6, width=4), images())


@_made_once
def vit():
    return settle(ViT(size=SIDE, patch=4, width=16, depth=2, heads=2, classes=6), images())


@_made_once
def variety():
    return settle(Variety(), images())


@_made_once
def timm_vit():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_classes=6)
    return settle(model, images(side=32))


BUILDERS = {"resnet": resnet, "vit": vit, "variety": variety, "timm_vit": timm_vit}


def input_of(name, count=8, seed=1):
    return images(count, 32 if name == "timm_vit" else SIDE, seed)


_calibrated = {}


def calibrated(name, recipe, **options):
    """Build, prepare and calibrate a network, in eval mode."""
    key = name, recipe, repr(options)
    if key not in _calibrated:
        _calibrated[key] = ttaq.prepare(BUILDERS[name](), ttaq.Recipe.parse(recipe, **options))
        ttaq.calibrate(_calibrated[key], [input_of(name)])
    return copy.deepcopy(_calibrated[key])


def snapshot(model):
    """Copy everything that a verb could change: tensors by name, modes, flags."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "tensors": {name: t.detach().clone() for name, t in tensors.items()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "kinds": {name: type(m) for name, m in model.named_modules()},
        "plain": {
            name: {k: copy.copy(v) for k, v in vars(m).items() if k in ("ready", "enabled", "drop", "auto")}
            for name, m in model.named_modules()
        },
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for key in before:
        if key != "tensors":
            assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name].nan_to_num(7e7), tensor.nan_to_num(7e7)), name
