"""Zeroth-order adaptation against its formulas written out, the size of its perturbations, and what it achieves."""

import pytest
import torch
from tiny import calibrated, images, resnet, vit
from torch import nn

import ttaq
from ttaq import ops
from ttaq.adaptation import adapt, entropy

ANCHOR = [images(16, seed=90), images(16, seed=91)]
FORMS = {
    "float": vit,
    "fake-quantised": lambda: calibrated("vit", "w4a4"),
    "packed": lambda: ttaq.pack(calibrated("vit", "w4a4")),
}


def shifted(n, seed):
    return 2 * images(n, seed=seed) + 1


def features_and_logits(model, x):
    found = []
    hook = model.head.register_forward_hook(lambda layer, args, output: found.append(args[0]))
    logits = model(x)
    hook.remove()
    return found[0], logits


def by_hand(model, batches, steps, lr, share, weight, full_batch):
    """Take one-sided SPSA steps in place on every LayerNorm of a network, and yield logits and loss before each."""
    source = torch.cat([features_and_logits(model, x)[0] for x in ANCHOR])
    mu_s, sigma_s = source.mean(0), source.std(0, correction=0)
    generator = torch.Generator().manual_seed(0)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    thetas = {f"{name}.{key}": getattr(norm, key) for name, norm in norms.items() for key in ("weight", "bias")}
    order = [name for name, _ in model.named_parameters() if name in thetas]

    def objective(x):
        f, logits = features_and_logits(model, x)
        apart = (f.mean(0) - mu_s).norm()
        if len(f) > 1:
            apart = apart + (f.std(0, correction=0) - sigma_s).norm()
        return logits, entropy(logits).mean() + weight * apart / sigma_s.norm()

    c = {name: share * steps[name] for name in order}
    mean_square = torch.cat([torch.full_like(thetas[name], c[name] ** 2) for name in order]).mean()
    for x in batches:
        logits, loss = objective(x)
        u = {name: torch.randint(2, thetas[name].shape, generator=generator) * 2.0 - 1 for name in order}
        start = {name: thetas[name].clone() for name in order}
        for name in order:
            thetas[name].copy_(start[name] + c[name] * u[name])
        rise = objective(x)[1] - loss
        rate = lr * min(1, len(x) / full_batch) if full_batch else lr
        for name in order:
            thetas[name].copy_(start[name] - rate * rise * c[name] * u[name] / mean_square)
        yield logits, loss


def expected_steps(model):
    """Give each parameter of a LayerNorm the step of what reads it, by name."""
    steps = {}
    for name, norm in model.named_modules():
        if not isinstance(norm, nn.LayerNorm):
            continue
        prefix, _, last = name.rpartition(".")
        reader = {"norm1": "attention.qkv", "norm2": "mlp.0", "norm": "head"}[last]
        quantizer = getattr(model.get_submodule(f"{prefix}.{reader}".lstrip(".")), "input_quantizer", None)
        step = 0.2 * norm.weight.square().mean().sqrt().item() if quantizer is None else quantizer.scale.item()
        steps |= {f"{name}.weight": step, f"{name}.bias": step}
    return steps


@pytest.mark.parametrize("full_batch", [0, 6, 64])
@pytest.mark.parametrize("form", FORMS)
def test_follows_its_formula(form, full_batch):
    model = FORMS[form]().requires_grad_(False)
    options = {"lr": 2e-3, "perturbation": 0.3, "alignment": 0.7, "full_batch": full_batch}
    adapter = adapt(model, "zeroth-order", anchor=ANCHOR, **options)
    batches = [shifted(n, i) for i, n in enumerate([8, 8, 1, 5, 8])]
    steps = expected_steps(model)
    with torch.no_grad():
        for x, (logits, loss) in zip(batches, by_hand(model, batches, steps, 2e-3, 0.3, 0.7, full_batch), strict=True):
            torch.testing.assert_close(adapter(x), logits, rtol=1e-5, atol=1e-5)
            assert adapter.history[-1].loss == pytest.approx(loss.item(), rel=1e-4)
    assert adapter.method.steps == pytest.approx(steps, rel=1e-4)


