"""Model cards: what lies beside a checkpoint, and what evaluations add to it."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_cli import invoke, tiny
from test_datasets import noise

from ttaq.cards import card_path, read_card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give a checkpoint with its card, and the images beside it."""
    root = tmp_path_factory.mktemp("cards")
    np.savez(root / "clean.npz", images=noise(24, seed=5), labels=np.arange(24) % 3)
    torch.manual_seed(0)
    save_file(tiny().state_dict(), root / "weights.safetensors")
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
    assert 0 <= card["agreement_with_float"] <= 100
    assert card["machine"]["torch"] == torch.__version__


def test_the_agreement_is_that_of_the_predictions(made):
    import ttaq
    from ttaq.jobs import agreement, open_job

    weights = made.with_name("weights.safetensors")
    job = open_job("test_cli:tiny", made.with_name("clean.npz"), weights=weights, images=16, seed=7)
    packed = ttaq.load(made, tiny())
    x = torch.cat(job.batches)
    with torch.no_grad():
        same = sum((job.model(x).argmax(1) == packed(x).argmax(1)).tolist())
    assert agreement(job.model, packed, job.batches) == pytest.approx(100 * same / 16)
    assert read_card(made)["agreement_with_float"] == pytest.approx(100 * same / 16)


def test_evaluations_are_entered_and_repeated_ones_replaced(made):
    evaluate(made, "--adapter", "norm,tent", "--stream", "fog,contrast", "--images", 8)
    evaluate(made, "--stream", "clean")
    evaluate(made, "--adapter", "tent", "--stream", "fog,contrast", "--images", 8)
    card = read_card(made)
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
