"""Adaptation methods that select images, written straight down from their papers, and what their tests share."""

import copy
import functools
import math

import torch
from tiny import SIDE, calibrated, resnet, vit
from torch import nn

import ttaq
from ttaq.adaptation import adapt

CLASSES = 6
OPTIONS = {"eta": {"d": 0.9}, "eata": {"d": 0.9}, "sar": {}, "deyo": {}}
NETS = {"batch norm": resnet, "layer norm": vit}
FACTOR = {"batch norm": 18.0, "layer norm": 9.0}  # of the logits, so that some images are reliable and some are not
PACKED = {
    "fake-quantised resnet": lambda: calibrated("resnet", "w4a4"),
    "packed resnet": lambda: ttaq.pack(calibrated("resnet", "w4a4")),
    "packed vit": lambda: ttaq.pack(calibrated("vit", "w4a4")),
}


def stream(batches=20, n=24, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [(1 + i / 20) * torch.randn(n, 3, SIDE, SIDE, generator=generator) for i in range(batches)]


def anchor():
    return stream(3, seed=77)


def sharp(factor, model, x):
    return factor * model(x)


def adapter_of(model, method, factor=18.0, **options):
    defaults = {**OPTIONS[method], **({"anchor": anchor()} if method == "eata" else {})}
    options = {**defaults, "full_batch": 0, "guard": "finite", **options}
    return adapt(model, method, forward=functools.partial(sharp, factor), **options)


# straight lines from the papers, in nothing but torch


def configured(model):
    """Copy a model for adaptation and list its affine parameters."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    affine = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.requires_grad_(True)
            affine += [module.weight, module.bias]
    return model, affine


def h(z):
    return -(z.softmax(1) * z.log_softmax(1)).sum(1)


def straight_eta(model, factor, batches, d=0.9, fisher_batches=(), beta=1.0):
    model, affine = configured(model)
    source, fisher = [p.detach().clone() for p in affine], [0.0] * len(affine)
    for x in fisher_batches:
        z = factor * model(x)
        loss = -z.log_softmax(1)[torch.arange(len(x)), z.argmax(1)].mean()
        gradients = torch.autograd.grad(loss, affine)
        fisher = [f + g**2 / len(fisher_batches) for f, g in zip(fisher, gradients, strict=True)]
    optimizer, m, bound = torch.optim.Adam(affine, lr=1e-3), None, 0.4 * math.log(CLASSES)
    counts, outputs = [], []
    for x in batches:
        z = factor * model(x)
        outputs.append(z.detach())
        p, unsure, keep = z.softmax(1).detach(), h(z), []
        for b in range(len(x)):
            new = m is None or (p[b] @ m) / (p[b].norm() * m.norm()) < d
            if unsure[b] < bound and new:
                keep.append(b)
        counts.append(len(keep))
        if not keep:
            continue
        mean = p[keep].mean(0)
        m = mean if m is None else 0.9 * m + 0.1 * mean
        loss = (torch.exp(bound - unsure[keep].detach()) * unsure[keep]).mean()
        if fisher_batches:
            pull = [(f * (p - s) ** 2).sum() for f, p, s in zip(fisher, affine, source, strict=True)]
            loss = loss + beta * sum(pull)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return outputs, counts


def straight_sar(model, factor, batches, rho=0.05):
    model, affine = configured(model)
    optimizer, bound = torch.optim.Adam(affine, lr=1e-3), 0.4 * math.log(CLASSES)
    counts, outputs = [], []
    for x in batches:
        z = factor * model(x)
        outputs.append(z.detach())
        first = h(z) < bound
        counts.append(int(first.sum()))
        if not first.any():
            continue
        gradients = torch.autograd.grad(h(z)[first].mean(), affine)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        before = [p.detach().clone() for p in affine]
        for p, g in zip(affine, gradients, strict=True):
            p.data = p.data + rho * g / norm
        z = factor * model(x)
        second = first & (h(z) < bound)
        for p in affine:
            p.grad = None
        if second.any():
            h(z)[second].mean().backward()
        for p, held in zip(affine, before, strict=True):
            p.data = held
        if second.any():
            optimizer.step()
    return outputs, counts


def destroyed(x, generator):
    """Shuffle the sixteen patches of each image, one by one."""
    order, side, y = torch.rand(len(x), 16, generator=generator).argsort(1), SIDE // 4, torch.empty_like(x)
    for b in range(len(x)):
        for to, of in enumerate(order[b].tolist()):
            (row, column), (top, left) = divmod(to, 4), divmod(of, 4)
            patch = x[b, :, top * side : top * side + side, left * side : left * side + side]
            y[b, :, row * side : row * side + side, column * side : column * side + side] = patch
    return y


def straight_deyo(model, factor, batches, plpd=0.2, seed=0):
    model, affine = configured(model)
    optimizer, counts, outputs, draws = torch.optim.Adam(affine, lr=1e-3), [], [], 0
    for x in batches:
        z = factor * model(x)
        outputs.append(z.detach())
        unsure = h(z).detach()
        if not (unsure < 0.5 * math.log(CLASSES)).any():
            counts.append(0)
            continue
        with torch.no_grad():
            other = factor * model(destroyed(x, torch.Generator().manual_seed(seed * 1_000_003 + draws)))
        draws += 1
        of = torch.arange(len(x)), z.argmax(1)
        fall = z.softmax(1).detach()[of] - other.softmax(1)[of]
        keep = [b for b in range(len(x)) if unsure[b] < 0.5 * math.log(CLASSES) and fall[b] > plpd]
        counts.append(len(keep))
        if not keep:
            continue
        weight = 1 / torch.exp(unsure - 0.4 * math.log(CLASSES)) + 1 / torch.exp(-fall)
        optimizer.zero_grad()
        (weight * h(z))[keep].mean().backward()
        optimizer.step()
    return outputs, counts


def run(adapter, batches):
    return [adapter(x) for x in batches]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return torch.equal(a, b) if tensors else a is b or (type(a) is type(b) and a == b)
