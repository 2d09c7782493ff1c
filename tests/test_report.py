"""Results, their table, findings, figure and page."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from ttaq.evaluation import Result
from ttaq.report import KEYS, Results, draw, find, render, tabulate

pytest.importorskip("matplotlib")

VOID = {"meta", "img", "source", "br", "link"}
ADDRESSES = ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "cite", "ping")


@pytest.fixture
def results():
    made = Results("errors & <their> fall", {"seed": 0}, {"torch": "2"}, notes=["a <note>"])

    def add(model, bits, method, form, adapter, errors, size=None):
        result = Result(dict(zip(("fog", "glass_blur"), errors, strict=True)), {}, 1.25)
        row = {"model": model, "bits": bits, "method": method, "form": form, "adapter": adapter, "bytes": size}
        made.add(result, clean_error=3.0, **row)

    for model in ("cnn", "vit"):
        shift = 4 if model == "vit" else 0
        add(model, "float", "none", "float", "source", (40 + shift, 20), 400_000)
        add(model, "float", "none", "float", "tent", (8, 6), 400_000)
        add(model, "w4a4", "rtn", "fake-quantised", "source", (80, 60))
        add(model, "w4a4", "qdrop", "fake-quantised", "source", (44, 24))
        add(model, "w4a4", "qdrop", "packed", "source", (44, 24), 60_000)
        add(model, "w4a4", "qdrop", "packed", "tent", (50, 30) if model == "vit" else (10, 8), 60_000)
    return made


class Page(HTMLParser):
    """Reads a page strictly: every element that opens closes, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.tags, self.cells, self.words = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ADDRESSES]
        self.ids += [value for name, value in attrs if name == "id"]
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words += data
        if "td" in self.open:
            self.cells.append(data)


def text_of(results, columns):
    console = Console(width=columns, file=io.StringIO())
    console.print(tabulate(results, columns))
    return console.file.getvalue()


def assert_whole(html):
    """Check that a page asks for nothing outside of itself, and finds all it asks for inside."""
    page = Page(html)
    inside = [link for link in page.links if link.startswith("#")]
    assert all(link.startswith("data:image/png;base64,") for link in page.links if link not in inside)
    assert {link[1:] for link in inside} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{name}" for name in page.ids}
    rest = re.sub(r"data:image/png;base64,[\w+/=]*", "", html)
    for address in ("http", "//", "@import", "<script", "<link", "<iframe", '<image href="/'):
        assert address not in rest
    return page


def test_a_page_parses_is_whole_and_asks_for_nothing(results):
    html = render(results).decode()
    assert_whole(html)
    assert "prefers-color-scheme:dark" in html
    assert 'name="viewport"' in html


def test_a_page_is_for_those_who_do_not_see_it_too(results):
    page = Page(render(results).decode())
    assert ("html", {"lang": "en"}) in page.tags
    pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(pictures) == 4  # errors and costs, wide and narrow
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 80 for attrs in pictures)
    assert "cnn W4A4 packed" in pictures[0]["aria-label"]
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    boxes = [attrs for tag, attrs in page.tags if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in boxes)
    assert len(boxes) == sum(tag == "table" for tag, _ in page.tags)


def test_a_page_shows_every_error_and_escapes_what_it_is_given(results):
    html = render(results).decode()
    page = Page(html)
    assert "<their>" not in html
    assert "errors & <their> fall" in page.words
    assert "a <note>" in page.words
    for number in ("30.0", "9.0", "34.0", "70.0", "60 kB", "400 kB"):
        assert number in page.cells
    for errors in results.errors:
        assert {f"{error:.0f}" for error in errors.values()} <= set(page.cells)


def test_findings_tell_gains_and_losses(results):
    text = " ".join(find(results))
    assert "cnn W4A4 packed: mean error 34.0 % unadapted, 9.0 % with tent." in text
    assert "60 kB, 0.15 of float" in text
    assert "cnn, W4A4: reconstruction brings the error without adaptation from 70.0 %" in text
    assert "No gain from tent on vit W4A4 packed (34.0 to 40.0 %)." in text
    assert "No gain from tent on cnn" not in text


def measured(stream, rows, size=60_000):
    made = Results(stream, {"stream": stream}, notes=["tent: a note"])
    for adapter, error in rows.items():
        row = {"model": "m", "bits": "w4a4", "method": "ttaq", "form": "packed", "bytes": size}
        clean = error if stream == "clean" else None
        made.add(Result({stream: error}, {stream: 8}), clean_error=clean, adapter=adapter, **row)
    return made


