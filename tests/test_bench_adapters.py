"""`python -m bench adapters`: it resumes, tells the guard apart, and draws its table."""

from functools import partial

import pytest
from test_grid import ARCHITECTURE, decided, pictures

import ttaq
from ttaq.streams import CORRUPTIONS


@pytest.fixture
def walk(bench, monkeypatch, tmp_path):
    """Run the command on a tiny ResNet with random images; give the rows of its file."""
    adapters, grid = bench("adapters"), bench("grid")
    subject = grid.Subject("tiny", decided(), pictures(32, 1), pictures(24, 2), ARCHITECTURE)
    short = {
        "continual": partial(ttaq.continual, corruptions=CORRUPTIONS[:2], images=24, batch_size=12),
        "batch-1": partial(ttaq.continual, corruptions=CORRUPTIONS[:1], images=5, batch_size=1),
    }
    monkeypatch.setattr(adapters, "orders", lambda images, batch_size: short)
    monkeypatch.setattr(adapters.machine, "commit", lambda given: {"commit": "c", "dirty": "no"})
    monkeypatch.setattr(adapters.accuracy, "open_subject", lambda options: (subject, None))
    path = tmp_path / "rows.csv"

    def run(*args):
        places = ["--out", str(path), "--cache", str(tmp_path / "cache"), "--method", "rtn", "--batch-size", "8"]
        assert bench("__main__").main(["adapters", "--bits", "w4a8", *places, *args]) == 0
        return grid.read(path)

    return run


def test_every_cell_has_a_row_and_is_measured_once(walk, bench, monkeypatch):
    rows = walk("--adapters", "source,norm,eata,lame", "--streams", "continual,batch-1")
    assert len(rows) == 4 * 2 * 2
    by = {(row["adapter"], row["stream"], row["guard"]): row for row in rows}
    assert by["source", "continual", "on"]["error"] == by["source", "continual", "off"]["error"]
    assert by["norm", "batch-1", "on"]["events"] == "1 x BatchNorm averages the statistics of batches"
    assert by["norm", "batch-1", "off"]["events"] == ""
    assert {row["images"] for row in rows if row["stream"] == "batch-1"} == {"5"}
    assert int(by["norm", "continual", "on"]["state_bytes"]) > int(by["source", "continual", "on"]["state_bytes"]) == 0
    monkeypatch.setattr(bench("adapters"), "packed_model", None)  # not even a model is made
    assert walk("--adapters", "source,norm", "--streams", "continual,batch-1") == rows


def test_the_table_has_methods_down_and_streams_across(walk, bench):
    rows = walk("--adapters", "source,norm", "--streams", "continual", "--guards", "on")
    lines = bench("adapters").table(rows).splitlines()
    assert lines[0] == "w4a8, guard on"
    assert lines[2:4] == ["| method | continual |", "|---|---|"]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| source", "| norm"]


def test_an_event_is_known_without_its_numbers(bench):
    kind = bench("adapters")._kind
    said = "collapse: 1.2 classes instead of 7.9, 81% of the predictions changed; halfway back to the source"
    assert kind(said) == "collapse: halfway back to the source"
    assert kind("BatchNorm averages the statistics of batches (1 images)").endswith("statistics of batches")


def test_unknown_names_are_refused(walk, capsys):
    with pytest.raises(SystemExit):
        walk("--adapters", "nothing")
    assert "got nothing" in capsys.readouterr().err


def test_overhead_tells_ratios_passes_and_state(bench, monkeypatch, tmp_path, capsys):
    overhead, grid = bench("overhead"), bench("grid")
    subject = grid.Subject("tiny", decided(), pictures(32, 1), pictures(40, 2), ARCHITECTURE)
    monkeypatch.setattr(overhead.machine, "commit", lambda given: {"commit": "c", "dirty": "no"})
    monkeypatch.setattr(overhead.accuracy, "open_subject", lambda options: (subject, None))
    path = tmp_path / "rows.csv"
    places = ["--out", str(path), "--cache", str(tmp_path / "cache"), "--method", "rtn", "--bits", "w4a8"]
    command = ["overhead", *places, "--adapters", "source,tent,eata", "--batch-sizes", "1,8", "--rounds", "3"]
    assert bench("__main__").main(command) == 0
    by = {(row["adapter"], row["batch"]): row for row in grid.read(path)}
    assert len(by) == 6
    assert float(by["tent", "8"]["backwards"]) == 1
    assert float(by["tent", "8"]["ratio"]) > float(by["source", "8"]["ratio"]) > 0
    assert int(by["tent", "8"]["state_bytes"]) > int(by["source", "8"]["state_bytes"]) == 0
    capsys.readouterr()
    assert bench("__main__").main(["overhead", "--out", str(path), "--table"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "| method | batch 1 | batch 8 | forwards | backwards | state, KiB |"
    )
