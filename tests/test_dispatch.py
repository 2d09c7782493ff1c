import os
import subprocess
import sys

import pytest
import torch

import ttaq
from ttaq import dispatch, ops
from ttaq.dispatch import Implementation, Op, cpu, gpu, never

X = torch.randn(6, 8)
ARGS = (X, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), 0, 15, None, 0)


def op(*refusals):
    """Make an op, not registered, whose implementations give their names."""
    implementations = [Implementation(name, lambda *_, name=name: name, lambda *_, r=r: r) for name, r in refusals]
    return Op("made_up", tuple(implementations))


@pytest.fixture
def forced(monkeypatch):
    return lambda name: monkeypatch.setattr(dispatch, "_forced", name)


def test_the_first_that_does_not_refuse_runs():
    assert op(("a", "no"), ("b", None), ("c", None)).run(X) == "b"
    assert op(("a", None), ("b", None)).run(X) == "a"


def test_when_all_refuse_the_sentences_are_in_the_error():
    with pytest.raises(RuntimeError, match=r"^made_up: every implementation refuses: .*a' *, 'too hot'.*'too cold'"):
        op(("a", "too hot"), ("b", "too cold")).run(X)


def test_a_forced_one_runs_or_says_why_not(forced):
    made = op(("a", None), ("b", None), ("c", "not here"))
    forced("b")
    assert made.run(X) == "b"
    forced("c")
    with pytest.raises(RuntimeError, match=r"^made_up: backend 'c' is forced and refuses: not here$"):
        made.run(X)
    forced("d")
    with pytest.raises(RuntimeError, match=r"backend 'd' is forced, this op has a, b, c; force one of these$"):
        made.run(X)


def test_errors_of_an_implementation_are_not_swallowed():
    def fail(*args):
        raise ZeroDivisionError("inside")

    made = Op("made_up", (Implementation("a", fail, never), Implementation("b", lambda *_: "b", never)))
    with pytest.raises(ZeroDivisionError, match="inside"):
        made.run(X)


def test_backend_forces_inside_the_block_alone():
    before = dispatch._forced
    with ttaq.backend("reference"):
        assert dispatch._forced == "reference"
        with ttaq.backend(None):
            assert dispatch._forced is None
        assert dispatch._forced == "reference"
    assert dispatch._forced == before
    with pytest.raises(KeyError), ttaq.backend("reference"):
        raise KeyError
    assert dispatch._forced == before


def test_unknown_backends_are_refused_at_the_door():
    with (
        pytest.raises(ValueError, match=r"^backend: wanted one of cpu, cuda, dequantised, .*, got 'gpu'$"),
        ttaq.backend("gpu"),
    ):
        pass


def test_reference_and_choice_agree():
    with ttaq.backend("reference"):
        wanted = ops.fake_quant(*ARGS[:3], qmin=0, qmax=15)
    assert torch.equal(ops.fake_quant(*ARGS[:3], qmin=0, qmax=15), wanted)


def test_explain_says_who_runs_and_why_the_others_do_not():
    lines = ttaq.explain("fake_quant", *ARGS).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["triton", "cpu", "reference"]
    assert sum(line.endswith(": runs") for line in lines) == 1
    assert lines[0].startswith("triton: refuses, the input is on cpu")
    with ttaq.backend("reference"):
        lines = ttaq.explain("fake_quant", *ARGS).splitlines()
        assert lines[-1] == "reference: runs"
        assert not lines[1].endswith("runs")
    with pytest.raises(ValueError, match=r"^explain: wanted one of fake_quant, .*, got 'nothing'$"):
        ttaq.explain("nothing")


def test_explain_for_tensors_without_memory():
    for line in ttaq.explain(
        "fake_quant", *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in ARGS)
    ).splitlines():
        assert ": refuses, the input is on meta" in line or line.startswith("reference: runs")


def test_device_refusals():
    meta = torch.empty(2, device="meta")
    assert cpu(never)(X) is None
    assert cpu(lambda *_: "why")(X) == "why"
    assert cpu(never)(meta) == "the input is on meta; this implementation needs the CPU"
    assert gpu(never)(meta) == "the input is on meta; this implementation needs a CUDA device"


def test_every_op_is_registered_once_and_refuses_nothing_last():
    for name, declared in dispatch.OPS.items():
        assert declared.name == name
        assert hasattr(torch.ops.ttaq, name)
        assert declared.implementations[-1].name == "reference"


def test_autocast_is_off_inside_an_op_and_back_on_after():
    seen = []
    made = Op("made_up", (Implementation("a", lambda *_: seen.append(torch.is_autocast_enabled("cpu")), never),))
    with torch.autocast("cpu", torch.bfloat16):
        made.run(X)
        assert torch.is_autocast_enabled("cpu")
    made.run(X)
    assert seen == [False, False]


def test_the_environment_forces_a_backend():
    """TTAQ_BACKEND is read once, when ttaq is imported."""
    code = "import torch, ttaq; from ttaq import dispatch; print(dispatch._forced)"
    environment = os.environ | {"TTAQ_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["reference"]
