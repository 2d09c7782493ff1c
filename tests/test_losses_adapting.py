"""Losses inside an adapter: what they remember, when they forget, and what the caller gets and is told."""

import io
import math

import pytest
import torch
from tiny import calibrated, images, resnet

import ttaq
from ttaq.adaptation import ABL, DOT, GradientMethod, adapt, entropy

LOSSES = {
    "abl": "abl",
    "abl-corrected": "abl-corrected",
    "dot": "dot",
    "entropy form": ABL("entropy", tau=2.0, momentum=0.5),
    "pseudo form": ABL("pseudo", beta=1.0, momentum=0.5),
}
SKEW = torch.tensor([3.0, 0, 0, 0, 0, 0])
MODELS = {"float": resnet, "packed": lambda: ttaq.pack(calibrated("resnet", "w4a4"))}
ADJUSTED = "adjusted to the class prior of the batch"


def lopsided(model, x):
    """Run the network as one that favours its first class."""
    return 6 * model(x) + SKEW.to(x.dtype)


def tent(model, loss, **options):
    return adapt(model, "tent", loss=loss, lr=1e-2, forward=lopsided, full_batch=0, **options)


def run(adapter, seeds, n=24):
    return [adapter(images(n, seed=seed)) for seed in seeds]


def memory(adapter):
    return adapter.method.balance.state_dict()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_states_and_reset_are_exact(model, loss):
    model = MODELS[model]()
    adapter = tent(model, LOSSES[loss])
    start, first = adapter.state_dict(), run(adapter, range(3))
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    held = adapter.state_dict()
    later = run(adapter, range(3, 6))
    file.seek(0)
    resumed = tent(model, LOSSES[loss])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(resumed.state_dict(), held)
    assert same(run(resumed, range(3, 6)), later)
    assert same(resumed.state_dict(), adapter.state_dict())
    assert not same(memory(resumed), held["memory"]["loss"])
    adapter.reset()
    assert same(adapter.state_dict(), start)
    assert memory(adapter) == {}
    assert same(run(adapter, range(3)), first)
    assert all(math.isfinite(step.loss) for step in adapter.history)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_changes_what_is_learned(loss):
    balanced, plain = tent(resnet(), LOSSES[loss]), tent(resnet(), "entropy")
    run(balanced, range(3))
    run(plain, range(3))
    assert not same(balanced.state_dict()["tensors"], plain.state_dict()["tensors"])


def test_the_callers_loss_is_not_shared():
    loss = ABL("entropy")
    one, two = tent(resnet(), loss), tent(resnet(), loss)
    run(one, range(2))
    assert loss.state_dict() == memory(two) == {}
    assert one.method.balance is not loss
    used = ABL()
    used.observe(torch.randn(8, 6))
    assert memory(tent(resnet(), used)) == {}
    assert used.state_dict() != {}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("before", [0, 2])
def test_a_skipped_step_leaves_the_memory_as_it_was(loss, before):
    def overflowing(model, x):
        return torch.where(x.amax((1, 2, 3), keepdim=False)[:, None] > 50, torch.inf, lopsided(model, x))

    adapter = adapt(resnet(), "tent", loss=LOSSES[loss], forward=overflowing)
    run(adapter, range(before))
    held = adapter.state_dict()["memory"]
    assert (held["loss"] == {}) == (before == 0)
    for value, reason in ((math.nan, "input"), (math.inf, "input"), (60.0, "logits")):
        x = images(24, seed=9)
        x[3, 0, 0, 0] = value
        assert not adapter(x)[3].isfinite().any()
        assert adapter.history[-1].reason.startswith("NaN or Inf in")
        assert reason in adapter.history[-1].reason
        assert same(adapter.state_dict()["memory"], held)
    adapter(images(0))
    adapter.predict(images(24))
    assert same(adapter.state_dict()["memory"], held)


def test_the_history_says_when_logits_were_adjusted():
    adapter, raw = tent(resnet(), "abl-corrected"), tent(resnet(), "abl")
    x = images(24)
    expected, how = ABL(correct=True).answer(raw.predict(x))
    assert how == ADJUSTED
    assert torch.equal(adapter.predict(x), expected)
    with adapter.frozen():
        assert torch.equal(adapter(x), expected)
    assert torch.equal(adapter(x), expected)
    assert not torch.equal(expected, raw(x))
    assert adapter.history[-1].returned == f"logits, {ADJUSTED}"
    assert raw.history[-1].returned == "logits"
    assert same(adapter.state_dict()["tensors"], raw.state_dict()["tensors"])
    assert adapter.history[-1].entropy == raw.history[-1].entropy
    adapter(x[:1])
    assert adapter.history[-1].returned == "logits"
    adapter(x[:0])
    assert adapter.history[-1].returned == "empty logits"


def test_bad_images_do_not_spoil_the_correction_of_the_others():
    adapter, undisturbed = tent(resnet(), "abl-corrected"), tent(resnet(), "abl-corrected")
    x = images(24)
    x[5, 1] = math.nan
    good = torch.arange(24) != 5
    logits = adapter(x)
    assert logits[5].isnan().all()
    assert torch.equal(logits[good], undisturbed.predict(x[good]))
    what = "NaN logits for 1 images, the others predicted without them"
    assert adapter.history[-1].returned == f"{what}, {ADJUSTED}"
    assert adapter(torch.full_like(x, math.nan)).isnan().all()
    assert adapter.history[-1].returned.startswith("NaN logits for 24 images")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_batches_and_half_precision(loss, dtype):
    adapter = tent(resnet().to(dtype), LOSSES[loss])
    for n in (1, 0, 5, 1):
        logits = adapter(images(n).to(dtype))
        assert (logits.shape, logits.dtype) == ((n, 6), dtype)
        assert logits.isfinite().all()
    assert (adapter.steps, adapter.skipped) == (3, 1)


def test_changing_dtype_keeps_the_memory():
    adapter = tent(resnet(), "abl")
    run(adapter, range(2))
    held = memory(adapter)
    adapter.double()
    assert adapter(images(24).double()).dtype == torch.float64
    assert adapter.steps == 3
    assert memory(adapter)["frequency"].dtype == held["frequency"].dtype == torch.float32


def test_a_method_that_selects_multiplies_its_mask_in():
    class Selecting(GradientMethod):
        def loss(self, x, logits):
            return (self.balance.terms(logits) * (entropy(logits) < 1.0)).mean()

    adapter = adapt(resnet(), Selecting, loss=DOT(), forward=lopsided)
    run(adapter, range(3))
    assert adapter.steps == 3
    assert memory(adapter)["frequency"].argmax() == 0


def test_the_state_of_another_loss_is_refused_and_changes_nothing():
    states = {}
    for name in ("abl", "dot", "entropy"):
        adapter = tent(resnet(), name)
        run(adapter, range(2))
        states[name] = adapter.state_dict()
    for mine, theirs in (("abl", "dot"), ("dot", "abl"), ("entropy", "abl")):
        adapter = tent(resnet(), mine)
        run(adapter, range(1))
        before = adapter.state_dict()
        with pytest.raises(ValueError, match=f"the loss '{mine}' does not; adapt with the loss"):
            adapter.load_state_dict(states[theirs])
        assert same(adapter.state_dict(), before)


def test_losses_are_refused_in_a_sentence():
    for loss in ("able", ABL, None):
        with pytest.raises(ValueError, match="adapt: loss must be one of entropy, abl, abl-corrected, dot or a Loss"):
            tent(resnet(), loss)
    with pytest.raises(ValueError, match="source does not know loss"):
        adapt(resnet(), "source", loss="abl")
