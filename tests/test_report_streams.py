"""Streams on the page: what ttaq adapt and an adapter's history wrote is counted, named and drawn."""

import json

import pytest
from test_report import assert_whole
from tiny import calibrated, images

import ttaq
from ttaq.adaptation import Step, write_history
from ttaq.report import Stream, draw_drift, render
from ttaq.report.canvas import Look
from ttaq.report.drift import plot_drift

pytest.importorskip("matplotlib")

DAY = Look.of()


def adapted(**options):
    adapter = ttaq.adapt(ttaq.pack(calibrated("resnet", "w4a4")), "tent", **options)
    for seed in range(6):
        adapter(images(6, seed=seed) * (1 if seed < 3 else 4))
    return adapter.history


LINES = [
    {"image": "a.png", "class": "cat", "label": 1, "confidence": 0.9},
    {"image": "x.txt", "error": "cannot identify image file <_io.BytesIO object at 0x7f01>"},
    {"image": "y.txt", "error": "cannot identify image file <_io.BytesIO object at 0x8f02>"},
    {"image": "z.png", "error": "image file is truncated (3 bytes not processed)"},
    {"image": "b.png", "class": "dog", "label": 0, "confidence": 0.7},
    {"event": "drift: 1 layers clip more, a 5.0% of its values instead of 1.0%", "batch": 0},
    {
        "drift": {
            "layers": {"a": {"clipped": 0.05, "reference": 0.01, "moved": 0.3}, "b": {"clipped": None}},
            "norms": {"n": 0.25, "odd": None},
        },
        "entropy": 1.5,
        "batch": 0,
    },
    {"image": "c.png", "class": "cat", "label": 1, "confidence": 0.5},
    {"event": "skipped: NaN in the logits", "batch": 1},
]


def written(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_lines_of_adapt_are_counted_and_grouped(tmp_path):
    stream = Stream.read(written(tmp_path / "said.jsonl", LINES))
    assert (stream.predicted, len(stream.refused), dict(stream.labels)) == (3, 3, {"cat": 2, "dog": 1})
    assert stream.confidence == pytest.approx(0.7)
    assert stream.reasons() == {
        "cannot identify image file": ["x.txt", "y.txt"],
        "image file is truncated (N bytes not processed)": ["z.png"],
    }
    assert stream.events() == [(0, LINES[5]["event"]), (1, "skipped: NaN in the logits")]
    first, second = stream.steps
    assert first.drift == {"layers": {"a": LINES[6]["drift"]["layers"]["a"]}, "norms": {"n": 0.25}}
    assert (first.entropy, second.skipped, second.drift) == (1.5, True, None)
    page = assert_whole(render(streams=[stream]).decode())
    for text in (
        "Stream: said.jsonl",
        "z.png: image file is truncated (3 bytes not processed)",
        "70.0%",
        "x.txt, y.txt",
    ):
        assert text in page.words
    assert any("a most, for 30% of its values" in attrs.get("aria-label", "") for _, attrs in page.tags)


def test_a_history_gives_the_same_figure_as_by_itself(tmp_path):
    history = adapted(telemetry=1, reference=[images(8)])
    stream = Stream.read(write_history(history, tmp_path / "h.jsonl"))
    assert stream.steps == list(history)
    assert (stream.predicted, stream.refused) == (36, [])
    figure = plot_drift(stream.steps, DAY)
    _strip, layers, clipping, norms, entropy, _bar = figure.axes
    worst = [100 * max(row["clipped"] for row in step.drift["layers"].values()) for step in history]
    assert list(clipping.lines[0].get_ydata()) == worst
    assert list(entropy.lines[0].get_ydata()) == [step.entropy for step in history]
    apart = [sum(step.drift["norms"].values()) / len(step.drift["norms"]) for step in history]
    assert list(norms.lines[0].get_ydata()) == apart
    moved = [[row["moved"] for row in step.drift["layers"].values()] for step in history]
    assert layers.collections[0].get_array().T.tolist() == moved
    assert draw_drift(tmp_path / "h.jsonl") == draw_drift(stream.steps)
    assert_whole(render(streams=[stream, stream]).decode())


def test_a_stream_without_telemetry_has_counts_and_says_so():
    stream = Stream.of("camera", [Step(0, 4, None, None, False, None, "logits", 0.1)])
    page = assert_whole(render(streams=[stream]).decode())
    assert "4 images predicted, 0 refused. Nobody measured drift: adapt with telemetry." in page.words
    assert "No events." in page.words


def test_images_that_were_answered_again_are_told_from_the_answers(tmp_path):
    stream = Stream.read(written(tmp_path / "said.jsonl", [*LINES, LINES[0], LINES[1]]))
    assert stream.count() == "4 predictions and 4 refusals of 6 different images"
    page = assert_whole(render(streams=[stream]).decode())
    assert page.words.count(f"{stream.count()}.") == 1
    assert "said.jsonl: predictions and 4 refusals of 6 different images" in page.words


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"luck": 1}', '{"image": "a"}', '{"returned": 1}'])
def test_other_lines_are_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"^report: .*a.jsonl holds (no|other) JSON lines"):
        Stream.read(tmp_path / "a.jsonl")
