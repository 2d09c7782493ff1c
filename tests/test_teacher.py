"""CoTTA, RoTTA and ROID: the papers' numbers, what they remember, and what they survive."""

import copy
import io
import math

import pytest
import straight_teachers as straight
import torch
from test_bank import VISITS, domain
from tiny import calibrated, images, resnet, vit
from torch import nn

import ttaq
from ttaq.adaptation import METHODS, adapt
from ttaq.augment import distort

OPTIONS = {"cotta": {"views": 2}, "rotta": {"capacity": 12, "frequency": 10}, "roid": {}}
NETS = {"resnet": resnet, "vit": vit}
FORMS = {
    "float": lambda name: NETS[name](),
    "fake": lambda name: calibrated(name, "w4a4"),
    "packed": lambda name: ttaq.pack(calibrated(name, "w4a4")),
}
SIZES = [8, 8, 1, 13]


def stream(batches=20, n=16):
    return [(1 + 0.05 * i) * images(n, seed=i) + 0.05 * i for i in range(batches)]


def run(adapter, seeds, sizes=SIZES):
    return [adapter(images(n, seed=seed)) for seed, n in zip(seeds, sizes * 9, strict=False)]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def of_papers(method, model, batches, lr):
    views = straight.Views(7)
    if method == "cotta":
        outputs, averaged = straight.cotta(model, batches, views, threshold(model), 3, 0.05, lr=lr, momentum=0.9)
        assert 0 < averaged < len(batches)
        return outputs
    if method == "rotta":
        return straight.rotta(model, batches, views, 24, 20, lr=lr, nu=0.1)
    return straight.roid(model, batches, views, lr=lr)


def threshold(model):
    """Say how sure the source is in the middle of the stream."""
    model = straight.on_batch_statistics(model)
    return torch.stack([model(x).softmax(1).amax(1).mean() for x in stream()]).median().item() + 1e-4


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", OPTIONS)
def test_logits_equal_the_papers_over_twenty_batches(method, net):
    model, batches = NETS[net](), stream()
    options = {
        "cotta": {"threshold": threshold(model), "views": 3, "restore": 0.05, "teacher_momentum": 0.9},
        "rotta": {"capacity": 24, "frequency": 20, "nu": 0.1},
        "roid": {},
    }[method]
    expected = of_papers(method, model, batches, 1e-3)
    adapter = adapt(model, method, guard="finite", seed=7, full_batch=0, **options)
    for x, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(adapter(x), logits, rtol=0, atol=1e-5)
    assert adapter.skipped == 0
    still = of_papers(method, model, batches, 0.0)[-1]
    assert (expected[-1] - still).abs().max() > 1e-3  # what is compared did adapt


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", OPTIONS)
def test_every_form_adapts_and_goes_back_bit_for_bit(method, form, net):
    model = FORMS[form](net)
    adapter = adapt(model, method, lr=1e-2, **OPTIONS[method])
    start, first = adapter.state_dict(), run(adapter, range(8))
    assert all(step.reason is None for step in adapter.history)
    assert all(torch.isfinite(logits).all() for logits in first)
    assert not same(start["tensors"], adapter.state_dict()["tensors"])
    adapter.reset()
    assert same(start, adapter.state_dict())
    assert same(first, run(adapter, range(8)))