def test_the_rate_falls_in_proportion_below_a_full_batch():
    """A batch that repeats its images says the same, at twice the rate for twice as many until it is full."""
    moved = {}
    for given, options in ((8, {}), (32, {}), (64, {}), (128, {}), (8, {"full_batch": 0}), (8, {"full_batch": 8})):
        adapter = adapt(vit(), "zeroth-order", anchor=ANCHOR, **options)
        before = adapter.model.norm.bias.clone()
        adapter(shifted(8, 0).repeat(given // 8, 1, 1, 1))
        moved[given, *options.values()] = (adapter.model.norm.bias - before).norm().item()
    full = moved[64,]
    for key, share in (((8,), 1 / 8), ((32,), 1 / 2), ((128,), 1), ((8, 0), 1), ((8, 8), 1)):
        assert moved[key] == pytest.approx(share * full, rel=0.02)


def test_two_forward_passes_a_batch_and_none_with_a_graph():
    passes = []

    def counted(model, x):
        passes.append(torch.is_grad_enabled())
        return model(x)

    adapter = adapt(resnet(), "zeroth-order", forward=counted)
    adapter(shifted(8, 0))
    assert passes == [False, False]
    assert not any(p.requires_grad for p in adapter.model.parameters())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_perturbation_flips_the_same_share_of_codes_at_any_width(bits):
    """By 0.1 steps in weight and bias: a little more than a tenth, whether there are 3 steps to the range or 255."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 5))
    model = ttaq.prepare(model.eval(), f"w8a{bits}")
    x = images(64)
    ttaq.calibrate(model, [x])
    method = adapt(model, "zeroth-order", anchor=[x]).method
    quantizer, qmax = method.model[3].input_quantizer, 2**bits - 1

    def codes():
        y = method.model[:3](x)
        return ops.quantize_codes(y, quantizer.scale, quantizer.zero, qmax=qmax)[0]

    with torch.no_grad():
        method.update(x, method.predict(x), adapt(model, "source").guard)
        assert method.steps["2.weight"] == pytest.approx(quantizer.scale.item())
        before = codes()
        method._move(method._draw(), 0.1)
        flipped = (codes() != before).float().mean().item()
    assert 0.06 < flipped < 0.16


def test_stored_statistics_stand_for_the_source():
    model = resnet()
    source = adapt(model, "zeroth-order").method.source
    norms = [model.layer2[0].bn2, model.layer3[0].bn1, model.layer3[0].bn2]
    assert len(source) == 3
    for moments, norm in zip(source.values(), norms, strict=True):
        assert torch.equal(moments.mean, norm.running_mean)
        assert torch.equal(moments.var, norm.running_var)


@pytest.mark.parametrize("form", ["float", "packed"])
@pytest.mark.parametrize("build", ["vit", "resnet"])
def test_the_objective_falls_on_a_shifted_stream(form, build):
    """On average over seeds, and on images that are not in the stream: one direction a batch is a noisy guide."""
    model = ttaq.pack(calibrated(build, "w4a4")) if form == "packed" else {"vit": vit, "resnet": resnet}[build]()
    apart, falls = shifted(64, 99), []

    def loss(adapter):
        with torch.no_grad():
            return adapter.method.objective(adapter.method.predict(apart)).item()

    for seed in range(5):
        options = {"anchor": ANCHOR if build == "vit" else None, "lr": 1e-2, "full_batch": 0, "seed": seed}
        adapter = adapt(model, "zeroth-order", **options)
        before = loss(adapter)
        for batch in range(30):
            adapter(shifted(32, batch))
        falls.append(before - loss(adapter))
    assert sum(falls) / len(falls) > 0.01, falls
