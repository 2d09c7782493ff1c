"""Several processes end with the codes of one, all with the same bits; one that is lost ends the job in a sentence."""

import json
import signal
import sys
import time

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

GRADIENTS = """
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
    return losses, [torch.cat([g.flatten() for g in kind]) for kind in kinds]

with distributed.join() as team:
    for name, index, options in {cases!r}:
        (loss,), ours = gradients(name, index, options, team)
        (wanted,), theirs = gradients(name, index, options, None)
        apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs)]
        print(json.dumps([name, index, options, abs(loss / wanted - 1), max(apart)]))
"""


def test_gradients_of_the_first_step_are_those_of_one_process():
    forms = [{}, {"drop": 0.0}, {"statistics": "batch"}, {"rounding": "ste"}]
    cases = [(name, index, options) for name in ("vit", "resnet", "variety") for options in forms for index in (0, 1)]
    first, second = run(GRADIENTS.replace("{cases!r}", repr(cases)))
    rows = [json.loads(line) for line in first.splitlines()]
    assert first == second
    assert len(rows) == len(cases)
    assert [row for row in rows if not (row[3] < 1e-6 and row[4] < 1e-6)] == []


QUANTIZE = """
from tiny import input_of, resnet, vit
with distributed.join() as team:
    for name, method, settings in {cases!r}:
        build = dict(vit=vit, resnet=resnet)[name]
        inputs = [input_of(name, 17), input_of(name, 7, seed=3)]
        model = ttaq.quantize(build(), inputs, "w3a4", method=method, team=team, **settings)
        torch.save([model.state_dict(), model.ttaq_report], f"{path}/{{name}}-{{method}}-{{team.rank}}.pt")
""".replace("{path}", "{{path}}")

CASES = [
    ("vit", "qdrop", QUICK),
    ("vit", "ttaq", QUICK | {"steps": 10}),
    ("resnet", "pcr", QUICK),
    ("resnet", "gptq", {"progress": False}),
    ("vit", "rtn", {"progress": False}),
]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Quantise in two processes; give the two states and reports of each case."""
    folder = tmp_path_factory.mktemp("together")
    run(QUANTIZE.replace("{cases!r}", repr(CASES)).replace("{{path}}", str(folder)).replace("{{", "{").replace("}}", "}"))
    return lambda name, method: [
        torch.load(folder / f"{name}-{method}-{rank}.pt", weights_only=True) for rank in range(2)
    ]


def codes_equal(one, other):
    """Return the share of the codes that are the same."""
    keys = [key for key in one if key.endswith(".codes")]
    pairs = [(one[key], other[key]) for key in keys]
    return sum((a == b).sum().item() for a, b in pairs) / max(1, sum(a.numel() for a, _ in pairs))


@pytest.mark.parametrize(("name", "method", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_two_processes_end_as_one(name, method, settings, together):
    (first, report), (second, _) = together(name, method)
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
