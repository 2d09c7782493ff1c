"""The cache of a block gives what a plain one gives, wherever its tensors lie, and holds three of them at most."""

import pytest
import torch
from tiny import calibrated, input_of
from torch import nn

import ttaq
from ttaq import caching
from ttaq.blocks import block_input, find_blocks, run_block
from ttaq.caching import BlockCache
from ttaq.quantizers import disabled

NAMES = ("quantised", "floats", "targets")


@torch.no_grad()
def plain(model, blocks, inputs):
    """Give the three tensors of every block, each made anew: the reference."""
    found, before = [], None
    for block in blocks:
        if block.chained and found:
            quantised, _, floats = found[-1]
            quantised = torch.cat([run_block(model, before, x) for x in quantised.split(128)])
        else:
            quantised = torch.cat([block_input(model, block, x)[0] for x in inputs])
            with disabled(model):
                floats = torch.cat([block_input(model, block, x)[0] for x in inputs])
        with disabled(model):
            targets = torch.cat([run_block(model, block, x) for x in floats.split(128)])
        found.append((quantised, floats, targets))
        before = block
    return found


class Windows(nn.Module):
    """Sees four rows an image and gives two."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.inner(x.reshape(-1, 6))
        return self.head(x.reshape(-1, 2, 6).mean(1))


def subject(name):
    if name != "windows":
        return calibrated(name, "w4a4"), [input_of(name, 20), input_of(name, 5, seed=2)]
    torch.manual_seed(0)
    inputs = [torch.randn(5, 24), torch.randn(3, 24)]
    model = ttaq.prepare(Windows().eval(), "w4a4")
    ttaq.calibrate(model, inputs)
    return model, inputs


@pytest.mark.parametrize("budget", [None, 0, 30_000])
@pytest.mark.parametrize("name", ["resnet", "vit", "variety", "windows"])
def test_every_budget_gives_the_same(name, budget):
    model, inputs = subject(name)
    model.eval()
    blocks = find_blocks(model, inputs[0])
    wanted = plain(model, blocks, inputs)
    cache, most = BlockCache(model, inputs, None, budget), 0
    for block, reference in zip(blocks, wanted, strict=True):
        given = cache.advance(block)
        assert all(a is getattr(cache, n) for a, n in zip(given, NAMES, strict=True))
        for one, other in zip(given, reference, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
        most = max(most, sum(t.nbytes for t in reference))
        assert cache.room.held <= cache.room.budget
        assert cache.room.held + cache.room.spilled == sum(t.nbytes for t in given)
        assert all(a is b for a, b in zip(cache.advance(block), given, strict=True))
    assert bool(cache.room.spilled) is (budget == 0)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_three_tensors_and_one_piece_are_the_most(name, monkeypatch):
    model, inputs = subject(name)
    blocks = find_blocks(model.eval(), inputs[0])
    cache, seen, rooms = BlockCache(model, inputs, None), [], []
    empty = cache.room.empty
    monkeypatch.setattr(caching, "run_block", lambda *a: seen.append(_live(cache)) or run_block(*a))
    monkeypatch.setattr(cache.room, "empty", lambda *a: rooms.append(block.name) or empty(*a))
    for block in blocks:
        cache.advance(block)
    assert max(seen) <= 3
    if name == "vit":  # its two layers have the same shapes, so that the second takes over the room of the first
        assert blocks[2].chained
        assert rooms.count(blocks[1].name) == 3
        assert rooms.count(blocks[2].name) == 0


def _live(cache):
    return sum(1 for r in cache.room._inside if r() is not None)


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_an_advance_that_failed_can_be_asked_for_again(name, shrunk, monkeypatch):
    model, inputs = subject(name)
    blocks = find_blocks(model.eval(), inputs[0])
    wanted = plain(model, blocks, inputs)
    cache, calls = BlockCache(model, inputs, None), []

    def failing(kind, real):
        def run(*args):
            calls.append(kind)
            if len(calls) % 7 == 0:
                raise torch.OutOfMemoryError
            return real(*args)

        return run

    monkeypatch.setattr(caching, "run_block", failing("run", run_block))
    monkeypatch.setattr(caching, "block_input", failing("input", block_input))
    failures = 0
    for block, reference in zip(blocks, wanted, strict=True):
        for _ in range(6):
            try:
                given = cache.advance(block)
                break
            except torch.OutOfMemoryError:
                failures += 1
                if shrunk:
                    cache.shrink()
        assert all(torch.equal(one, other) for one, other in zip(given, reference, strict=True))
    assert failures >= 2


def test_shrinking_keeps_what_is_there():
    model, inputs = subject("resnet")
    block = find_blocks(model.eval(), inputs[0])[0]
    cache = BlockCache(model, inputs, None)
    before = [t.clone() for t in cache.advance(block)]
    assert cache.shrink()
    assert cache.room.held <= cache.room.budget
    assert cache.room.spilled > 0
    assert all(torch.equal(a, b) for a, b in zip(cache.advance(block), before, strict=True))
    while cache.shrink():
        pass
    assert cache.room.held == 0
    assert all(torch.equal(a, b) for a, b in zip(cache.advance(block), before, strict=True))
