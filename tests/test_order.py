"""Streams: the same batches each time, domains in turn, nothing made twice, classes mixed as asked for."""

import numpy as np
import pytest
import torch
from test_datasets import noise, write_cifar_c, write_images

from ttaq.streams import (
    CORRUPTIONS,
    CifarC,
    Corrupted,
    ImageNetC,
    Images,
    Stream,
    continual,
    correlated,
    corrupt,
    long_tailed,
)
from ttaq.streams import order as order_module


def source(count=12):
    return Images(noise(count), np.arange(count) % 4)


def small(count, classes=10):
    """Small images whose classes are of equal size: image k has class k modulo `classes`."""
    return Images(noise(count, 2, 2), np.arange(count) % classes)


class Domains:
    """Gives the same images in every domain, uncorrupted: orders of many images cost nothing."""

    def __init__(self, images):
        self.images = images

    def domain(self, name, severity):
        return self.images


def orders(stream):
    return [index.tolist() for _, index in stream.order]


def test_continual_meets_all_corruptions_in_turn():
    stream = continual(source(), images=10, batch_size=4, severity=3)
    batches = list(stream)
    assert len(stream) == len(batches) == 15 * 3
    assert [batch.domain for batch in batches] == [name for name in CORRUPTIONS for _ in range(3)]
    assert [batch.first for batch in batches] == [True, False, False] * 15
    assert [len(batch.labels) for batch in batches[:3]] == [4, 4, 2]
    assert batches[0].images.dtype == torch.float32
    assert batches[0].images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("make", [continual, correlated, long_tailed])
