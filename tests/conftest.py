"""What every test shares: Triton on the CPU, seeds, poisoned memory, marks and the shared data."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # where there is a GPU the kernels run compiled
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared/data"


def _round_to_bfloat16_as_hardware_does():
    """Replace the interpreter's float32 to bfloat16 conversion, which truncates, by rounding half to even."""
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if not (source.is_fp32() and target.is_bf16()):
            return original(values, source, target, rounding_mode)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert


def _multiply_bfloat16_as_numbers():
    """Widen the operands of the interpreter's tl.dot, which multiplies the bit patterns of bfloat16."""
    from triton import language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widen(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(builder, a, b, *rest):
        return original(builder, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        _round_to_bfloat16_as_hardware_does()
        _multiply_bfloat16_as_numbers()
    except ImportError:
        del os.environ["TRITON_INTERPRET"]  # there is no Triton here: nothing is interpreted


def pytest_configure(config):
    """Silence numpy where the interpreter overflows and divides by zero as a GPU does: without a word."""
    kinds = "(overflow|invalid value|divide by zero) encountered"
    config.addinivalue_line("filterwarnings", f"ignore:{kinds}:RuntimeWarning")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test draw from the old generator)


@pytest.fixture
def poison(monkeypatch):
    """Fill what torch.empty, empty_like and new_empty return with NaN, or with 0xA5 bytes for integers."""

    def filling(allocate):
        def poisoned(*args, **kwargs):
            fresh = allocate(*args, **kwargs)
            if fresh.is_floating_point():
                return fresh.fill_(torch.nan)
            return fresh.fill_(0xA5 if fresh.dtype == torch.uint8 else 0x25A5A5A5)

        return poisoned

    monkeypatch.setattr(torch, "empty", filling(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filling(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filling(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def shared_data():
    """Give the folder of CIFAR-10 and the trained ResNet-20, which is not part of the repository."""
    if not DATA.is_dir():
        pytest.skip(f"needs the data folder {DATA}")
    return DATA


@pytest.fixture(scope="module")
def bench():
    """Import modules of bench/, which is no part of the package."""
    sys.path.append(str(ROOT))
    yield lambda name: importlib.import_module(f"bench.{name}")
    sys.path.remove(str(ROOT))


@pytest.fixture
def threads():
    """Give the function that sets torch's number of threads; it is as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
