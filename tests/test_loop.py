"""The loop over blocks: any cache gives the same codes, memory that runs out costs time alone, few images are named."""

import os
import tempfile
import warnings

import numpy as np
import pytest
import torch
from test_datasets import noise
from tiny import assert_unchanged, calibrated, input_of, resnet, snapshot, vit
from typer.testing import CliRunner

import ttaq
from ttaq import PCR, blockwise, cli, learning, reconstruct
from ttaq.checkpoint import read_header
from ttaq.learning import progress_bar

pytestmark = pytest.mark.filterwarnings("ignore:.* images are few")
QUICK = {"steps": 6, "batch_size": 4, "rounding_lr": 0.05, "progress": False}


def states_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("options", [{}, {"pcr": PCR(perturbation="input")}], ids=["plain", "pcr"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_any_cache_gives_the_same_codes(name, options, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    models = []
    for cache in (None, 0, "40 kB"):
        model = calibrated(name, "w3a4")
        reconstruct(model, [input_of(name, 16)], cache=cache, **QUICK | options)
        models.append(model)
    assert states_equal(models[0], models[1])
    assert states_equal(models[0], models[2])
    assert not [name for name in os.listdir(tmp_path) if name.startswith("ttaq-")]


def failing(monkeypatch, *calls):
    """Let memory run out at some of the steps."""
    real, count = blockwise.squared_distance, []

    def squared_distance(*args):
        count.append(1)
        if len(count) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(blockwise, "squared_distance", squared_distance)
    return count


@pytest.mark.parametrize("calls", [(1,), (10,), (10, 12), (3, 5)], ids=str)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_where_memory_runs_out_the_block_is_learned_again(name, calls, monkeypatch):
    plain, model = calibrated(name, "w3a4"), calibrated(name, "w3a4")
    reconstruct(plain, [input_of(name, 16)], statistics="batch", **QUICK)
    failing(monkeypatch, *calls)
    with pytest.warns(
        UserWarning, match=r"^reconstruct: memory ran out at block .*with a cache of at most .* MiB"
    ) as got:
        report = reconstruct(model, [input_of(name, 16)], statistics="batch", **QUICK)
    assert len(got) == len(calls)
    assert sum(row.get("retries", 0) for row in report["blocks"]) == len(calls)
    assert states_equal(model, plain)
    keys = ("name", "before", "after", "steps", "curve")
    assert [[r[k] for k in keys] for r in report["blocks"]] == [
        [r[k] for k in keys] for r in plain.ttaq_report["blocks"]
    ]


@pytest.mark.filterwarnings("ignore:reconstruct. memory ran out")
def test_where_nothing_is_left_to_move_the_model_is_as_it_was(monkeypatch):
    model = calibrated("vit", "w3a4")
    before = snapshot(model)
    failing(monkeypatch, *range(8, 100))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        reconstruct(model, [input_of("vit")], **QUICK)
    assert caught.value.__notes__ == ["reconstruct: layers.0 does not fit beside an empty cache; lower batch_size"]
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("recipe", "count", "said"),
    [
        ("w4a4", 16, "quantize: 16 images are few for w4a4; 1,024 are known to suffice"),
        ("w4a8", 16, "quantize: 16 images are few for w4a8; 256 are known to suffice"),
        ("w4a16", 255, "quantize: 255 images are few for w4a16; 256 are known to suffice"),
        ("w4a8", 256, None),
        ("w3a4", 1024, None),
    ],
)
def test_few_images_are_named_once(recipe, count, said):
    x = input_of("resnet", 16).repeat(64, 1, 1, 1)[:count]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ttaq.quantize(resnet(), [x[: count // 2], x[count // 2 :]], recipe, method="qdrop", **QUICK | {"steps": 1})
    assert [str(w.message) for w in caught if "images" in str(w.message)] == ([said] if said else [])
    assert all(w.filename == __file__ for w in caught if "images" in str(w.message))


def test_the_report_says_what_was_done_for_each_block():
    model = ttaq.quantize(vit(), [input_of("vit")], "w4a4", method="qdrop", **QUICK)
    rows = model.ttaq_report["blocks"]
    assert [row["steps"] for row in rows] == [6] * 4
    assert all(set(row) == {"name", "layers", "before", "after", "steps", "seconds", "curve"} for row in rows)
    assert all(len(row["curve"]) == 6 for row in rows)


def test_the_bar_goes_from_nothing_to_all(monkeypatch):
    seen, bars = [], []

    def bar(shown, **options):
        bars.append(progress_bar(False, **options))
        update = bars[-1].update
        bars[-1].update = lambda task, **changes: seen.append(changes) or update(task, **changes)
        return bars[-1]

    monkeypatch.setattr("ttaq.reconstruction.progress_bar", bar)
    reconstruct(calibrated("vit", "w4a4"), [input_of("vit")], **QUICK | {"progress": True})
    done = [changes["completed"] for changes in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert bars[0].tasks[0].completed == pytest.approx(bars[0].tasks[0].total)
    named = [changes["description"] for changes in seen if "description" in changes]
    assert named[0] == "reconstruct patches (1 of 4)"
    assert any(isinstance(column, learning.TimeRemainingColumn) for column in bars[0].columns)


def test_the_command_line_takes_a_budget_and_a_file_to_resume_from(tmp_path):
    np.savez(tmp_path / "clean.npz", images=noise(24, seed=5), labels=np.arange(24) % 6)
    given = ["quantize", "tiny:resnet", "--data", tmp_path / "clean.npz", "--out", tmp_path / "model.safetensors"]
    given += ["--steps", 4, "--images", 16, "--mean", "0.5,0.5,0.4"]
    options = ["--budget", "1min", "--resume", tmp_path / "state.safetensors"]
    for more, said in ((options, "layers packed"), (["--method", "rtn", *options], "takes no steps, budget, resume")):
        result = CliRunner().invoke(cli.app, [str(word) for word in (*given, *more)])
        assert said in result.output
    assert (tmp_path / "state.safetensors").exists()
    report = read_header(tmp_path / "model.safetensors")["report"]
    assert report["budget"]["seconds"] == 60
    assert [row["steps"] for row in report["blocks"]] == [2] * 5
    result = CliRunner().invoke(cli.app, [str(word) for word in (*given, "--budget", "soon")])
    assert result.exit_code == 2
    assert result.stderr.startswith("ttaq: budget: wanted seconds above 0")
