"""ETA, EATA, SAR and DeYO against straight lines from the papers, and where they differ from public code on purpose."""

import copy
import functools
import io
import math

import pytest
import torch
from tiny import SIDE, calibrated, resnet, vit
from torch import nn

import ttaq
from ttaq.adaptation import ABL, adapt
from ttaq.adaptation.destruction import occlude, shuffle_patches, shuffle_pixels
from ttaq.adaptation.selection import redundancy

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
    options = {**OPTIONS[method], **({"anchor": anchor()} if method == "eata" else {}), "full_batch": 0, **options}
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


STRAIGHT = {
    "eta": straight_eta,
    "eata": lambda *args: straight_eta(*args, fisher_batches=anchor()),
    "sar": straight_sar,
    "deyo": straight_deyo,
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", STRAIGHT)
def test_methods_equal_their_papers_over_twenty_batches(method, net):
    model, factor = NETS[net](), FACTOR[net]
    faint = {"plpd": 5e-4} if (method, net) == ("deyo", "layer norm") else {}  # that network looks at no shape
    expected, counts = STRAIGHT[method](model, factor, stream(), **faint)
    adapter = adapter_of(model, method, factor, **faint)
    for x, logits in zip(stream(), expected, strict=True):
        torch.testing.assert_close(adapter(x), logits, rtol=1e-5, atol=1e-5)
    assert 0 < sum(counts) < 20 * 24  # some images were selected, some were not
    assert adapter.steps > 10
    assert (expected[-1] - factor * configured(model)[0](stream()[-1])).abs().max() > 1e-3


# what they remember, select and refuse


def run(adapter, batches):
    return [adapter(x) for x in batches]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return torch.equal(a, b) if tensors else a is b or (type(a) is type(b) and a == b)


@pytest.mark.parametrize("model", [*NETS, *PACKED])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_stream_resumes_bit_for_bit_and_reset_starts_it_again(method, model):
    model = {**NETS, **PACKED}[model]()
    batches = stream(6, n=12)
    options = {"loss": "abl", "statistics": "ema", "plpd": 0.0} if method == "deyo" else {"loss": "abl"}
    adapter = adapter_of(model, method, **options)
    start, first = adapter.state_dict(), run(adapter, batches[:3])
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    later, held = run(adapter, batches[3:]), adapter.state_dict()
    file.seek(0)
    resumed = adapter_of(model, method, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(run(resumed, batches[3:]), later)
    assert same(resumed.state_dict(), held)
    for name in adapter.method.remembers:
        assert not same(held["memory"][name], start["memory"][name]), name
    assert not same(held["tensors"], start["tensors"])
    adapter.reset()
    assert same(adapter.state_dict(), start)
    assert same(run(adapter, batches[:3]), first)


@pytest.mark.parametrize("model", [*NETS, *PACKED])
@pytest.mark.parametrize("method", OPTIONS)
def test_one_image_none_and_a_bad_one(method, model):
    options = {"recovery": 0.0} if method == "sar" else {}
    adapter = adapter_of({**NETS, **PACKED}[model](), method, factor=40.0, **options)
    bad = stream(1, n=5)[0]
    bad[2, 0, 3, 3] = math.nan
    run(adapter, stream(3, n=1))
    before = adapter.state_dict()
    assert adapter(bad).isnan().any(1).tolist() == [False, False, True, False, False]
    assert adapter(bad[:0]).shape == (0, CLASSES)
    after = adapter.state_dict()
    assert same(after["tensors"], before["tensors"])
    assert same(after["memory"], before["memory"])
    assert all(y.isfinite().all() for y in run(adapter, stream(3, n=1, seed=8)))
    assert all(t.isfinite().all() for t in adapter.method.tensors().values())
    reasons = {step.reason for step in adapter.history}
    assert reasons <= {None, "no image was selected", "NaN or Inf in input", "empty batch"}


@pytest.mark.parametrize("method", OPTIONS)
def test_a_batch_without_a_selected_image_takes_no_step_and_says_so(method):
    adapter = adapter_of(resnet(), method, margin=1e-6, statistics="ema", loss="abl")
    parameters = [p.detach().clone() for p in adapter.method.parameters.values()]
    moments = adapter.model.bn1.running_mean.clone()
    run(adapter, stream(2))
    assert same(list(adapter.method.parameters.values()), parameters)
    assert not torch.equal(adapter.model.bn1.running_mean, moments)  # the statistics follow the stream all the same
    assert adapter.method.balance.frequency is not None
    step = adapter.history[-1]
    assert (step.skipped, step.reason, step.loss) == (True, "no image was selected", None)
    assert math.isfinite(step.entropy)
    assert (adapter.steps, adapter.skipped, adapter.images) == (0, 2, 48)
    assert not adapter.method.optimizer.state


def test_bad_logits_of_unselected_images_are_still_a_fault():
    def overflowing(model, x):
        return model(x) * torch.where(x.amax() > 50, torch.inf, 1.0)

    adapter = adapt(resnet(), "eta", forward=overflowing, margin=1e-6, statistics="ema")
    before = adapter.state_dict()["tensors"]
    x = stream(1)[0]
    x[0, 0, 0, 0] = 60
    adapter(x)
    assert adapter.history[-1].reason == "NaN or Inf in logits"
    assert same(adapter.state_dict()["tensors"], before)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_that_fails_leaves_no_trace(method, steps):
    adapter = adapter_of(resnet(), method, steps=steps)
    run(adapter, stream(2))
    before = adapter.state_dict()
    rates, adapter.method._rates = adapter.method._rates, [math.inf]
    adapter(stream(3)[2])
    assert "adapted tensors" in adapter.history[-1].reason
    assert same(adapter.state_dict()["tensors"], before["tensors"])
    assert all(same(adapter.state_dict()["memory"][n], before["memory"][n]) for n in adapter.method.remembers)
    adapter.method._rates = rates
    adapter(stream(3)[2])
    assert adapter.history[-1].reason is None


@pytest.mark.parametrize("method", ["eta", "deyo"])
def test_the_terms_of_abl_take_the_place_of_the_entropy_and_weights_multiply(method):
    adapter = adapter_of(resnet(), method, loss=ABL("debiased", tau=3.0, momentum=0.5))
    run(adapter, stream(3))
    x = stream(4)[3]
    logits = adapter.predict(x)
    terms, unsure, most = adapter.method.balance.terms(logits), h(logits), math.log(CLASSES)
    assert not torch.allclose(terms, unsure)
    if method == "eta":
        p, m = logits.softmax(1), adapter.method.mean
        keep = (unsure < 0.4 * most) & ((p @ m) / p.norm(dim=1) / m.norm() < 0.9)
        weight = torch.exp(0.4 * most - unsure)
    else:
        generator = torch.Generator().manual_seed(adapter.method.draws)
        with torch.no_grad():
            other = adapter.method.predict(destroyed(x, generator)).softmax(1)
        of = torch.arange(len(x)), logits.argmax(1)
        fall = logits.softmax(1)[of] - other[of]
        keep, weight = (unsure < 0.5 * most) & (fall > 0.2), torch.exp(0.4 * most - unsure) + torch.exp(fall)
    assert 0 < keep.sum() < len(x)
    assert adapter.update(x).loss == pytest.approx((terms * weight)[keep].mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("loss", ["abl", "dot"])
def test_a_balanced_loss_changes_what_is_learned_once_it_remembers(method, loss):
    plain, balanced = adapter_of(resnet(), method), adapter_of(resnet(), method, loss=loss)
    assert same(run(plain, stream(3))[:2], run(balanced, stream(3))[:2])
    assert not same(plain.state_dict()["tensors"], balanced.state_dict()["tensors"])
    assert balanced.state_dict()["memory"]["loss"]


# ETA and EATA


def test_the_default_d_meets_both_published_settings_and_lets_sure_predictions_in():
    assert redundancy(10) == pytest.approx(0.4)
    assert redundancy(1000) == pytest.approx(0.05)
    for classes in (2, 3, 10, 100, 1000, 20_000):
        assert classes**-0.5 < redundancy(classes) <= 1


def test_eata_stays_nearer_to_the_source_than_eta_where_the_source_cares():
    drift, moved = {}, {}
    for weight in (0.0, 1e4):
        adapter = adapter_of(resnet(), "eata", anchor_weight=weight, lr=3e-3)
        run(adapter, stream(10))
        drift[weight] = adapter.method.drift().item()
        moved[weight] = adapter.state_dict()["tensors"]
    eta = adapter_of(resnet(), "eta", lr=3e-3)
    run(eta, stream(10))
    assert same(moved[0.0], eta.state_dict()["tensors"])
    assert 0 < drift[1e4] < 0.5 * drift[0.0]


def test_the_anchor_is_any_source_of_batches_and_leaves_the_model_as_it_is():
    pairs = [(x, torch.zeros(len(x))) for x in anchor()]
    adapters = [adapter_of(resnet(), "eata", anchor=given, statistics="ema") for given in (pairs, iter(anchor()))]
    plain = adapter_of(resnet(), "eta", statistics="ema")
    for adapter in adapters:
        assert same(adapter.state_dict()["tensors"], plain.state_dict()["tensors"])
        assert all((f >= 0).all() for f in adapter.method._fisher)
        assert all(p.grad is None for p in adapter.method.parameters.values())
    assert same(run(adapters[0], stream(2)), run(adapters[1], stream(2)))
    assert adapter_of(resnet(), "eata", anchor=anchor()[0]).method._fisher[0].sum() > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, 'anchor must be batches of source images, got None; pass anchor=... or use method="eta"'),
        ([], "anchor must give finite gradients, got no batch"),
        ([torch.full((2, 3, SIDE, SIDE), math.nan)], "NaN or infinite values"),
        (["images"], "a batch must be a tensor"),
    ],
)
def test_eata_refuses_what_is_no_anchor(given, says):
    with pytest.raises(ValueError, match=says):
        adapt(resnet(), "eata", anchor=given)


