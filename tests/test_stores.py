"""Room for large tensors: on the device up to a budget, outside beyond it, and nothing left behind."""

import gc
import os
import tempfile

import pytest
import torch

from ttaq import stores
from ttaq.stores import Room, bytes_of, rows

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(0, 0), (4096, 4096), ("4096", 4096), ("2GiB", 2 << 30), ("1.5 kib", 1536), ("500MB", 500_000_000), ("7 b", 7)],
)
def test_bytes_are_read(text, wanted):
    assert bytes_of(text) == wanted


@pytest.mark.parametrize("text", ["", "GiB", "2 GiBs", "-1", -1, 2.5, True, None, "1e9"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match=r'^cache: wanted bytes, as a number or as in "2GiB" or "500MB", got '):
        bytes_of(text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mapped():
    with open("/proc/self/maps", encoding="utf-8") as file:
        return [line for line in file if "ttaq-" in line]


def test_what_does_not_fit_lies_in_a_file_without_a_name(folder):
    like, room = torch.randn(2, 5, 3), Room(CPU, 4 * 60)
    first, second = room.empty(4, like), room.empty(4, like)
    assert (room.held, room.spilled) == (240, 240)
    assert len(mapped()) == 1
    assert str(folder) in mapped()[0]
    assert "(deleted)" in mapped()[0]
    assert os.listdir(folder) == []
    for tensor in (first, second):
        assert (tensor.shape, tensor.dtype, tensor.stride()) == ((4, 5, 3), torch.float32, (15, 3, 1))
        tensor[:] = 1.5
        assert tensor.sum() == 90
    del first, second, tensor
    gc.collect()
    assert (room.held, room.spilled) == (0, 0)
    assert mapped() == []


@pytest.mark.parametrize("budget", [0, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_the_layout_is_kept(budget, dtype):
    plain = torch.randn(2, 4, 5, 6).to(dtype)
    assert Room(CPU, budget).empty(7, plain).is_contiguous()
    last = Room(CPU, budget).empty(7, plain.contiguous(memory_format=torch.channels_last))
    assert last.shape == (7, 4, 5, 6)
    assert last.dtype == dtype
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()


def test_by_default_half_of_what_is_free_is_given():
    with open("/proc/meminfo", encoding="ascii") as file:
        total = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemTotal"))
    assert 0 < Room(CPU).budget <= total // 2


def test_shrinking_moves_what_is_too_much():
    like, room = torch.randn(1, 8), Room(CPU, 1 << 20)
    held = [room.empty(4, like).copy_(torch.randn(4, 8)) for _ in range(2)]
    before = [tensor.clone() for tensor in held]
    assert room.shrink()
    assert room.budget == 128
    held = [room.move(tensor) for tensor in held]
    assert (room.held, room.spilled) == (128, 128)
    assert room.shrink()
    held = [room.move(tensor) for tensor in held]
    assert (room.held, room.spilled) == (0, 256)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    assert not room.shrink()


def test_a_full_disk_ends_in_a_sentence(monkeypatch, folder):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.os, "posix_fallocate", full)
    message = rf"^cache: {folder} cannot take 0 MiB \(No space left on device\); set TMPDIR, or give a larger cache"
    with pytest.raises(ValueError, match=message):
        Room(CPU, 0).empty(3, torch.ones(1, 2))
    assert os.listdir(folder) == []


def test_rows():
    x = torch.randn(6, 3)
    assert torch.equal(rows(x, slice(1, 4), CPU), x[1:4])
    assert torch.equal(rows(x, torch.tensor([4, 0]), CPU), x[[4, 0]])


@pytest.mark.gpu
def test_on_a_gpu_the_rest_lies_in_pinned_memory():
    device, like = torch.device("cuda", 0), torch.randn(1, 3, device="cuda")
    room = Room(device, 0)
    store = room.empty(6, like)
    assert store.is_pinned()
    store.copy_(torch.randn(6, 3))
    picked = torch.tensor([4, 0], device="cuda")
    for found in (rows(store, picked, device), rows(store, picked, device, picked.cpu())):
        assert found.is_cuda
        assert torch.equal(found.cpu(), store[[4, 0]])
    assert torch.equal(rows(store, slice(1, 4), device).cpu(), store[1:4])
