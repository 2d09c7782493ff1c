"""The benchmark of a whole quantisation, on a tiny network."""

import json
from types import SimpleNamespace

import pytest
import torch

TINY = ["--model", "test_vit", "--size", "64", "--steps", "2", "--images", "6", "--batch", "4", "--threads", "1"]


@pytest.fixture
def quantize(bench):
    return bench("quantize")


def options_of(bench, *more):
    return bench("__main__")._parser().parse_args(["quantize", *TINY, *more])


def test_a_model_of_random_weights(quantize):
    model = quantize.random_model("test_vit", 64)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    again = quantize.random_model("test_vit", 64)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 64, 64))).all()


@pytest.mark.filterwarnings("ignore:.* images are few")
def test_what_is_measured(quantize, bench):
    found = json.loads(json.dumps(quantize.measure(options_of(bench, "--method", "ttaq", "--cache", "0"))))
    assert [row["steps"] for row in found["blocks"]] == [1] * len(found["blocks"])
    assert found["seconds"] >= sum(row["seconds"] for row in found["blocks"]) + found["refinement"]
    assert found["image_bytes"] == 6 * 3 * 64 * 64 * 4
    assert found["device_peak_bytes"] is None
    text = quantize.table(found)
    assert text.startswith("test_vit, w4a4, ttaq, 6 images of 64, batch 4, cpu, 1 threads\n")
    assert f"{found['peak_bytes'] / found['float_bytes']:.2f} of the float model's" in text
    assert text.count("1 steps") == len(found["blocks"])


def test_the_command_runs_in_a_process_of_its_own(quantize, bench, tmp_path, capsys):
    options = options_of(bench, "--json", str(tmp_path / "found.json"))
    gated = []
    assert quantize.run(options, lambda path: gated.append(path.name) or True) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert gated == ["test_loop.py"]
    assert {"commit", "machine", "torch", "seconds", "blocks"} <= set(found)
    assert found["peak_bytes"] > 0  # which a process that freed memory before could hide
    assert quantize.table(found) in capsys.readouterr().out
    assert quantize.run(options, lambda path: False) == 1


def test_a_process_that_fails_says_so(quantize, bench, monkeypatch):
    failed = SimpleNamespace(run=lambda *args, **kwargs: SimpleNamespace(returncode=3), PIPE=None)
    monkeypatch.setattr(quantize, "subprocess", failed)
    with pytest.raises(ValueError, match=r"^bench quantize: the process failed with status 3; see its error above$"):
        quantize.run(options_of(bench), lambda path: True)
