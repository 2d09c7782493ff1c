import pytest
import torch
from tiny import assert_unchanged, calibrated, images, input_of, resnet, snapshot, vit
from torch import nn

import ttaq
from ttaq import Recipe, calibrate, prepare
from ttaq.quantizers import ActivationQuantizer, Quantizer


def ranges(model):
    return {n: (m.scale.detach().clone(), m.zero.clone()) for n, m in model.named_modules() if isinstance(m, Quantizer)}


def test_every_range_is_set_and_nothing_else_changes():
    model = prepare(vit(), "w4a4").train()
    before = snapshot(model)
    report = calibrate(model, [input_of("vit")])
    after = snapshot(model)
    assert report is model.ttaq_report
    inputs = report["calibration"].pop("inputs")
    assert report["calibration"] == {"images": 8, "unseen": []}
    assert list(inputs) == ["low", "high", "mean", "std", "clipped"]
    for key in ("modes", "flags", "kinds", "hooks"):
        assert after[key] == before[key]
    changed = {n for n, t in before["tensors"].items() if not torch.equal(after["tensors"][n], t)}
    assert changed
    assert all(n.endswith(("_quantizer.scale", "_quantizer.zero")) for n in changed)
    assert all(q.ready for q in model.modules() if isinstance(q, Quantizer))


def test_ranges_are_those_of_the_float_model():
    """The quantised layers before a layer leave no trace in its range."""
    model = prepare(resnet(), Recipe.parse("w2a2", first_last=None))
    calibrate(model, [input_of("resnet")])
    first = ranges(model)
    calibrate(model, [input_of("resnet")])
    assert all(torch.equal(a, b) for n in first for a, b in zip(first[n], ranges(model)[n], strict=True))
    seen = []
    plain = resnet()
    plain.linear.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    plain(input_of("resnet"))
    own = ActivationQuantizer(model.linear.input_quantizer.spec)
    own.fit(seen[0])
    assert torch.equal(own.scale, model.linear.input_quantizer.scale)


def test_the_same_seed_gives_the_same_ranges_and_leaves_the_global_state():
    state = torch.get_rng_state()
    one, other, third = (prepare(resnet()) for _ in range(3))
    x = images(64)
    torch.set_rng_state(state)
    calibrate(one, [x])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    calibrate(other, [x])
    calibrate(third, [x], seed=1)
    same = [torch.equal(a[0], b[0]) for a, b in zip(ranges(one).values(), ranges(other).values(), strict=True)]
    assert all(same)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(ranges(one).values(), ranges(third).values(), strict=True))


@pytest.mark.parametrize(
    "batches",
    [
        [images(4), images(4, seed=2)],
        [(images(4), torch.arange(4)), [images(4, seed=2), None]],
        ((images(4), 0), (images(4, seed=2), 0)),
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.cat([images(4), images(4, seed=2)]), torch.arange(8)), batch_size=4
        ),
        (x for x in [images(4), images(4, seed=2)]),
    ],
    ids=["tensors", "pairs", "tuple", "loader", "generator"],
)
def test_batches_of_every_form(batches):
    reference = prepare(resnet())
    calibrate(reference, [images(4), images(4, seed=2)])
    model = prepare(resnet())
    assert calibrate(model, batches)["calibration"]["images"] == 8
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ranges(model).values(), ranges(reference).values(), strict=True))


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = resnet()

    def forward(self, pixel_values, scale=None):
        y = self.inner(pixel_values)
        return {"logits": y if scale is None else y * scale.mean()}


def test_dicts_and_forward():
    batch = {"pixel_values": images(), "labels": torch.arange(8), "scale": torch.ones(8), "note": "kept out"}
    model = prepare(Keyed())
    assert calibrate(model, [batch])["calibration"]["images"] == 8
    called = []

    def forward(net, entry):
        called.append(entry.keys())
        return net(entry["pixel_values"])

    calibrate(model, [batch], forward=forward)
    assert [set(keys) for keys in called] == [{"pixel_values", "scale"}]


