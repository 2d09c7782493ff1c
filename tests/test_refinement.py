import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import BUILDERS, assert_unchanged, calibrated, images, input_of, resnet, settle, snapshot, vit
from torch import nn

import ttaq
from ttaq import refinement as module
from ttaq.learning import seeded
from ttaq.norms import batch_norms
from ttaq.quantizers import ActivationQuantizer, WeightQuantizer, dequantise, disabled
from ttaq.refinement import Refinement, refine
from ttaq.roundings import StraightThrough

QUICK = {"steps": 3, "batch_size": 8, "progress": False}
KEEP = {"holdout": 0.0}  # nothing held out: what was learned is kept


def weight_quantizers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, WeightQuantizer)}


def codes_of(model):
    layers = {n: model.get_submodule(n.rpartition(".")[0]) for n in weight_quantizers(model)}
    return {n: q.integer(layers[n].weight)[0] for n, q in weight_quantizers(model).items()}


def logits(model, x):
    with torch.no_grad():
        return model(x)


def refined(name="resnet", recipe="w3a4", recipe_options=None, **options):
    model = calibrated(name, recipe, **recipe_options or {})
    refine(model, [input_of(name, 16)], **QUICK | KEEP | options)
    return model


def held_out(model, x, **options):
    """Measure the loss of each image held out as `refine` does."""
    chosen = Refinement(**options)
    with seeded(chosen.seed, torch.device("cpu")):
        return module._Task(model.eval(), x, chosen, None)._held_out()


# What is kept


@pytest.mark.parametrize(("name", "rate"), [("resnet", 0.03), ("resnet", 20.0), ("vit", 0.03), ("vit", 20.0)])
def test_the_loss_held_out_never_rises_beyond_chance(name, rate):
    x, options = input_of(name, 32), {"holdout": 0.5, "weight_lr": rate}
    model = calibrated(name, "w2a4")
    before = held_out(model, x, **options)
    outcome = refine(model, [x], **QUICK | {"steps": 8} | options)["refinement"]
    after = held_out(model, x, **options)
    worse = after - before
    assert before.shape == (16,)
    assert outcome["held_out"]["before"] == pytest.approx(before.mean().item(), abs=1e-6)
    assert worse.mean() <= 2 * worse.std(correction=0) / 4
    if outcome["kept"]:
        assert outcome["held_out"]["after"] == pytest.approx(after.mean().item(), abs=1e-6)
    else:
        assert torch.equal(after, before)
        assert outcome["held_out"]["after"] > outcome["held_out"]["before"]


def scripted(monkeypatch, *values):
    losses = iter(torch.tensor(value) for value in values)
    monkeypatch.setattr(module._Task, "_held_out", lambda self: next(losses))


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("after", [(1.5, 2.6, 3.5), (9.0, 9.0, 9.0), (0.1, 0.1, math.nan)])
def test_what_does_not_help_is_put_back_bit_for_bit(name, after, monkeypatch):
    model = calibrated(name, "w3a4").train()
    ttaq.reconstruct(model, [input_of(name)], steps=2, batch_size=4, progress=False)
    before = snapshot(model)
    scripted(monkeypatch, (1.0, 2.0, 3.0), after)
    outcome = refine(model, [input_of(name, 16)], **QUICK | {"weight_lr": 1.0})["refinement"]
    assert outcome["kept"] is False
    assert_unchanged(model, before)
    assert all(q.rounding is None for q in weight_quantizers(model).values())


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("after", [(0.9, 2.0, 3.0), (0.0, 3.2, 2.9)])
def test_what_helps_or_differs_by_chance_is_kept(name, after, monkeypatch):
    model, before = calibrated(name, "w3a4"), calibrated(name, "w3a4")
    scripted(monkeypatch, (1.0, 2.0, 3.0), after)
    outcome = refine(model, [input_of(name, 16)], **QUICK | {"weight_lr": 1.0})["refinement"]
    assert outcome["kept"] is True
    old, new = codes_of(before), codes_of(model)
    assert all(not torch.equal(old[n], new[n]) for n in old)
    for name_, quantizer in weight_quantizers(model).items():
        assert quantizer.rounding is None
        assert quantizer.codes.dtype == torch.uint8
        assert quantizer.codes.max() <= quantizer.spec.qmax
        assert not torch.equal(quantizer.scale, weight_quantizers(before)[name_].scale)
    for one, other in zip(batch_norms(model), batch_norms(before), strict=True):
        assert not torch.equal(one.running_mean, other.running_mean)
        assert not torch.equal(one.running_var, other.running_var)


