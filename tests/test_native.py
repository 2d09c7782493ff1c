"""The native libraries against the plain-torch references, on every instruction set of this processor."""

import multiprocessing
import re
import subprocess
from pathlib import Path

import pytest
import torch
from ttaq.kernels import _library, _native, codes, fake_quant

LEVELS = _native.LEVELS[: _native.LEVELS.index(_native.cpu_level() or "base") + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One scale; rows longer than a task; short rows alone and many; columns under, at and over a tile; two short sides.
FORMS = [
    *((1, 1, 1), (1, 1, 3), (1, 1, 40_001), (2, 3, 17_000), (7, 3, 200), (1, 300, 32), (1, 9000, 24), (2, 700, 100)),
    *((1000, 3, 1), (300, 1, 1), (70, 1025, 1), (65, 1024, 1), (1, 5000, 1), (131, 6, 4), (9, 20, 49), (2, 9000, 2)),
]

pytestmark = pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads are the subject of one test; in all others they would only wait for other processes' work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _inputs(form, dtype, seed=0):
    """Draw values over and beyond the range, with ties, both infinities and a NaN among them."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.rand(form[1], generator=random) * 0.3 + 0.05
    zero = torch.randn(form[1], generator=random) * 4 + 7.5
    x = torch.randn(form, generator=random) * 2
    ties = torch.rand(form, generator=random) < 0.2
    x = torch.where(ties, (torch.round(x * 4) + 0.5) * scale[:, None], x).to(dtype)
    if x.numel() > 100:
        x.view(-1)[[17, 40, 63]] = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
    return x, torch.randn(form, generator=random).to(dtype), scale, zero


def _poisoned(like, dtype=None):
    """Allocate an output that no reader could take for an answer."""
    dtype = dtype or like.dtype
    return torch.full(like.shape, float("nan") if dtype.is_floating_point else 99, dtype=dtype)


def _forward(x, scale, zero, form, level=None):
    y = _poisoned(x)
    _native.fake_quant(x, y, scale, zero, 0, 15, *form, level)
    return y


def _backward(grad, x, scale, zero, form, level=None):
    dx, dscale, dzero = _poisoned(x), _poisoned(scale), _poisoned(scale)
    _native.fake_quant_backward(grad, x, dx, scale, zero, dscale, dzero, 0, 15, *form, level)
    return dx, dscale, dzero


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_and_input_gradients_are_those_of_the_reference(form, dtype):
    x, grad, scale, zero = _inputs(form, dtype)
    expected = fake_quant.reference(x, scale, zero, 0, 15, 1, 0)
    wanted_dx, wanted_dscale, _ = fake_quant.reference_backward(grad, x, scale, zero, 0, 15, 1, 0)
    for level in LEVELS:
        y = _forward(x, scale, zero, form, level)
        assert torch.equal(y.nan_to_num(-99), expected.nan_to_num(-99)), level
        dx, dscale, _ = _backward(grad, x, scale, zero, form, level)
        assert torch.equal(dx, wanted_dx), level
        assert torch.equal(dscale.isnan(), wanted_dscale.isnan()), level


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parameter_gradients_err_at_most_twice_as_much_as_float32_torch(form, dtype):
    # root mean squares over draws: of one sum alone, either error may be small by luck
    ours, torchs, size = dict.fromkeys(LEVELS, 0.0), 0.0, 0.0
    for seed in range(12 if form[1] < 8 else 2):
        x, grad, scale, zero = _inputs(form, dtype, seed)
        x, zero = x.nan_to_num(1.25, 2.5, -2.5), zero.round().to(torch.int32)
        exact = _gradients_in_float64(grad, x, scale, zero)
        plain = torch.stack(fake_quant.reference_backward(grad, x, scale, zero, 0, 15, 1, 0)[1:])
        torchs += (plain - exact).square().sum(1)
        size += exact.square().sum(1)
        for level in LEVELS:
            got = torch.stack(_backward(grad, x, scale, zero, form, level)[1:])
            ours[level] += (got - exact).square().sum(1)
    ulp = size.sqrt() * torch.finfo(torch.float32).eps
    for level in LEVELS:
        assert (ours[level].sqrt() <= 2 * torchs.sqrt() + ulp).all(), (level, ours[level].sqrt(), torchs.sqrt())


def _gradients_in_float64(grad, x, scale, zero):
    """Sum in float64 what float32 arithmetic says is inside and what is outside."""
    inside = fake_quant.reference_backward(torch.ones_like(grad), x, scale, zero, 0, 15, 1, 0)[0].bool()
    rounded = torch.round(x.float() / scale[:, None]).double()
    ratio, step, origin = x.double() / scale.double()[:, None], scale.double()[:, None], zero.double()[:, None]
    outside = torch.clamp(rounded + origin, 0, 15) - origin
    dscale = grad.double() * torch.where(inside, rounded - ratio, outside)
    dzero = grad.double() * torch.where(inside, 0.0, -step)
    return torch.stack([dscale.sum((0, 2)), dzero.sum((0, 2))])


@pytest.mark.parametrize("form", [(1, 1, 300_001), (3, 5, 17_000), (500, 320, 1), (40, 64, 49)], ids=str)
def test_results_have_the_same_bits_for_any_number_of_threads(form):
    x, grad, scale, zero = _inputs(form, torch.float32)
    x = x.nan_to_num(0.5, 1.0, -1.0)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((_forward(x, scale, zero, form), *_backward(grad, x, scale, zero, form)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_thread_pool_is_that_of_torch():
    assert _native.library("cpu").ttaq_cpu_has_pool() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_are_those_of_the_reference_and_nonfinite_values_are_counted(form, dtype):
    x, _, scale, zero = _inputs(form, dtype)
    wanted, count = codes.reference(x, scale, zero, 0, 15, 1, 0)
    for level in LEVELS:
        got, nonfinite = _poisoned(x, torch.uint8), torch.tensor(-7, dtype=torch.int32)
        _native.quantize_codes(x, got, scale, zero, nonfinite, 0, 15, *form, level)
        assert torch.equal(got, wanted), level
        assert nonfinite == count


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (2, 33), (4, 40_000), (3, 16_389)], ids=str)
def test_packed_words_are_those_of_the_reference(shape, bits):
    random = torch.Generator().manual_seed(2)
    values = torch.randint(0, 1 << bits, shape, generator=random, dtype=torch.uint8)
    wanted = codes.pack_reference(values, bits)
    for level in LEVELS:
        words, back = _poisoned(wanted), _poisoned(values)
        _native.pack_codes(values, words, bits, level)
        assert torch.equal(words, wanted), level
        _native.unpack_codes(words, back, bits, level)
        assert torch.equal(back, values), level


def test_every_half_precision_number_survives_the_conversions():
    # scale 1 and a range wider than the type make y = round(x): compares all 65,536 float16 and bfloat16 values
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        scale, zero = torch.ones(1), torch.zeros(1)
        for level in LEVELS:
            y = torch.empty_like(x)
            _native.fake_quant(x, y, scale, zero, -(1 << 24), 1 << 24, 1, 1, x.numel(), level)
            wanted = torch.clamp(torch.round(x.float()), -(1 << 24), 1 << 24).to(dtype)
            torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


def test_rounding_to_half_precision_is_to_nearest_even():
    random = torch.Generator().manual_seed(3)
    codes_in = torch.arange(256.0).repeat(64)
    for dtype in (torch.float16, torch.bfloat16):
        scale = torch.rand(codes_in.numel(), generator=random) * torch.logspace(-9, 3, codes_in.numel())
        x = (codes_in * scale).to(dtype)
        for level in LEVELS:
            y = torch.empty_like(x)
            _native.fake_quant(x, y, scale, torch.zeros_like(scale), 0, 255, 1, x.numel(), 1, level)
            assert torch.equal(y, fake_quant.reference(x, scale, torch.zeros_like(scale), 0, 255, 0, 0))


def test_an_unknown_level_and_width_are_refused():
    x, y = torch.ones(4), torch.empty(4)
    with pytest.raises(ValueError, match="v9"):
        _native.fake_quant(x, y, torch.ones(1), torch.zeros(1), 0, 15, 1, 1, 4, "v9")
    with pytest.raises(RuntimeError, match="bits must be 2, 3, 4 or 8"):
        _native.pack_codes(torch.ones(8, dtype=torch.uint8), torch.empty(5, dtype=torch.uint8), 5)


def _quantise_in_child(queue, x, y, scale, zero, form):
    # nothing of torch that runs in parallel: its own operations hang here
    _native.fake_quant(x, y, scale, zero, 0, 15, *form)
    queue.put(y.numpy().tobytes())


def test_a_forked_child_still_quantises():
    form = (1, 1, 1 << 18)
    x, _, scale, zero = _inputs(form, torch.float32)
    torch.set_num_threads(2)
    expected = _forward(x, scale, zero, form)  # starts the pool that the child loses
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_quantise_in_child, args=(queue, x, _poisoned(x), scale, zero, form), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=20) == expected.numpy().tobytes()
    finally:
        child.kill()


def test_a_missing_library_gives_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    assert "pip install" in _library._why_not_built("cpu")
    (tmp_path / "native_build.json").write_text('{"cpu": null, "cuda": "nvcc was not found"}')
    assert _library._why_not_built("cuda") == "nvcc was not found"
    assert "gone" in _library._why_not_built("cpu")


def test_the_cuda_library_says_why_it_cannot_serve():
    if _native.library("cuda") is None:
        assert _native.reason("cuda")
    else:
        assert torch.cuda.is_available()


@pytest.mark.skipif("_native.library('cuda') is not None")
def test_without_a_gpu_the_reason_names_the_driver_or_the_build():
    assert any(word in _native.reason("cuda") for word in ("driver", "device", "nvcc", "TTAQ_NATIVE", "built"))


@pytest.mark.gpu
@pytest.mark.skipif(_native.library("cuda") is None, reason=str(_native.reason("cuda")))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (2, 33), (64, 4096), (3, 16_389)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_packed_words_on_a_gpu_are_those_of_the_reference(shape, bits, offset):
    random = torch.Generator().manual_seed(4)
    values = torch.randint(0, 1 << bits, shape, generator=random, dtype=torch.uint8)
    wanted = codes.pack_reference(values, bits)
    there = _on_gpu(values, offset)
    words = _on_gpu(_poisoned(wanted), offset)
    _native.pack_codes(there, words, bits)
    assert torch.equal(words.cpu(), wanted)
    back = _on_gpu(_poisoned(values), offset)
    _native.unpack_codes(words, back, bits)
    assert torch.equal(back.cpu(), values)


def _on_gpu(tensor, offset):
    """Copy to the GPU, `offset` bytes after an aligned address."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
    return room[offset:].view(tensor.shape).copy_(tensor)


def test_the_cpu_library_exports_only_its_own_names():
    path = _native.library("cpu")._name
    symbols = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True)
    if symbols.returncode:
        pytest.skip("nm is not installed")
    strong = [line.split()[-1] for line in symbols.stdout.splitlines() if " T " in line]
    assert strong
    assert all(name.startswith("ttaq_cpu_") for name in strong)


