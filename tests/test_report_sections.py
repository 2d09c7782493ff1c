"""The sections of the page: trade-offs, layers, reconstruction; what is drawn is what was measured."""

import io
import json
import re
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from test_report import Page, assert_whole, results  # noqa: F401
from test_report_streams import LINES, written
from tiny import images, resnet, vit

import ttaq
from ttaq.evaluation import Result
from ttaq.report import Results, read, render, say, write_figures
from ttaq.report.canvas import THEMES, Look
from ttaq.report.checkpoints import Checkpoint, grouped
from ttaq.report.curves import learned, plot_curves, shares
from ttaq.report.layers import SHAPES, plot_layers
from ttaq.report.model_sections import describe_checkpoints
from ttaq.report.tradeoff import costs_of, front_of, plot_tradeoff, points_of

pytest.importorskip("matplotlib")

NIGHT, DAY = Look.of(dark=True), Look.of()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Give checkpoints: a reconstructed and a rounded network, and a transformer in another width."""
    folder, made = tmp_path_factory.mktemp("report"), {}
    for name, model, bits, method in (
        ("learned", resnet(), "w2a4", "qdrop"), ("nearest", resnet(), "w4a4", "rtn"), ("vit", vit(), "w4a8", "qdrop")
    ):  # fmt: skip
        steps = {} if method == "rtn" else {"steps": 40, "batch_size": 4}
        with pytest.warns(UserWarning, match="are few"):
            quantised = ttaq.quantize(model, [images(8)], bits, method=method, progress=False, **steps)
        made[name] = ttaq.save(ttaq.pack(quantised), folder / f"{name}.safetensors", reference=f"lib:build_{name}")
    return made


def evaluated():
    """Give results with bytes and seconds that are known."""
    made = Results("t")
    for bits, form, adapter, error, size, seconds in (
        ("float", "float", "source", 30.0, 4000, 1.0), ("float", "float", "tent", 10.0, 4000, 4.0),
        ("w4a4", "fake-quantised", "source", 33.0, None, 9.0), ("w4a4", "packed", "source", 33.0, 600, 0.5),
        ("w4a4", "packed", "tent", 12.0, 600, 2.0), ("w8a8", "packed", "tent", 12.5, 1100, 2.5),
    ):  # fmt: skip
        row = {"model": "m", "bits": bits, "method": "qdrop", "form": form, "bytes": size, "adapter": adapter}
        made.add(Result({"fog": error}, {"fog": 100}, seconds), clean_error=None, **row)
    return made


# Costs


def test_points_are_what_can_be_deployed_with_seconds_an_image():
    points = points_of(evaluated())
    assert [(p.bits, p.adapter, p.error, p.bytes, p.seconds) for p in points] == [
        ("float", "source", 30.0, 4000, 0.01), ("float", "tent", 10.0, 4000, 0.04),
        ("w4a4", "source", 33.0, 600, 0.005), ("w4a4", "tent", 12.0, 600, 0.02), ("w8a8", "tent", 12.5, 1100, 0.025),
    ]  # fmt: skip
    assert costs_of(points) == ["bytes", "seconds"]


def test_the_front_holds_what_nothing_beats():
    points = points_of(evaluated())
    names = {cost: [(p.bits, p.adapter) for p in front_of(points, cost)] for cost in costs_of(points)}
    assert names["bytes"] == [("w4a4", "tent"), ("float", "tent")]
    assert names["seconds"] == [("w4a4", "source"), ("float", "source"), ("w4a4", "tent"), ("float", "tent")]
    for cost in costs_of(points):
        for point in points:
            beaten = any(p.error < point.error and getattr(p, cost) <= getattr(point, cost) for p in points)
            tied = any(p.error == point.error and getattr(p, cost) < getattr(point, cost) for p in points)
            assert (point in front_of(points, cost)) == (not beaten and not tied)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_trade_off_is_drawn_where_it_was_measured(narrow):
    points = points_of(evaluated())
    size, time = plot_tradeoff(points, Look.of(narrow=narrow)).axes
    for axes, cost in ((size, "bytes"), (time, "seconds")):
        marks = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_linestyle() == "None"}
        assert marks == {(getattr(p, cost), p.error) for p in points}
        (front,) = (line for line in axes.lines if line.get_linestyle() != "None")
        assert list(zip(*front.get_data(), strict=True)) == [
            (getattr(p, cost), p.error) for p in front_of(points, cost)
        ]
        assert all(axes.get_xlim()[0] < x < axes.get_xlim()[1] for x, _ in marks)
        assert all(axes.get_ylim()[0] < y < axes.get_ylim()[1] for _, y in marks)
    assert "m W4A4" in [text.get_text() for text in size.texts]


def test_no_trade_off_without_a_choice():
    one = evaluated()
    one.rows, one.errors, one.images = one.rows[:1], one.errors[:1], one.images[:1]
    assert "What accuracy costs" not in Page(render(one).decode()).words
    assert "What accuracy costs" in Page(render(evaluated()).decode()).words


def test_files_of_before_count_no_images_and_settings_that_differ_are_both_said(tmp_path):
    made, other = evaluated(), evaluated()
    made.settings, other.settings = {"severity": 5, "seed": 0}, {"severity": 3, "seed": 0}
    content = json.loads(made.write(tmp_path / "a.json").read_text())
    del content["images"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    for row in other.rows:
        row["model"] = "n"
    both = Results.read(tmp_path / "a.json", other.write(tmp_path / "b.json"))
    assert both.images == [None] * 6 + [100] * 6
    assert both.settings == {"severity": "5 | 3", "seed": 0}
    assert {p.seconds for p in points_of(both) if p.model == "m"} == {None}
    content["images"] = [1]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must hold rows"):
        Results.read(tmp_path / "a.json")


# Checkpoints


def test_a_checkpoint_says_its_layers_and_blocks(files):
    header = ttaq.checkpoint.read_header(files["learned"])
    one = Checkpoint.read(files["learned"])
    assert (one.model, one.bits, one.method, one.images) == ("learned", "w2a4", "qdrop", 8)
    assert one.bytes == files["learned"].stat().st_size
    assert {row.name: row.sqnr for row in one.measured} == header["report"]["sqnr"]
    assert [row.name for row in one.blocks] == [row["name"] for row in header["report"]["blocks"]]
    assert all(len(row.curve) == 32 for row in one.blocks)
    assert 2 < one.code_bits < 8  # the first and the last layer have 8
    assert Checkpoint.read(files["nearest"]).blocks == ()


def test_checkpoints_of_one_architecture_share_a_panel(files):
    read_all = [Checkpoint.read(path) for path in files.values()]
    assert [list(group) for group in grouped(read_all)] == [["W2A4", "W4A4"], ["W4A8"]]
    assert [list(group) for group in grouped(read_all[:1] * 2)] == [["learned.safetensors"]]


@pytest.mark.parametrize("look", [DAY, Look.of(narrow=True)], ids=["wide", "narrow"])
def test_layers_are_drawn_with_their_sqnr_and_bits(files, look):
    one = Checkpoint.read(files["learned"])
    (axes,) = plot_layers(grouped([one]), look).axes
    curve, *marks = axes.lines
    assert list(curve.get_ydata()) == [row.sqnr for row in one.measured]
    drawn = {(x, y, line.get_marker()) for line in marks for x, y in zip(*line.get_data(), strict=True)}
    assert drawn == {(k, row.sqnr, SHAPES[row.weight]) for k, row in enumerate(one.measured)}
    assert {SHAPES[2], SHAPES[8]} == {marker for _, _, marker in drawn}
    assert axes.get_ylabel() == "dB"


def test_curves_are_drawn_as_shares_of_their_beginning(files):
    one = Checkpoint.read(files["learned"])
    (axes,) = (axes for axes in plot_curves(learned([one]), DAY).axes if axes.get_visible())
    assert [line.get_label() for line in axes.lines] == [row.name for row in one.blocks]
    for line, row in zip(axes.lines, one.blocks, strict=True):
        assert list(line.get_ydata()) == pytest.approx([error / row.curve[0] for error in row.curve])
        assert list(line.get_xdata()) == pytest.approx([40 * (k + 0.5) / 32 for k in range(32)])
    assert shares(one.blocks[0])[1][0] == 1.0


def test_sentences_name_the_weakest_layer(files):
    one = Checkpoint.read(files["learned"])
    worst = min(one.measured, key=lambda row: row.sqnr)
    (text,) = describe_checkpoints([one])
    assert f"lowest {worst.sqnr:.1f} dB in {worst.name}" in text
    assert text in say(None, [one])


def test_a_checkpoint_alone_makes_a_page(files):
    page = assert_whole(render(None, [Checkpoint.read(files["nearest"])]).decode())
    assert "nearest.safetensors" in page.words
    assert "Nobody measured the SQNR" in page.words
    assert "Reconstruction" not in page.words
    assert "W8A8" in page.cells  # of the first layer


# The page and its figures


def test_a_page_of_everything_is_whole_and_its_figures_are_files(results, files, tmp_path):  # noqa: F811
    lines = written(tmp_path / "said.jsonl", LINES)
    found = read(results.write(tmp_path / "r.json"), *files.values(), lines)
    page = assert_whole(render(*found).decode())
    heads = ("Error along the stream", "What accuracy costs", "Layers", "Reconstruction", "Stream:", "Environment")
    places = [page.words.index(head) for head in heads]
    assert places == sorted(places)
    paths = write_figures(tmp_path / "figures", *found)
    names = ("errors", "tradeoff", "layers", "reconstruction", "drift")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for path in paths:
        if path.suffix == ".png":
            assert min(Image.open(io.BytesIO(path.read_bytes())).size) > 300
        else:
            root = ElementTree.fromstring(path.read_text())
            links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    again = write_figures(tmp_path / "again", *found)
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(paths, again, strict=True))


def test_nothing_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^report: there is nothing to show; give results, checkpoints or streams$"):
        render()


def test_figures_on_the_page_are_text_in_the_colours_of_the_page():
    html = render(evaluated()).decode()
    drawn = "".join(re.findall(r"<figure>.*?</figure>", html, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b(?![\w-])", re.sub(r'(href="|url\(|id=")#?\w+', "", drawn))
    assert "var(--ink)" in drawn
    assert "m W4A4 packed: error along the stream" in drawn
    for name in THEMES["light"]:
        assert f"--{name}:{THEMES['light'][name]}" in html
        assert f"--{name}:{THEMES['dark'][name]}" in html


def contrast(one, other):
    """WCAG 2.2, relative luminance."""
    values = []
    for colour in (one, other):
        parts = torch.tensor([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)], dtype=torch.float64)
        linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        values.append((linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)).item())
    return (max(values) + 0.05) / (min(values) + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_colours_have_the_contrast_of_wcag_aa(theme):
    colours, page = THEMES[theme], {"light": "#f6f7f9", "dark": "#0e1116"}[theme]
    for name in ("ink", "faint", "c1"):  # text
        assert min(contrast(colours[name], paper) for paper in (colours["paper"], page)) >= 4.5, name
    for name in (name for name in colours if re.fullmatch(r"c\d", name)):  # curves and marks
        assert contrast(colours[name], colours["paper"]) >= 3, name
    for name in ("#2f7fd0", "#9a58c0", "#d0601f"):  # depth, the same on both
        assert contrast(name, colours["paper"]) >= 3, name
