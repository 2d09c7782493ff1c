"""The CUDA kernels of few rows: as C++ on the CPU, with cuda_on_cpu.h, and on a GPU where there is one."""

import ctypes
import mmap
import platform
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import assert_as_good, assert_same
from ttaq.kernels import _library, _native, _products
from ttaq.kernels import codes as cd
from ttaq.kernels import packed_linear as pl
from ttaq.kernels import skinny_linear as sl

import ttaq
from ttaq import dispatch, ops
from ttaq.declarations import RAW

ROOT = Path(__file__).parents[1]
KINDS = {"codes": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SIGNATURE = _library._SIGNATURES["cuda"]["ttaq_cuda_skinny_linear"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library of csrc/cuda/skinny_linear.cu as plain C++."""
    if not shutil.which("g++") or platform.system() != "Linux":
        pytest.skip("needs g++ and Linux, whose fibers stand for CUDA threads")
    path = tmp_path_factory.mktemp("emulated") / "skinny.so"
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-DTTAQ_ON_CPU")
    source = ("-x", "c++", ROOT / "csrc/cuda/skinny_linear.cu", "-I", ROOT / "tests", "-o", path)
    done = subprocess.run(["g++", *flags, *source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(path))
    library.ttaq_cuda_skinny_linear.argtypes = SIGNATURE
    return library


@pytest.fixture
def launch(emulated, monkeypatch):
    """Give `sl.launch` for tensors on the CPU."""
    monkeypatch.setattr(_products, "library", lambda kind: emulated)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
    return sl.launch


def arguments(kind, bits, shape, n, *, group=0, tokens=False, bias=True, dtype=None, whole_bytes=False, device="cpu"):
    random = torch.Generator().manual_seed(bits + shape[-1])

    def draw(size, width, dtype=torch.uint8):
        return torch.randint(0, 1 << width, size, generator=random, dtype=dtype)

    k = shape[-1]
    scales = (n, k // group) if group else (n,)
    codes = draw((n, k), bits)
    words = codes if whole_bytes else cd.pack_reference(codes, bits)
    weight = (words, torch.rand(scales, generator=random) * 0.01 + 0.001, draw(scales, bits, torch.int32))
    x, grid = torch.randn(shape, generator=random).to(KINDS[kind]), (None, None)
    if kind == "codes":
        x, rows = draw(shape, 8), shape[:-1] if tokens else ()
        grid = (torch.rand(rows, generator=random) * 0.1 + 0.01, draw(rows, 8, torch.int32))
    b = torch.randn(n, generator=random) if bias else None
    args = (x, *weight, b, bits, group, *grid, 8, dtype or KINDS[kind])
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


def check(run, args):
    """Compare with the reference: bits on codes, twice the error of plain torch on floats; and with a second call."""
    x, words, scale, zero, bias, bits, group, *_ = args
    y, *nothing = run(*args)
    assert [t.shape for t in nothing] == [(0,), (0,)]
    assert_same(run(*args)[0], y)
    wanted = pl.reference(*args)[0]
    if x.dtype == torch.uint8:
        assert_same(y, wanted)
        return
    codes = cd.stored_codes(words, bits, x.shape[-1]).double()
    scale, zero = (t.repeat_interleave(group, -1) if group else t.unsqueeze(-1) for t in (scale.double(), zero))
    exact = x.double() @ ((codes - zero) * scale).T
    assert_as_good(y, wanted.to(y.dtype), exact if bias is None else exact + bias.double())


ODD = {2: 335, 3: 341, 4: 335, 8: 336}  # whole dwords, and no more: a dword, or two of 4 bits, a load
LONG = {2: 2111, 3: 1365, 4: 1055, 8: 656}  # rows of whole 16 bytes, of some turns of the loop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", cd.PACKABLE)
@pytest.mark.parametrize("m", range(1, 9))
def test_any_number_of_rows(launch, kind, bits, m):
    check(launch, arguments(kind, bits, (m, ODD[bits]), 21, tokens=m % 2 == 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", cd.PACKABLE)
def test_loads_of_16_bytes(launch, kind, bits):
    args = arguments(kind, bits, (3, LONG[bits]), 16, bias=False)
    assert args[1].shape[1] % 16 == 0
    check(launch, args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", cd.PACKABLE)
@pytest.mark.parametrize("group", [64, 128, 192, 256, 512])
def test_groups(launch, kind, bits, group):
    args = arguments(kind, bits, (5, 6 * group), 9, group=group, tokens=group == 128)
    if bits == 3 and group % 128:
        assert "whole steps of 128" in sl.refuses(*args)
        return
    check(launch, args)
    check(launch, arguments(kind, bits, (2, group), 9, group=group))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_outputs_of_any_dtype(launch, kind, dtype):
    if kind == "codes" or dtype in (torch.float32, KINDS[kind]):
        check(launch, arguments(kind, 4, (2, 64), 5, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_each_many_outputs_and_whole_bytes(launch, kind):
    check(launch, arguments(kind, 8, (1, 16), 1))
    check(launch, arguments(kind, 4, (2, 80), 2049))
    check(launch, arguments(kind, 4, (96,), 7, tokens=True))
    check(launch, arguments(kind, 4, (2, 2, 96), 7, tokens=True))
    check(launch, arguments(kind, 5, (4, 48), 6, whole_bytes=True))
    assert launch(*arguments(kind, 4, (0, 64), 3))[0].shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_begin_anywhere(launch, kind):
    x, *rest = arguments(kind, 4, (3, 64), 5)
    wide = torch.full((3, 100), 7).to(x.dtype)
    for rows in (wide[:, 1:65].copy_(x), wide[:, 32:96].copy_(x), torch.empty(64, 3, dtype=x.dtype).copy_(x.T).T):
        check(launch, (rows, *rest))


def test_sums_at_the_bound_of_int32_are_exact(launch):
    k = 33_024
    x = torch.full((2, k), 255, dtype=torch.uint8)
    words = torch.tensor([[255], [0], [255]], dtype=torch.uint8).expand(3, k).contiguous()
    zero, x_zero = (torch.tensor(v, dtype=torch.int32) for v in ([0, 255, 128], 0))
    check(launch, (x, words, torch.rand(3), zero, None, 8, 0, torch.tensor(0.3), x_zero, 8, torch.float32))


def test_no_byte_outside_the_words_is_read(launch):
    """The words end where the memory of the process does."""
    libc = ctypes.CDLL(None, use_errno=True)
    for bits, k in (*ODD.items(), *LONG.items()):
        x, words, *rest = arguments("codes", bits, (2, k), 3)
        page = mmap.PAGESIZE
        size = -(-words.numel() // page) * page
        room = mmap.mmap(-1, size + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(room))
        assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
        held = torch.frombuffer(room, dtype=torch.uint8, count=words.numel(), offset=size - words.numel())
        at_end = held.view(words.shape).copy_(words)
        if at_end.data_ptr() % 16 == 0 or words.shape[1] % 16:
            assert_same(launch(x, at_end, *rest)[0], pl.reference(x, words, *rest)[0])


def test_refusals_are_sentences():
    good = arguments("f16", 4, (8, 128), 5)
    x, words, *rest = good

    def said(*args):
        return sl.refuses(*args)

    assert said(*good) == _native.reason("cuda")
    assert "9 rows" in said(*arguments("f16", 4, (9, 128), 5))
    assert "float32" in said(x.float(), words, *rest)
    assert "float64" in said(*good[:-1], torch.float64)
    assert "follows" in said(*good, None, None, None, "relu")
    assert "follows" in said(*good, None, None, None, "none", None, None, 8, True)
    assert "multiples of 8 bytes" in said(*arguments("f16", 4, (2, 100), 5))
    assert "5 bits" in said(x[:, :40], torch.empty(1, 25, dtype=torch.uint8), *rest[:3], 5, *rest[4:])
    assert "whole steps of 64" in said(*arguments("f16", 4, (2, 96), 5, group=32))
    assert "97 groups" in said(*arguments("codes", 4, (2, 97 * 64), 5, group=64))
    assert "int32" in said(*arguments("codes", 8, (1, 40_000), 1))
    shifted = torch.empty(words.numel() + 1, dtype=torch.uint8)[1:].view(words.shape)
    assert "words do not begin" in said(x, shifted, *rest)
    assert "gradient" in sl.refuses_backward()
    assert ttaq.explain("packed_linear", *good).startswith("cuda: refuses, the input is on cpu")


@pytest.mark.parametrize(
    ("change", "code"),
    [({"m": 9}, -8), ({"bits": 5}, -3), ({"group": 32}, -7), ({"group": 48}, -7), ({"y_dtype": 3}, -1)],
    ids=str,
)
def test_the_library_refuses_what_it_cannot_do(emulated, change, code):
    x = torch.zeros(9, 64, dtype=torch.uint8)
    y, scale, zero = torch.zeros(9, 4), torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int32)
    words = torch.zeros(4, 64, dtype=torch.uint8)
    sizes = {"y_dtype": 0, "bits": 4, "group": 0, "m": 2} | change
    pointers = [t.data_ptr() for t in (words, scale, zero)]
    grid = [scale.data_ptr(), zero.data_ptr(), 0, y.data_ptr(), 0, sizes["y_dtype"], sizes["bits"], sizes["group"]]
    assert emulated.ttaq_cuda_skinny_linear(x.data_ptr(), 64, *pointers, None, *grid, sizes["m"], 4, 64, None) == code


def run_cuda(*args):
    with dispatch.backend("cuda"):
        return RAW.packed_linear(*args)


@pytest.mark.gpu
@pytest.mark.skipif(_native.library("cuda") is None, reason=str(_native.reason("cuda")))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", cd.PACKABLE)
@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(21, 0, 0), (1024, 4096, 0), (4096, 4096, 0), (1000, 4096, 128)], ids=str
)
def test_on_a_gpu(kind, bits, m, n, k, group):
    check(run_cuda, arguments(kind, bits, (m, k or ODD[bits]), n, group=group, tokens=m == 3, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(_native.library("cuda") is None, reason=str(_native.reason("cuda")))
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_cuda_graph_and_on_another_stream(kind):
    args = arguments(kind, 4, (4, 1024), 512, device="cuda")
    wanted = run_cuda(*args)[0]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = run_cuda(*args)[0]
    stream.synchronize()
    assert_same(y, wanted)
    with torch.cuda.graph(graph):
        y = run_cuda(*args)[0]
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        assert_same(y, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(_native.library("cuda") is None, reason=str(_native.reason("cuda")))
def test_few_rows_run_on_it_and_many_on_triton():
    for m, name in ((8, "cuda"), (9, "triton")):
        args = arguments("bf16", 4, (m, 256), 32, device="cuda")
        assert f"{name}: runs" in ttaq.explain("packed_linear", *args)
        x, words, scale, zero, bias, *_ = args
        y, _ = ops.packed_linear(x.requires_grad_(), words, scale, zero, bias, bits=4)
        y.sum().backward()
        assert x.grad.isfinite().all()