def test_nothing_but_scales_codes_and_statistics_changes():
    model = calibrated("resnet", "w3a4").train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    before = snapshot(model)
    refine(model, [input_of("resnet", 16)], **QUICK | KEEP)
    after = snapshot(model)
    for key in ("modes", "flags", "hooks", "plain", "kinds"):
        assert after[key] == before[key], key
    changed = {n for n, t in before["tensors"].items() if not torch.equal(after["tensors"][n], t)}
    assert all(n.endswith(("quantizer.scale", "running_mean", "running_var")) for n in changed)
    assert {n.rpartition(".")[2] for n in set(after["tensors"]) - set(before["tensors"])} == {
        "codes", "float_mean", "float_var"
    }  # fmt: skip
    assert not any(p.grad is not None for p in model.parameters())


def test_scales_stay_positive():
    model = refined(scale_lr=3.0, steps=6)
    assert all((q.scale > 0).all() for q in model.modules() if isinstance(q, ActivationQuantizer | WeightQuantizer))


def test_more_steps_bring_the_predictions_nearer():
    x = input_of("vit", 32)
    model, wanted = calibrated("vit", "w2a4"), logits(vit(), x)
    before = (logits(model, x) - wanted).square().mean()
    refine(model, [x], **QUICK | KEEP | {"steps": 40, "batch_size": 32})
    assert (logits(model, x) - wanted).square().mean() < 0.5 * before


# The float model


@pytest.mark.parametrize("statistics", ["batch", "source"])
@pytest.mark.parametrize("name", ["resnet", "vit", "variety"])
def test_the_float_model_is_untouched(name, statistics):
    model, x = calibrated(name, "w3a4"), input_of(name, seed=2)
    with disabled(model):
        before = logits(model, x)
    assert torch.equal(before, logits(BUILDERS[name](), x))
    for _ in range(2):  # a second time it is still that float model
        refine(model, [input_of(name, 16)], **QUICK | KEEP | {"statistics": statistics})
        with disabled(model):
            assert torch.equal(logits(model, x), before)
        assert not torch.equal(logits(model, x), before)


# Packing


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("resnet", "w3a4", {}),
        ("vit", "w2a8", {}),
        ("variety", "w4a4", {}),
        ("vit", "w3a8", {"group": 8}),
        ("vit", "w4a8", {"token": True}),
        ("resnet", "w4a16", {}),
        ("resnet", "w4a4", {"exclude": ("layer1.*",), "overrides": {"layer2.*": "w16a8"}}),
    ],
)
def test_the_packed_model_gives_the_same_bits(name, recipe, options, tmp_path):
    model, x = refined(name, recipe, options, weight_lr=0.5), input_of(name, seed=2)
    packed = ttaq.pack(model)
    wanted = logits(model, x)
    assert torch.isfinite(wanted).all()
    assert torch.equal(logits(packed, x), wanted)
    assert not any("float_" in n for n, _ in packed.named_buffers())
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "m.safetensors"), BUILDERS[name]())
    assert torch.equal(logits(loaded, x), wanted)
    assert ttaq.pack(model, inplace=True) is model
    assert not any("float_" in n for n, _ in model.named_buffers())
    assert torch.equal(logits(model, x), wanted)