# SAR


def test_sar_recovers_below_a_share_of_the_largest_entropy_not_below_fixed_nats():
    """Deliberate: the published 0.2 nats are for 1,000 classes."""
    x, bound = stream(1)[0], 0.2 * math.log(CLASSES) / math.log(1000)
    for factor in (100.0, 2000.0):
        adapter = adapter_of(resnet(), "sar", factor, lr=0.0, rho=0.0)
        average = h(factor * configured(resnet())[0](x))
        average = average[average < 0.4 * math.log(CLASSES)].mean().item()
        adapter(x)
        assert average < 0.2
        if average < bound:
            assert adapter.history[-1].reason.startswith(f"collapse: the entropy averaged {average:.3g}, below 0.0519")
            assert adapter.history[-1].skipped
        else:
            assert adapter.method.average == pytest.approx(average, rel=1e-4)
            assert adapter.steps == 1
    assert average < bound  # the second factor
    never = adapter_of(resnet(), "sar", 2000.0, recovery=0.0)
    never(x)
    assert never.steps == 1


def test_sar_starts_its_average_anew_after_a_recovery():
    """Deliberate: with a stale average the next batch, which is no collapse, would be taken for one."""
    factors, model = iter([40.0, 40.0, 4000.0, 4000.0, 40.0, 40.0]), resnet()
    adapter = adapt(model, "sar", lr=1e-2, recovery=1.0, loss="abl", statistics="ema", full_batch=0)
    source, x = adapter.state_dict(), stream(1)[0]
    seen = []
    for factor in factors:
        adapter.method.forward = functools.partial(sharp, factor)
        adapter(x)
        seen.append((adapter.method.average, adapter.history[-1].reason))
        if adapter.history[-1].reason:
            break
    bound = 1.0 * math.log(CLASSES) / math.log(1000)
    assert len(seen) >= 1
    assert seen[-1][1].startswith("collapse")
    assert seen[-1][0] is None
    after = adapter.state_dict()
    assert same(after["tensors"], source["tensors"])
    assert same(after["memory"], source["memory"])
    mild = functools.partial(sharp, 12.0)
    adapter.method.forward = mild
    fresh = adapt(model, "sar", lr=1e-2, recovery=0.0, loss="abl", statistics="ema", full_batch=0, forward=mild)
    adapter(x), fresh(x)
    assert adapter.history[-1].reason is None
    assert adapter.method.average == fresh.method.average > bound


