"""Several processes end with the codes of one, all with the same bits; one that is lost ends the job in a sentence."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from team import finish, run, start
from test_datasets import noise
from tiny import input_of, resnet, vit

import ttaq
from ttaq import distributed
from ttaq.checkpoint import read_header
from ttaq.distributed import Team
from ttaq.sharding import Shard, Share

pytestmark = pytest.mark.filterwarnings("ignore:.* images are few")
QUICK = {"steps": 8, "batch_size": 6, "rounding_lr": 0.05, "progress": False}
CPU = torch.device("cpu")

WORK = """
import json
from tiny import calibrated, input_of
from ttaq.blocks import find_blocks
from ttaq.blockwise import BlockLearner, Schedule
from ttaq.caching import BlockCache
from ttaq.learning import frozen
from ttaq.objectives import Objectives
from ttaq.perturbation import PEM
from ttaq.sharding import Shard

def gradients(name, index, options, team):
    model, inputs = calibrated(name, "w3a4").eval(), [input_of(name, 17), input_of(name, 6, seed=3)]
    shard = team and Shard(team, 23)
    block = find_blocks(model, inputs[0])[index]
    store = BlockCache(model, inputs, None, shard=shard).advance(block)
    with frozen(model):
        torch.manual_seed(0)
        learner = BlockLearner(model, block, Schedule(steps=1, batch_size=8, warmup=0, **options), shard=shard)
        terms = Objectives(model, inputs, None, PEM(strength=0.1), None, shard)
        terms.begin(block, *store)
        losses = [loss.item() for loss in learner.steps(*store, terms)]
    kinds = [r.v.grad for r in learner.roundings], [q.scale.grad for q in learner._learned()]
    found = [[g.flatten() for g in kind if g is not None] for kind in kinds]
    return losses, [torch.cat(grads) for grads in found if grads]

from safetensors.torch import save_file
from tiny import resnet, vit
with distributed.join() as team:
    for name, index, options in FORMS:
        (loss,), ours = gradients(name, index, options, team)
        (wanted,), theirs = gradients(name, index, options, None)
        apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs)]
        assert len(ours) == len(theirs) > 0
        print(json.dumps([name, index, options, abs(loss / wanted - 1), max(apart)]))
    for name, method, settings in CASES:
        build = dict(vit=vit, resnet=resnet)[name]
        inputs = [input_of(name, 17), input_of(name, 7, seed=3)]
        model = ttaq.quantize(build(), inputs, "w3a4", method=method, team=team, **settings)
        torch.save([model.state_dict(), model.ttaq_report], f"PATH/{name}-{method}-{team.rank}.pt")
    inputs = [input_of("vit", 16)]
    timed = ttaq.quantize(vit(), inputs, "w4a4", budget=0.5, team=team, progress=False)
    team.agree("quantize", "the network under a budget", timed.state_dict().values())
    source = f"PATH/weights-{team.rank}.safetensors"
    save_file(vit().state_dict(), source)
    options = dict(method="qdrop", steps=4, batch_size=4, progress=False, team=team)
    held = ttaq.pack(ttaq.quantize(vit(), inputs, "w4a4", safety="off", **options)).state_dict()
    streamed = ttaq.quantize(vit().to("meta"), inputs, "w4a4", weights=source, **options).state_dict()
    assert held.keys() == streamed.keys() and all(torch.equal(held[key], streamed[key]) for key in held)
    try:
        team.agree("reconstruct", "block x", [torch.tensor([team.rank])])
    except ValueError as error:
        print(error)
"""


CASES = [
    ("vit", "qdrop", QUICK),
    ("vit", "ttaq", QUICK | {"steps": 10}),
    ("resnet", "pcr", QUICK),
    ("resnet", "gptq", {"progress": False}),
    ("vit", "rtn", {"progress": False}),
]


FORMS = [
    (name, index, options)
    for name in ("vit", "resnet", "variety")
    for options in ({}, {"drop": 0.0}, {"statistics": "batch"}, {"rounding": "ste"})
    for index in (0, 1)
]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Work in two processes; give the folder of what they leave, and what they say."""
    folder = tmp_path_factory.mktemp("together")
    said = run(WORK.replace("FORMS", repr(FORMS)).replace("CASES", repr(CASES)).replace("PATH", str(folder)))
    return folder, [text.splitlines() for text in said]


