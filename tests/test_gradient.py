"""Tent against a straight-line re-implementation, and the choice of what adapts."""

import copy
import functools

import pytest
import torch
from torch import nn

from ttaq.adaptation import METHODS, GradientMethod, adapt, entropy


def cnn(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


class Tokens(nn.Module):
    """A transformer block over the columns of an image."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Linear(24, 16), nn.Linear(16, 10)
        self.norm1, self.norm2 = norm(16), norm(16)
        self.qkv, self.mlp = nn.Linear(16, 48), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = self.embed(x.permute(0, 3, 1, 2).flatten(2))
        x = x + nn.functional.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, -1))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


class RmsNorm(nn.Module):
    """A norm layer that torch does not know."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def stream(batches=10, n=64, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [1.5 * torch.randn(n, 3, 8, 8, generator=generator) + 0.1 * i for i in range(batches)]


def straight_tent(model, batches, lr=1e-3, batch_statistics=True):
    """Follow the paper's section 3 with nothing but torch."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    affine = []
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.requires_grad_(True)
            affine += [module.weight, module.bias]
        if isinstance(module, nn.BatchNorm2d) and batch_statistics:
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    optimizer = torch.optim.Adam(affine, lr=lr)
    outputs = []
    for x in batches:
        logits = model(x)
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outputs.append(logits.detach())
    return outputs, affine


@pytest.mark.parametrize("make", [cnn, Tokens])
def test_tent_equals_the_paper_over_ten_batches(make):
    model = make()
    expected, affine = straight_tent(model, stream())
    adapter = adapt(model, "tent")
    for x, logits in zip(stream(), expected, strict=True):
        torch.testing.assert_close(adapter(x), logits, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(adapter.method.parameters.values(), affine, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    drift = (expected[-1] - straight_tent(model, stream(), lr=0.0)[0][-1]).abs().max()
    assert drift > 1e-3


def test_source_statistics_leave_batchnorm_as_it_is():
    model = cnn()
    expected, _ = straight_tent(model, stream(3), batch_statistics=False)
    adapter = adapt(model, "tent", statistics="source")
    assert torch.equal(adapter.predict(stream(1)[0]), model(stream(1)[0]))
    for x, logits in zip(stream(3), expected, strict=True):
        torch.testing.assert_close(adapter(x), logits, rtol=1e-5, atol=1e-6)


def test_entropy_falls_on_a_repeated_batch():
    x = stream(1)[0]
    adapter = adapt(cnn(), "tent", lr=5e-2, steps=3)
    for _ in range(10):
        adapter(x)
    losses = [step.loss for step in adapter.history]
    assert losses[-1] < 0.8 * losses[0]


def test_one_forward_and_one_backward_a_step():
    calls = []
    adapter = adapt(cnn(), "tent", forward=lambda model, x: calls.append(len(x)) or model(x))
    adapter(stream(1)[0])
    assert calls == [64]
    adapter = adapt(cnn(), "tent", steps=2, forward=lambda model, x: calls.append(len(x)) or model(x))
    adapter.update(stream(1)[0])
    assert calls == [64, 64, 64]


def test_the_rate_falls_with_small_batches_and_returns():
    sgd = functools.partial(torch.optim.SGD, momentum=0.9)
    adapter = adapt(cnn(), "tent", lr=0.1, optimizer=sgd)
    rates = []
    for n in (64, 16, 1, 64):
        adapter(stream(1, n)[0])
        rates.append(adapter.method.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.025, 0.1 / 64, 0.1])
    adapter = adapt(cnn(), "tent", lr=0.1, full_batch=0)
    adapter(stream(1, 2)[0])
    assert adapter.method.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("norm", {"1.weight", "1.bias", "4.weight", "4.bias"}),
        (["*.bias"], {"1.bias", "3.bias", "4.bias", "8.bias"}),
        ("8.*", {"8.weight", "8.bias"}),
        (lambda name, p: p.dim() == 2, {"8.weight"}),
    ],
)
def test_only_what_was_chosen_moves(parameters, expected):
    model = cnn()
    adapter = adapt(model, "tent", parameters=parameters)
    for x in stream(2):
        adapter(x)
    after = dict(adapter.model.named_parameters())
    assert {name for name, p in model.named_parameters() if not torch.equal(p, after[name])} == expected
    assert {name for name, p in after.items() if p.requires_grad} == expected


@pytest.mark.parametrize("norm", [RmsNorm, nn.RMSNorm, functools.partial(nn.GroupNorm, 1), nn.LayerNorm])
def test_norms_of_every_kind_are_found(norm):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.embed, self.act, self.head = nn.Linear(192, 16), norm(16), nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.act(self.embed(x.flatten(1))))

    adapter = adapt(Mean(), "tent")
    adapter(stream(1)[0])
    assert all(name.startswith("act.") for name in adapter.method.parameters)
    assert not torch.equal(adapter.method.parameters["act.weight"], torch.ones(16))


def test_a_users_method_needs_one_function():
    class Sharp(GradientMethod):
        def loss(self, x, logits):
            return -logits.logsumexp(1).mean()

    adapter = adapt(cnn(), Sharp, lr=1e-2)
    adapter(stream(1)[0])
    assert adapter.steps == 1
    METHODS["sharp"] = Sharp
    try:
        assert adapt(cnn(), "sharp").state_dict()["method"] == "sharp"
    finally:
        del METHODS["sharp"]


def test_entropy_of_known_distributions():
    assert entropy(torch.full((2, 10), 3.0)).tolist() == pytest.approx([2.302585, 2.302585])
    p = torch.tensor([[0.5, 0.25, 0.25]])
    assert entropy(p.log().bfloat16()).item() == pytest.approx(1.0397, abs=2e-2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parameters": ["nothing*"]}, r"matches no parameter of Sequential \(it has 0.weight"),
        ({"steps": 0}, "steps must be a whole number from 1, got 0"),
        ({"rate": 1}, "tent does not know rate; it takes lr, optimizer"),
        ({"method": "tant"}, f"one of {', '.join(METHODS)}, got 'tant'"),
    ],
)
def test_refusals(options, says):
    with pytest.raises(ValueError, match=says):
        adapt(cnn(), **options)


def test_a_forward_without_gradients_is_refused():
    adapter = adapt(cnn(), "tent", forward=torch.no_grad()(lambda model, x: model(x)))
    with pytest.raises(ValueError, match="carry no gradient"):
        adapter(stream(1)[0])


def test_a_network_without_norms_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match='use method="source"'):
        adapt(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "tent")
