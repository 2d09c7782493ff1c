"""The benchmarks of whole networks, on a tiny one, and their table."""

from dataclasses import replace

import pytest
import torch
from tiny import calibrated, input_of

import ttaq


@pytest.fixture
def subject(bench):
    models = bench("models")
    twin = calibrated("timm_vit", "w4a8")
    packed = ttaq.pack(twin)
    fused = ttaq.fuse(packed, input_of("timm_vit", 1))
    made = models.Subject("ViT-tiny", twin, packed, fused, torch.contiguous_format, "cpu")
    made.images = lambda batch: input_of("timm_vit", batch)
    return made


ORIGIN = dict.fromkeys(("commit", "dirty", "machine", "driver", "cuda", "torch", "triton"), "")


def test_networks_are_measured_and_laid_out(bench, subject):
    rows = list(bench("models").measure(subject, 2, ORIGIN, seconds=0.0, compiled=False))
    assert [r.rival for r in rows] == ["torch float32", "torch bfloat16", "torch dynamic int8"] * 2
    assert all(r.ratio > 0 and r.peak_mib > 0 and r.max_error < 0.1 for r in rows)
    lost = [replace(r, ratio=0.5, p50_us=4000.0, peak_mib=3.0) for r in rows]
    older = [replace(r, case=r.case.replace(" of ", " of 9")) for r in rows]
    text = bench("tables").networks([*older, *lost])
    packed, whole = (bench("models").size_of(m) / 2**20 for m in (subject.packed, subject.floating))
    assert f"| ViT-tiny | 2 | {packed:.1f}, {whole:.1f} | 3 | 4 ms | 500.0 | 0.5x, a loss |" in text
    assert "| ViT-tiny, fused | 2 | " in text
    assert len(text.splitlines()) == 4


def test_a_compiler_that_fails_is_named_and_left_out(bench, subject, monkeypatch, capsys):
    def broken(batch):
        raise RuntimeError("there is no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    assert bench("models")._inductor(subject, input_of("timm_vit", 1)) == {}
    assert "torch.compile fails for ViT-tiny and is left out: there is no compiler\n" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 40])
def test_the_int8_rival_computes_a_linear_layer(bench, rows):
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8, bias=False))
    x = torch.randn(2, rows, 24)
    wanted = model(x)
    found = bench("rivals").int8_linears(model)(x)
    assert [type(m).__name__ for m in model] == ["Int8Linear", "ReLU", "Int8Linear"]
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_networks_that_are_not_there_are_refused_by_name(bench):
    with pytest.raises(ValueError, match=r"wanted some of ResNet-50, .*, got 'LeNet'"):
        bench("models").run(bench("__main__")._parser().parse_args(["models", "--models", "LeNet"]))


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
def test_a_map_is_measured_and_laid_out(bench, tmp_path, monkeypatch, capsys):
    command, who = bench("__main__"), bench("map")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command.machine, "commit", lambda given: {"commit": "abcdef123456", "dirty": "no"})
    asked = ["map", "--sizes", "32,64", "--rows", "1,5", "--seconds", "0", "--results", str(tmp_path)]
    monkeypatch.setattr(command, "gate", lambda tests: tests.name == "test_packed_linear.py")
    assert command.main(asked) == 0
    (path,) = tmp_path.iterdir()
    rows = bench("rows").read(path)
    assert len(rows) == 2 * 2 * 2 * 3
    assert {row.op for row in rows} == {"map"}
    text = capsys.readouterr().out
    assert all(head in text for head in ("| W4A8: M \\ N = K | 32 | 64 |", "| W4, float input: M \\ N = K | 32 | 64 |"))
    named = {"torch float32": 3.0, "torch bfloat16": 1.5, "torch dynamic int8": 0.5}
    cell = [replace(rows[0], case="64x64, M=5, W4A8", rival=name, ratio=ratio) for name, ratio in named.items()]
    assert who.table(cell, "W4A8").splitlines()[2] == "| 5 | int8 0.50 |"
    assert who.table(cell[:2], "W4A8").splitlines()[2] == "| 5 | ours 1.50 |"


def test_a_red_gate_maps_nothing(bench, tmp_path, monkeypatch):
    command = bench("__main__")
    monkeypatch.setattr(command.machine, "commit", lambda given: {})
    monkeypatch.setattr(command, "gate", lambda tests: False)
    assert command.main(["map", "--results", str(tmp_path)]) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("widths", ["W4A8", "W4, float input"])
def test_the_rivals_of_a_map_on_a_gpu_compute_what_ours_computes(bench, widths):
    case = bench("map").case(64, 40, widths, "cuda")
    inputs = case.make(torch.Generator().manual_seed(3), "cpu")
    wanted = case.exact(inputs)[0].float()
    assert set(case.rivals) >= {"torch bfloat16", "torch._int_mm"}
    assert ("dequantised" in case.rivals) == (widths != "W4A8")
    for name, bind in ({"ours": case.ours} | case.rivals).items():
        got = bind(inputs)()
        error = ((got[0] if isinstance(got, tuple) else got).float() - wanted).abs().max() / wanted.abs().max()
        assert error < 0.05, name