@pytest.mark.parametrize("order", [("clean", "fog"), ("fog", "clean")])
def test_errors_on_clean_images_fill_the_rows_of_a_stream(tmp_path, order):
    measured("clean", {"source": 3.0, "tent": 2.5, "norm": 2.0}).write(tmp_path / "clean.json")
    measured("fog", {"source": 9.0, "tent": 8.0, "sar": 7.0}).write(tmp_path / "fog.json")
    found = Results.read(*(tmp_path / f"{name}.json" for name in order))
    assert [(row["adapter"], row["clean_error"], row["mean_error"]) for row in found.rows] == [
        ("source", 3.0, 9.0), ("tent", 2.5, 8.0), ("sar", None, 7.0), ("norm", 2.0, 2.0),
    ]  # fmt: skip
    assert [len(part) for part in (found.errors, found.images)] == [4, 4]
    assert (found.title, found.settings) == ("fog", {"stream": "fog | clean"})
    assert found.notes == ["tent: a note", "clean images, tent: a note"]
    assert "3.0" in Page(render(found).decode()).cells


def test_errors_on_clean_images_of_another_file_or_measured_twice_are_refused(tmp_path):
    measured("fog", {"source": 9.0}).write(tmp_path / "fog.json")
    measured("clean", {"source": 3.0}).write(tmp_path / "clean.json")
    measured("clean", {"source": 3.0}, size=1).write(tmp_path / "other.json")
    for names in (("fog", "other"), ("clean", "fog", "clean"), ("clean", "clean")):
        with pytest.raises(ValueError, match="two files hold the row m w4a4 ttaq packed source; give one of them"):
            Results.read(*(tmp_path / f"{name}.json" for name in names))


def test_reconstruction_that_did_harm_is_said():
    made = Results("t")
    for method, error in (("rtn", 10.0), ("qdrop", 12.0)):
        row = {"model": "m", "bits": "w8a8", "method": method, "form": "fake-quantised", "bytes": None}
        made.add(Result({"fog": error}), clean_error=1.0, adapter="source", **row)
    assert "No gain from reconstruction of m W8A8, source (10.0 to 12.0 %)." in find(made)
    assert "brings" not in " ".join(find(made))


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_the_table_fits_the_terminal_without_cutting_a_number(results, columns):
    text = text_of(results, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    for number in ("34.0", "9.0", "70.0"):
        assert number in text
    assert ("seconds" in text) == (columns == 120)
    assert "\x1b" not in text


def test_figures_are_pictures_by_day_and_by_night(results):
    light, dark = (Image.open(io.BytesIO(draw(results, dark=dark))).convert("L") for dark in (False, True))
    assert light.size == dark.size
    assert light.size[0] >= 1000
    assert light.getpixel((3, 3)) > 240
    assert dark.getpixel((3, 3)) < 40
    assert draw(results) == draw(results)


def test_results_are_read_as_written_and_several_become_one(results, tmp_path):
    results.write(tmp_path / "one.json")
    assert Results.read(tmp_path / "one.json") == results
    assert all(tuple(row) == KEYS for row in json.loads((tmp_path / "one.json").read_text())["rows"])
    with pytest.raises(ValueError, match="two files hold the row cnn float none float source; give one"):
        Results.read(tmp_path / "one.json", tmp_path / "one.json")
    for row in results.rows:
        row["model"] += "2"
    results.write(tmp_path / "two.json")
    both = Results.read(tmp_path / "one.json", tmp_path / "two.json")
    assert len(both.rows) == len(both.errors) == 2 * len(results.rows)
    assert both.notes == results.notes
    assert draw(both)


def test_curves_over_different_domains_are_drawn_where_they_are():
    made = Results("t")
    row = {"model": "m", "bits": "w4a4", "method": "qdrop", "form": "packed", "bytes": 10}
    made.add(Result({"fog": 50.0, "snow": 30.0}), clean_error=None, adapter="source", **row)
    made.add(Result({"snow": 20.0}), clean_error=None, adapter="norm", **row)
    assert draw(made)
    assert "no gain" not in " ".join(find(made)).lower()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "no JSON file"),
        ("[]", "must hold rows with model, bits"),
        ('{"format": 1, "title": "t", "rows": [], "errors": []}', "must hold rows"),
        ('{"format": 1, "title": "t", "rows": [{"model": "m"}], "errors": [{"fog": 1}]}', "must hold rows"),
        ('{"format": 2, "title": "t", "rows": [], "errors": []}', "in format 1"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        Results.read(path)
    with pytest.raises(ValueError, match="cannot read"):
        Results.read(tmp_path / "none.json")


def test_a_single_row_makes_a_page(tmp_path):
    made = Results("one")
    row = {"model": "m", "bits": "w4a8", "method": "qdrop", "form": "packed", "adapter": "norm", "bytes": 10}
    made.add(Result({"fog": 12.5}), clean_error=None, **row)
    assert "12.5" in Page(render(made).decode()).words
    assert "12.5" in text_of(made, 80)
