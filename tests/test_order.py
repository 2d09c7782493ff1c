"""Streams: the same batches each time, domains in turn, nothing made twice."""

import numpy as np
import pytest
import torch
from test_datasets import noise, write_cifar_c, write_images

from ttaq.streams import CORRUPTIONS, CifarC, Corrupted, ImageNetC, Images, Stream, continual, corrupt
from ttaq.streams import order as order_module


def source(count=12):
    return Images(noise(count), np.arange(count) % 4)


def test_continual_meets_all_corruptions_in_turn():
    stream = continual(source(), images=10, batch_size=4, severity=3)
    batches = list(stream)
    assert len(stream) == len(batches) == 15 * 3
    assert [batch.domain for batch in batches] == [name for name in CORRUPTIONS for _ in range(3)]
    assert [batch.first for batch in batches] == [True, False, False] * 15
    assert [len(batch.labels) for batch in batches[:3]] == [4, 4, 2]
    assert batches[0].images.dtype == torch.float32
    assert batches[0].images.shape == (4, 3, 32, 32)


def test_a_stream_is_the_same_each_time():
    arguments = {"corruptions": ("snow", "fog"), "images": 7, "batch_size": 3}
    stream = continual(source(), **arguments, seed=5)
    for again in (stream, continual(source(), **arguments, seed=5, cache=False)):
        for one, other in zip(stream, again, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert one.index.tolist() == other.index.tolist()
    other = continual(source(), **arguments, seed=6)
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
def test_refusals_come_before_the_first_batch(change, message):
    with pytest.raises(ValueError, match=message) as error:
        continual(source(), **({"images": 12} | change))
    assert "\n" not in str(error.value)
