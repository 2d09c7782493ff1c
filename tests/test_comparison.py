"""Methods side by side: the same streams for all, means and deviations, and the files that hold them."""

import csv
import io
import statistics

import numpy as np
import pytest
import torch
from test_order import Domains, small
from tiny import assert_unchanged, calibrated, resnet, snapshot

import ttaq
from ttaq.evaluation import Result
from ttaq.report import Comparison, evaluate_grid


def pictures(count=16):
    """Make 8 x 8 images of 6 classes."""
    return ttaq.streams.Images(small(count).pixels().repeat(4, 1).repeat(4, 2), np.arange(count) % 6)


def stream(seed, make=ttaq.mixed):
    return make(Domains(pictures()), corruptions=("snow", "fog"), images=12, batch_size=8, seed=seed)


@pytest.fixture(scope="module")
def comparison():
    methods = {"source": {}, "tent": {"lr": 0.1}, "slow": {"method": "tent", "lr": 1e-4}}
    return evaluate_grid(resnet(), stream, methods, seeds=[0, 4])


def test_each_cell_is_a_plain_evaluation(comparison):
    assert list(comparison.results) == ["source", "tent", "slow"]
    for name, method, options in [
        ("source", "source", {}),
        ("tent", "tent", {"lr": 0.1}),
        ("slow", "tent", {"lr": 1e-4}),
    ]:
        for seed in (0, 4):
            wanted = ttaq.evaluate(ttaq.adapt(resnet(), method, **options), stream(seed))
            found = comparison.results[name][seed]
            assert (found.errors, found.ece, found.forwards) == (wanted.errors, wanted.ece, wanted.forwards)


def test_a_packed_model_names_alone_and_progress():
    model, told = ttaq.pack(calibrated("resnet", "w4a4")), []
    before = snapshot(model)
    found = ttaq.evaluate_grid(
        model,
        lambda seed: stream(seed, ttaq.continual),
        ["source", "tent"],
        seeds=[1],
        reset=True,
        forward=lambda own, x: own(x),
        progress=lambda *cell: told.append(cell[:2]),
    )
    assert told == [("source", 1), ("tent", 1)]
    assert_unchanged(model, before)
    assert found.domains == ["snow", "fog"]


def made():
    """Make two methods by hand: errors 10, 20 and 30, 30 on "a", twice that on "b"."""

    def result(error):
        return Result({"a": error, "b": 2 * error}, {"a": 5, "b": 5}, 1.0, ece=3.0, forwards=1.0, backwards=0.0)

    return Comparison({"one": {0: result(10.0), 1: result(20.0)}, "two": {0: result(30.0), 1: result(30.0)}})


def test_spreads_and_the_table():
    comparison = made()
    assert comparison.spread("one", "a") == (15.0, pytest.approx(statistics.stdev([10, 20])))
    assert comparison.spread("one") == (22.5, pytest.approx(statistics.stdev([15, 30])))
    assert comparison.spread("two") == (45.0, 0.0)
    assert Comparison({"one": {0: made().results["one"][0]}}).spread("one") == (15.0, None)
    head, _, one, two = comparison.table().splitlines()
    assert head == "| method | a | b | mean | ECE | forwards | backwards | seconds | seeds |"
    assert one.startswith("| one | 15.00 ± 7.07 | 30.00 ± 14.14 | 22.50 ± 10.61 | 3.00 ± 0.00 | 1.00 ± 0.00 | 0.00")
    assert two.endswith("| 1.00 ± 0.00 | 2 |")


def test_files(comparison, tmp_path):
    assert Comparison.read(comparison.write(tmp_path / "a.json")) == comparison
    with open(comparison.write(tmp_path / "a.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2
    assert {(row["method"], row["seed"], row["domain"]) for row in rows} == {
        (m, s, d) for m in ("source", "tent", "slow") for s in "04" for d in ("snow", "fog")
    }
    for row in rows:
        result = comparison.results[row["method"]][int(row["seed"])]
        assert float(row["error"]) == result.errors[row["domain"]]
        assert float(row["mean_error"]) == result.mean_error
    assert comparison.write(tmp_path / "a.md").read_text(encoding="utf-8") == comparison.table()
    with pytest.raises(ValueError, match=r"must end in .json, .csv, .md, .png, got .*a.pdf; name it so"):
        comparison.write(tmp_path / "a.pdf")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be a .json file of Comparison.write"):
        Comparison.read(tmp_path / "b.json")


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    many = Comparison({f"method {k}": made().results["one"] for k in range(8)})
    for found in (made(), many, Comparison({"one": {0: made().results["one"][0]}})):
        picture = Image.open(io.BytesIO(found.write(tmp_path / "a.png").read_bytes()))
        assert min(picture.size) > 500
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_refusals():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"^evaluate_grid: there must be a method and a seed"):
        evaluate_grid(model, stream, [])
    with pytest.raises(ValueError, match=r"^evaluate_grid: there must be a method and a seed"):
        evaluate_grid(model, stream, ["source"], seeds=[])
    with pytest.raises(
        ValueError, match=r'^evaluate_grid: methods must be a list or a dict, got \'tent\'; pass \["tent"\]$'
    ):
        evaluate_grid(model, stream, "tent")
    with pytest.raises(ValueError, match="method must be one of"):
        evaluate_grid(model, None, ["source", "luck"])
