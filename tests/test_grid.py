"""The grid of accuracies on a tiny subject: what is measured, what is not measured again, what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from test_datasets import noise
from tiny import SIDE, settle, vit

import ttaq
from ttaq.evaluation import evaluate
from ttaq.models import ResNet, ViT
from ttaq.streams import Images

CORRUPTIONS = ("brightness", "contrast")
SMALL = ["--stream-images", "16", "--batch-size", "8", "--images", "16", "--commit", "abcdef123456"]


def pictures(count, seed):
    """Make images of one colour each, under noise."""
    colours = np.random.default_rng(seed).integers(40, 215, (count, 1, 1, 3))
    pixels = (noise(count, SIDE, SIDE, seed=seed) // 4 + colours - 32).astype(np.uint8)
    return Images(pixels, np.arange(count) % 6)


ARCHITECTURE = partial(ResNet, depth=8, classes=6, width=4)


def decided():
    """Build a network whose answers to such images are many."""
    torch.manual_seed(0)
    x = next(iter(pictures(64, 3).batches(64)))[0]
    model = settle(ARCHITECTURE(), x)
    head = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    with torch.no_grad():
        head.weight *= 5
        head.bias -= model(x).mean(0)
        assert len(model(x).argmax(1).unique()) == 6
    return model


@pytest.fixture
def walk(bench, monkeypatch, tmp_path):
    """Run the command on a tiny ResNet with random images; give the rows of its file."""
    grid, accuracy, path = bench("grid"), bench("accuracy"), tmp_path / "rows/grid.csv"
    short = {kind: partial(make, corruptions=CORRUPTIONS) for kind, make in grid.STREAMS.items()}
    monkeypatch.setattr(grid, "STREAMS", short)
    monkeypatch.setattr(grid.machine, "commit", lambda given: {"commit": given, "dirty": "no"})
    monkeypatch.setattr(accuracy.torch.cuda, "is_available", lambda: False)
    subject = grid.Subject("tiny", decided(), pictures(16, 1), pictures(24, 2), ARCHITECTURE)
    monkeypatch.setattr(accuracy, "open_subject", lambda options: (subject, None))

    def run(*args, out=path):
        places = ["--out", str(out), "--cache", str(tmp_path / "cache")]
        assert bench("__main__").main(["accuracy", *SMALL, *places, *args]) == 0
        return grid.read(out)

    run.subject, run.path, run.cache = subject, path, tmp_path / "cache"
    return run


def cells(rows, *keys):
    return sorted(tuple(row[key] for key in keys) for row in rows)


RTN = ["--methods", "rtn", "--seeds", "0", "--bits", "w4a4"]


def test_a_grid_writes_a_row_a_cell(bench, walk):
    rows = walk(*RTN, "--losses", "entropy,abl", "--statistics", "batch,ema0.2", "--streams", "iid,longtail")
    one = [("none", "", "", "clean")]
    for stream in ("iid", "longtail"):
        one += [("source", "", "", stream)]
        for kind in ("batch", "ema0.2"):
            one += [("norm", "", kind, stream), ("tent", "entropy", kind, stream), ("tent", "abl", kind, stream)]
    assert cells(rows, "adapter", "loss", "statistics", "stream") == sorted(one)
    assert len({tuple(row[key] for key in bench("grid").KEY) for row in rows}) == len(rows)
    for row in rows:
        assert (row["model"], row["bits"], row["method"], row["steps"], row["pass"]) == (
            "tiny",
            "w4a4",
            "rtn",
            "0",
            "1",
        )
        assert row["images"] == ("24" if row["stream"] == "clean" else "16")
        assert 0 <= float(row["error"]) <= 100
        assert 0 <= float(row["class_error"]) <= 100
        assert float(row["seconds"]) >= 0
        assert (row["commit"], row["dirty"]) == ("abcdef123456", "no")
        assert row["machine"]
    (clean,) = (row for row in rows if row["stream"] == "clean")
    (packed,) = walk.cache.iterdir()
    assert int(clean["bytes"]) == packed.stat().st_size
    model = ttaq.load(packed, walk.subject.architecture())
    plain = evaluate(model, bench("grid").whole(walk.subject.test)).mean_error
    assert float(clean["error"]) == pytest.approx(plain, abs=1e-3)


def test_every_order_is_a_stream_of_the_grid(bench, walk):
    others = [name for name in bench("grid").STREAMS if name not in bench("grid").OLD]
    assert others == ["shuffled", "gradual", "mixed", "mixed-correlated", "recurring"]
    rows = walk(*RTN, "--streams", ",".join(["iid", *others]), "--adapters", "source,tent")
    assert cells(rows[1:], "stream", "adapter") == sorted(
        (stream, adapter) for stream in ("iid", *others) for adapter in ("source", "tent")
    )
    errors = {row["stream"]: row["error"] for row in rows if row["adapter"] == "source"}
    alike = ("iid", "shuffled", "mixed", "mixed-correlated", "recurring")  # the same images, which order cannot change
    assert len({errors[name] for name in alike}) == 1


def test_a_second_run_measures_only_what_is_missing(bench, walk, monkeypatch):
    first = walk(*RTN, "--streams", "iid")
    before = walk.path.read_bytes()
    monkeypatch.setattr(bench("grid"), "packed_model", None)  # not even a model is made
    assert walk(*RTN, "--streams", "iid") == first
    assert walk.path.read_bytes() == before


def test_a_cell_more_is_measured_alone_and_from_the_cache(bench, walk, monkeypatch):
    first = walk(*RTN, "--streams", "iid", "--adapters", "source")
    monkeypatch.setattr(bench("grid").ttaq, "quantize", None)
    rows = walk(*RTN, "--streams", "iid", "--adapters", "source,tent")
    assert rows[: len(first)] == first
    assert cells(rows[len(first) :], "adapter", "loss") == [("tent", "entropy")]


def test_a_walk_that_was_cut_short_goes_on(walk):
    whole = walk(*RTN, "--streams", "iid", "--passes", "2")
    lines = walk.path.read_text().splitlines(keepends=True)
    walk.path.write_text("".join(lines[:-1]))  # the second pass of Tent is missing: both are walked again
    rows = walk(*RTN, "--streams", "iid", "--passes", "2")
    assert [row["pass"] for row in rows[len(whole) - 1 :]] == ["1", "2"]
    for old, new in zip(whole[-2:], rows[-2:], strict=True):
        assert old["error"] == new["error"]


def test_three_passes_give_three_rows_of_tent_which_goes_on_learning(bench, walk, monkeypatch):
    seen = []
    monkeypatch.setattr(
        bench("grid"),
        "evaluate",
        lambda model, stream: seen.append(getattr(model, "steps", 0)) or evaluate(model, stream),
    )
    rows = walk(*RTN, "--streams", "iid", "--passes", "3")
    assert cells(rows, "adapter", "pass") == [
        ("none", "1"), ("norm", "1"), ("source", "1"), ("tent", "1"), ("tent", "2"), ("tent", "3"),
    ]  # fmt: skip
    assert seen == [0, 0, 0, 0, 4, 8]  # two corruptions of two batches


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_share_the_models_out(bench, walk, monkeypatch, shards):
    taken = []
    monkeypatch.setattr(
        bench("grid").Grid, "_model", lambda self, seed, bits, method, options: taken.append((seed, bits, method))
    )
    for shard in range(shards):
        walk("--bits", "w32a32,w2a2,w2a4", "--seeds", "0,1", "--shards", str(shards), "--shard", str(shard))
    every = [(s, b, m) for s in (0, 1) for b in ("w2a2", "w2a4") for m in ("qdrop", "ttaq", "pcr", "pem", "rtn")]
    assert sorted(taken) == sorted([*every, (0, "w32a32", "none"), (1, "w32a32", "none")])


def test_two_processes_may_share_a_file(walk):
    for shard in "01":
        rows = walk("--bits", "w32a32,w4a4", "--methods", "rtn", "--seeds", "0", "--streams", "iid",
                    "--adapters", "source", "--shards", "2", "--shard", shard)  # fmt: skip
    assert cells(rows, "bits", "stream") == [("w32a32", "clean"), ("w32a32", "iid"), ("w4a4", "clean"), ("w4a4", "iid")]
    assert walk.path.read_text().count("commit,") == 1


def test_remembered_answers_give_the_error_of_a_plain_evaluation(bench, walk):
    computed = []
    float_model, build = walk.subject.model, walk.subject.architecture
    hook = float_model.register_forward_pre_hook(lambda module, args: computed.append(len(args[0])))
    walk("--bits", "w32a32", "--seeds", "0,1", "--adapters", "source")
    hook.remove()
    assert sum(computed) == 2 * (24 + 2 * 16)  # for each seed: clean, and two corruptions once for all three streams
    rows = walk("--bits", "w4a4", "--methods", "rtn", "--seeds", "0,1", "--adapters", "source")
    options = bench("__main__")._parser().parse_args(["accuracy", *SMALL])
    streams = [row for row in rows if row["stream"] != "clean"]
    assert len(streams) == 2 * 2 * 3
    # one order of the same images errs as another does; models, seeds and long tails differ
    assert len({row["class_error"] for row in streams}) > 4
    for row in streams:
        packed = walk.cache / f"tiny-w4a4-rtn-0-{row['seed']}-16.safetensors"
        model = ttaq.load(packed, build()) if row["bits"] == "w4a4" else float_model
        grid = bench("grid").Grid(walk.subject, walk.path, walk.cache)
        result = evaluate(model, grid.stream(row["stream"], int(row["seed"]), options))
        assert float(row["error"]) == pytest.approx(result.mean_error, abs=1e-3)
        assert float(row["class_error"]) == pytest.approx(result.mean_class_error, abs=1e-3)


def test_remembered_answers_are_those_of_each_image(bench):
    model, x = decided(), next(iter(pictures(24, 2).batches(24)))[0]
    remembering = bench("grid")._Remembering(model, {})
    with torch.no_grad():
        remembering(x[:16])
        order = torch.randperm(24)
        torch.testing.assert_close(remembering(x[order]), model(x)[order])
        assert torch.equal(remembering(x[order.flip(0)]), remembering(x[order]).flip(0))


def test_float_models_are_measured_once_and_with_entropy_alone(walk):
    rows = walk(
        "--bits", "w32a32", "--methods", "qdrop,rtn", "--seeds", "0", "--losses", "entropy,abl", "--streams", "iid"
    )
    assert cells(rows, "method", "adapter", "loss") == [
        ("none", "none", ""), ("none", "norm", ""), ("none", "source", ""), ("none", "tent", "entropy"),
    ]  # fmt: skip
    assert rows[0]["bytes"] == str(4 * sum(p.numel() for p in ARCHITECTURE().parameters()))


def test_networks_without_batchnorm_have_no_rows_of_norm(bench, walk, monkeypatch):
    build = partial(ViT, size=SIDE, patch=4, width=16, depth=2, heads=2, classes=6)
    subject = bench("grid").Subject("vit", vit(), pictures(16, 1), pictures(24, 2), build)
    monkeypatch.setattr(bench("accuracy"), "open_subject", lambda options: (subject, None))
    rows = walk(*RTN, "--streams", "iid", "--statistics", "source")
    assert cells(rows, "adapter") == [("none",), ("source",), ("tent",)]


def test_learned_models_say_what_making_them_took(walk):
    args = ["--methods", "ttaq", "--bits", "w2a4", "--seeds", "3", "--streams", "iid", "--adapters", "source"]
    rows = walk(*args, "--steps", "2")
    assert (rows[0]["stream"], rows[0]["steps"], rows[0]["seed"]) == ("clean", "2", "3")
    assert rows[0]["note"].startswith("PEM: strength ")
    assert "refinement: " in rows[0]["note"]
    assert [path.name for path in walk.cache.iterdir()] == ["tiny-w2a4-ttaq-2-3-16.safetensors"]
    more = walk(*args, "--steps", "3")
    assert cells(more[2:], "steps") == [("3",), ("3",)]


def test_statistics_are_read(bench):
    read = bench("grid").statistics_of
    assert read("batch") == {"statistics": "batch"}
    assert read("ema0.2") == {"statistics": "ema", "momentum": 0.2}
    assert read("blend.5") == {"statistics": "blend", "alpha": 0.5}
    assert read("ema") == {"statistics": "ema"}
    for text in ("batch0.5", "emas", "", "0.5"):
        with pytest.raises(ValueError, match="statistics must be one of"):
            read(text)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--losses", "abel"], "argument --losses: takes entropy, abl, abl-corrected, dot, got abel"),
        (["--methods", "qdrop,x,y"], "argument --methods: takes ttaq, pem, pcr, qdrop, gptq, rtn, got x, y"),
        (["--adapters", "lame"], "argument --adapters: takes source, norm, tent, eta, eata, sar, deyo, got lame"),
        (
            ["--streams", "still"],
            "argument --streams: takes iid, correlated, longtail, shuffled, gradual, mixed, "
            "mixed-correlated, recurring, got still",
        ),
        (["--statistics", "banana"], "argument --statistics: statistics must be one of source, batch"),
        (["--bits", "w2"], "argument --bits: recipe: wanted a text such as"),
        (["--seeds", "0,one"], "argument --seeds: takes whole numbers, got 'one'"),
        (["--seeds", ","], "argument --seeds: wants at least one"),
        (["--shard", "2", "--shards", "2"], "--shard must be 0 to 1, got 2"),
        (["--model", "digits"], "--model NAME wants --calibration DIR and --data DIR"),
        (["--model", "resnet20"], "--data wants the folder"),
        (["--table", "--out", "nowhere.csv"], "nowhere.csv holds no rows of these steps and images"),
    ],
)
def test_what_is_unknown_is_refused_in_a_sentence(bench, capsys, args, says):
    try:
        status = bench("__main__").main(["accuracy", *args])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_the_command_explains_itself(bench, capsys):
    with pytest.raises(SystemExit, match="0"):
        bench("__main__").main(["accuracy", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in (*bench("accuracy").AXES, "passes", "shards", "table", "figure"))


def test_every_adapter_that_descends_takes_every_loss_and_walks_as_often(walk):
    rows = walk(*RTN, "--adapters", "eata", "--losses", "entropy,abl", "--passes", "2", "--streams", "iid")
    found = [(row["loss"], row["pass"]) for row in rows if row["adapter"] == "eata"]
    assert sorted(found) == [(loss, number) for loss in ("abl", "entropy") for number in ("1", "2")]