@pytest.mark.parametrize("method", ["sar", "deyo"])
def test_the_second_pass_leaves_the_statistics_of_the_first(method):
    every = {"margin": 2.0, "plpd": -1.0} if method == "deyo" else {"margin": 2.0}
    adapter, norm = adapter_of(resnet(), method, statistics="ema", **every), adapt(resnet(), "norm", statistics="ema")
    x = stream(1)[0]
    adapter(x), norm(x)
    assert adapter.steps == 1
    moments = {name: t for name, t in adapter.method.tensors().items() if "running" in name}
    assert same(moments, norm.state_dict()["tensors"])


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("fault", ["flat", "interrupted", "bad"])
def test_sar_comes_down_whatever_happens_above(guard, fault):
    calls = []

    def second(model, x):
        calls.append(len(x))
        if len(calls) != 2:
            return 18 * model(x)
        if fault == "interrupted":
            raise KeyboardInterrupt
        return model(x) * (1e-3 if fault == "flat" else math.nan)

    adapter = adapt(resnet(), "sar", forward=second, guard=guard, rho=1.0)
    before = [p.detach().clone() for p in adapter.method.parameters.values()]
    if fault == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            adapter(stream(1)[0])
    else:
        adapter(stream(1)[0])
        assert adapter.skipped == 1
    assert same(list(adapter.method.parameters.values()), before)
    assert adapter.method.average is None
    adapter(stream(1)[0])
    assert adapter.history[-1].reason is None