def test_the_state_loads_into_a_prepared_model():
    model, x = refined(), input_of("resnet", seed=2)
    fresh = ttaq.prepare(settle(resnet(), images(seed=9)), "w3a4").eval()
    assert str(fresh.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(logits(fresh, x), logits(model, x))


# Seeds


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_same_seed_gives_the_same_model_and_global_generators_stand_still(name):
    states = []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(noise)
        model, state = calibrated(name, "w3a4"), torch.get_rng_state()
        refine(model, [input_of(name, 16)], **QUICK | KEEP | {"seed": seed, "weight_lr": 0.3})
        assert torch.equal(torch.get_rng_state(), state)
        states.append(model.state_dict())
    one, other, third = states
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert any(not torch.equal(one[k], third[k]) for k in one)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_switched_gradients_off(context):
    model = calibrated("resnet", "w3a4")
    with context():
        refine(model, [input_of("resnet", 16)], **QUICK | KEEP)
        assert not torch.is_grad_enabled()
    mine, wanted = model.state_dict(), refined().state_dict()
    assert all(torch.equal(mine[k], wanted[k]) for k in wanted)


# The start


@pytest.mark.parametrize(("shape", "group"), [((6, 12), 0), ((6, 12), 4), ((5, 3, 3, 3), 0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_straight_through_weights_start_in_the_cells_of_the_codes(bits, shape, group):
    weight = torch.randn(shape)
    quantizer = WeightQuantizer(ttaq.QuantSpec(bits, "group" if group else "channel", group), weight.shape)
    quantizer.fit(weight)
    nearest = quantizer.integer(weight)[0]
    moved = nearest.int() + torch.randint(-3, 4, shape)
    for codes in (None, nearest, moved.clamp(0, quantizer.spec.qmax).to(torch.uint8)):
        quantizer.codes = codes
        rounding = StraightThrough(weight, quantizer)
        wanted = nearest if codes is None else codes
        assert torch.equal(rounding.codes(quantizer), wanted)
        wanted = dequantise(wanted, quantizer.scale, quantizer.zero, group)
        assert torch.equal(rounding(weight, quantizer), wanted)
        if codes is None:
            assert torch.equal(rounding.v, weight)
            assert rounding.v.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("rounding", ["adaround", "ste", None])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_first_pass_has_the_codes_that_the_model_had(name, rounding, monkeypatch):
    model = calibrated(name, "w3a4")
    if rounding:
        options = {"steps": 4, "batch_size": 4, "rounding_lr": 0.5 if rounding == "adaround" else 0.1}
        ttaq.reconstruct(model, [input_of(name)], rounding=rounding, progress=False, **options)
    had, first = codes_of(model), {}
    predict = module._Task.predict

    def watching(self, *args):
        for n, q in weight_quantizers(model).items():
            if q.rounding is not None:
                first.setdefault(n, q.rounding.codes(q))
        return predict(self, *args)

    monkeypatch.setattr(module._Task, "predict", watching)
    refine(model, [input_of(name, 16)], **QUICK)
    assert first.keys() == had.keys()
    assert all(torch.equal(first[n], had[n]) for n in had)


def test_learning_nothing_keeps_the_codes():
    model = calibrated("vit", "w3a4")
    ttaq.reconstruct(model, [input_of("vit")], steps=4, batch_size=4, progress=False)
    had, scales = codes_of(model), [q.scale.clone() for q in weight_quantizers(model).values()]
    refine(model, [input_of("vit")], **QUICK | KEEP | {"weight_lr": 0.0, "scale_lr": 0.0})
    assert all(torch.equal(codes_of(model)[n], had[n]) for n in had)
    assert all(torch.equal(q.scale, s) for q, s in zip(weight_quantizers(model).values(), scales, strict=True))


# The loss


def predictions(anchor, **options):
    """Give the target, the float logits of the images and the view that was predicted, of one step."""
    model, x, seen = calibrated("resnet", "w4a4"), input_of("resnet"), []
    options = {"light": 0.0, "noise": 0.0} | options
    with seeded(0, torch.device("cpu")):
        task = module._Task(model, x, Refinement(anchor=anchor, **options), lambda m, e: seen.append(e) or m(e))
        target, _ = task.predict(task.seen, task.generator)
    return target.detach(), seen, task


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_the_anchor_decides_whether_the_target_sees_the_perturbation(anchor):
    target, (asked, view), _ = predictions(anchor, light=0.4, noise=1.0)
    assert torch.equal(asked, view) is (anchor == 0)
    assert torch.equal(target, logits(resnet(), asked))
    assert not target.requires_grad


def test_views_are_those_of_light_and_noise():
    _, (asked, view), _ = predictions(1.0)
    assert torch.allclose(asked, view, atol=1e-5)  # neither
    _, (asked, view), _ = predictions(1.0, noise=1.0)
    ratio = 10 * ((asked.square().sum((1, 2, 3))) / (view - asked).square().sum((1, 2, 3))).log10()
    assert ratio.min() > 9.5
    assert ratio.max() < 30.5
    assert ratio.max() - ratio.min() > 3
    _, (asked, view), _ = predictions(1.0, light=0.4)
    for a, v in zip(asked.flatten(1), view.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([a, v]))[0, 1] > 0.9999
        assert 0.59 < v.std() / a.std() < 1.41
        assert abs(v.mean() - a.mean()) < 0.41 * a.std()


@pytest.mark.parametrize("statistics", ["batch", "source"])
def test_statistics_are_live_for_the_quantised_model_alone(statistics):
    modes = []
    model, x = calibrated("resnet", "w4a4"), input_of("resnet")
    before = snapshot(model)
    task = module._Task(model, x, Refinement(statistics=statistics), lambda m, e: modes.append(m.bn1.training) or m(e))
    task.predict(task.seen, task.generator)
    assert modes == [False, statistics == "batch"]
    assert_unchanged(model, before)


def test_images_held_out_are_in_no_step(monkeypatch):
    x = torch.arange(16.0).view(-1, 1, 1, 1).expand(16, 3, 16, 16) + 0.01 * images(16)
    chosen, steps = Refinement(holdout=0.25, **{k: QUICK[k] for k in ("steps", "batch_size")}), []
    with seeded(0, torch.device("cpu")):
        task = module._Task(calibrated("resnet", "w4a4"), x, chosen, None)
    number = lambda entry: {round(v.mean().item()) for v in entry}  # noqa: E731
    assert number(task.held) | number(task.seen) == set(range(16))
    assert len(task.held) == 4
    real = module._Task.predict
    monkeypatch.setattr(module._Task, "predict", lambda self, e, g: steps.append(number(e)) or real(self, e, g))
    refine(task.model, [x], refinement=chosen, progress=False)
    held = number(task.held)
    assert steps[:4] == steps[-4:] == [held] * 4  # four views, before and after
    assert not any(step & held for step in steps[4:-4])
    assert len(steps) == 8 + 3


# Inputs and outputs of other kinds


class Keyed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = resnet(), kind

    def forward(self, pixel_values, offset=None):
        y = self.inner(pixel_values)
        y = y if offset is None else y + offset[:, None]
        return {"dict": lambda: {"size": y.mean(), "logits": y}, "object": lambda: SimpleNamespace(logits=y),
                "tuple": lambda: (y, None)}[self.kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["dict", "object", "tuple"])
def test_dicts_of_inputs_and_outputs_that_name_their_logits(kind):
    x, states = images(16), []
    forms = [
        ([{"pixel_values": x[:10], "labels": torch.arange(10)}, {"pixel_values": x[10:]}], None),
        ([(x, torch.arange(16))], None),
        ([{"pixel_values": x, "offset": torch.arange(16)}], lambda m, e: m(e["pixel_values"])),
    ]
    for batches, forward in forms:
        model = ttaq.prepare(Keyed(kind), "w3a4")
        ttaq.calibrate(model, [x])
        report = refine(model, batches, forward=forward, **QUICK)
        states.append((report["refinement"]["held_out"], model.state_dict()))
    for found, state in states[1:]:
        assert found == states[0][0]
        assert all(torch.equal(state[k], v) for k, v in states[0][1].items())


def vectors(norm):
    return settle(nn.Sequential(nn.Linear(12, 16), norm(16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(64, 12))


@pytest.mark.parametrize("count", [16, 129, 257])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_vectors_are_no_images(norm, count):
    model, x = vectors(norm), torch.randn(count, 12)
    quantised = ttaq.quantize(model, [x], "w4a8", method="pcr", steps=4, batch_size=8, progress=False)
    assert quantised.ttaq_report["refinement"]["held_out"]["before"] is not None
    refine(quantised, [x], **QUICK | KEEP)
    assert torch.equal(logits(ttaq.pack(quantised), x), logits(quantised, x))
    with disabled(quantised):
        assert torch.equal(logits(quantised, x), logits(model.eval(), x))


@pytest.mark.parametrize("total", [1, 8, 128, 129, 300, 1024])
def test_statistics_come_from_pieces_of_equal_size(total):
    task = SimpleNamespace(images=torch.arange(total), model=None, forward=lambda m, part: sizes.append(part.tolist()))
    sizes = []
    for run in module._Task._passes(task):
        run()
    assert [i for s in sizes for i in s] == list(range(total))
    lengths = [len(s) for s in sizes]
    assert max(lengths) <= 128
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == math.ceil(total / 128)


def test_fewer_images_than_a_step_takes():
    outcome = refined(holdout=0.0, batch_size=500).ttaq_report["refinement"]
    assert outcome["held_out"] == {"before": None, "after": None}
    assert outcome["kept"] is True


# The report


def test_the_report():
    model = calibrated("vit", "w4a4")
    chosen = Refinement(steps=2, batch_size=4, holdout=0.5, seed=3)
    report = refine(model, [input_of("vit")], refinement=chosen, progress=False)
    assert report is model.ttaq_report
    found = report["refinement"]
    assert dataclasses.asdict(chosen).items() <= found.items()
    assert set(found) - set(dataclasses.asdict(chosen)) == {"held_out", "kept", "seconds"}
    assert found["held_out"]["before"] > 0
    assert found["seconds"] > 0
    assert report["calibration"]["images"] == 8
    assert json.loads(json.dumps(ttaq.pack(model).ttaq_report))["refinement"] == found


# What goes wrong


@pytest.mark.parametrize("when", [0, 1, 5, 11, 14, 18])
@pytest.mark.parametrize("learned", [False, True], ids=["calibrated", "reconstructed"])
def test_an_interrupt_leaves_the_model_as_it_was(when, learned, monkeypatch):
    model, count = calibrated("resnet", "w3a4").train(), []
    if learned:
        ttaq.reconstruct(model, [images()], steps=1, batch_size=4, statistics="batch", progress=False)
    before, state, report = snapshot(model), torch.get_rng_state(), copy.deepcopy(model.ttaq_report)

    def interrupted(net, entry):
        count.append(1)
        y = net(entry)
        if len(count) > when:
            raise KeyboardInterrupt
        return y

    monkeypatch.setattr(module, "_PIECE", 4)
    options = QUICK | {"holdout": 0.125, "weight_lr": 1.0}
    with pytest.raises(KeyboardInterrupt):
        refine(model, [images(16)], forward=interrupted, **options)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.ttaq_report == report
    assert all(q.rounding is None for q in weight_quantizers(model).values())
    assert not any(p.grad is not None for p in model.parameters())
    count.clear()
    monkeypatch.undo()
    assert when < 8 + 6 + 4 + 8  # passes: held out, steps, statistics, held out


@pytest.mark.parametrize("failure", [RuntimeError, MemoryError])
@pytest.mark.parametrize("place", ["softened_divergence", "clamp_scales", "measure_again", "take"])
def test_a_failure_anywhere_leaves_the_model_as_it_was(place, failure, monkeypatch):
    model = calibrated("resnet", "w3a4")
    before = snapshot(model)

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(module, place, fail)
    with pytest.raises(failure):
        refine(model, [images(16)], **QUICK)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps and batch_size must be 1 or more, got 0, 64"),
        ({"batch_size": 0}, "steps and batch_size must be 1 or more, got 300, 0"),
        ({"statistics": "none"}, 'statistics must be "batch" or "source", got \'none\''),
        (
            {"anchor": 1.5},
            r"anchor, noise, light and holdout are shares from 0 to below 1, got \(1.5, 0.5, 0.4, 0.125\)",
        ),
        ({"light": 1}, "anchor, noise, light and holdout are shares"),
        ({"holdout": 1}, "anchor, noise, light and holdout are shares"),
        ({"noise": -0.1}, "anchor, noise, light and holdout are shares"),
        ({"lr": 0.1}, "there is no option lr; there are steps, batch_size"),
    ],
)
def test_settings_that_do_not_serve(options, message):
    model = calibrated("resnet", "w4a4")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^refine: {message}"):
        refine(model, [images()], **options)
    assert_unchanged(model, before)


def test_settings_and_options_at_once_are_refused():
    with pytest.raises(ValueError, match=r"^refine: give a schedule or its fields, not both; got seed beside one"):
        refine(calibrated("resnet", "w4a4"), [images()], refinement=Refinement(), seed=3)


@pytest.mark.parametrize("stage", ["float", "prepared", "packed"])
def test_models_that_cannot_be_refined(stage):
    model = {
        "float": vit,
        "prepared": lambda: ttaq.prepare(vit()),
        "packed": lambda: ttaq.pack(calibrated("vit", "w4a4")),
    }[stage]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^refine: the model is not calibrated; call ttaq.prepare and ttaq.calibrate"):
        refine(model, [images()], **QUICK)
    assert_unchanged(model, before)


@pytest.mark.parametrize("batches", [[], [images() * torch.nan], [images()[:0]], None, [{}]])
def test_images_that_do_not_serve(batches):
    model = calibrated("resnet", "w4a4")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^refine: "):
        refine(model, batches, **QUICK)
    assert_unchanged(model, before)


def test_models_without_logits_are_refused():
    model = calibrated("resnet", "w4a4")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^logits: the model must return logits, got dict; pass forward=, which picks"
    ):
        refine(model, [images()], forward=lambda m, x: {"scores": m(x)}, **QUICK)
    assert_unchanged(model, before)
