import math

import pytest
import torch
from tiny import BUILDERS, Tied, Variety, assert_unchanged, calibrated, images, input_of, resnet, settle, snapshot, vit
from torch import nn

import ttaq
from ttaq import blockwise, caching, reconstruct, reconstruction
from ttaq.blockwise import Schedule
from ttaq.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer

QUICK = {"steps": 12, "batch_size": 4, "rounding_lr": 0.05, "progress": False}


def codes(model):
    return {n: m.codes for n, m in model.named_modules() if isinstance(m, WeightQuantizer)}


def output_error(model, plain, x):
    with torch.no_grad():
        return (model(x) - plain(x)).square().mean().item()


@pytest.mark.parametrize("rounding", ["adaround", "ste"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_losses_fall_and_so_does_the_error_of_the_output(name, rounding):
    model, plain, x = calibrated(name, "w2a8"), BUILDERS[name](), input_of(name, 32)
    before = output_error(model, plain, x)
    schedule = {"steps": 40, "batch_size": 16, "rounding_lr": 0.05 if rounding == "adaround" else 0.01}
    report = reconstruct(model, [x[:16], x[16:]], rounding=rounding, progress=False, **schedule)
    total = [sum(row[k] for row in report["blocks"]) for k in ("before", "after")]
    assert total[1] < 0.8 * total[0]
    assert output_error(model, plain, x) < 0.8 * before
    for quantizer in (m for m in model.modules() if isinstance(m, WeightQuantizer)):
        assert quantizer.codes.dtype == torch.uint8
        assert quantizer.codes.max() <= quantizer.spec.qmax
        assert quantizer.rounding is None
        assert (quantizer.scale > 0).all()


@pytest.mark.parametrize("rounding", ["adaround", "ste"])
def test_nothing_but_quantisers_changes(rounding):
    model = calibrated("resnet", "w3a4").train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    report = reconstruct(model, [input_of("resnet")], rounding=rounding, **QUICK)
    after = snapshot(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert report is model.ttaq_report
    for key in ("modes", "flags", "hooks", "plain"):
        assert after[key] == before[key], key
    assert set(after["kinds"]) == set(before["kinds"])
    changed = {n for n, t in before["tensors"].items() if not torch.equal(after["tensors"][n], t)}
    learned = ("input_quantizer.scale", "weight_quantizer.scale") if rounding == "ste" else ("input_quantizer.scale",)
    assert changed
    assert all(n.endswith(learned) for n in changed)
    assert set(after["tensors"]) - set(before["tensors"]) == {n + ".codes" for n in codes(model)}
    assert not any(p.grad is not None for p in model.parameters())
    assert all(m.drop == 0.0 for m in model.modules() if isinstance(m, ActivationQuantizer))


def test_the_same_seed_gives_the_same_codes():
    runs = []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        model = calibrated("resnet", "w2a4")
        torch.manual_seed(noise)
        reconstruct(model, [input_of("resnet")], seed=seed, **QUICK)
        runs.append(model)
    one, other, third = (r.state_dict() for r in runs)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert any(not torch.equal(one[k], third[k]) for k in one)


def test_the_report():
    model = calibrated("vit", "w4a4")
    report = reconstruct(model, [input_of("vit")], seed=3, **QUICK)
    assert report["schedule"] | {"steps": 12, "batch_size": 4, "seed": 3, "rounding": "adaround"} == report["schedule"]
    layers = [layer for row in report["blocks"] for layer in row["layers"]]
    assert sorted(layers) == sorted(n for n, k in report["layers"].items() if k["kind"] != "MatMul")
    assert report["sqnr"].keys() == set(layers)
    for row in report["blocks"]:
        assert row["before"] > 0
        assert row["after"] > 0
        assert row["seconds"] >= 0
        assert row["name"]
    assert report["calibration"]["images"] == 8
    assert report["sqnr"]["head"] > report["sqnr"]["layers.0.mlp.0"]  # 8 bits against 4


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("vit", "w4a8", {"token": True}),
        ("vit", "w3a8", {"group": 8}),
        ("variety", "w3a4", {}),
        ("resnet", "w4a16", {}),
        ("resnet", "w4a4", {"exclude": ("layer1.*",), "overrides": {"layer2.*": "w16a8"}}),
        ("vit", "w4a4", {"exclude": ("*scores", "*mix"), "first_last": None}),
    ],
)
def test_recipes_of_every_kind(name, recipe, options):
    model = calibrated(name, recipe, **options)
    reconstruct(model, [input_of(name)], **QUICK)
    assert all(c is not None for c in codes(model).values())
    x = input_of(name, seed=2)
    with torch.no_grad():
        assert torch.equal(ttaq.pack(model)(x), model(x))


def test_learned_codes_lie_within_one_of_the_nearest():
    model = calibrated("resnet", "w4a16")
    nearest = {
        n: q.integer(model.get_submodule(n.rpartition(".")[0]).weight)[0]
        for n, q in model.named_modules()
        if isinstance(q, WeightQuantizer)
    }
    reconstruct(model, [input_of("resnet")], **QUICK | {"rounding_lr": 0.5})
    moved = [(codes(model)[n].int() - nearest[n].int()).abs() for n in nearest]
    assert max(m.max() for m in moved) == 1


def test_dropping_nothing_and_no_warmup():
    for options in ({"drop": 0.0}, {"drop": 1.0}, {"warmup": 0.0, "penalty": 0.0}, {"warmup": 1.0}):
        model = calibrated("resnet", "w4a4")
        report = reconstruct(model, [input_of("resnet")], **QUICK | {"steps": 2} | options)
        assert all(math.isfinite(row["after"]) for row in report["blocks"])


def test_shared_layers_are_learned_once():
    x = torch.randn(16, 12)
    model = ttaq.prepare(settle(Tied(), x), "w4a4")
    ttaq.calibrate(model, [x])
    report = reconstruct(model, [x], **QUICK)
    assert [row["name"] for row in report["blocks"]] == ["model"]
    assert sorted(report["blocks"][0]["layers"]) == ["first", "head", "second"]


def test_fewer_images_than_a_step_takes():
    model = calibrated("resnet", "w4a4")
    reconstruct(model, [input_of("resnet", 3)], **QUICK | {"batch_size": 64})


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = resnet()

    def forward(self, pixel_values):
        return {"logits": self.inner(pixel_values), "extra": pixel_values.mean()}


def test_dicts_pairs_and_forward():
    x = images()
    forms = {
        "dict": ([{"pixel_values": x, "labels": torch.arange(8)}], None),
        "pair": ([(x, torch.arange(8))], None),
        "forward": ([{"pixel_values": x}], lambda net, entry: net(**entry)["logits"]),
    }
    states = []
    for batches, forward in forms.values():
        model = ttaq.prepare(Keyed(), "w3a4")
        ttaq.calibrate(model, batches, forward=forward)
        reconstruct(model, batches, forward=forward, **QUICK)
        states.append(model.state_dict())
    for other in states[1:]:
        assert all(torch.equal(states[0][k], other[k]) for k in other)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_switched_gradients_off(context):
    reference, model = calibrated("resnet", "w3a4"), calibrated("resnet", "w3a4")
    reconstruct(reference, [input_of("resnet")], **QUICK)
    with context():
        reconstruct(model, [input_of("resnet")], **QUICK)
        assert not torch.is_grad_enabled()
    mine, wanted = model.state_dict(), reference.state_dict()
    assert all(torch.equal(mine[k], wanted[k]) for k in wanted)


def test_learning_again_starts_from_the_float_weights():
    model = calibrated("resnet", "w3a4")
    reconstruct(model, [input_of("resnet")], **QUICK)
    first = {k: v.clone() for k, v in codes(model).items()}
    report = reconstruct(model, [input_of("resnet")], **QUICK)
    assert len(report["blocks"]) == len({row["name"] for row in report["blocks"]})
    assert all(c.max() <= 255 for c in codes(model).values())
    assert first.keys() == codes(model).keys()


def test_a_layer_that_gives_nothing_is_served():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
    nn.init.zeros_(model[2].weight)
    quantised = ttaq.quantize(model, [torch.randn(16, 6)], "w4a4", **QUICK)
    assert quantised.ttaq_report["sqnr"]["2"] == 0.0
    assert quantised(torch.randn(2, 6)).abs().max() == 0


def test_sqnr_is_that_of_each_layer_alone():
    model, plain, x = calibrated("resnet", "w4a4"), resnet(), input_of("resnet")
    measured = reconstruction.layer_sqnr(model, x)
    given = []
    plain.linear.register_forward_hook(lambda m, args, y: given.append((args[0], y)))
    with torch.no_grad():
        plain(x)
        inputs, wanted = given[0]
        error = (model.linear(inputs) - wanted).square().sum()
        sqnr = 10 * math.log10(wanted.square().sum() / error)
    assert measured["linear"] == pytest.approx(sqnr, abs=0.02)


# States


def test_a_reconstructed_state_loads_into_a_prepared_model():
    model = calibrated("resnet", "w3a4")
    reconstruct(model, [input_of("resnet")], **QUICK)
    fresh = ttaq.prepare(settle(resnet(), images(seed=9)), "w3a4")
    assert str(fresh.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    x = input_of("resnet", seed=2)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model(x))
        assert torch.equal(ttaq.pack(fresh)(x), model(x))
    again = calibrated("resnet", "w3a4")
    again.load_state_dict(fresh.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_state_from_disk_without_pickles(tmp_path):
    model = calibrated("vit", "w3a4")
    reconstruct(model, [input_of("vit")], **QUICK)
    torch.save(model.state_dict(), tmp_path / "s.pth")
    fresh = ttaq.prepare(vit(), "w3a4").eval()
    fresh.load_state_dict(torch.load(tmp_path / "s.pth", weights_only=True))
    x = input_of("vit", seed=2)
    assert torch.equal(fresh(x), model(x))


# What goes wrong


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("when", [0, 1, 17])
@pytest.mark.parametrize("rounding", ["adaround", "ste"])
def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch, failure, when, rounding):
    model = calibrated("resnet", "w3a4").train()
    before, state = snapshot(model), torch.get_rng_state()
    real, count = caching.squared_distance, []

    def interrupted(*args):
        count.append(1)
        if len(count) > when:
            raise failure
        return real(*args)

    monkeypatch.setattr(caching, "squared_distance", interrupted)
    monkeypatch.setattr(blockwise, "squared_distance", interrupted)
    with pytest.raises(failure):
        reconstruct(model, [input_of("resnet")], rounding=rounding, **QUICK)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert "blocks" not in model.ttaq_report
    assert all(m.rounding is None for m in model.modules() if isinstance(m, WeightQuantizer))


def test_an_interrupt_after_the_last_block_restores_too(monkeypatch):
    model = calibrated("resnet", "w3a4")
    reconstruct(model, [input_of("resnet")], **QUICK)
    before = snapshot(model)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(reconstruction, "layer_sqnr", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(model, [input_of("resnet")], **QUICK | {"seed": 4})
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "stochastic"}, "rounding must be one of adaround, ste, got 'stochastic'"),
        ({"steps": 0}, "steps and batch_size must be 1 or more, got 0, 32"),
        ({"batch_size": 0}, "steps and batch_size must be 1 or more, got 1000, 0"),
        ({"drop": 1.5}, "drop and warmup are shares from 0 to 1, got 1.5, 0.2"),
        ({"warmup": -0.1}, "drop and warmup are shares from 0 to 1, got 0.5, -0.1"),
    ],
)
def test_schedules_that_do_not_serve(options, message):
    with pytest.raises(ValueError, match=rf"^reconstruct: {message}"):
        Schedule(**options)


