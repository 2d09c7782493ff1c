"""The examples run from any folder, offline, and print and write what they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ALONE = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def run(script, folder, *options):
    """Run an example in `folder` as a user would; return what it prints."""
    command = [sys.executable, EXAMPLES / script, *options]
    done = subprocess.run(command, cwd=folder, env=ALONE | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(text, pattern):
    """Return the numbers that follow what `pattern` matches, line by line."""
    return [float(found.replace(",", "")) for found in re.findall(pattern + r"\D*?(\d[\d,]*\.?\d*)", text)]


def colours(path):
    """Count the colours of a picture, of which an empty one has few."""
    from PIL import Image

    with Image.open(path) as picture:
        assert min(picture.size) > 300
        return len(picture.convert("RGB").getcolors(1 << 24))


def test_every_example_is_short_and_stands_in_the_table():
    told = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in sorted(EXAMPLES.glob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    for path in sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]):
        assert f"`{path.name}`" in told


def test_layers_in_a_network_of_ones_own(tmp_path):
    told = run("quant_linear.py", tmp_path, "--out", "net.safetensors")
    rows = r"(?m)^(?:float|w2a4, calibrated|w2a4, 3 epochs trained|packed)"
    floats, calibrated, trained, packed = numbers(told, rows)
    assert floats < calibrated
    assert packed == trained < calibrated
    weights, codes = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes of (?:weights|codes)", told))
    assert codes < weights / 14
    assert "logits the same: True" in told
    assert codes < (tmp_path / "net.safetensors").stat().st_size < weights / 4


@pytest.mark.parametrize("op", ["fake_quant", "packed_linear"])
def test_profiling_times_what_runs_and_says_why_the_rest_does_not(op, tmp_path):
    told = run("profile_kernel.py", tmp_path, op, "--rows", "64", "--columns", "96", "--seconds", "0.02")
    lines = dict(line.split(maxsplit=1) for line in told.splitlines())
    assert lines["triton"].startswith("refuses, ")
    assert " us " in lines["reference"]
    assert told.count("the one that runs unasked") == 1
    assert "NOT the bits" not in told
    assert told.count("the bits of the reference") == told.count(" us ")


@pytest.mark.slow
def test_a_vit_is_quantised_within_a_time_and_timed(tmp_path):
    pytest.importorskip("timm")
    options = ("--size", "32", "--count", "16", "--budget", "4s", "--out", "vit.safetensors")
    told = run("quantise_vit.py", tmp_path, *options)
    assert "logits the same: True" in told
    assert float(re.search(r"bytes, (0\.\d+) of", told)[1]) < 0.2
    assert (tmp_path / "vit.safetensors").stat().st_size > 1 << 20
    assert len(numbers(told, r"(?m)^(?:float32|packed|fused)")) == 3


def test_adapting_lowers_errors_and_draws_them(tmp_path):
    told = run("adapt_stream.py", tmp_path, "--out", "pictures", "--images", "50", "--steps", "10", "--epochs", "5")
    source, norm, tent, alone, guarded, bare = map(float, re.findall(r"([\d.]+) % error", told))
    assert max(norm, tent) < source - 10
    assert guarded < min(alone, bare) - 10
    for name in ("errors.png", "drift.png"):
        assert colours(tmp_path / "pictures" / name) > 100
    assert (tmp_path / "pictures/history.jsonl").read_text().count("\n") == 10


def test_the_notebook_runs_in_the_interpreter_of_the_tests(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "adapting.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without: they would age unseen
    [place] = [k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("epochs, steps, images, visits = 4, 5, 50, 2"))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "work").mkdir()
    resources = {"metadata": {"path": str(tmp_path / "work")}}
    client.NotebookClient(notebook, km=kernel(tmp_path), resources=resources, timeout=300).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    source, norm, _ = numbers("".join(o.get("text", "") for o in shown), r"(?m)^(?:as it is|batch statistics|Tent)")
    assert norm < source
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["digits.safetensors", "tent.state"]


def kernel(folder):
    """Make a manager of kernels that run in this interpreter, whatever kernels the machine knows."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    spec = folder / "kernels" / "here"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    text = json.dumps({"argv": command, "display_name": "here", "language": "python"})
    (spec / "kernel.json").write_text(text, encoding="utf-8")
    specs = KernelSpecManager(kernel_dirs=[str(folder / "kernels")])
    return AsyncKernelManager(kernel_name="here", kernel_spec_manager=specs)
