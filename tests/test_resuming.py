"""A run that was killed goes on from its last block and ends with the same bits; a file of another is refused."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import assert_unchanged, calibrated, input_of, resnet, snapshot, vit

import ttaq
from ttaq import PCR, PEM, Refinement, blockwise, reconstruct

pytestmark = pytest.mark.filterwarnings("ignore:.* images are few")
QUICK = {"steps": 6, "batch_size": 4, "rounding_lr": 0.05, "progress": False}
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import ttaq
from tiny import input_of, {name}
from ttaq import blockwise, files

real, calls = blockwise.squared_distance, []

def squared_distance(*args):
    calls.append(1)
    if len(calls) == {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

replace, renames = os.replace, []

def replaced(*args):
    renames.append(1)
    if len(renames) == {renamed}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*args)

blockwise.squared_distance = squared_distance
os.replace = replaced
model = ttaq.quantize({name}(), [input_of({name!r}, 16)], "w3a4", resume={path!r}, **{options!r})
torch.save(model.state_dict(), {path!r} + ".done")
"""


def run(name, path, options, when=0, renamed=0):
    """Quantise in a process of its own, which kills itself at a step or while it writes."""
    values = {"tests": str(Path(__file__).parent), "name": name, "path": str(path), "options": options}
    code = KILLED.format(**values, when=when, renamed=renamed)
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def rows_of(path):
    with safe_open(path, framework="pt") as file:
        return [row["name"] for row in json.loads(file.metadata()["ttaq-resume"])["rows"]]


