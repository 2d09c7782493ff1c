"""The Adapter: what it returns, what it leaves alone, what it remembers and what it gives back."""

import contextlib
import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ttaq.adaptation import adapt

ALL = [
    ("source", {}),
    ("norm", {}),
    ("norm", {"statistics": "blend"}),
    ("norm", {"statistics": "ema"}),
    ("tent", {}),
    ("tent", {"statistics": "ema", "steps": 2}),
    ("eta", {"margin": 2.0, "d": 2.0}),
    ("eata", {"margin": 2.0, "d": 2.0, "anchor": [torch.randn(4, 3, 8, 8)], "statistics": "ema", "steps": 2}),
    ("sar", {"margin": 2.0, "statistics": "ema"}),
    ("deyo", {"margin": 2.0, "plpd": -1.0, "statistics": "blend"}),
]
STREAM = [7, 7, 7, 1, 4]


def cnn():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 5),
    )  # fmt: skip
    model[0].weight.requires_grad_(False)
    model.register_buffer("words", torch.randint(0, 255, (64,), dtype=torch.uint8))
    return model


def vit():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5))


def images(n=7, seed=0):
    return 2 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 1


def run(adapter, sizes, seed=0):
    return [adapter(images(n, seed + i)) for i, n in enumerate(sizes)]


