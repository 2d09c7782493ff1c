"""The benchmarks: timing, rows, tables, and a gate that lets nothing through while a test is red."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "commit,dirty,machine,driver,cuda,torch,triton,op,backend,dtype,case,p20_us,p50_us,p80_us,gbps,tflops,"
    "percent_of_roofline,peak_mib,max_error,rival,ratio"
)


@pytest.fixture
def row(bench):
    return bench("rows").Row(
        commit="abcdef123456", dirty="no", machine="toy-1-threads", driver="", cuda="", torch="2.15", triton="3.9",
        op="fake_quant", backend="cpu", dtype="float32", case="4M, per tensor, forward", p20_us=900.0, p50_us=1000.0,
        p80_us=1200.0, gbps=33.5, tflops=None, percent_of_roofline=84.0, peak_mib=16.0, max_error=0.0,
        rival="composed eager LSQ", ratio=7.0,
    )  # fmt: skip


def test_machines_have_short_names(bench):
    names = ("NVIDIA H200", "AMD EPYC 9B14 96-Core Processor", "Intel(R) Xeon(R) CPU @ 2.20GHz", "")
    assert [bench("machine").slug(n) for n in names] == ["h200", "amd-epyc-9b14", "intel-xeon", "unknown"]


def test_rows_have_the_agreed_columns_and_are_appended(bench, row, tmp_path):
    rows = bench("rows")
    path = rows.append([row], tmp_path)
    before = path.read_bytes()
    rows.append([replace(row, rival="torch.compile", ratio=0.5)], tmp_path)
    assert path.name == "toy-1-threads.csv"
    assert path.read_bytes().startswith(before)
    lines = path.read_text().splitlines()
    assert lines[0] == COLUMNS
    assert (len(lines), rows.read(path)[0]) == (3, row)


def test_a_file_with_other_columns_is_left_alone(bench, row, tmp_path):
    path = tmp_path / "toy-1-threads.csv"
    path.write_text("op,ratio\n")
    with pytest.raises(ValueError, match="other columns"):
        bench("rows").append([row], tmp_path)
    assert path.read_text() == "op,ratio\n"


def test_a_later_run_replaces_an_earlier_one_whole(bench, row):
    old = [replace(row, rival=name) for name in ("first", "gone")]
    new = [replace(row, p50_us=500.0, rival=name) for name in ("first", "second")]
    other = replace(row, case="other")
    assert bench("rows").latest([old[0], old[1], other, *new]) == [*new, other]


def test_revisions_and_files_are_selected(bench, row, tmp_path):
    rows = bench("rows")
    path = rows.append([row, replace(row, commit="fedcba654321", p50_us=500.0)], tmp_path)
    assert [r.p50_us for r in rows.select("abcdef", "toy-1-threads", tmp_path)] == [1000.0]
    assert [r.p50_us for r in rows.select(str(path), "elsewhere", tmp_path)] == [500.0]
    assert [r.p50_us for r in rows.select(f"{path}@abcdef", "elsewhere", tmp_path)] == [1000.0]
    with pytest.raises(ValueError, match="holds no rows of 999"):
        rows.select("999", "toy-1-threads", tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        rows.select("abcdef", "elsewhere", tmp_path)


def test_tables_say_losses_in_words(bench, row):
    tables = bench("tables")
    lost = replace(row, rival="torch.compile", ratio=0.48)
    text = tables.report([row, lost])
    assert "| 7.00x | 0.48x, a loss |" in text
    assert "1 of 2 comparisons are losses." in text
    assert "composed eager LSQ" in text.splitlines()[4]
    assert "commit abcdef123456." in text
    assert "with changes" in tables.report([replace(row, dirty="yes")])
    assert "0.48x, a loss (torch.compile)" in tables.summary([row, lost])
    worst = "0.48x, a loss: 4M, per tensor, forward, float32, against torch.compile"
    assert f"| 1 of 2 | {worst} |" in tables.short([row, lost])


def test_rivals_missing_from_a_case_leave_a_dash(bench, row):
    text = bench("tables").report([row, replace(row, case="1M", rival="torch.compile", ratio=2.0)])
    assert "| 7.00x | - |" in text
    assert "| - | 2.00x |" in text


def test_comparison_tells_slower_from_faster(bench, row):
    other = replace(row, case="1M")
    after = [replace(row, p50_us=2000.0, percent_of_roofline=42.0), replace(other, p50_us=250.0)]
    text = bench("tables").compare([row, other, replace(row, case="gone")], after)
    assert "| 1 ms | 2 ms | 0.5x, a loss | 84 % | 42 % |" in text
    assert "| 1 ms | 250 µs | 4.00x |" in text
    assert "2 cases in both, 1 only before, 0 only after." in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own(bench, device):
    cases = bench("cases")
    found = [(op, case) for op in cases.CASES for case in cases.cases(op, device)]
    assert len({(case.op, case.name, case.dtype) for _, case in found}) == len(found)
    assert all(case.rivals and case.bytes > 0 for _, case in found)
    assert {op for op, case in found if case.quick} == set(cases.CASES)
    assert any(case.graph for _, case in found) == (device == "cuda")


FAKE_QUANT_RIVALS = ["composed eager LSQ", "torch learnable", "torch fixed, no scale gradient"]


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
@pytest.mark.parametrize(
    ("shape", "axis", "group", "layout"),
    [((96,), None, 0, ""), ((2, 6, 4, 4), 1, 0, "channels-last"), ((3, 32), None, 16, ""), ((3, 32), None, 32, "")],
)
def test_fake_quant_rows_are_measured(bench, which, shape, axis, group, layout):
    case = bench("cases")._fq_case(shape, axis, group, "float32", which, layout)
    rows = _measured(bench, case)
    assert [r.rival for r in rows if r.rival != "brevitas"] == FAKE_QUANT_RIVALS
    assert all(r.max_error < 1e-5 and r.ratio > 0 and r.p20_us <= r.p50_us <= r.p80_us for r in rows)


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
@pytest.mark.parametrize(("kind", "axis"), [("drop", None), ("step", None), ("gauss", 1)])
def test_perturbed_rows_are_measured(bench, kind, axis, which):
    case = bench("perturb").case("toy", (4, 6, 8), axis, kind, "float32", which)
    rows = _measured(bench, case)
    assert [r.rival for r in rows] == ["fake_quant and torch's numbers"]
    assert all(r.max_error < 1e-5 and r.ratio > 0 for r in rows)


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
def test_rivals_compute_what_ours_computes(bench):
    cases, packed = bench("cases"), bench("packed")
    shapes = [(2, 5, 16), (2, 5, 16), (2, 5, 32), (2, 5, 16), (2, 6, 4, 4)]
    places = [replace(place, shape=s) for place, s in zip(bench("prologue").PLACES, shapes, strict=True)]
    small = [
        *(cases._fq_case((3, 32), None, 16, "float32", which) for which in ("forward", "backward", "both")),
        *(bench("log2").case("", (3, 40), 1, "float32", which) for which in ("forward", "backward")),
        bench("log2").codes_case("", (3, 40), 2, "float32"),
        *(bench("prologue").case(place, "float32", "forward") for place in places),
        *(cases._soft_round_case("w", (6, 10), groups, "both", False) for groups in (0, 1)),
        cases._quantize_case("", (3, 32), None, 0, "float32"),
        *(bench("activation").case("", (3, 32), "float32", *width) for width in ((8, False), (4, False), (4, True))),
        cases._pack_case("", (4, 24), 3),
        cases._unpack_case("", (4, 24), 3),
        packed._linear_case("", 5, 8, 32, 4, 8, "cpu"),
        packed._linear_case("", 5, 8, 32, 2, None, "cpu"),
        packed._linear_case("", 5, 8, 32, 4, None, "cpu", gradient=True),
        packed._conv_case("", 1, 4, 8, 3, 6, 1, 4, 8, "cpu"),
        packed._conv_case("", 1, 4, 8, 3, 6, 2, 4, None, "cpu"),
    ]
    for case in small:
        inputs = case.make(torch.Generator().manual_seed(3), "cpu")
        wanted = case.exact(inputs)[0].float()
        for name, bind in ({"ours": case.ours} | case.rivals).items():
            if name == "torch.compile":
                continue
            got = bind(inputs)()
            error = ((got[0] if isinstance(got, tuple) else got).float() - wanted).abs() / wanted.abs().max()
            coarse = "A8" in case.name or name in ("torch bfloat16", "torch dynamic int8")
            bound = 0.05 if coarse and name != "ours" else 1e-5
            edge = 0.1 if "backward" in case.name and name != "ours" else 0.0  # those less than half a step outside
            assert (error > bound).float().mean() <= edge, f"{case.op}, {case.name}: {name}"


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
def test_matrix_products_are_held_to_the_speed_of_arithmetic(bench, monkeypatch):
    measure = bench("measure")
    monkeypatch.setattr(measure, "peak_flops", lambda device, dtype: 1.0)  # a machine of one operation a second
    case = bench("packed")._linear_case("toy", 2, 4, 8, 4, None, "cpu")
    row = _measured(bench, case)[0]
    assert row.percent_of_roofline == pytest.approx(100 * case.flops / (row.p50_us * 1e-6))
    assert row.tflops == pytest.approx(case.flops / (row.p50_us * 1e-6) * 1e-12)


def test_few_rows_are_measured_against_triton_on_a_gpu(bench):
    found = list(bench("cases").cases("skinny_linear", "cuda"))
    assert len(found) == 2 * 3 * 4 * 2
    assert all(case.graph and "triton" in case.rivals for case in found)
    assert not any("triton" in case.rivals for case in bench("cases").cases("skinny_linear", "cpu"))


def test_a_backend_that_refuses_is_no_row(bench):
    case = bench("cases")._fq_case((8,), None, 0, "float32", "forward")
    with pytest.raises(RuntimeError, match="'cuda' cannot run it"):
        _measured(bench, case, backend="cuda")
    assert {r.backend for r in _measured(bench, case, backend="reference")} == {"reference"}


def _measured(bench, case, backend=None):
    origin = dict.fromkeys(("commit", "dirty", "machine", "driver", "cuda", "torch", "triton"), "")
    return bench("measure").measure(case, "cpu", origin, backend=backend, seconds=0.0)


@pytest.fixture
def toy(bench, monkeypatch, tmp_path):
    """An op called toy with one case, whose test is written by the test that asks for it."""
    command, cases = bench("__main__"), bench("cases")
    monkeypatch.setattr(command, "TESTS", tmp_path)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    one = replace(cases._fq_case((64,), None, 0, "float32", "forward"), quick=True)
    monkeypatch.setitem(cases.CASES, "toy", lambda device: iter([one]))
    monkeypatch.setattr(command.machine, "commit", lambda given: {"commit": "abcdef123456", "dirty": "no"})

    def run(test):
        (tmp_path / "test_toy.py").write_text(f"def test_toy():\n    assert {test}\n")
        return command.main(["run", "toy", "--quick", "--results", str(tmp_path / "results")])

    return run, tmp_path / "results"


def test_a_red_gate_writes_no_row(toy, capsys):
    run, results = toy
    assert run("1 + 1 == 3") == 1
    assert not results.exists()
    output = capsys.readouterr().out
    assert "1 failed" in output
    assert "nothing was measured" in output


def test_a_green_gate_writes_the_rows(toy, capsys):
    run, results = toy
    assert run("1 + 1 == 2") == 0
    (path,) = results.iterdir()
    lines = list(csv.DictReader(path.open()))
    assert [line["rival"] for line in lines if line["rival"] != "brevitas"] == FAKE_QUANT_RIVALS
    assert {line["commit"] for line in lines} == {"abcdef123456"}
    assert "1 passed" in capsys.readouterr().out


def test_an_op_without_tests_is_no_row(bench, tmp_path):
    assert not bench("__main__").gate(tmp_path / "test_absent.py")


def test_a_tree_without_history_needs_its_commit_told(bench, monkeypatch):
    machine = bench("machine")
    monkeypatch.setattr(machine, "_git", lambda *args: None)
    assert machine.commit("abcdef1234567890") == {"commit": "abcdef123456", "dirty": "unknown"}
    with pytest.raises(ValueError, match="pass --commit"):
        machine.commit(None)
    monkeypatch.setattr(machine, "_git", lambda *args: "0123456789abcdef" if args[0] == "rev-parse" else "")
    assert machine.commit(None) == {"commit": "0123456789ab", "dirty": "no"}
    with pytest.raises(ValueError, match="leave --commit out"):
        machine.commit("abcdef")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_the_script_for_a_gpu_says_that_there_is_none(tmp_path):
    beside = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(["bash", ROOT / "bench/gpu.sh", tmp_path], env=beside, capture_output=True, text=True)
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr
    assert not any(tmp_path.iterdir())