def test_cuda_kernels_exist_for_both_architectures_and_spill_nothing():
    library = Path(_native.__file__).with_name("_native_cuda.so")
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not library.exists() or not tool.exists():
        pytest.skip("no CUDA library was built here, or there is no cuobjdump to read it with")
    report = subprocess.run([str(tool), "-res-usage", str(library)], capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    skinny = [kernel for kernel in kernels if "skinny_linear" in kernel[0]]
    assert len(kernels) - len(skinny) == 2 * 12  # pack and unpack, dense and by rows, 2, 3 and 4 bits
    assert len(skinny) == 2 * 3 * 7  # codes and two kinds of floats; wide and narrow loads, 8 bits wide alone
    assert {"sm_80", "sm_90a"} <= set(re.findall(r"arch = (\w+)", report))
    for name, registers, stack, local in kernels:
        # 3 bits: 8 warps of a block share the registers of a multiprocessor, else 16
        most = 32 if "skinny_linear" not in name else 168 if re.search(r"(Float|Code)SumI(Lb\dE)?Li3E", name) else 128
        assert int(registers) <= most
        assert (stack, local) == ("0", "0")
    code = subprocess.run([str(tool), "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    for instruction in ("LDG.E.NA.128.CONSTANT", "IMMA.16832.U8.U8", "HMMA.16816.F32 ", "HMMA.16816.F32.BF16"):
        assert code.count(instruction) >= 2 * 4
