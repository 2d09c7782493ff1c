"""Drift as quantisers and norms see it: clip rates, occupancy of codes, distances, against a plain computation."""

import pytest
import torch
from tiny import calibrated, images

import ttaq
from ttaq.adaptation import Telemetry, adapt


def packed():
    return ttaq.pack(calibrated("resnet", "w4a4"))


def shifted(seed=5, gain=3.0):
    return gain * images(6, seed=seed) + 1


def test_clip_rate_and_occupancy_are_those_of_the_layers_input():
    model, inputs = packed(), {}
    telemetry = Telemetry(model, every=1, reference=[images(6, seed=3)])
    name, layer = next(iter(telemetry.layers.items()))
    layer.register_forward_pre_hook(lambda layer, args: inputs.update(x=args[0]))
    with torch.no_grad(), telemetry.looking():
        model(shifted())
    clipped, counts = telemetry.seen[name]
    quantizer = layer.input_quantizer
    place = torch.round(inputs["x"] / quantizer.scale) + quantizer.zero
    outside = (place < 0) | (place > quantizer.spec.qmax)
    assert clipped == pytest.approx(outside.float().mean().item(), abs=1e-6)
    wanted = torch.bincount(place.clamp(0, quantizer.spec.qmax).flatten().int(), minlength=quantizer.spec.qmax + 1)
    assert torch.equal(counts, wanted.double() / inputs["x"].numel())
    assert outside.any()


def test_a_shift_is_an_event_and_none_is_none():
    calm = adapt(packed(), "source", telemetry=2, reference=[images(6, seed=s) for s in range(4)])
    for seed in range(6):
        calm(images(6, seed=seed))
        assert (calm.history[-1].drift is not None) == (seed % 2 == 1)
    assert not any(event.startswith("drift") for step in calm.history for event in step.events)
    for seed in range(4):
        calm(shifted(seed))
    events = [event for step in calm.history for event in step.events if event.startswith("drift")]
    assert any("clip more" in event for event in events)


def test_norms_are_as_far_from_the_source_as_the_stream_is():
    adapter = adapt(packed(), "norm", telemetry=1, reference=[images(6, seed=1)])
    adapter(shifted())
    name, norm = next(iter(adapter.telemetry.norms.items()))
    gap = (norm.running_mean - norm.source_mean).abs() / (norm.source_var + norm.eps).sqrt()
    assert adapter.history[-1].drift["norms"][name] == pytest.approx(gap.mean().item()) != 0


def test_without_a_reference_the_stream_begins_as_its_own():
    adapter = adapt(packed(), "source", telemetry=1)
    for seed in range(3):
        adapter(images(6, seed=seed))
        assert adapter.history[-1].drift is None
    adapter(images(6, seed=9))
    calm = {name: layer["moved"] for name, layer in adapter.history[-1].drift["layers"].items()}
    adapter(shifted())
    moved = {name: layer["moved"] for name, layer in adapter.history[-1].drift["layers"].items()}
    many = [name for name, values in adapter.telemetry.values.items() if values >= 100]
    assert max(calm[name] for name in many) < 0.1 < max(moved[name] for name in many)


def test_measuring_changes_no_logits_and_resumes(tmp_path):
    model = packed()
    plain, measured = adapt(model, "tent"), adapt(model, "tent", telemetry=1)
    for seed in range(5):
        assert torch.equal(plain(images(6, seed=seed)), measured(images(6, seed=seed)))
    again = adapt(model, "tent", telemetry=1)
    again.resume(measured.save(tmp_path / "state.pt"))
    measured(shifted())
    again(shifted())
    assert again.history[-1].drift == measured.history[-1].drift
    measured.reset()
    assert measured.telemetry.reference == {}


def test_a_given_reference_outlives_reset():
    adapter = adapt(packed(), "source", telemetry=1, reference=[images(6, seed=1)])
    before = adapter.telemetry.state_dict()["reference"]
    adapter(shifted())
    adapter.reset()
    after = adapter.telemetry.state_dict()["reference"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^Telemetry: every and first must be at least 1"):
        Telemetry(packed(), every=0)
