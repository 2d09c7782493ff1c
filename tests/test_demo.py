"""The demo at a tiny size: what it writes, that the files serve, and that a seed fixes the numbers."""

import json
import os

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ttaq import demo, load
from ttaq.demo import NETWORKS, Settings, has_batch_statistics, make_bars, run_demo
from ttaq.report import KEYS
from ttaq.streams import load_digits, load_npz
from ttaq.training import Training, distort, fetch_trained, train_model

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = Settings(
    images=12,
    clean=24,
    batch_size=6,
    steps=2,
    train=96,
    calibration=16,
    epochs=1,
    bits=("w4a4",),
    corruptions=("fog", "contrast"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, TINY)


def numbers(results):
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in results.rows]
    return rows, results.errors, results.notes


def test_every_combination_has_one_row_with_the_agreed_keys(run):
    out, results = run
    written = json.loads((out / "results.json").read_text())
    assert written["rows"] == results.rows
    assert all(tuple(row) == KEYS for row in written["rows"])
    made = [tuple(row[key] for key in ("model", "method", "form", "adapter")) for row in results.rows]
    forms = [("none", "float"), ("rtn", "fake-quantised"), ("ttaq", "fake-quantised"), ("ttaq", "packed")]
    adapters = {"resnet": ("source", "norm", "tent"), "vit": ("source", "tent")}
    assert made == [(name, *form, adapter) for name in adapters for form in forms for adapter in adapters[name]]
    assert all(set(errors) == {"fog", "contrast"} for errors in results.errors)
    assert "vit has no batch statistics, so norm has nothing to do and is left out." in results.notes


def test_mean_error_is_the_mean_over_the_domains_and_seconds_were_spent(run):
    for row, errors in zip(run[1].rows, run[1].errors, strict=True):
        assert row["mean_error"] == pytest.approx(np.mean(list(errors.values())), abs=2e-3)
        assert row["seconds"] > 0
        assert 0 <= row["clean_error"] <= 100


def test_packed_rows_repeat_the_fake_quantised_ones_and_give_the_size_of_their_file(run):
    out, results = run
    lines = {(line.model, line.method, line.form): line for line in results.lines()}
    for name in NETWORKS:
        packed, simulated = lines[name, "ttaq", "packed"], lines[name, "ttaq", "fake-quantised"]
        assert packed.error("source") == simulated.error("source")
        assert packed.bytes == (out / "checkpoints" / f"{name}-w4a4.safetensors").stat().st_size
        assert simulated.bytes is None
        assert packed.bytes < 0.25 * lines[name, "none", "float"].bytes
    assert any(note.startswith("The packed logits of resnet w4a4, vit w4a4 equal") for note in results.notes)


def test_the_same_seed_gives_the_same_numbers_and_another_one_does_not(run, tmp_path):
    again = run_demo(tmp_path / "again", TINY)
    assert numbers(again) == numbers(run[1])
    for name in os.listdir(run[0] / "models"):
        one, other = (load_file(folder / "models" / name) for folder in (run[0], tmp_path / "again"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_trained_networks_are_read_back_unless_the_settings_differ(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("ttaq.training.train_model", refuse)
    images = load_digits("train").take(slice(TINY.train))
    training = Training(epochs=1, lr=demo.RATES["vit"])
    model, path = fetch_trained(NETWORKS["vit"], images, training, run[0] / "models", "vit")
    assert torch.equal(model.head.weight, load_file(path)["head.weight"])
    assert not model.training
    with pytest.raises(AssertionError, match="trained again"):
        fetch_trained(NETWORKS["vit"], images, Training(epochs=1, seed=7), run[0] / "models", "vit")


def test_a_broken_cache_says_what_to_do(run, tmp_path):
    training = Training(epochs=1, lr=demo.RATES["vit"])
    images = load_digits("train").take(slice(TINY.train))
    _, path = fetch_trained(NETWORKS["vit"], images, training, run[0] / "models", "vit")
    (tmp_path / path.name).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="delete it to train again"):
        fetch_trained(NETWORKS["vit"], images, training, tmp_path, "vit")


def test_checkpoints_load_on_meta_and_the_images_written_are_the_test_set(run):
    with torch.device("meta"):
        architecture = demo.build_resnet()
    model = load(run[0] / "checkpoints/resnet-w4a4.safetensors", architecture)
    images, test = load_npz(run[0] / "digits.npz", mean=(0.5,) * 3, std=(0.5,) * 3), load_digits("test")
    assert np.array_equal(images.pixels(), test.pixels())
    assert images.classes == test.classes
    assert torch.isfinite(model(next(iter(images.batches(4)))[0])).all()


def test_a_short_training_learns():
    images = load_digits("train").take(slice(256))
    torch.manual_seed(3)
    model = demo.build_resnet()
    x, y = images.preprocess(images.pixels()), torch.tensor(images.labels)
    with torch.no_grad():
        before = (model.eval()(x).argmax(1) == y).float().mean()
    ticks = []
    train_model(model, images, Training(epochs=4, batch_size=32), progress=ticks.append)
    with torch.no_grad():
        after = (model(x).argmax(1) == y).float().mean()
    assert ticks == [1, 1, 1, 1]
    assert before < 0.3
    assert after > 0.6


def test_distortions_follow_the_generator_and_stay_small():
    x = load_digits("train").take(slice(8))
    x = x.preprocess(x.pixels())
    one, other, third = (distort(x, torch.Generator().manual_seed(seed), Training()) for seed in (1, 1, 2))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    still = distort(x, torch.Generator().manual_seed(1), Training(turn=0, stretch=0, shift=0))
    assert torch.allclose(still, x, atol=1e-5)
    assert 0.05 < (one - x).abs().mean() < 0.5


def test_networks_without_batch_statistics_are_told_apart():
    assert has_batch_statistics(demo.build_resnet())
    assert not has_batch_statistics(demo.build_vit())


def test_bars_are_silent_without_a_terminal(capsys):
    with make_bars(Console(force_terminal=False, stderr=True)) as bars:
        bars.advance(bars.add_task("work", total=2))
    with make_bars(None) as bars:
        bars.add_task("work")
    assert capsys.readouterr() == ("", "")


def test_a_missing_extra_is_one_sentence_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr("ttaq.demo.importlib.util.find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ValueError, match=r'demo: matplotlib must be installed; pip install "ttaq\[demo\]"'):
        run_demo(tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists()