def test_a_stream_is_the_same_each_time(make):
    arguments = {"corruptions": ("snow", "fog"), "images": 7, "batch_size": 3}
    stream = make(source(), **arguments, seed=5)
    for again in (stream, stream, make(source(), **arguments, seed=5, cache=False)):
        for one, other in zip(stream, again, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert one.index.tolist() == other.index.tolist()
    other = make(source(), **arguments, seed=6)
    assert [b.index.tolist() for b in other] != [b.index.tolist() for b in stream]


def test_the_same_images_in_every_domain_and_order():
    """Each image is met once a domain, with its label and with the corruption of its own index."""
    images = source()
    stream = continual(images, corruptions=("snow", "frost"), severity=2, images=9, batch_size=9, seed=1)
    snow, frost = list(stream)
    assert sorted(snow.index) == sorted(frost.index)
    assert snow.index.tolist() != frost.index.tolist()
    assert len(set(snow.index.tolist())) == 9
    for batch in (snow, frost):
        assert batch.labels.tolist() == (batch.index % 4).tolist()
        pixels = corrupt(images.images, batch.domain, 2, seed=1)[batch.index]
        assert torch.equal(batch.images, images.preprocess(pixels))


def test_a_correlated_stream_meets_what_a_continual_one_meets():
    """Images of each domain once, whatever slots and batches divide; the order differs between domains."""
    for slot, images in [(1, 95), (7, 95), (50, None), (1000, 95)]:
        arguments = {"corruptions": ("snow", "fog", "frost"), "images": images, "seed": 3}
        met = orders(correlated(Domains(small(120)), slot=slot, **arguments))
        asked = orders(continual(Domains(small(120)), **arguments))
        assert [sorted(order) for order in met] == [sorted(order) for order in asked]
        assert len({tuple(order) for order in met}) == 3
        assert len(set(met[0])) == len(met[0])


def distinct(concentration, slot=50):
    """Count the classes in each slot of 4 domains of 1,000 images in 10 classes, on average."""
    stream = correlated(Domains(small(1000)), concentration=concentration, slot=slot, corruptions=CORRUPTIONS[:4])
    slots = [order[start : start + slot] for order in orders(stream) for start in range(0, 1000, slot)]
    return np.mean([len({number % 10 for number in part}) for part in slots])


def test_labels_are_correlated_in_time():
    """Slots of 50 hold 9.9 of 10 classes when drawn alike, a few under a small concentration."""
    alike = orders(continual(Domains(small(1000)), corruptions=["snow"]))[0]
    assert np.mean([len({n % 10 for n in alike[start : start + 50]}) for start in range(0, 1000, 50)]) > 9.7
    assert distinct(0.1) < 4.5
    assert distinct(0.01) < 2.5
    assert distinct(1e-6) == distinct(1e-300) == 1  # as 50 divides the 100 images of a class
    assert distinct(1e6) > 9


def test_a_slot_follows_a_dirichlet_mix():
    """The counts of a first slot vary as those of a Dirichlet-multinomial distribution do."""
    counts = []
    for seed in range(200):
        (order,) = orders(correlated(Domains(small(1000)), corruptions=["fog"], seed=seed))
        counts.append(np.bincount(np.array(order[:50]) % 10, minlength=10))
    share, total, draws = 0.1, 10 * 0.1, 50
    variance = draws * share * (1 - share) * (draws + total) / (1 + total)
    assert np.var(counts, axis=0).mean() == pytest.approx(variance, rel=0.1)


def test_the_tail_falls_off_exponentially():
    stream = long_tailed(Domains(small(1000)), ratio=50, corruptions=("snow", "fog", "frost"), seed=4)
    first, second, third = orders(stream)
    assert sorted(first) == sorted(second) == sorted(third)
    assert len({tuple(order) for order in (first, second, third)}) == 3
    assert len(set(first)) == len(first)
    counts = np.bincount(np.array(first) % 10)
    assert sorted(counts, reverse=True) == [round(100 * 50 ** (-rank / 9)) for rank in range(10)]
    other = orders(long_tailed(Domains(small(1000)), ratio=50, corruptions=["snow"], seed=5))[0]
    assert counts.argsort().tolist() != np.bincount(np.array(other) % 10).argsort().tolist()
    assert len(stream) == 3 * -(-len(first) // 200)


def test_a_class_keeps_no_more_than_it_has_and_at_least_one():
    images = Images(noise(26, 2, 2), np.repeat([0, 2, 5], [20, 4, 2]))
    kept = set()
    for seed in range(12):
        arguments = {"images": None, "corruptions": ["fog"], "seed": seed}
        (order,) = orders(long_tailed(Domains(images), ratio=1e9, **arguments))
        kept.add(tuple(np.bincount(images.labels[order])[[0, 2, 5]].tolist()))
        (order,) = orders(long_tailed(Domains(images), ratio=1, **arguments))
        assert sorted(order) == list(range(26))
    assert kept == {(20, 1, 1), (1, 4, 1), (1, 1, 2)}


@pytest.mark.parametrize("make", [correlated, long_tailed])
def test_one_class_is_no_trouble(make):
    images = Images(noise(7, 2, 2), np.full(7, 3))
    (order,) = orders(make(Domains(images), images=None, corruptions=["fog"]))
    assert sorted(order) == list(range(7))


def test_a_subset_keeps_its_corruptions():
    images = source()
    part = images.take([8, 3, 5])
    (batch,) = continual(part, corruptions=["snow"], images=None, seed=2)
    assert sorted(batch.index) == [3, 5, 8]
    assert torch.equal(batch.images, images.preprocess(corrupt(images.images, "snow", 5, seed=2)[batch.index]))


def test_corrupted_images_are_made_once_and_shared(monkeypatch):
    made = []

    def count(images, *arguments, **keywords):
        made.append(len(images))
        return corrupt(images, *arguments, **keywords)

    monkeypatch.setattr(order_module, "corrupt", count)
    shared = Corrupted(source(), seed=0)
    for _ in range(2):
        for batch in continual(shared, corruptions=["fog"], images=8, batch_size=4):
            batch.images.zero_()
    assert sum(made) == 8
    (batch,) = continual(shared, corruptions=["fog"], images=None)
    assert sum(made) == 12
    assert batch.images.std() > 0.1
    assert len(list(continual(Corrupted(source(), cache=False), corruptions=["fog"], images=8))) == 1
    assert sum(made) == 20


def test_real_folders_have_domains_of_their_own(tmp_path):
    cifar = CifarC(write_cifar_c(tmp_path / "cifar", count=4))
    batches = list(continual(cifar, corruptions=cifar.corruptions, severity=2, images=None, batch_size=3))
    assert [(batch.domain, batch.first, len(batch.labels)) for batch in batches] == [
        ("snow", True, 3),
        ("snow", False, 1),
        ("fog", True, 3),
        ("fog", False, 1),
    ]
    pixels = noise(20, seed=1)[4:8][batches[0].index]
    assert torch.equal(batches[0].images, cifar.domain("snow", 2).preprocess(pixels))
    with pytest.raises(ValueError, match=r"gaussian_noise\.npy is missing"):
        continual(cifar)
    write_images(tmp_path / "imagenet" / "fog" / "5", classes=("n1", "n2"), count=3, size=(24, 24))
    (batch,) = continual(ImageNetC(tmp_path / "imagenet"), corruptions=["fog"], images=5)
    assert batch.images.shape == (5, 3, 24, 24)
    assert batch.labels.tolist() == (batch.index // 3).tolist()


def test_a_stream_of_any_domains():
    images = source()
    stream = Stream([("clean", images), ("late", images)], [(1, np.array([2, 1])), (0, np.array([0]))], 2)
    assert [(batch.domain, batch.index.tolist()) for batch in stream] == [("late", [2, 1]), ("clean", [0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 13}, "images must be 1 to 12, as many as gaussian_noise holds, got 13; pass images=None"),
        ({"images": 0}, "images must be 1 to 12"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"severity": 0}, "severity must be"),
        ({"corruptions": ["rain"]}, "name must be one of"),
        ({"table": "tiny"}, "table must be"),
    ],
)
@pytest.mark.parametrize("make", [continual, correlated, long_tailed])
def test_refusals_come_before_the_first_batch(make, change, message):
    with pytest.raises(ValueError, match=message) as error:
        make(source(), **({"images": 12} | change))
    assert "\n" not in str(error.value)
    assert "images must" not in message or str(error.value).startswith(f"{make.__name__}: ")


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (correlated, {"concentration": 0}, "^correlated: concentration must be positive and finite, got 0; 0.1 is"),
        (correlated, {"concentration": -1.0}, "concentration must be positive"),
        (correlated, {"concentration": np.inf}, "concentration must be positive"),
        (correlated, {"concentration": np.nan}, "concentration must be positive"),
        (correlated, {"slot": 0}, "^correlated: slot must be at least 1, got 0; 50 is the default$"),
        (long_tailed, {"ratio": 0.5}, "^long_tailed: ratio must be at least 1, got 0.5; 10 to 100 is usual$"),
        (long_tailed, {"ratio": np.nan}, "ratio must be at least 1"),
    ],
)
def test_impossible_mixes_are_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(source(), **change)
