"""NaN and Inf anywhere skip the step and give back the last good state."""

import functools
import math

import pytest
import torch
from torch import nn

from ttaq.adaptation import GradientMethod, adapt
from ttaq.adaptation.guard import Snapshot, finite


class Counting(nn.Module):
    """Hide NaN as codes do, and count it as packed layers do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        self.nonfinite.add_((~torch.isfinite(x)).sum())
        return torch.nan_to_num(x, posinf=1.0, neginf=-1.0)


class Overflowing(nn.Module):
    """Give Inf where a pixel is larger than 50."""

    def forward(self, x):
        return torch.where(x.abs() > 50, torch.inf, x)


def cnn(first=None, last=None):
    torch.manual_seed(0)
    return nn.Sequential(
        first or nn.Identity(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), last or nn.Identity(),
    ).eval()  # fmt: skip


def images(n=16, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def memory(adapter):
    state = adapter.state_dict()
    optimizer = state["memory"].get("optimizer", {"state": {}})["state"]
    return [*state["tensors"].values(), *(v for values in optimizer.values() for v in values.values())]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", ["source", "norm", "tent"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_image_in_the_middle_leaves_no_trace(method, value):
    model = cnn()
    adapter, undisturbed = adapt(model, method), adapt(model, method)
    bad = images(seed=3)
    bad[4, 1, 2, 2] = value
    for seed, x in enumerate([images(seed=1), bad, images(seed=2)]):
        logits = adapter(x)
        if x is bad:
            good = torch.arange(16) != 4
            assert logits[4].isnan().all()
            assert torch.equal(logits[good], undisturbed.predict(x[good]))
            continue
        assert torch.equal(logits, undisturbed(x)), seed
    assert same(memory(adapter), memory(undisturbed))
    assert (adapter.steps, adapter.skipped) == (2, 1)
    step = adapter.history[1]
    assert step.skipped
    assert step.reason == "NaN or Inf in input"
    assert step.returned == "NaN logits for 1 images, the others predicted without them"
    assert step.entropy is None
    assert not adapter.history[2].skipped


def test_a_batch_with_no_good_image():
    adapter = adapt(cnn(), "tent")
    logits = adapter(torch.full((3, 3, 8, 8), math.nan))
    assert logits.shape == (3, 5)
    assert logits.isnan().all()
    assert adapter.skipped == 1


@pytest.mark.parametrize("method", ["norm", "tent"])
def test_what_the_first_batch_broke_is_put_back(method):
    adapter = adapt(cnn(first=Overflowing()), method)
    before = memory(adapter)
    x = images()
    x[0, 0, 0, 0] = 60
    assert adapter(x).isnan().any()
    assert same(memory(adapter), before)
    assert "statistics" in adapter.history[0].reason
    assert "logits" in adapter.history[0].reason
    assert adapter.history[0].returned == "logits"
    assert torch.isfinite(adapter(images())).all()
    assert adapter.steps == 1


def test_counters_of_quantised_layers_are_read_and_set_back():
    adapter = adapt(cnn(first=nn.Sequential(Overflowing(), Counting())), "tent")
    adapter(images())
    before = memory(adapter)
    x = images(seed=1)
    x[2, 0, 0, 0] = 60
    adapter.predict(x)
    adapter(images(seed=2))
    assert adapter.skipped == 0
    before = memory(adapter)
    assert torch.isfinite(adapter(x)).all()
    assert adapter.history[-1].reason == "NaN or Inf in activations of quantised layers"
    assert same(memory(adapter), before)
    adapter(images(seed=2))
    assert adapter.skipped == 1


def test_a_bad_loss_and_bad_gradients_are_named():
    class Broken(GradientMethod):
        scale = 1.0

        def loss(self, x, logits):
            return logits.square().mean() * self.scale

    class Rootless(GradientMethod):
        def loss(self, x, logits):
            return (logits * 0).sum().abs().sqrt()  # finite, with an infinite slope

    adapter = adapt(cnn(), Broken)
    adapter(images())
    before, adapter.method.scale = memory(adapter), math.nan
    adapter(images())
    assert adapter.history[-1].reason == "NaN or Inf in loss, gradients"
    assert adapter.history[-1].loss is None
    assert same(memory(adapter), before)
    adapter = adapt(cnn(), Rootless)
    adapter(images())
    assert adapter.history[-1].reason == "NaN or Inf in gradients"


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_a_step_that_overflows_is_undone_with_the_optimizers_memory(optimizer):
    adapter = adapt(cnn(), "tent", optimizer=optimizer)
    before = memory(adapter)
    adapter.method._rates = [math.inf]
    adapter(images())
    assert "adapted tensors" in adapter.history[-1].reason
    assert same(memory(adapter), before)
    adapter.method._rates = [1e-3]
    adapter(images())
    before = memory(adapter)
    adapter.method._rates = [math.inf]
    adapter(images(seed=1))
    assert adapter.skipped == 2
    assert same(memory(adapter), before)


def test_an_optimizer_whose_memory_overflows_is_caught():
    class Huge(GradientMethod):
        def loss(self, x, logits):
            return logits.square().mean() * 1e25  # finite gradients whose squares are not

    adapter = adapt(cnn(), Huge)
    adapter(images())
    assert adapter.history[0].reason == "NaN or Inf in optimizer state"
    assert adapter.method.optimizer.state_dict()["state"] == {}


def test_an_interrupted_step_is_undone():
    class Interrupted(GradientMethod):
        def loss(self, x, logits):
            if self.lr == 0:
                self.parameters["2.weight"].data.add_(1)
                raise KeyboardInterrupt
            return logits.square().mean()

    adapter = adapt(cnn(), Interrupted)
    adapter(images())
    before, adapter.method.lr = memory(adapter), 0
    with pytest.raises(KeyboardInterrupt):
        adapter(images())
    assert same(memory(adapter), before)


def test_without_the_guard_nan_goes_through():
    adapter = adapt(cnn(), "tent", guard=False)
    x = images()
    x[0] = math.nan
    assert adapter(x).isnan().all()
    assert adapter.skipped == 0
    assert any(t.isnan().any() for t in memory(adapter))


def test_finite_looks_at_every_value():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert finite([x, None, torch.empty(0), torch.tensor([1, 2])])
    for value in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[2, 4] = value
        assert not finite([x, bad])
        assert not finite([bad.bfloat16()])
    assert finite([torch.tensor([7])]) is None
    assert finite([torch.tensor([3e38, 3e38])])


def test_a_snapshot_follows_growing_state():
    class Toy:
        def __init__(self):
            self.p = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))
            self.optimizer = torch.optim.Adam([self.p])

        def tensors(self):
            return {"p": self.p}

        def step(self):
            self.p.grad = torch.ones(3)
            self.optimizer.step()

    toy = Toy()
    snapshot, start = Snapshot(toy), toy.p.detach().clone()
    snapshot.save()
    toy.step()
    snapshot.restore()
    assert torch.equal(toy.p, start)
    assert not toy.optimizer.state
    toy.step()
    snapshot.save()
    kept = toy.p.detach().clone(), toy.optimizer.state[toy.p]["exp_avg"].clone()
    toy.step()
    toy.step()
    snapshot.restore()
    assert torch.equal(toy.p, kept[0])
    assert torch.equal(toy.optimizer.state[toy.p]["exp_avg"], kept[1])
    assert toy.optimizer.state[toy.p]["step"] == 1