def test_gradients_of_the_first_step_are_those_of_one_process(together):
    first, second = together[1]
    assert first == second
    rows = [json.loads(line) for line in first[: len(FORMS)]]
    assert [row for row in rows if not (row[3] < 1e-6 and row[4] < 1e-6)] == []


def test_processes_that_disagree_say_so(together):
    said = "reconstruct: the processes disagree about block x: rank 1 has other codes than rank 0; give all of"
    assert [lines[-1].startswith(said) for lines in together[1]] == [True, True]


def codes_equal(one, other):
    """Return the share of the codes that are the same."""
    keys = [key for key in one if key.endswith(".codes")]
    pairs = [(one[key], other[key]) for key in keys]
    return sum((a == b).sum().item() for a, b in pairs) / max(1, sum(a.numel() for a, _ in pairs))


@pytest.mark.parametrize(("name", "method", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_two_processes_end_as_one(name, method, settings, together):
    states = [torch.load(together[0] / f"{name}-{method}-{rank}.pt", weights_only=True) for rank in range(2)]
    (first, report), (second, _) = states
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    inputs = [input_of(name, 17), input_of(name, 7, seed=3)]
    model = ttaq.quantize({"vit": vit, "resnet": resnet}[name](), inputs, "w3a4", method=method, **settings)
    wanted = model.state_dict()
    assert first.keys() == wanted.keys()
    if method == "rtn":
        assert all(torch.equal(first[key], wanted[key]) for key in wanted)
    else:
        assert codes_equal(first, wanted) >= 0.99
        assert [r["before"] for r in report["blocks"]] == pytest.approx(
            [r["before"] for r in model.ttaq_report["blocks"]], rel=0.02, abs=1e-4
        )
        curves = [[r.get("curve", []) for r in made["blocks"]] for made in (report, model.ttaq_report)]
        assert [len(curve) for curve in curves[0]] == [len(curve) for curve in curves[1]]
        for ours, theirs in zip(*curves, strict=True):
            assert ours[:1] == pytest.approx(theirs[:1], rel=0.02, abs=1e-4)


KILLED = """
from tiny import input_of, vit
from ttaq import blockwise

calls, real = [], blockwise.squared_distance

def squared_distance(*args):
    calls.append(1)
    if len(calls) == WHEN and team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

blockwise.squared_distance = squared_distance
try:
    with distributed.join(wait=30) as team:
        for path in PATHS:
            model = ttaq.quantize(
                vit(), [input_of("vit", 24)], "w3a4", method="qdrop", team=team, resume=path, **OPTIONS
            )
            if team.leads:
                torch.save(model.state_dict(), path + ".done")
except ConnectionError as error:
    sys.exit(f"ttaq: {error}")
"""


def lines(paths, when):
    code = KILLED.replace("WHEN", str(when)).replace("OPTIONS", repr(QUICK | {"seed": 3}))
    return code.replace("PATHS", repr([str(path) for path in paths]))


def test_a_lost_process_ends_the_job_in_a_sentence_and_it_goes_on(tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "state"
    processes = start(lines([whole, path], 4 * QUICK["steps"] + 2 * QUICK["steps"] + 3))
    processes[1].wait(timeout=300)
    killed = time.perf_counter()
    (status, _, errors), (other, _, _) = finish(processes)
    assert time.perf_counter() - killed < 10
    assert other == -signal.SIGKILL
    assert status == 1, errors
    assert errors.startswith("ttaq: distributed: rank 0 of 2 lost another process (")
    assert errors.strip().endswith("start the job again, and with resume= it goes on from the last block that is done")
    assert len(errors.strip().splitlines()) == 1
    with safe_open(path, framework="pt") as file:
        assert len(json.loads(file.metadata()["ttaq-resume"])["rows"]) == 2
    for status, _, errors in finish(start(lines([path], 0))):
        assert status == 0, errors
    one, other = (torch.load(f"{p}.done", weights_only=True) for p in (whole, path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_command_line_under_torchrun(tmp_path):
    np.savez(tmp_path / "images.npz", images=noise(24, 16, 16), labels=np.arange(24) % 4)
    out = tmp_path / "model.safetensors"
    command = [sys.executable, "-W", "ignore", "-P", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "ttaq", "quantize", "ttaq.models:ResNet", "--data"]
    command += [tmp_path / "images.npz", "--out", out, "--steps", "4", "--size", "16", "--method", "qdrop"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layers packed, calibrated on 24 images") == 1
    assert len(read_header(out)["report"]["blocks"]) > 3


class Silent(Team):
    """One of several processes that are not there."""

    def __init__(self, rank, size):
        super().__init__(rank, size, CPU)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_shards_hold_every_image_once_and_shares_add_up(size):
    inputs = [torch.arange(5.0), torch.arange(5.0, 6.0), torch.arange(6.0, 23.0)]
    shards = [Shard(Silent(rank, size), 23) for rank in range(size)]
    held = [torch.cat(shard.entries(inputs)) for shard in shards]
    assert [part.tolist() for part in held] == [list(map(float, range(r, 23, size))) for r in range(size)]
    assert [shard.count for shard in shards] == list(map(len, held))
    picked = torch.randint(23, (6,))
    shares = [shard.share(picked, part, CPU) for shard, part in zip(shards, held, strict=True)]
    assert sum(share.weight for share in shares) == pytest.approx(1)
    batch = torch.full((6,), torch.nan)
    for share, part in zip(shares, held, strict=True):
        if share.weight:
            batch[share.places] = part[share.picked]
    assert torch.equal(batch, picked.float())
    piece = slice(4, 15)
    parts = [(*shard.part(piece, part, CPU), part) for shard, part in zip(shards, held, strict=True)]
    assert sorted(torch.cat([p[own] for share, own, p in parts if share.weight]).tolist()) == list(range(4, 15))


def test_rows_of_windows_stay_with_their_image():
    shard = Shard(Silent(1, 2), 5)
    store = torch.tensor([[g * 3 + k for k in range(3)] for g in range(1, 5, 2)]).flatten()
    share = shard.share(torch.tensor([0, 5, 14, 10, 3]), store, CPU)
    assert store[share.picked].tolist() == [5, 10, 3]
    assert share.places.tolist() == [1, 3, 4]
    with pytest.raises(ValueError, match=r"^distributed: a block is given 7 rows of 2 images, .*; use one process$"):
        shard.rows(torch.zeros(7))
    with pytest.raises(ValueError, match=r"^distributed: there must be an image for each process, got 1 images for 2"):
        Shard(Silent(0, 2), 1)


@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(1, 2),
        lambda x: x[..., ::2],
        lambda x: x.flatten(0, 1),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_share_draws_what_it_would_in_the_whole_batch(lay, count):
    whole, places = torch.randn(5, 4, 6, 8), torch.tensor([3, 1][:count])
    share = Share(5, places, places, places, count / 5)

    def draw(x):
        drawn = torch.empty_like(x)
        drawn.as_strided((x.numel(),), (1,)).copy_(torch.rand(x.numel(), generator=torch.Generator().manual_seed(2)))
        return x + drawn

    wanted, given = draw(lay(whole)), lay(whole[places])
    each = len(given) // count
    rows = (places[:, None] * each + torch.arange(each)).flatten()
    assert torch.equal(share.within(given, draw), wanted[rows])
    odd = torch.randn(5 if count == 2 else 0, 3)
    assert torch.equal(share.within(odd, draw), draw(odd))


def test_a_process_alone_has_no_team():
    assert distributed.placed() == (0, 1)
    with distributed.join() as team:
        assert team is None
