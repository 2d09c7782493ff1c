"""What `ttaq adapt` saved becomes a plain model again, and goes out of the door by `ttaq export --state`."""

import json

import numpy as np
import pytest
import torch
from test_cli import folder, invoke, refused, tiny  # noqa: F401
from test_datasets import noise, write_images

import ttaq
from ttaq.serving import adapted_model
from ttaq.workbench import open_checkpoint


@pytest.fixture
def stream(tmp_path):
    """Write images that came from a camera."""
    write_images(tmp_path / "camera", ("front",), count=12, size=(32, 32))
    return tmp_path / "camera"


@pytest.mark.parametrize("method", ["tent", "norm", "rotta", "eata"])
def test_the_exported_model_is_that_of_the_adapter(folder, tmp_path, method):  # noqa: F811
    chosen = {"size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = open_checkpoint(folder / "model.safetensors", "test_cli:tiny")[0]
    before = model(images)
    anchor = {"anchor": [images]} if method == "eata" else {}
    adapter = ttaq.adapt(model, method, **anchor)
    for start in (0, 4, 8):
        adapter(images[start : start + 8] * 3 + 1)
    adapter.save(tmp_path / "model.state")
    again = open_checkpoint(folder / "model.safetensors", "test_cli:tiny")[0]
    path = folder / "clean.npz" if anchor else None
    found = adapted_model(again, tmp_path / "model.state", anchor=path, preprocessing=chosen)
    with torch.no_grad():
        assert torch.equal(found(images), adapter.export()(images))
    assert method != "tent" or not torch.equal(found(images), before)


def test_the_command_writes_the_adapted_model(folder, stream, tmp_path):  # noqa: F811
    import onnxruntime

    path, state, extra = folder / "model.safetensors", tmp_path / "model.state", ["--model", "test_cli:tiny"]
    result = invoke("adapt", path, stream, "--state", state, "--batch-size", 4, "--lr", 0.05, "--size", 32, *extra)
    assert result.exit_code == 0, result.output
    logits = []
    for name, more in (("plain", ()), ("adapted", ("--state", state))):
        out = tmp_path / f"{name}.onnx"
        result = invoke("export", path, "--out", out, "--size", 32, *extra, *more)
        assert result.exit_code == 0, result.output
        assert ("with the statistics of BatchNorm as the adapter used them last" in result.stderr) == bool(more)
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        x = noise(2, 32, 32, seed=3).astype(np.float32).transpose(0, 3, 1, 2) / 255
        logits.append(session.run(None, {session.get_inputs()[0].name: x})[0])
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    held = session.get_modelmeta().custom_metadata_map
    assert json.loads(held["ttaq.preprocessing"])["mean"] == [0.5, 0.5, 0.4]
    assert json.loads(held["ttaq.classes"]) == ["0", "1", "2"]
    assert json.loads(held["ttaq.reference"]) == "test_cli:tiny"
    assert json.loads(held["ttaq.recipe"]).startswith("w4a4")
    assert [value.shape[0] for value in (*session.get_inputs(), *session.get_outputs())] == ["batch", "batch"]


def test_a_file_that_is_no_state_is_refused(folder, tmp_path):  # noqa: F811
    path, extra = folder / "model.safetensors", ["--model", "test_cli:tiny", "--size", 32]
    assert "there is no file" in refused("export", path, *extra, "--state", tmp_path / "none.state")
    torch.save({"method": "luck"}, tmp_path / "odd.state")
    assert "is no state of a method that is known here" in refused(
        "export", path, *extra, "--state", tmp_path / "odd.state"
    )
    adapter = ttaq.adapt(tiny(), "tent")
    state = adapter.state_dict()
    state["tensors"].popitem()
    torch.save(state, tmp_path / "other.state")
    assert "must have shape" in refused("export", path, *extra, "--state", tmp_path / "other.state")