@pytest.mark.parametrize("method", OPTIONS)
def test_a_fake_quantised_and_a_packed_model_adapt_alike(method):
    fake, packed = (adapt(FORMS[form]("resnet"), method, **OPTIONS[method]) for form in ("fake", "packed"))
    for a, b in zip(run(fake, range(8)), run(packed, range(8)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", OPTIONS)
def test_a_saved_state_continues_bit_for_bit(method, net):
    model = FORMS["packed"](net)
    adapter = adapt(model, method, **OPTIONS[method])
    run(adapter, range(6))
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    twin, before, held = copy.deepcopy(adapter), adapter.state_dict(), copy.deepcopy(adapter.state_dict())
    later = run(adapter, range(6, 12))
    assert same(held, before)
    file.seek(0)
    resumed = adapt(model, method, **OPTIONS[method])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(later, run(resumed, range(6, 12)))
    assert same(later, run(twin, range(6, 12)))
    assert same(adapter.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", OPTIONS)
def test_predicting_changes_nothing_and_says_what_calling_says(method, net):
    adapter = adapt(NETS[net](), method, **OPTIONS[method])
    run(adapter, range(5))
    before, x = adapter.state_dict(), images(9, seed=30)
    logits = adapter.predict(x)
    assert same(before["tensors"], adapter.state_dict()["tensors"])
    assert same(before["memory"], adapter.state_dict()["memory"])
    assert torch.equal(adapter(x), logits)
    assert not logits.requires_grad


@pytest.mark.parametrize("method", OPTIONS)
def test_the_callers_model_stays_and_the_export_predicts_alike(method):
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    adapter = adapt(model, method, **OPTIONS[method] | ({"correct": False} if method == "roid" else {}))
    run(adapter, range(6))
    x = images(9, seed=40)
    exported = adapter.export()
    assert exported.state_dict().keys() == before.keys()
    assert not any(isinstance(m, ttaq.adaptation.AdaptiveBatchNorm) for m in exported.modules())
    if method == "rotta":
        torch.testing.assert_close(exported(x), adapter.predict(x), rtol=1e-4, atol=1e-5)
    else:
        exported = straight.on_batch_statistics(exported)
        torch.testing.assert_close(exported(x), adapter.predict(x), rtol=1e-4, atol=1e-5)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", OPTIONS)
def test_single_images_are_predicted_and_learned_from(method, net):
    adapter = adapt(NETS[net](), method, **OPTIONS[method])
    for seed in range(12):
        assert torch.isfinite(adapter(images(1, seed=seed))).all()
    assert adapter.skipped == 0
    assert all(math.isfinite(step.loss) for step in adapter.history if step.loss is not None)
    assert any(step.loss is not None for step in adapter.history)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", OPTIONS)
def test_bad_and_empty_batches_leave_no_trace(method, form):
    model = FORMS[form]("resnet")
    adapter, calm = (adapt(model, method, guard="finite", **OPTIONS[method]) for _ in range(2))
    bad = images(6, seed=50)
    bad[2, 0, 3, 3] = math.nan
    run(adapter, range(3))
    run(calm, range(3))
    assert adapter(bad)[[0, 1, 3, 4, 5]].isfinite().all()
    assert adapter(images(6)[:0]).shape == (0, 6)
    assert [step.reason for step in list(adapter.history)[-2:]] == ["NaN or Inf in input", "empty batch"]
    assert same(run(adapter, range(3, 7)), run(calm, range(3, 7)))
    assert same(adapter.state_dict()["tensors"], calm.state_dict()["tensors"])
    assert same(adapter.state_dict()["memory"], calm.state_dict()["memory"])


@pytest.mark.parametrize("method", OPTIONS)
def test_a_step_that_goes_wrong_halfway_leaves_no_trace(method):
    spoil = []

    def augment(x, generator):
        return distort(x, generator) * (math.nan if spoil else 1.0)

    adapter = adapt(resnet(), method, augment=augment, guard="finite", **OPTIONS[method])
    run(adapter, range(4))
    before = adapter.state_dict()
    spoil.append(True)
    adapter(images(12, seed=9))
    assert adapter.history[-1].reason.startswith("NaN or Inf in")
    after = adapter.state_dict()
    assert same(before["tensors"], after["tensors"])
    assert same(before["memory"], after["memory"])


@pytest.mark.parametrize("method", OPTIONS)
def test_changing_dtype_takes_everything_along(method):
    adapter = adapt(resnet(), method, **OPTIONS[method])
    start = adapter.state_dict()["tensors"]
    run(adapter, range(4))
    adapter.double()
    for seed in range(4, 8):
        assert adapter(images(12, seed=seed).double()).dtype == torch.float64
    assert adapter.skipped == 0
    assert all(t.dtype == torch.float64 for t in adapter.method.tensors().values())
    adapter.reset()
    assert same(start, {name: t.float() for name, t in adapter.state_dict()["tensors"].items()})


@pytest.mark.parametrize("method", OPTIONS)
def test_the_guard_and_the_bank_work_with_it(method):
    adapter = adapt(resnet(), method, bank=8, telemetry=2, **OPTIONS[method])
    for kind, seed in VISITS:
        adapter(domain(kind, seed))
    assert adapter.skipped == 0
    assert any("one returns" in event for step in adapter.history for event in step.events)


@pytest.mark.parametrize(("threshold", "passes"), [(0.0, 3), (1.0, 7)])
def test_cotta_passes_forward_three_times_or_views_more(threshold, passes):
    calls = []
    count = {"forward": lambda model, x: calls.append(len(x)) or model(x), "guard": "finite"}
    adapt(resnet(), "cotta", views=4, threshold=threshold, **count)(images(8))
    assert calls == [8] * passes


def test_cotta_chooses_its_threshold_by_the_number_of_classes():
    x, drawn = images(16), []
    for classes in (6, 300):
        head = nn.Linear(768, classes)
        model = nn.Sequential(nn.Flatten(), nn.LayerNorm(768), head)
        nn.init.normal_(head.weight, std=0.1)
        adapter = adapt(model, "cotta", views=2)
        confidence = model(x).softmax(1).amax(1).mean()
        assert 0.1 < confidence < 0.92
        adapter(x)
        drawn.append(adapter.state_dict()["memory"]["draws"])
    assert drawn == [3, 1]  # two views and what is restored; what is restored alone


def test_cotta_restores_the_students_elements_at_the_asked_rate():
    adapter = adapt(resnet(), "cotta", restore=1.0, lr=1e-2, threshold=0.0)
    run(adapter, range(3))
    tensors = adapter.state_dict()["tensors"]
    source = resnet().state_dict()
    assert all(torch.equal(tensors[f"student.{name}"], source[name]) for name in adapter.method.parameters)
    adapter = adapt(vit(), "cotta", restore=0.25, lr=1e-2, threshold=0.0)
    adapter(images(8))
    tensors, source = adapter.state_dict()["tensors"], vit().state_dict()
    back = torch.cat([tensors[f"student.{name}"] == source[name] for name in adapter.method.parameters])
    assert 0.15 < back.float().mean() < 0.35


def test_cotta_adapts_norms_and_biases_and_everything_on_request():
    names = set(adapt(FORMS["packed"]("vit"), "cotta").method.parameters)
    assert names == set(adapt(vit(), "cotta").method.parameters)
    assert names == {n for n in vit().state_dict() if n.endswith(".bias") or "norm" in n}
    everything = adapt(vit(), "cotta", parameters="*", views=2)
    everything(images(8))
    assert set(everything.method.parameters) == set(dict(vit().named_parameters()))
    assert not torch.equal(everything.method.tensors()["student.patches.weight"], vit().patches.weight)


@pytest.mark.parametrize("method", OPTIONS)
def test_activation_scales_learn_and_stay_positive(method):
    model = FORMS["packed"]("resnet")
    adapter = adapt(model, method, parameters="norm+activation_scales", lr=0.5, full_batch=0, **OPTIONS[method])
    start, first = adapter.state_dict(), run(adapter, range(6))
    tensors = adapter.method.tensors()
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("input_quantizer.scale")}
    assert all((scale > 0).all() for scale in scales.values())
    moved = [name for name, scale in scales.items() if not torch.equal(scale, start["tensors"][name])]
    assert moved
    assert any(name.startswith("student.") for name in moved) == (method != "roid")
    adapter.reset()
    assert same(start, adapter.state_dict())
    assert same(first, run(adapter, range(6)))


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("cotta", {"threshold": 92}, "threshold must lie in 0 to 1, got 92; use 0.92"),
        ("cotta", {"views": 0}, "views must be a whole number from 1, got 0"),
        ("cotta", {"restore": -1}, "restore must lie in 0 to 1"),
        ("rotta", {"nu": 2}, "nu must lie in 0 to 1, got 2; use 0.001"),
        ("rotta", {"frequency": 0}, "frequency must be a number of images from 1"),
        ("rotta", {"capacity": 0}, "capacity must be a number of images from 1, got 0; use 64"),
        ("roid", {"temperature": 0}, "temperature must be above 0"),
        ("roid", {"clip": 1.0}, "clip must lie above 0 and below 1"),
        ("roid", {"steps": 2}, "roid does not know steps; it takes lr"),
    ],
)
def test_refusals(method, options, says):
    assert method in METHODS
    with pytest.raises(ValueError, match=says):
        adapt(vit(), method, **options)
