"""CoTTA, RoTTA and ROID once more, line by line from the papers, on copies of float networks."""

import copy
import math

import torch
from torch import nn

from ttaq.adaptation.views import numbered
from ttaq.augment import distort

NORMS = (nn.BatchNorm2d, nn.LayerNorm)


class Views:
    """The one thing shared: what is drawn, and in which order."""

    def __init__(self, seed):
        self.seed, self.draws = seed, 0

    def generator(self):
        self.draws += 1
        return numbered(self.seed, self.draws)

    def __call__(self, x):
        return distort(x, self.generator())


class Robust(nn.Module):
    """RoTTA's BatchNorm: normalise with the moving average; `moving` moves it first."""

    moving = False

    def __init__(self, norm, momentum):
        super().__init__()
        self.weight, self.bias, self.eps, self.share = norm.weight, norm.bias, norm.eps, momentum
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()

    def forward(self, x):
        mean, var = self.mean, self.var
        if self.moving:
            mean = (1 - self.share) * mean + self.share * x.mean((0, 2, 3))
            var = (1 - self.share) * var + self.share * x.var((0, 2, 3), correction=0)
            self.mean, self.var = mean.detach(), var.detach()
        mean, var, weight, bias = (v[None, :, None, None] for v in (mean, var, self.weight, self.bias))
        return (x - mean) / (var + self.eps).sqrt() * weight + bias


def on_batch_statistics(model):
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return model


def robust(model, momentum):
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, key, Robust(child, momentum))
    return model


def learning(model, biases=False):
    """Name the affine of the norms, and all biases on request, in the order of the model."""
    affine = [
        f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, (*NORMS, Robust)) for k in ("weight", "bias")
    ]
    names = [n for n, _ in model.named_parameters() if n in affine or (biases and n.endswith(".bias"))]
    return {name: model.get_parameter(name).requires_grad_(True) for name in names}


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def follow(teacher, student, momentum):
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.copy_(momentum * mine + (1 - momentum) * theirs)


def cotta(model, batches, views, threshold, count, restore, lr=1e-3, momentum=0.999):
    """Return the logits of every batch, and for how many of them views were averaged."""
    student, teacher, source = (on_batch_statistics(model) for _ in range(3))
    adapted = learning(student, biases=True)
    first = {name: p.detach().clone() for name, p in adapted.items()}
    optimizer = torch.optim.Adam(adapted.values(), lr=lr)
    outputs, averaged = [], 0
    for x in batches:
        with torch.no_grad():
            outputs.append(teacher(x))
            target = outputs[-1].softmax(1)
            if source(x).softmax(1).max(1).values.mean() < threshold:
                averaged += 1
                target = torch.stack([teacher(views(x)).softmax(1) for _ in range(count)]).mean(0)
        step(optimizer, -(target * student(x).softmax(1).log()).sum(1).mean())
        follow(teacher, student, momentum)
        generator = views.generator()
        with torch.no_grad():
            for name, p in adapted.items():
                mask = (torch.rand(p.shape, generator=generator) < restore).float()
                p.copy_(mask * first[name] + (1 - mask) * p)
    return outputs, averaged


class Memory:
    """RoTTA's algorithm 1, a list of lists."""

    def __init__(self, size, classes):
        self.size, self.classes = size, classes
        self.held = [[] for _ in range(classes)]

    def score(self, age, unsure):
        return 1 / (1 + math.exp(-age / self.size)) + unsure / math.log(self.classes)

    def total(self):
        return sum(map(len, self.held))

    def offer(self, x, label, unsure):
        new = [x, 0, unsure]
        if len(self.held[label]) < self.size / self.classes:
            most = max(map(len, self.held))
            rivals = [c for c in self.held if len(c) == most] if self.total() >= self.size else None
        else:
            rivals = [self.held[label]]
        if rivals is None:
            self.held[label].append(new)
        else:
            bad, home, place = max(
                ((self.score(*item[1:]), c, i) for c in rivals for i, item in enumerate(c)), key=lambda found: found[0]
            )
            if bad > self.score(0, unsure):
                home.pop(place)
                self.held[label].append(new)
        for item in self.items():
            item[1] += 1

    def items(self):
        """List (image, age, entropy), the oldest first."""
        return sorted((item for held in self.held for item in held), key=lambda item: -item[1])


def rotta(model, batches, views, size, frequency, lr=1e-3, momentum=0.05, nu=0.001):
    """Return the logits of every batch."""
    student, teacher = robust(model, momentum), robust(model, momentum)
    adapted = learning(student)
    optimizer = torch.optim.Adam(adapted.values(), lr=lr)
    outputs, seen, memory = [], 0, None
    for x in batches:
        with torch.no_grad():
            outputs.append(teacher(x))
        p = outputs[-1].softmax(1)
        memory = memory or Memory(size, p.shape[1])
        for image, q in zip(x, p, strict=True):
            memory.offer(image, q.argmax().item(), -(q * q.log()).sum().item())
            seen += 1
            if seen % frequency:
                continue
            Robust.moving = True
            images = torch.stack([item[0] for item in memory.items()])
            age = torch.tensor([item[1] / size for item in memory.items()])
            with torch.no_grad():
                target = teacher(images).softmax(1)
            losses = -(target * student(views(images)).log_softmax(1)).sum(1)
            step(optimizer, (losses * torch.exp(-age) / (1 + torch.exp(-age))).mean())
            follow(teacher, student, 1 - nu)
            Robust.moving = False
    return outputs


def roid(model, batches, views, lr=1e-3, momentum=0.99, beta=0.9, tau=1 / 3):
    """Return the corrected logits of every batch."""
    model = on_batch_statistics(model)
    adapted = learning(model)
    first = {name: p.detach().clone() for name, p in adapted.items()}
    optimizer = torch.optim.Adam(adapted.values(), lr=lr)
    outputs, usual = [], None
    for x in batches:
        z = model(x)
        p = z.softmax(1)
        with torch.no_grad():
            n, classes = p.shape
            usual = torch.full((classes,), 1 / classes) if usual is None else usual
            diverse = 1 - (p @ usual) / (p.norm(dim=1) * usual.norm())
            diverse = (diverse - diverse.min()) / (diverse.max() - diverse.min())
            certain = (p * p.log()).sum(1)
            certain = (certain - certain.min()) / (certain.max() - certain.min())
            weight = torch.exp(diverse * certain / tau)
            kept = diverse >= diverse.mean()
            usual = beta * usual + (1 - beta) * p.mean(0)
            prior = p.mean(0)
            gamma = max(1 / n, 1 / classes) / prior.max()
            outputs.append(z + ((prior + gamma) / (1 + gamma * classes)).log())
        q = model(views(x[kept])).softmax(1)
        p, weight = p[kept], weight[kept]
        clipped = p.clamp(max=0.99)
        ratio = -(clipped * (clipped / (1 - clipped)).log()).sum(1)
        agreement = -0.5 * ((q * p.log()).sum(1) + (p * q.log()).sum(1))
        step(optimizer, (weight * (ratio + agreement)).sum() / n)
        with torch.no_grad():
            for name, parameter in adapted.items():
                parameter.copy_(momentum * parameter + (1 - momentum) * first[name])
    return outputs