def fingerprint(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("method", "options"), ALL)
@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_not_touched(method, options, training):
    model = cnn().train(training)
    model[1].eval()
    modules = list(model.modules())
    state, modes, flags = fingerprint(model)
    adapter = adapt(model, method, **options)
    run(adapter, STREAM)
    adapter.train()
    adapter(images())
    adapter.export()
    adapter.reset()
    after, modes_after, flags_after = fingerprint(model)
    assert_same(state, after)
    assert (modes, flags) == (modes_after, flags_after)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_weights_and_codes_are_shared_and_what_adapts_is_not():
    model = cnn()
    adapter = adapt(model, "tent")
    mine, theirs = dict(adapter.model.named_parameters()), dict(model.named_parameters())
    shared = {name for name in mine if mine[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == {"0.weight", "4.weight", "4.bias", "10.weight", "10.bias"}
    assert adapter.model.words.data_ptr() == model.words.data_ptr()
    assert adapter.model[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()


def test_inplace_adapts_the_callers_model():
    model = vit()
    adapter = adapt(model, "tent", inplace=True)
    assert adapter.model is model
    before = model[2].weight.detach().clone()
    adapter(images())
    assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize(("method", "options"), ALL)
def test_calling_is_predicting_and_then_updating(method, options):
    one, two = adapt(cnn(), method, **options), adapt(cnn(), method, **options)
    for i, n in enumerate(STREAM):
        x = images(n, i)
        before = copy.deepcopy(two.state_dict()["tensors"])
        logits = two.predict(x)
        assert_same(before, two.state_dict()["tensors"])
        assert torch.equal(one(x), logits)
        step = two.update(x)
        assert (step.batch, step.images, step.skipped) == (i, n, False)
        assert logits.shape == (n, 5)
        assert torch.isfinite(logits).all()
        assert not logits.requires_grad
    assert_same(one.state_dict()["tensors"], two.state_dict()["tensors"])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_changes_nothing(context):
    expected = run(adapt(cnn(), "tent"), STREAM)
    with context():
        model = cnn()
        adapter = adapt(model, "tent")
        outputs = run(adapter, STREAM)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
        adapter.export()(images())
        adapter.load_state_dict(adapter.state_dict())
        adapter.reset()
    outputs += run(adapter, STREAM)
    for a, b in zip(outputs, expected + expected, strict=True):
        assert torch.equal(a, b)
        assert not a.is_inference()


@pytest.mark.parametrize(("method", "options"), ALL)
def test_reset_restores_bits(method, options):
    adapter = adapt(cnn(), method, **options)
    before = adapter.state_dict()
    first = run(adapter, STREAM)
    if method != "source":
        assert any(not torch.equal(t, before["tensors"][n]) for n, t in adapter.method.tensors().items())
    adapter.reset()
    after = adapter.state_dict()
    assert_same(before["tensors"], after["tensors"])
    assert (before["memory"], before["counters"]) == (after["memory"], after["counters"])
    assert all(torch.equal(a, b) for a, b in zip(first, run(adapter, STREAM), strict=True))
    assert len(adapter.history) == 2 * len(STREAM)


@pytest.mark.parametrize(("method", "options"), ALL)
def test_a_saved_state_continues_bit_for_bit(method, options):
    model = cnn()
    adapter = adapt(model, method, **options)
    run(adapter, STREAM)
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    expected = run(adapter, STREAM, seed=50)
    file.seek(0)
    resumed = adapt(model, method, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.steps, resumed.images) == (5, sum(STREAM))
    assert all(torch.equal(a, b) for a, b in zip(expected, run(resumed, STREAM, seed=50), strict=True))
    assert_same(adapter.state_dict()["tensors"], resumed.state_dict()["tensors"])


def test_the_state_holds_no_weights_and_no_live_tensors():
    adapter = adapt(cnn(), "tent")
    state = adapter.state_dict()
    kept = {name: t.clone() for name, t in state["tensors"].items()}
    assert {name.rpartition(".")[2] for name in kept} == {"weight", "bias", "running_mean", "running_var"}
    assert sum(t.numel() for t in kept.values()) == 4 * 24
    run(adapter, STREAM)
    assert_same(kept, state["tensors"])
    later = adapter.state_dict()
    kept = later["memory"]["optimizer"]["state"][0]["exp_avg"].clone()
    run(adapter, STREAM)
    assert torch.equal(kept, later["memory"]["optimizer"]["state"][0]["exp_avg"])


def test_foreign_states_are_refused_and_change_nothing():
    adapter = adapt(cnn(), "tent")
    run(adapter, STREAM)
    before = adapter.state_dict()["tensors"]
    good = adapt(cnn(), "tent").state_dict()
    cases = [
        (adapt(cnn(), "norm").state_dict(), "expected format 3 of method 'tent', got 3 of 'norm'"),
        ({**good, "format": 9}, "got 9 of"),
        ({**good, "tensors": {**good["tensors"], "1.weight": torch.zeros(3)}}, r"1.weight must have shape \(8,\), got"),
        ({**good, "tensors": {}}, "must have shape"),
        ({"weights": 1}, "no state of an Adapter"),
    ]
    for state, says in cases:
        with pytest.raises(ValueError, match=says):
            adapter.load_state_dict(state)
        assert_same(before, adapter.state_dict()["tensors"])


def test_frozen_predicts_without_adapting():
    adapter = adapt(cnn(), "tent")
    run(adapter, STREAM)
    before, batches = adapter.state_dict(), len(adapter.history)
    with adapter.frozen() as same:
        assert same is adapter
        assert torch.equal(adapter(images()), adapter(images()))
        with pytest.raises(ValueError, match="frozen"):
            adapter.update(images())
    assert_same(before["tensors"], adapter.state_dict()["tensors"])
    assert len(adapter.history) == batches
    with contextlib.suppress(KeyError), adapter.frozen():
        raise KeyError
    adapter(images())
    assert len(adapter.history) == batches + 1


@pytest.mark.parametrize(("method", "options"), ALL)
def test_export_is_plain_independent_and_equal(method, options):
    model = cnn()
    adapter = adapt(model, method, **options)
    run(adapter, STREAM[:3])
    x = images(9, 99)
    exported = adapter.export()
    assert [type(m) for m in exported.modules()] == [type(m) for m in model.modules()]
    assert not any(m.training for m in exported.modules())
    assert exported.state_dict().keys() == model.state_dict().keys()
    assert [p.requires_grad for p in exported.parameters()] == [p.requires_grad for p in model.parameters()]
    for tensors in (exported.state_dict(), dict(exported.named_parameters())):
        addresses = {t.data_ptr() for t in tensors.values()}
        assert not addresses & {t.data_ptr() for t in model.state_dict().values()}
        assert not addresses & {t.data_ptr() for t in adapter.model.state_dict().values()}
    for name, tensor in adapter.method.tensors().items():
        assert torch.equal(exported.state_dict()[name], tensor)
    y = exported(x)
    run(adapter, STREAM)
    assert torch.equal(exported(x), y)


def test_export_after_a_batch_predicts_that_batch_alike():
    adapter = adapt(cnn(), "norm")
    x = images(9)
    torch.testing.assert_close(adapter.export()(x), cnn().eval()(x))
    logits = adapter(x)
    torch.testing.assert_close(adapter.export()(x), logits, rtol=1e-4, atol=1e-5)


def test_history_is_bounded_and_says_what_happened():
    adapter = adapt(vit(), "tent", history=3)
    run(adapter, STREAM)
    assert len(adapter.history) == 3
    assert [step.batch for step in adapter.history] == [2, 3, 4]
    assert [step.images for step in adapter.history] == [7, 1, 4]
    assert all(step.loss == pytest.approx(step.entropy) and step.seconds > 0 for step in adapter.history)
    assert (adapter.steps, adapter.images, adapter.skipped) == (5, 26, 0)


@pytest.mark.parametrize(("method", "options"), ALL)
def test_an_empty_batch_takes_no_step(method, options):
    adapter = adapt(cnn(), method, **options)
    adapter(images())
    before = adapter.state_dict()["tensors"]
    logits = adapter(images()[:0])
    assert logits.shape == (0, 5)
    assert adapter.predict(images()[:0]).shape == (0, 5)
    assert_same(before, adapter.state_dict()["tensors"])
    assert adapter.history[-1].reason == "empty batch"
    assert (adapter.steps, adapter.skipped) == (1, 1)


def test_forward_picks_the_logits_out():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = vit()

        def forward(self, pixels):
            return SimpleNamespace(logits=self.body(pixels))

    expected = run(adapt(vit(), "tent"), STREAM)
    adapter = adapt(Wrapped(), "tent", forward=lambda model, x: model(pixels=x).logits)
    assert all(torch.equal(a, b) for a, b in zip(expected, run(adapter, STREAM), strict=True))
    with pytest.raises(ValueError, match="got SimpleNamespace; pass forward="):
        adapt(Wrapped(), "tent")(images())


def test_wrong_batches_are_refused():
    adapter = adapt(vit(), "tent")
    with pytest.raises(ValueError, match="on meta and the model on cpu"):
        adapter(images().to("meta"))
    with pytest.raises(ValueError, match=r"must be a tensor of shape.*got list"):
        adapter([images()])
    with pytest.raises(ValueError, match=r"got \(7, 7, 6, 6\)"):
        adapt(nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)), "norm")(images())
    assert adapter.steps == 0


def test_a_copy_of_an_adapter_is_independent():
    adapter = adapt(cnn(), "tent")
    run(adapter, STREAM)
    twin, before = copy.deepcopy(adapter), adapter.state_dict()["tensors"]
    bad = images()
    bad[0] = torch.inf
    twin(bad)
    outputs = run(twin, STREAM)
    assert_same(before, adapter.state_dict()["tensors"])
    assert all(torch.equal(a, b) for a, b in zip(outputs, run(adapter, STREAM), strict=True))


def test_changing_dtype_takes_everything_along():
    adapter = adapt(cnn(), "tent")
    run(adapter, STREAM)
    adapter.double()
    logits = adapter(images().double())
    assert logits.dtype == torch.float64
    assert adapter.method.tensors()["1.running_mean"].dtype == torch.float64
    adapter.reset()
    expected = adapt(cnn(), "tent").state_dict()["tensors"]
    assert_same({k: v.float() for k, v in adapter.state_dict()["tensors"].items()}, expected)
    assert adapter.export()(images().double()).dtype == torch.float64


def test_shared_layers_stay_shared():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    adapter = adapt(model, "tent")
    adapter(images())
    assert adapter.model[0] is adapter.model[2]
    exported = adapter.export()
    assert exported[0] is exported[2]
    assert type(exported[0]) is nn.BatchNorm2d