def test_under_inference_mode_and_no_grad():
    for context in (torch.no_grad, torch.inference_mode):
        model = prepare(resnet())
        with context():
            calibrate(model, [images()])
        model.train()(images()).square().sum().backward()
        assert model.conv1.weight.grad is not None


def test_weights_without_activations_and_the_reverse():
    model = prepare(resnet(), "w4a16")
    assert calibrate(model, [images()])["calibration"]["unseen"] == []
    assert model.conv1.weight_quantizer.ready
    model = prepare(resnet(), "w16a8")
    calibrate(model, [images()])
    assert model.conv1.input_quantizer.ready


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the calibration set is empty; pass a re-iterable of batches, some hundred images"),
        (iter(()), "the calibration set is empty"),
        ([images()[:0]], "batch 0 holds no image; drop it"),
        ([images(), images() * torch.nan], "batch 1 holds NaN or infinite values; clean the calibration images"),
        ([images(), images(), images() / 0], "batch 2 holds NaN or infinite values"),
        ([(images() * torch.nan, 1)], "batch 0 holds NaN"),
        (["image"], r"a batch must be a tensor, an \(x, y\) pair or a dict of tensors, got str"),
        ([None], "a batch must be .*, got NoneType"),
        ([()], "a batch must be .*, got tuple"),
        ([{}], "batch 0 is a dict without tensors"),
        (None, "wanted a re-iterable of batches, got NoneType; pass a list of image tensors"),
        (3, "wanted a re-iterable of batches, got int"),
    ],
    ids=[
        "nothing",
        "spent",
        "no-image",
        "nan",
        "infinite",
        "nan-pair",
        "text",
        "none-inside",
        "empty-pair",
        "empty-dict",
        "none",
        "number",
    ],
)
def test_images_that_do_not_serve(batches, message):
    model = prepare(resnet())
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^calibrate: {message}"):
        calibrate(model, batches)
    assert_unchanged(model, before)
    assert "calibration" not in model.ttaq_report


def test_one_nan_in_the_last_batch():
    model = calibrated("resnet", "w4a4")
    before = snapshot(model)
    last = images()
    last[7, 2, 15, 15] = torch.nan
    for verb in (calibrate, lambda m, b: ttaq.reconstruct(m, b, steps=1, progress=False)):
        with pytest.raises(ValueError, match=r"^\w+: batch 2 holds NaN or infinite values"):
            verb(model, [images(), images(), last])
    assert_unchanged(model, before)


def test_weights_with_nan_are_named():
    for damage in (torch.nan, torch.inf):
        model = prepare(resnet())
        with torch.no_grad():
            model.layer2[0].conv2.weight[0, 0, 0, 0] = damage
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"^calibrate: the weight of layer2.0.conv2 holds NaN or infinite values"):
            calibrate(model, [images()])
        assert_unchanged(model, before)


def test_activations_with_nan_are_named():
    model = prepare(resnet())
    model.layer1[0].bn1.running_var.fill_(-1.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^calibrate: the input of layer1.0.conv2.input_quantizer holds NaN"):
        calibrate(model, [images()])
    assert_unchanged(model, before)


def test_models_that_cannot_be_calibrated():
    with pytest.raises(ValueError, match=r"^calibrate: the model has no quantised layers; call ttaq.prepare first$"):
        calibrate(resnet(), [images()])
    with pytest.raises(ValueError, match=r"^calibrate: the model is on meta and holds no weights; load them first$"):
        calibrate(prepare(nn.Sequential(nn.Linear(4, 4, device="meta"))), [torch.randn(2, 4)])
    apart = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta")))
    with pytest.raises(ValueError, match="the model must be on one device, got cpu, meta"):
        calibrate(apart, [torch.randn(2, 4)])


def test_an_error_of_the_model_leaves_no_hook():
    model = prepare(resnet())
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        calibrate(model, [images(channels=4)])
    assert_unchanged(model, before)