def test_a_schedule_and_options_at_once_are_refused():
    with pytest.raises(ValueError, match=r"^reconstruct: give a schedule or its fields, not both; got seed beside one"):
        reconstruct(calibrated("resnet", "w4a4"), [images()], schedule=Schedule(steps=1), seed=3)


@pytest.mark.parametrize("stage", ["float", "prepared", "packed"])
def test_models_that_cannot_be_reconstructed(stage):
    model = {
        "float": resnet,
        "prepared": lambda: ttaq.prepare(resnet()),
        "packed": lambda: ttaq.pack(calibrated("resnet", "w4a4")),
    }[stage]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^reconstruct: the model is not calibrated; call ttaq.prepare and"):
        reconstruct(model, [images()], **QUICK)
    assert_unchanged(model, before)


@pytest.mark.parametrize("batches", [[], [images() * torch.nan], [images()[:0]], None])
def test_images_that_do_not_serve(batches):
    model = calibrated("resnet", "w4a4")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^reconstruct: "):
        reconstruct(model, batches, **QUICK)
    assert_unchanged(model, before)


def test_every_quantiser_of_the_odd_network_learns():
    model = calibrated("variety", "w4a4")
    assert isinstance(model, Variety)
    before = {n: q.scale.detach().clone() for n, q in model.named_modules() if isinstance(q, Quantizer)}
    reconstruct(model, [input_of("variety")], **QUICK | {"scale_lr": 0.05})
    after = {n: q.scale.detach() for n, q in model.named_modules() if isinstance(q, ActivationQuantizer)}
    assert all(not torch.equal(after[n], before[n]) for n in after)
