"""ETA, EATA, SAR and DeYO against straight lines from the papers; what they remember, select and refuse."""

import io
import math

import pytest
import torch
from straight_lines import (
    CLASSES,
    FACTOR,
    NETS,
    OPTIONS,
    PACKED,
    adapter_of,
    anchor,
    configured,
    destroyed,
    h,
    run,
    same,
    straight_deyo,
    straight_eta,
    straight_sar,
    stream,
)  # fmt: skip
from tiny import SIDE, resnet

from ttaq.adaptation import ABL, adapt
from ttaq.adaptation.selection import redundancy

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


def test_the_guard_watches_batches_without_a_selected_image_too():
    adapter = adapter_of(resnet(), "eta", margin=1e-6, guard=True)
    run(adapter, stream(3))
    assert adapter.skipped == adapter.guard.collapse.batches == 3
    assert adapter.guard.correlation.frequency


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


@pytest.mark.parametrize("method", ["sar", "deyo"])
def test_the_second_pass_leaves_the_statistics_of_the_first(method):
    every = {"margin": 2.0, "plpd": -1.0} if method == "deyo" else {"margin": 2.0}
    adapter, norm = adapter_of(resnet(), method, statistics="ema", **every), adapt(resnet(), "norm", statistics="ema")
    x = stream(1)[0]
    adapter(x), norm(x)
    assert adapter.steps == 1
    moments = {name: t for name, t in adapter.method.tensors().items() if "running" in name}
    assert same(moments, norm.state_dict()["tensors"])


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
