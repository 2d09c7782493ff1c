"""`python -m bench endurance`: the stream holds what it promises, and its judge finds what is wrong."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_datasets import noise

from ttaq.streams import Corrupted, Images


@pytest.fixture
def endurance(bench):
    return bench("endurance")


LABELS = np.arange(600) % 10


def test_a_hundred_thousand_images_hold_a_thousand_runs_and_every_fault(endurance):
    planned = list(endurance.plan(100_000, LABELS))
    kinds = Counter(batch.kind for batch in planned)
    assert sum(len(batch.index) for batch in planned) == 100_000
    assert kinds == {"run": 1000, "independent": 300, "nan": 200, "constant": 100, "single": 5000, "empty": 100}
    assert all(len(set(LABELS[batch.index])) == 1 for batch in planned if batch.kind == "run")
    assert len({batch.domain for batch in planned}) == 15
    again = list(endurance.plan(100_000, LABELS))
    assert all(a.kind == b.kind and np.array_equal(a.index, b.index) for a, b in zip(planned, again, strict=True))


def test_faults_are_put_into_the_images(endurance):
    pictures = Images(noise(4, 8, 8, seed=0), np.arange(4))
    corrupted = Corrupted(pictures, cache=False)

    def made(kind, *index):
        return endurance.make(endurance.Planned(kind, "fog", np.array(index, dtype=np.int64)), corrupted)

    x, labels = made("nan", 2, 1)
    assert x.isnan().flatten(1).any(1).tolist() == [True, False]
    assert labels.tolist() == [2, 1]
    assert made("constant", 0, 1)[0].unique().numel() == 1
    assert made("empty")[0].shape == (0, 3, 8, 8)
    assert made("run", 3)[0].unique().numel() > 1


def lines(count, **changes):
    """Write the journal of so many sound batches of two images."""
    one = {
        "kind": "run", "images": 2, "wrong": 1, "nan_images": 0, "skipped": None, "events": ["drift"],
        "resident_mib": 5.0,
    }  # fmt: skip
    return [one | {"batch": number, "digest": str(number)} | changes for number in range(count)]


def test_the_judge_finds_what_is_wrong(endurance):
    sound = {"finite": True, "state": "x"}
    assert endurance.judge(lines(3), 6, sound) == []
    assert endurance.judge([*lines(3), *lines(3)[1:]], 6, sound) == []
    assert endurance.judge([*lines(3), *lines(3, digest="other")[1:]], 6, sound) == [
        "batch 1 differs when it is done again",
        "batch 2 differs when it is done again",
    ]
    assert endurance.judge(lines(3)[:2], 6, sound) == ["2 images are missing"]
    assert endurance.judge(lines(1, nan_images=1), 2, sound) == ["NaN logits for sound images in the batches [0]"]
    assert endurance.judge(lines(1), 2, {"finite": False}) == ["what adapted is not finite at the end"]


def test_rows_and_memory_are_told_from_the_journal(endurance, tmp_path):
    rows = list(endurance.summarise(lines(5), 4))
    assert [(row["from"], row["images"], row["error"], row["events"]) for row in rows] == [
        (0, 4, 50.0, "2 x drift"),
        (4, 4, 50.0, "2 x drift"),
    ]
    two = [*lines(20), *lines(30, resident_mib=7.0)[18:]]
    assert endurance.flatness(two) == "resident MiB in the longest of 2 lives: 5.0 early, 5.0 late, most 5.0"
    journal = tmp_path / "journal.jsonl"
    journal.write_text('{"batch": 0}\n{"batch": 1, "ima', encoding="utf-8")
    assert endurance.read(journal) == [{"batch": 0}]


def test_digests_tell_bits_apart(endurance):
    zero = torch.zeros(3)
    assert endurance.digest([zero]) == endurance.digest([torch.zeros(3)])
    assert endurance.digest([zero]) != endurance.digest([-zero])


def test_the_figure_is_drawn(endurance, tmp_path):
    pytest.importorskip("matplotlib")
    endurance.draw(lines(1200), tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
