"""Evaluation in a team: the images of a model that does not adapt, or the adapters, are shared out."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import save_file
from team import run
from test_cli import invoke, tiny
from test_datasets import noise

import ttaq
from ttaq.distributed import Team
from ttaq.streams import Images

WORK = """
import json
import numpy as np
from test_datasets import noise
from test_evaluation_team import stream
from tiny import resnet
with distributed.join() as team:
    found = ttaq.evaluate(resnet(), stream(KIND), team=team)
    print(json.dumps(found.to_dict()))
"""


def stream(kind):
    images = Images(noise(23, seed=2), np.arange(23) % 4)
    if kind == "mixed":
        return ttaq.mixed(images, corruptions=("fog", "contrast", "snow"), images=11, batch_size=4)
    if kind == "plain":
        return list(ttaq.continual(images, corruptions=("snow", "contrast"), images=10, batch_size=3))
    return ttaq.continual(images, corruptions=("snow", "contrast"), images=11, batch_size=4)


@pytest.mark.parametrize(("kind", "size"), [("continual", 2), ("mixed", 3), ("plain", 2)])
def test_processes_count_together_what_one_counts(kind, size):
    from tiny import resnet

    wanted = json.loads(json.dumps(ttaq.evaluate(resnet(), stream(kind)).to_dict()))
    for output in run(WORK.replace("KIND", repr(kind)), size):
        found = json.loads(output)
        for name in ("errors", "images", "class_images", "class_wrong", "visit_errors", "forwards", "backwards"):
            assert found[name] == wanted[name], name
            if isinstance(found[name], dict):
                assert list(found[name]) == list(wanted[name]), name
        assert found["ece"] == pytest.approx(wanted["ece"], abs=1e-9)


def test_a_part_of_a_stream_reads_its_own_batches_alone():
    whole = list(stream("mixed"))
    parts = [list(stream("mixed").part(rank, 3)) for rank in range(3)]
    for number, batch in enumerate(whole):
        other = parts[number % 3][number // 3]
        assert (batch.images == other.images).all()
        assert (batch.domains, batch.first, batch.visit) == (other.domains, other.first, other.visit)
    assert sum(map(len, parts)) == len(whole)


def test_an_adapter_that_learns_takes_no_team():
    from tiny import resnet

    with pytest.raises(ValueError, match="learns from one batch after the other; leave out team="):
        ttaq.evaluate(ttaq.adapt(resnet(), "tent"), stream("continual"), team=Team(0, 2, None))


@pytest.mark.slow
def test_evaluate_under_torchrun_gives_what_one_process_gives(tmp_path, monkeypatch):
    np.savez(tmp_path / "clean.npz", images=noise(24, seed=5), labels=np.arange(24) % 3)
    save_file(tiny().state_dict(), tmp_path / "weights.safetensors")
    made = ["--weights", tmp_path / "weights.safetensors", "--method", "rtn", "--out", tmp_path / "model.safetensors"]
    assert invoke("quantize", "test_cli:tiny", "--data", tmp_path / "clean.npz", *made).exit_code == 0
    given = ["model.safetensors", "--model", "test_cli:tiny", "--data", "clean.npz", "--images", "12", "--quiet"]
    given += ["--stream", "fog,contrast", "--batch-size", "5"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "ttaq"]
    for adapter in ("source", "source,norm,tent"):
        told = ["evaluate", *given, "--adapter", adapter]
        paths = {"PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launch, *told, "--json", "team.json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | paths,
        )
        assert done.returncode == 0, done.stderr
        monkeypatch.chdir(tmp_path)
        assert invoke(*told, "--json", tmp_path / "one.json").exit_code == 0
        team, one = (json.loads((tmp_path / name).read_text()) for name in ("team.json", "one.json"))
        assert team["errors"] == one["errors"]
        assert [row["adapter"] for row in team["rows"]] == adapter.split(",")
        assert done.stdout.count("fog") == 1  # the first process alone speaks