# DeYO


def test_another_seed_draws_other_patches():
    first, again, other = (run(adapter_of(resnet(), "deyo", seed=seed), stream(3)) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("transform", ["patch", "pixel", "occ", lambda x, generator: x.flip(3)])
def test_every_transform_adapts(transform):
    adapter = adapter_of(resnet(), "deyo", transform=transform, plpd=-1.0)
    run(adapter, stream(2))
    assert adapter.steps == 2


def test_patches_change_places_whole_and_each_image_by_itself():
    x = torch.arange(2 * 3 * 16 * 16.0).reshape(2, 3, 16, 16)
    y = shuffle_patches(x, torch.Generator().manual_seed(3))
    assert torch.equal(y, destroyed(x, torch.Generator().manual_seed(3)))
    assert not torch.equal(y[0] - x[0], y[1] - x[1])
    z = shuffle_pixels(x, torch.Generator().manual_seed(3))
    for changed in (y, z):
        assert torch.equal(changed.flatten(2).sort().values, x.flatten(2))
    assert torch.equal(z[:, 1] - z[:, 0], torch.full((2, 16, 16), 256.0))  # the channels of a pixel stay together


def test_what_patches_do_not_divide_stays_and_the_middle_is_covered():
    x = torch.randn(2, 3, 10, 7)
    y = shuffle_patches(x, torch.Generator().manual_seed(0))
    assert torch.equal(y[:, :, 8:], x[:, :, 8:])
    assert torch.equal(y[:, :, :, 4:], x[:, :, :, 4:])
    assert not torch.equal(y, x)
    x = torch.randn(2, 3, 8, 12)
    y = occlude(x)
    assert torch.equal(y[0, 1, 2:6, 3:9], x[0, 1].mean().expand(4, 6))
    y[:, :, 2:6, 3:9] = x[:, :, 2:6, 3:9]
    assert torch.equal(y, x)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"transform": "blur"}, "transform must be one of patch, pixel, occ or a function .*, got 'blur'"),
        ({"rate": 1}, "deyo does not know rate; it takes margin, weight_margin, plpd, transform, seed, lr, optimizer"),
    ],
)
def test_refusals(options, says):
    with pytest.raises(ValueError, match=says):
        adapt(resnet(), "deyo", **options)


def test_images_too_small_for_patches_are_refused():
    adapter = adapter_of(resnet(), "deyo", margin=2.0)
    with pytest.raises(
        ValueError, match=r"must be \(N, C, H, W\) of at least 4 x 4, got \(2, 3, 3, 3\); pass transform="
    ):
        adapter(torch.randn(2, 3, 3, 3))
