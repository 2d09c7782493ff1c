"""RoTTA's memory: bounded, balanced, recent and sure."""

import math
import random
from collections import Counter

import pytest
import straight_teachers as straight
import torch
from tiny import images, resnet

from ttaq.adaptation import adapt
from ttaq.adaptation.memory import ClassBalancedMemory


def image(value, shape=(3, 4, 4)):
    return torch.full(shape, float(value))


@pytest.mark.parametrize(("capacity", "classes"), [(12, 5), (7, 10), (1, 3), (64, 1000)])
def test_it_holds_what_the_papers_algorithm_holds(capacity, classes):
    rng = random.Random(capacity)
    memory, list_of_lists = ClassBalancedMemory(capacity, 1.0, 1.0), straight.Memory(capacity, classes)
    for i in range(300):
        label = min(int(rng.expovariate(1.0)), classes - 1) if i % 100 < 50 else rng.randrange(classes)
        unsure = rng.random() * math.log(classes)
        memory.add(image(i), label, unsure, classes)
        list_of_lists.offer(image(i), label, unsure)
        assert len(memory) <= capacity
        held = {entry.image[0, 0, 0].item(): memory.seen - entry.born for entry in memory.entries}
        assert held == {item[0][0, 0, 0].item(): item[1] for item in list_of_lists.items()}


def test_a_correlated_stream_leaves_room_for_other_classes():
    memory = ClassBalancedMemory(20, 1.0, 1.0)
    for i in range(400):
        memory.add(image(i), i // 100, 0.1, 4)
    assert Counter(entry.label for entry in memory.entries) == {0: 5, 1: 5, 2: 5, 3: 5}
    memory.add(image(1), 3, 0.1, 4)
    assert Counter(entry.label for entry in memory.entries)[3] == 5


def test_unsure_newcomers_are_not_taken_and_old_images_go_first():
    memory = ClassBalancedMemory(2, 1.0, 1.0)
    for value in (1, 2):
        memory.add(image(value), 0, 0.0, 1)
    memory.add(image(3), 0, 5.0, 1)
    assert [entry.image[0, 0, 0].item() for entry in memory.entries] == [1, 2]
    memory.add(image(4), 0, 0.0, 1)
    assert [entry.image[0, 0, 0].item() for entry in memory.entries] == [2, 4]


def test_timeliness_falls_with_age():
    memory = ClassBalancedMemory(4, 1.0, 1.0)
    for value in range(4):
        memory.add(image(value), 0, 0.0, 1)
    batch, timely = memory.batch(torch.zeros(1, dtype=torch.float64))
    assert batch.dtype == torch.float64
    assert timely.tolist() == pytest.approx([math.exp(-a / 4) / (1 + math.exp(-a / 4)) for a in (4, 3, 2, 1)])


def test_its_bytes_are_bounded_and_hold_no_batch():
    adapter = adapt(resnet(), "rotta", capacity=6, frequency=50)
    for seed in range(8):
        adapter(images(40, seed=seed))
        memory = adapter.method.memory
        assert memory.nbytes <= 6 * images(1).nbytes
        assert all(entry.image.untyped_storage().nbytes() == images(1).nbytes for entry in memory.entries)


def test_images_of_another_size_are_refused_until_reset():
    adapter = adapt(resnet(), "rotta", frequency=100)
    adapter(images(4))
    before = adapter.state_dict()["memory"]["memory"]["seen"]
    with pytest.raises(ValueError, match=r"images of shape \(3, 16, 16\), got \(3, 24, 24\); resize"):
        adapter(images(4, side=24))
    assert adapter.state_dict()["memory"]["memory"]["seen"] == before
    adapter.reset()
    adapter(images(4, side=24))


def test_states_are_copies_and_a_fuller_one_is_refused():
    memory = ClassBalancedMemory(4, 1.0, 1.0)
    for value in range(4):
        memory.add(image(value), value % 2, 0.1, 2)
    state = memory.state_dict()
    twin = ClassBalancedMemory(4, 1.0, 1.0)
    twin.load_state_dict(state)
    state["images"][0].fill_(9)
    assert [e.image[0, 0, 0].item() for e in memory.entries] == [e.image[0, 0, 0].item() for e in twin.entries]
    with pytest.raises(ValueError, match="remembers 4 images, and capacity is 3"):
        ClassBalancedMemory(3, 1.0, 1.0).load_state_dict(state)


def test_rotta_predicts_each_image_by_itself_and_learns_at_its_frequency():
    adapter = adapt(resnet(), "rotta", capacity=12, frequency=10)
    for seed, n in enumerate([8, 8, 1, 13]):
        adapter(images(n, seed=seed))
    x = images(9, seed=60)
    alone = torch.cat([adapter.predict(one) for one in x.split(1)])
    torch.testing.assert_close(adapter.predict(x), alone, rtol=1e-4, atol=1e-5)
    assert [step.loss is not None for step in adapter.history] == [False, True, False, True]  # 8, 16, 17, 30
