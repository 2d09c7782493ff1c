"""What the rows of the grid say: the table, paired differences, and the figure."""

import math
import statistics

import pytest


def made(method, seed, error, bits="w2a2", **other):
    cell = {"adapter": "tent", "loss": "entropy", "statistics": "batch", "stream": "iid", "pass": "1"}
    cell |= {"steps": "500", "images": "1000"}
    return {"bits": bits, **cell, "method": method, "seed": str(seed), "error": str(error), **other}


ROWS = [
    *(made("qdrop", seed, error) for seed, error in enumerate((30.0, 32.0, 37.0, 40.0))),
    *(made("ttaq", seed, error) for seed, error in enumerate((29.0, 30.0, 33.0))),
    made("ttaq", 0, 28.0),  # measured again: the latest counts
    made("rtn", 0, 80.0),
    made("none", 0, 10.0, "w32a32"),
    made("none", 1, 12.0, "w32a32"),
    made("qdrop", 0, 35.0, loss="abl"),
]


def test_the_table_gives_means_deviations_and_paired_differences(bench):
    lines = bench("summary").table(ROWS).splitlines()
    assert (
        lines[0] == "| bits | adapter | loss | statistics | stream | pass | float | rtn | qdrop | ttaq | ttaq - qdrop |"
    )
    ttaq_, qdrop = (28.0, 30.0, 33.0), (30.0, 32.0, 37.0, 40.0)
    gaps = [a - b for a, b in zip(ttaq_, qdrop, strict=False)]
    spread = f"{statistics.fmean(ttaq_):.2f} ± {statistics.stdev(ttaq_):.2f}"
    expected = (
        "| w2a2 | tent | entropy | batch | iid | 1 | 11.00 ± 1.41 (2) | 80.00 (1) | "
        f"34.75 ± {statistics.stdev(qdrop):.2f} (4) | {spread} (3) | "
        f"{statistics.fmean(gaps):.2f} ± {statistics.stdev(gaps) / 3**0.5:.2f} (3) |"
    )
    assert lines[3] == expected
    assert lines[2] == "| w2a2 | tent | abl | batch | iid | 1 |  |  | 35.00 (1) |  |  |"
    assert len(lines) == 4


def test_pairs_are_of_one_seed(bench):
    paired = bench("summary").paired
    assert paired({"0": 1.0, "1": 4.0, "9": 7.0}, {"1": 2.0, "0": 0.0, "5": 9.0}) == (1.5, 0.5, 2)
    mean, error, count = paired({"0": 1.0}, {"0": 3.0})
    assert (mean, math.isnan(error), count) == (-2.0, True, 1)
    assert paired({"0": 1.0}, {"1": 3.0})[2] == 0


def test_the_figure_and_the_table_of_a_file(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, figure = tmp_path / "grid.csv", tmp_path / "figure.png"
    others = (made("ttaq", 0, 99.0, steps="20"), made("qdrop", 0, 99.0, images="10"))
    for row in [*ROWS, *others]:
        bench("grid").append(row, path)
    main = bench("__main__").main
    assert main(["accuracy", "--out", str(path), "--figure", str(figure)]) == 0
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert main(["accuracy", "--out", str(path), "--table"]) == 0
    assert capsys.readouterr().out == 2 * bench("summary").table(ROWS)
    assert main(["accuracy", "--out", str(path), "--table", "--steps", "20"]) == 0
    assert "99.00 (1)" in capsys.readouterr().out


def test_walks_are_paired_by_seed_and_say_what_is_recovered(bench):
    walked = {
        ("entropy", 0): (30, 29, 33),
        ("entropy", 1): (32, 31, 35),
        ("abl", 0): (30, 29, 31),
        ("abl", 1): (32, 31, 32),
    }
    rows = [
        made("ttaq", seed, error, loss=loss, **{"pass": str(walk)})
        for (loss, seed), errors in walked.items()
        for walk, error in enumerate(errors, 1)
    ]
    rows += [made("ttaq", 2, 9.0), made("ttaq", 0, 50.0, adapter="norm", loss="")]  # one walk of three; no loss
    assert bench("summary").passes(rows).splitlines()[2:] == [
        "| w2a2 | ttaq | tent | batch | iid | abl | 31.00 | 30.00 | 31.50 | -2.50 ± 0.50 (2) | 62% |",
        "| w2a2 | ttaq | tent | batch | iid | entropy | 31.00 | 30.00 | 34.00 |  |  |",
    ]
