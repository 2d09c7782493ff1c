"""Model cards: what lies beside a checkpoint, and what evaluations add to it."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import invoke, tiny, write_inputs
from test_datasets import noise

import ttaq
from ttaq.cards import card_path, read_card
from ttaq.jobs import check, open_job


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give a checkpoint with its card, and the images beside it."""
    root = tmp_path_factory.mktemp("cards")
    write_inputs(root)
    args = ["--data", root / "clean.npz", "--weights", root / "weights.safetensors", "--images", 16, "--steps", 4]
    result = invoke("quantize", "test_cli:tiny", *args, "--seed", 7, "--out", root / "model.safetensors")
    assert result.exit_code == 0, result.output
    return root / "model.safetensors"


def evaluate(made, *extra):
    result = invoke(
        "evaluate", made, "--model", "test_cli:tiny", "--data", made.with_name("clean.npz"), "--quiet", *extra
    )
    assert result.exit_code == 0, result.output
    return result


def test_a_card_says_how_the_checkpoint_was_made(made):
    card = json.loads(card_path(made).read_text())
    assert card_path(made).name == "model.card.json"
    assert card["sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    assert (card["model"], card["bits"], card["method"], card["seed"]) == ("test_cli:tiny", "w4a4", "ttaq", 7)
    assert card["policy"] == {"first_last": 8, "exclude": [], "overrides": {}}
    assert card["calibration"] == {"data": "clean.npz", "images": 16}
    assert card["bytes"]["file"] == made.stat().st_size
    assert card["bytes"]["float"] == sum(t.nbytes for t in tiny().state_dict().values())
    assert card["steps"]["refinement"] == 2
    assert card["seconds"] > 0
    assert card["check"]["images"] == 16
    assert card["machine"]["torch"] == torch.__version__


def test_the_check_is_that_of_the_predictions(made):
    weights = made.with_name("weights.safetensors")
    job = open_job("test_cli:tiny", made.with_name("clean.npz"), weights=weights, images=16, seed=7)
    packed = ttaq.load(made, tiny())
    x = torch.cat(job.batches)
    with torch.no_grad():
        floats, guesses = job.model(x).argmax(1), packed(x).argmax(1)
    wanted = {"float_error": floats != job.labels, "error": guesses != job.labels, "agreement": floats == guesses}
    found = {name: 100 * sum(value.tolist()) / 16 for name, value in wanted.items()}
    assert read_card(made)["check"] == pytest.approx(found | {"images": 16}, abs=0.01)


def test_a_float_model_that_errs_is_named_before_anything_is_learned(made):
    """Its predictions are made the labels, then wrong ones."""
    data, weights = made.with_name("labelled.npz"), made.with_name("weights.safetensors")
    images = np.load(made.with_name("clean.npz"))["images"]
    np.savez(data, images=images, labels=np.arange(24) % 3)
    job = open_job("test_cli:tiny", data, weights=weights)
    with torch.no_grad():
        right = job.model(torch.cat(job.batches)).argmax(1)
    for shift, wanted in ((0, 0.0), (1, 100.0)):
        labels = torch.empty(24, dtype=torch.long)
        labels[np.random.default_rng(0).permutation(24)] = (right + shift) % 3
        np.savez(data, images=images, labels=labels.numpy())
        asked = ["--data", data, "--weights", weights, "--dry-run", "--method", "rtn"]
        asked += ["--classes", made.with_name("classes.txt")]
        made.with_name("classes.txt").write_text("a\nb\nc\n")
        result = invoke("quantize", "test_cli:tiny", *asked)
        assert f"float error: {wanted:.1f} % on 24 of these images" in result.stdout
        assert ("the float model errs on 100.0 % of 24 calibration images" in result.stderr) == bool(shift)
    assert check(open_job("test_cli:tiny", data))["float_error"] >= 0  # random weights are no reason to warn


def test_evaluations_are_entered_and_repeated_ones_replaced(made):
    evaluate(made, "--adapter", "norm,tent", "--stream", "fog,contrast", "--images", 8)
    evaluate(made, "--stream", "clean")
    evaluate(made, "--adapter", "tent", "--stream", "fog,contrast", "--images", 8)
    evaluate(made, "--adapter", "tent", "--stream", "fog,contrast", "--images", 8, "--lr", 0.01)
    slower = read_card(made)["evaluations"][-1]
    assert (slower["adapter"], slower["lr"]) == ("tent", 0.01)
    evaluate(made, "--adapter", "tent", "--stream", "fog,contrast", "--images", 8)  # with another rate, not replaced
    card = read_card(made)
    assert slower in card["evaluations"]
    card["evaluations"].remove(slower)
    assert [entry["adapter"] for entry in card["evaluations"]] == ["norm", "source", "tent"]
    last = card["evaluations"][-1]
    assert last["errors"].keys() == {"fog", "contrast"}
    assert last["mean_error"] == pytest.approx(sum(last["errors"].values()) / 2, abs=1e-3)
    assert (last["severity"], last["seed"], last["images"]) == (5, 0, 8)
    said = invoke("inspect", made).stdout
    assert f"measured: {last['mean_error']:.1f} % error with tent" in said
    assert "made: in " in said


def test_a_card_of_another_file_is_left_alone(made, tmp_path):
    other = tmp_path / "model.safetensors"
    other.write_bytes(made.read_bytes())
    card_path(other).write_text(card_path(made).read_text().replace(read_card(made)["sha256"], "0" * 64))
    before = card_path(other).read_text()
    np.savez(tmp_path / "clean.npz", images=noise(24, seed=5), labels=np.arange(24) % 3)
    evaluate(other, "--stream", "clean")
    assert card_path(other).read_text() == before
    assert read_card(other) is None


def test_without_a_card_and_without_leave_nothing_is_written(made, tmp_path):
    other = tmp_path / "model.safetensors"
    other.write_bytes(made.read_bytes())
    np.savez(tmp_path / "clean.npz", images=noise(24, seed=5), labels=np.arange(24) % 3)
    evaluate(other, "--stream", "clean")
    assert not card_path(other).exists()
    before = card_path(made).read_text()
    evaluate(made, "--stream", "clean", "--no-card", "--seed", 9)
    assert card_path(made).read_text() == before


def test_the_float_model_meets_the_same_streams(made):
    weights = made.with_name("weights.safetensors")
    told = ["--adapter", "source,tent", "--stream", "fog", "--images", 8, "--float", weights, "--seed", 3]
    out = evaluate(made, *told, "--json", made.with_name("both.json")).stdout
    assert "float source" in out
    assert "packed tent" in out
    found = json.loads(made.with_name("both.json").read_text())
    assert [(row["form"], row["bits"], row["adapter"]) for row in found["rows"]] == [
        (form, bits, adapter)
        for form, bits in (("float", "float"), ("packed", "w4a4"))
        for adapter in ("source", "tent")
    ]
    model = tiny()
    model.load_state_dict(load_file(weights))
    images = ttaq.streams.load_npz(made.with_name("clean.npz"))
    stream = ttaq.continual(images, corruptions=("fog",), images=8, batch_size=64, seed=3)
    wanted = ttaq.evaluate(ttaq.adapt(model.eval(), "tent"), stream)
    assert found["errors"][1] == {"fog": round(wanted.errors["fog"], 3)}
    assert found["rows"][0]["bytes"] == sum(t.nbytes for t in model.state_dict().values())
    entered = [e for e in read_card(made)["evaluations"] if e["seed"] == 3]
    assert [(e["form"], e["adapter"]) for e in entered] == [
        ("float", "source"), ("float", "tent"), ("packed", "source"), ("packed", "tent")
    ]  # fmt: skip
    assert "measured: float, " in invoke("inspect", made).stdout
