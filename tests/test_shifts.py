"""Orders in which the shift changes: gradual, mixed, recurring and shuffled, each the same for every method."""

import numpy as np
import pytest
import torch
from test_datasets import noise
from test_order import Domains, orders, small, source

from ttaq.streams import (
    CORRUPTIONS,
    STREAMS,
    Batch,
    Images,
    Stream,
    continual,
    corrupt,
    gradual,
    mixed,
    mixed_correlated,
    recurring,
    shuffled,
)

THREE = ("snow", "fog", "frost")


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_order_is_seeded_and_keeps_short_batches(make, batch_size):
    arguments = {"corruptions": THREE, "images": 7, "severity": 2, "batch_size": batch_size}
    images, stream = Domains(small(12)), make(Domains(small(12)), seed=5, **arguments)
    batches = list(stream)
    assert len(batches) == len(stream)
    assert sum(len(b.labels) for b in batches) == sum(len(index) for _, index in stream.order)
    assert all(1 <= len(b.labels) == len(b.images) == len(b.index) == len(b.domains) <= batch_size for b in batches)
    for again in (stream, make(images, seed=5, **arguments)):
        for one, other in zip(batches, again, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert one.index.tolist() == other.index.tolist()
            assert (one.domain, one.domains, one.first, one.visit) == (
                other.domain,
                other.domains,
                other.first,
                other.visit,
            )
    other = make(images, seed=6, **arguments)
    assert [b.index.tolist() for b in other] != [b.index.tolist() for b in batches]


def test_severity_rises_and_falls_within_a_corruption():
    asked = []

    class Levels(Domains):
        def domain(self, name, severity):
            asked.append((name, severity))
            return Images(np.full((12, 2, 2, 3), severity, np.uint8), np.arange(12), mean=(0,) * 3, std=(1,) * 3)

    batches = list(gradual(Levels(None), corruptions=("snow", "fog"), images=5, batch_size=3, seed=1))
    levels = [round(float(b.images[0, 0, 0, 0]) * 255) for b in batches]
    path = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    assert levels == [level for _ in range(2) for level in path for _ in range(2)]
    assert [len(b.labels) for b in batches] == [3, 2] * 18
    assert [b.domain for b in batches] == ["snow"] * 18 + ["fog"] * 18
    assert [place for place, b in enumerate(batches) if b.first] == [0, 18]
    assert asked == [(name, level) for name in ("snow", "fog") for level in range(1, 6)]  # each read once
    peak = gradual(Levels(None), corruptions=["fog"], images=5, batch_size=5, severity=2)
    assert [round(float(b.images[0, 0, 0, 0]) * 255) for b in peak] == [1, 2, 1]
    assert len(list(gradual(Levels(None), corruptions=["fog"], images=5, severity=1))) == 1


@pytest.mark.parametrize("make", [mixed, mixed_correlated])
def test_a_mixed_batch_holds_every_image_under_its_own_corruption(make):
    images = source()
    arguments = {"corruptions": THREE, "images": 9, "seed": 1}
    batches = list(make(images, batch_size=10, severity=2, **arguments))
    assert [len(b.labels) for b in batches] == [10, 10, 7]
    assert [(b.domain, b.first) for b in batches] == [("mixed", True), ("mixed", False), ("mixed", False)]
    made = {name: corrupt(images.images, name, 2, seed=1) for name in THREE}
    met = []
    for batch in batches:
        assert batch.labels.tolist() == (batch.index % 4).tolist()
        pixels = np.stack([made[name][number] for name, number in zip(batch.domains, batch.index, strict=True)])
        assert torch.equal(batch.images, images.preprocess(pixels))
        assert batch.images.is_contiguous()
        met += zip(batch.domains, batch.index.tolist(), strict=True)
    asked = continual(images, **arguments)
    assert sorted(met) == sorted((b.domain, n) for b in asked for n in b.index.tolist())


def test_a_batch_of_200_holds_all_fifteen_corruptions():
    batches = list(mixed(Domains(small(100)), images=100))
    assert all(set(batch.domains) == set(CORRUPTIONS) for batch in batches[:-1])


def test_mixed_and_correlated_labels():
    """Slots of 50 hold nearly all of 10 classes when shuffled, a few under a small concentration; all corruptions."""

    def classes(make):
        stream = make(Domains(small(400)), corruptions=THREE, images=None, batch_size=50)
        return np.mean([len(batch.labels.unique()) for batch in stream])

    assert classes(mixed) > 9.7
    assert classes(mixed_correlated) < 4.5
    stream = mixed_correlated(Domains(small(400)), corruptions=THREE, images=None, batch_size=50)
    assert all(set(batch.domains) == set(THREE) for batch in stream)


def test_the_sequence_comes_back():
    arguments = {"corruptions": THREE, "images": 8, "seed": 3, "batch_size": 5}
    stream = recurring(Domains(small(12)), visits=4, concentration=None, **arguments)
    batches = list(stream)
    assert [b.visit for b in batches] == [visit for visit in range(4) for _ in range(6)]
    assert [b.domain for b in batches[::2]] == list(THREE) * 4
    assert [b.first for b in batches] == [True, False] * 12
    met = orders(stream)
    assert met[:3] == orders(continual(Domains(small(12)), **arguments))
    assert len({tuple(sorted(order)) for order in met}) == 1  # the same images in each visit
    assert len({tuple(order) for order in met}) == 12  # in another order
    assert recurring(Domains(small(12)), **arguments).visits == 20
    once = orders(recurring(Domains(small(12)), visits=1, **arguments))
    assert once == orders(STREAMS["correlated"](Domains(small(12)), **arguments))


def test_the_seed_draws_the_order_of_the_corruptions():
    drawn = [[name for name, _ in shuffled(Domains(small(4)), images=4, seed=seed).domains] for seed in range(10)]
    assert all(sorted(names) == sorted(CORRUPTIONS) for names in drawn)
    assert len({tuple(names) for names in drawn}) == 10


def test_a_stream_mixes_what_its_order_says():
    one, two = Images(noise(3, 2, 2), np.arange(3)), Images(noise(3, 2, 2, seed=9), np.arange(3))
    order = [(np.array([1, 0, 1]), np.array([2, 1, 0])), (0, [2])]
    first, second, third = Stream([("a", one), ("b", two)], order, 2)
    assert (first.domain, first.domains, first.index.tolist()) == ("mixed", ("b", "a"), [2, 1])
    assert torch.equal(first.images, torch.cat([two.preprocess(two.pixels([2])), one.preprocess(one.pixels([1]))]))
    assert (second.domains, second.labels.tolist(), second.first) == (("b",), [0], False)
    assert (third.domain, third.domains, third.first) == ("a", ("a",), True)


def test_a_batch_of_one_domain_names_it_for_each_image():
    batch = Batch(torch.zeros(2, 3, 1, 1), torch.zeros(2), "fog", np.arange(2), True)
    assert (batch.domains, batch.visit) == (("fog", "fog"), 0)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (gradual, {"severity": 0}, "^gradual: severity must be 1 to 5, got 0; 5 is usual$"),
        (gradual, {"severity": 2.5}, "^gradual: severity must be 1 to 5, got 2.5"),
        (mixed_correlated, {"concentration": 0}, "^mixed_correlated: concentration must be positive and finite, got 0"),
        (mixed_correlated, {"slot": 0}, "^mixed_correlated: slot must be at least 1"),
        (recurring, {"visits": 0}, "^recurring: visits must be at least 1, got 0; 20 is usual$"),
        (recurring, {"concentration": -1}, "^recurring: concentration must be positive"),
        *(
            (make, {"images": 13}, f"^{make.__name__}: images must be 1 to 12, as many as .* holds, got 13")
            for make in (gradual, mixed, mixed_correlated, recurring, shuffled)
        ),
        *(
            (make, {"corruptions": ["rain"]}, "name must be one of")
            for make in (gradual, mixed, mixed_correlated, recurring, shuffled)
        ),
        (mixed, {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_refusals(make, change, message):
    with pytest.raises(ValueError, match=message) as error:
        make(source(), **({"images": 12} | change))
    assert "\n" not in str(error.value)
