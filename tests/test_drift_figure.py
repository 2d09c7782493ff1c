"""The figure of drift: from a history and from its file, with and without BatchNorm, and what is refused."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import calibrated, images

import ttaq
from ttaq.adaptation import Step, adapt, read_history, write_history
from ttaq.report import draw_drift
from ttaq.report.drift import _count, _events

pytest.importorskip("matplotlib")


def walked(name="resnet", **options):
    """Walk from calm batches to shifted ones, over one with NaN and a reset."""
    adapter = adapt(ttaq.pack(calibrated(name, "w4a4")), "tent", telemetry=2, **options)
    for seed in range(12):
        x = images(6, seed=seed) * (1 if seed < 5 else 3)
        adapter(x.index_fill(0, torch.tensor([0]), torch.nan) if seed == 6 else x)
        if seed == 7:
            adapter.reset()
    return adapter.history


def picture(png):
    from PIL import Image

    return Image.open(io.BytesIO(png))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_figure_is_a_picture_by_day_and_by_night(name):
    history = walked(name, reference=[images(6, seed=90)])
    assert {bool(step.drift["norms"]) for step in history if step.drift} == {name == "resnet"}
    light, dark = (picture(draw_drift(history, dark=dark)).convert("L") for dark in (False, True))
    assert light.size == dark.size
    assert min(light.size) > 900
    assert light.getpixel((3, 3)) > 240
    assert dark.getpixel((3, 3)) < 40
    assert len(np.unique(np.asarray(light))) > 50
    assert draw_drift(history) == draw_drift(history)


def test_a_file_gives_the_same_steps_and_the_same_figure(tmp_path):
    history = walked()
    path = write_history(history, tmp_path / "history.jsonl")
    assert read_history(path) == list(history)
    assert draw_drift(path) == draw_drift(str(path)) == draw_drift(history)


def test_batches_go_on_counting_over_a_reset_and_events_are_gathered_by_kind():
    history = walked()
    batches = _count(list(history))
    assert [step.batch for step in history] == [*range(8), *range(4)]
    assert batches == list(range(12))
    assert _count(list(history)[3:]) == list(range(3, 12))
    found = _events(zip(batches, history, strict=True))
    assert found["skipped"] == [6]
    assert found["BatchNorm averages"] == [0, 8]  # batches of 6 images
    every = ("collapse: x", "domain: x", "drift: a", "drift: b", "normalisation: x", "BatchNorm uses x", "luck: x")
    assert _events([(3, replace(history[0], events=every, skipped=True))]) == {
        kind: [3] for kind in ("collapse", "BatchNorm averages", "drift", "domain", "normalisation", "skipped")
    }


def test_one_measurement_many_layers_and_many_events_are_drawn():
    row = {"clipped": 0.1, "reference": 0.0, "moved": 0.5}
    drift = {"layers": {f"a.rather.long.name.of.some.block.{k}.proj": row for k in range(100)}, "norms": {"n": 2.0}}
    step = Step(0, 4, 1.0, 1.0, False, None, "logits", 0.1, ("domain: x",), drift)
    many = [replace(step, batch=k, drift=drift if k % 7 == 0 else None) for k in range(60)]
    other = replace(step, batch=60, drift={"layers": {"late": row}, "norms": {}}, entropy=None)
    calm = replace(step, events=(), drift={"layers": {}, "norms": {}}, entropy=None)
    for history in ([step], [*many, other], [calm]):
        assert min(picture(draw_drift(history)).size) > 900


def test_what_holds_no_drift_is_refused_in_one_sentence(tmp_path):
    adapter = adapt(calibrated("resnet", "w4a4"), "source")
    adapter(images(2))
    for history in (adapter.history, [], write_history(adapter.history, tmp_path / "a.jsonl")):
        with pytest.raises(ValueError, match=r"^draw_drift: no step holds drift; adapt with telemetry=10 and give"):
            draw_drift(history)
    with pytest.raises(ValueError, match=r"^read_history: there is no file .*none.jsonl; give the path"):
        draw_drift(tmp_path / "none.jsonl")
    for text in ("{", "[1]", '{"batch": 1}', '{"events": [], "luck": 1}'):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"^read_history: .*b.jsonl holds no JSON lines of write_history"):
            read_history(tmp_path / "b.jsonl")
