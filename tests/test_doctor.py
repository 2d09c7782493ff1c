"""The doctor: every op is asked, and what it says is what happens."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from ttaq.kernels import _library, _native

from ttaq import backend, dispatch
from ttaq.doctor import SAMPLES, _describe_products, describe_machine, examine, print_report


def test_every_op_has_a_sample_that_runs():
    assert SAMPLES.keys() == dispatch.OPS.keys()
    for name, sample in SAMPLES.items():
        args = sample()
        outputs = getattr(torch.ops.ttaq, name)(*args)
        wanted = dispatch.OPS[name].implementations[-1].run(*args)
        for one, other in zip(
            *(value if isinstance(value, tuple) else (value,) for value in (outputs, wanted)), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_one_implementation_runs_and_the_others_say_why_not():
    for op, verdicts in examine().items():
        assert [name for name, _ in verdicts] == [i.name for i in dispatch.OPS[op].implementations]
        running = [name for name, verdict in verdicts if verdict == "runs"]
        assert len(running) == 1
        first = next(i.name for i in dispatch.OPS[op].implementations if i.refuses(*SAMPLES[op]()) is None)
        assert running == [first]
        assert all(len(verdict) > 20 for name, verdict in verdicts if name not in running)


def test_a_forced_backend_shows():
    with backend("reference"):
        assert dict(examine()["fake_quant"])["reference"] == "runs"
        assert "forced" in dict(examine()["fake_quant"])["cpu"] or _native.reason("cpu")


@pytest.mark.parametrize("columns", [44, 100])
def test_the_report_fits_and_names_all(columns):
    console = Console(width=columns, file=io.StringIO())
    print_report(console)
    text = console.file.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= columns
    assert "\x1b" not in text
    for word in (*dispatch.OPS, "triton", "refuses", torch.__version__):
        assert word in text


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine["torch"] == torch.__version__
    assert ("commit" in machine["ttaq"]) == (Path(__file__).parents[1] / ".git").exists()
    assert machine["threads"].startswith(f"{torch.get_num_threads()} of torch")
    assert (_native.cpu_level() or "never") in machine["native cpu"] or _native.reason("cpu")


@pytest.mark.parametrize(
    ("level", "processor", "words"),
    [
        ("v4", "v4", ("AVX-512 VNNI", "64 pairs")),
        ("v3", "v4", ("AVX2", "AVX-512 without its VNNI part")),
        ("v3", "v3", ("AVX2", "no AVX-512 VNNI")),
        ("base", "base", ("base", "neither AVX2 nor AVX-512 VNNI")),
        (None, None, ("by torch", "no native library")),
    ],
)
def test_products_are_named_with_the_reason(level, processor, words):
    line = _describe_products(level, processor)
    assert all(word in line for word in words)
    assert "\n" not in line


def test_the_products_here_are_those_of_the_processor():
    assert describe_machine()["products"] == _describe_products(_library.product_level(), _native.cpu_level())
    if _native.reason("cpu"):
        return
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    if "avx512_vnni" in flags and _native.cpu_level() == "v4":
        assert _library.product_level() == "v4"
    elif flags:
        assert _library.product_level() != "v4"


@pytest.mark.gpu
def test_ops_are_asked_with_a_gpu_tensor_too():
    assert dict(examine("cuda")["fake_quant"])["triton"] == "runs"