@pytest.mark.parametrize(
    ("name", "method", "when", "renamed", "done"),
    [
        pytest.param("vit", "ttaq", 4 + 2 * 3 + 2, 0, 2, id="in a step"),  # of the third block, after four pilots
        pytest.param("resnet", "qdrop", 0, 3, 2, id="while it writes", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_ends_with_the_same_codes(name, method, when, renamed, done, tmp_path):
    path, options = tmp_path / "state.safetensors", QUICK | {"method": method, "seed": 5}
    killed = run(name, path, options, when, renamed)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(rows_of(path)) == done
    assert not Path(f"{path}.done").exists()
    finished = run(name, path, options)
    assert finished.returncode == 0, finished.stderr
    mine = torch.load(f"{path}.done", weights_only=True)
    wanted = ttaq.quantize({"vit": vit, "resnet": resnet}[name](), [input_of(name, 16)], "w3a4", **options).state_dict()
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)


class Killed(BaseException):
    pass


def interrupted(monkeypatch, at):
    """Let a reconstruction end at a block, as if the process were killed; return what undoes that."""
    real, count = blockwise.BlockLearner.harden, []

    def harden(self, *args):
        count.append(1)
        if len(count) > at:
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(blockwise.BlockLearner, "harden", harden)
    return lambda: monkeypatch.setattr(blockwise.BlockLearner, "harden", real)


FORMS = {
    "plain": {},
    "ste": {"rounding": "ste", "rounding_lr": 0.01},
    "batch": {"statistics": "batch"},
    "pem": {"pem": PEM(strength=0.1, form="clipped", precondition=True)},
    "pcr": {"pcr": PCR(perturbation="input")},
    "self": {"pcr": PCR(objective="self"), "cache": 0},
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", ["resnet", "vit", "variety"])
def test_every_form_goes_on_from_every_block(name, form, tmp_path, monkeypatch):
    options = QUICK | {"steps": 2} | FORMS[form]
    inputs = [input_of(name, 130), input_of(name, 6, seed=3)] if form == "plain" else [input_of(name, 12)]
    whole = calibrated(name, "w3a4")
    report = reconstruct(whole, inputs, **options)
    path, wanted, at = tmp_path / "s.safetensors", whole.state_dict(), 0
    while at < len(report["blocks"]):
        at += 2 if form == "plain" else 3
        model = calibrated(name, "w3a4")
        revive = interrupted(monkeypatch, 2 if form == "plain" else 3)
        before, stopped = snapshot(model), False
        try:
            found = reconstruct(model, inputs, resume=path, **options)
        except Killed:
            stopped = True
        revive()
        if stopped:
            assert_unchanged(model, before)
    assert not stopped
    assert [row["name"] for row in found["blocks"]] == [row["name"] for row in report["blocks"]]
    keys = ("name", "layers", "before", "after", "steps", "curve")
    assert [[r[k] for k in keys] for r in found["blocks"]] == [[r[k] for k in keys] for r in report["blocks"]]
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    for one, other in zip(model.buffers(), whole.buffers(), strict=True):  # the float model's statistics among them
        assert torch.equal(one, other)


def test_the_rule_is_asked_once(tmp_path, monkeypatch):
    options = QUICK | {"steps": 10, "pem": PEM()}
    whole, model = calibrated("vit", "w3a4"), calibrated("vit", "w3a4")
    report = reconstruct(whole, [input_of("vit", 16)], **options)
    revive = interrupted(monkeypatch, 6)  # four pilots and two blocks
    with pytest.raises(Killed):
        reconstruct(model, [input_of("vit", 16)], resume=tmp_path, **options)
    revive()
    assert os.listdir(tmp_path) == ["resume.safetensors"]
    monkeypatch.setattr("ttaq.objectives.Objectives.choose_strength", lambda *_: pytest.fail("asked again"))
    found = reconstruct(model, [input_of("vit", 16)], resume=tmp_path, **options)
    assert found["pem"] == report["pem"]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in whole.state_dict().items())


def test_a_budget_counts_what_was_spent(tmp_path, monkeypatch):
    options = QUICK | {"steps": 30, "budget": 30}
    model = calibrated("vit", "w3a4")
    revive = interrupted(monkeypatch, 2)
    with pytest.raises(Killed):
        reconstruct(model, [input_of("vit", 16)], resume=tmp_path, **options)
    revive()
    report = reconstruct(model, [input_of("vit", 16)], resume=tmp_path, **options)
    assert [row["steps"] for row in report["blocks"]] == [30] * 4
    again = calibrated("vit", "w3a4")
    reconstruct(again, [input_of("vit", 16)], **QUICK | {"steps": report})
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "state.safetensors"
    reconstruct(calibrated("vit", "w3a4"), [input_of("vit")], resume=path, **QUICK)
    return path


OTHER = {
    "recipe": ({"recipe": "w2a4"}, "another recipe"),
    "images": ({"inputs": [input_of("vit", 8, seed=9)]}, "other images"),
    "seed": ({"seed": 1}, "another seed"),
    "steps": ({"steps": 7}, "other steps, rates or terms"),
    "term": ({"pcr": PCR()}, "other steps, rates or terms"),
    "rates": ({"seed": 2, "scale_lr": 0.5}, "another seed and other steps, rates or terms"),
}


@pytest.mark.parametrize("what", list(OTHER))
def test_the_file_of_another_run_is_refused(what, written):
    changes, said = OTHER[what]
    changes = dict(changes)
    model, inputs = calibrated("vit", changes.pop("recipe", "w3a4")), changes.pop("inputs", [input_of("vit")])
    refused(model, inputs, written, rf"belongs to {said}; give another name, or remove it to start again$", **changes)


def test_other_weights_are_refused(written):
    model = calibrated("vit", "w3a4")
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    refused(model, [input_of("vit")], written, "belongs to a model of other weights; give another name")
    refused(calibrated("resnet", "w3a4"), [input_of("vit")], written, "belongs to a model of other weights and another")


def refused(model, inputs, path, said, **changes):
    before, content = snapshot(model), path.read_bytes()
    with pytest.raises(ValueError, match=rf"^resume: {re.escape(str(path))} {said}"):
        reconstruct(model, inputs, resume=path, **QUICK | changes)
    assert_unchanged(model, before)
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "text"])
def test_a_damaged_file_is_refused(damage, written, tmp_path):
    path = tmp_path / "state.safetensors"
    content = written.read_bytes()
    if damage == "foreign":
        save_file({"x": torch.ones(2)}, path)
    else:
        path.write_bytes({"empty": b"", "cut": content[:-9], "text": b"hello" * 99}[damage])
    said = "was not written by" if damage == "foreign" else "is damaged or no such file"
    refused(calibrated("vit", "w3a4"), [input_of("vit")], path, said)


def test_a_run_that_was_done_is_done_at_once(written, monkeypatch):
    model = calibrated("vit", "w3a4")
    monkeypatch.setattr(blockwise.BlockLearner, "__init__", lambda *_: pytest.fail("a block was learned again"))
    reconstruct(model, [input_of("vit")], resume=written, **QUICK)
    whole = calibrated("vit", "w3a4")
    monkeypatch.undo()
    reconstruct(whole, [input_of("vit")], **QUICK)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in whole.state_dict().items())


def test_quantize_goes_on_too(tmp_path, monkeypatch):
    options = QUICK | {"seed": 2, "refinement": Refinement(steps=2)}
    whole = ttaq.quantize(resnet(), [input_of("resnet", 16)], "w3a4", **options)
    revive = interrupted(monkeypatch, 7)
    with pytest.raises(Killed):
        ttaq.quantize(resnet(), [input_of("resnet", 16)], "w3a4", resume=tmp_path / "s", **options)
    revive()
    again = ttaq.quantize(resnet(), [input_of("resnet", 16)], "w3a4", resume=tmp_path / "s", **options)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in whole.state_dict().items())
