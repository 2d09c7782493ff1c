"""A time budget: how it is read, shared out, kept, found too small, and repeated bit for bit without a clock."""

import json
import warnings

import pytest
import torch
from tiny import assert_unchanged, calibrated, input_of, resnet, snapshot, vit

import ttaq
from ttaq import blockwise, pacing
from ttaq.blocks import find_blocks
from ttaq.blockwise import BlockLearner, Schedule
from ttaq.costs import block_costs, step_costs
from ttaq.learning import frozen
from ttaq.pacing import FEWEST, MOST, PILOT, REFINE, Deadline, Pace, seconds_of, steps_of

pytestmark = pytest.mark.filterwarnings("ignore:.* images are few", "ignore:.*the budget of")
QUICK = {"batch_size": 4, "progress": False}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(90, 90), (0.5, 0.5), ("90s", 90), ("5min", 300), ("5 m", 300), ("1h", 3600), ("1h30min", 5400), ("1.5 h", 5400)],
)
def test_times_are_read(text, wanted):
    assert seconds_of(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "min", "5 minutes", "-3s", 0, -1, "0s", True, None, float("inf"), float("nan"), []]
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match=r'^budget: wanted seconds above 0, or "90s", "5min" or "1h", got '):
        seconds_of(text)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    held = Clock()
    monkeypatch.setattr(pacing, "time", held)
    return held


def test_deadlines(clock):
    whole = Deadline("10s")
    clock.now += 2
    half = whole.part(0.5)
    assert (whole.left, half.left) == (8, 4)
    half.spend(1)
    assert (whole.left, half.left) == (7, 3)
    assert Deadline.of(None) is None
    assert Deadline.of(half) is half
    assert not whole.missed
    with pytest.warns(UserWarning, match=r"^verb: the budget of 10 s is too small for nothing$"):
        half.miss("verb", "nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole.miss("verb", "nothing")
        whole.part(0.1).miss("verb", "nothing")
    assert whole.missed
    assert half.missed


def spent(clock, costs, budget, step, other=0.0, most=MOST, slower=1.0):
    """Learn blocks that cost what is said; return their steps and what was over at the end."""
    pace, steps = Pace(Deadline(budget), {name: step * cost for name, cost in costs.items()}, most), {}
    for name, cost in costs.items():
        steps[name] = pace.steps(name)
        learning = steps[name] * step * cost * slower
        clock.now += learning + other * cost
        pace.end(name, learning + other * cost, learning)
    return steps, pace


def test_every_block_gets_the_same_steps_where_costs_are_as_foreseen(clock):
    steps, pace = spent(clock, {"a": 1.0, "b": 3.0, "c": 2.0}, 60, 0.01)
    assert set(steps.values()) <= {999, 1000}
    assert 0 <= pace.deadline.left < 0.1
    assert not pace.short


def test_what_blocks_take_beside_their_steps_is_kept_free(clock):
    steps, pace = spent(clock, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, 40, 0.01, other=2.0)
    assert -2.1 < pace.deadline.left < 0.1  # what the first block takes is not known before
    assert steps["b"] < steps["a"]


def test_a_step_that_runs_in_another_form_tells_how_much_faster_all_are(clock):
    pace = Pace(Deadline(60), {"a": 0.01, "b": 0.02}, MOST)
    assert pace.steps("a") == 2000
    assert pace.steps("a", 0.002) == 10_000
    learning = 10_000 * 0.002
    clock.now += learning
    pace.end("a", learning, learning)
    assert pace.steps("b", 0.1) == 10_000  # what blocks took counts for more than a step or two


def test_steps_that_take_longer_than_those_tried_are_made_up_for(clock):
    steps, pace = spent(clock, dict.fromkeys("abcdefgh", 1.0), 80, 0.01, slower=1.5)
    assert steps["a"] == 1000
    assert {steps[name] for name in "bcdefgh"} <= {618, 619, 620}  # (80 - 15) / 7 / 0.015
    assert pace.deadline.left == pytest.approx(0, abs=0.2)


def test_a_block_of_another_process_counts_for_nothing(clock):
    pace = Pace(Deadline(10), {"a": 0.01, "b": 0.01}, MOST)
    pace.end("a", 0.0, 0.0)
    assert pace.steps("b") == 1000


def test_bounds(clock):
    steps, pace = spent(clock, {"a": 1.0, "b": 1.0}, 1, 0.5)
    assert steps == {"a": FEWEST, "b": FEWEST}
    assert pace.short
    with pytest.warns(
        UserWarning, match=rf"^reconstruct: the budget of 1 s is too small for {FEWEST} steps in each of 2"
    ):
        pace.close("reconstruct", 2)
    assert spent(clock, {"a": 1.0, "b": 1.0}, 1e6, 0.1)[0] == {"a": MOST, "b": MOST}
    steps, pace = spent(clock, {"a": 1.0}, 1, 0.1, most=5)
    assert steps == {"a": 5}
    assert not pace.short


def test_a_budget_that_cannot_do_is_named_before_the_first_block(clock):
    pace = Pace(Deadline(10), {"a": 0.2, "b": 0.4}, MOST)
    wanted = rf"^reconstruct: the budget of 10 s is too small for {FEWEST} steps in each of 2 blocks, about 12 s"
    with pytest.warns(UserWarning, match=wanted):
        pace.open("reconstruct")
    assert pace.deadline.missed
    pace = Pace(Deadline(13), {"a": 0.2, "b": 0.4}, MOST)
    pace.open("reconstruct")
    assert not pace.deadline.missed


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_costs_of_blocks(name):
    model, x = calibrated(name, "w4a4").eval(), input_of(name)
    blocks = find_blocks(model, x)
    costs = block_costs(model, blocks, x, None)
    assert list(costs) == [block.name for block in blocks]
    assert all(cost > 0 for cost in costs.values())
    assert sum(costs.values()) == pytest.approx(1)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("rounding", ["adaround", "ste"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_steps_are_timed_and_undone(name, rounding):
    model, x = calibrated(name, "w4a4").eval(), input_of(name)
    blocks = find_blocks(model, x)
    with frozen(model):
        before, state = snapshot(model), torch.get_rng_state()
        costs = step_costs(model, blocks, x, None, Schedule(batch_size=4, rounding=rounding, statistics="batch"))
        assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(costs) == [block.name for block in blocks]
    assert all(0 < cost < 5 for cost in costs.values())


# A budget and its repetition


@pytest.fixture
def steady(clock, monkeypatch):
    """Let a step seem to take two milliseconds in one block and three in the next; each block takes its own time."""
    seconds, real, learn = iter([2e-3, 3e-3] * 20), blockwise.time_calls, BlockLearner.harden

    def time_calls(run):
        real(run)
        return next(seconds)

    def harden(self, *args):
        clock.now += 0.03
        return learn(self, *args)

    monkeypatch.setattr(blockwise, "time_calls", time_calls)
    monkeypatch.setattr("ttaq.refinement.time_calls", time_calls)
    monkeypatch.setattr(BlockLearner, "harden", harden)


@pytest.mark.parametrize(
    ("build", "method", "budget"), [(resnet, "ttaq", 1.2), (vit, "pem", 0.3), (resnet, "qdrop", 0.45)]
)
def test_a_run_under_a_budget_is_repeated_bit_for_bit(build, method, budget, steady):
    options = QUICK | {"method": method, "steps": 40, "seed": 3}
    first = ttaq.quantize(build(), [input_of("vit", 16)], "w3a4", budget=budget, **options)
    report = json.loads(json.dumps(first.ttaq_report))
    done = steps_of(report)
    wanted = {row["name"]: row["steps"] for row in report["blocks"]}
    wanted |= {} if method == "qdrop" else {PILOT: report["pem"]["pilot_steps"]}
    wanted |= {REFINE: report["refinement"]["steps"]} if method == "ttaq" else {}
    assert done == wanted
    assert set(report["budget"]) == {"seconds", "taken", "enough"}
    assert len(set(done.values())) > 1
    assert all(n >= FEWEST for name, n in done.items() if name != PILOT)
    for given in (report, done) if method == "qdrop" else (report,):
        again = ttaq.quantize(build(), [input_of("vit", 16)], "w3a4", **options | {"steps": given})
        assert steps_of(again.ttaq_report) == done
        assert "budget" not in again.ttaq_report
        one, other = first.state_dict(), again.state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_budget_is_about_kept():
    report = ttaq.quantize(vit(), [input_of("vit", 16)], "w4a4", budget="4s", **QUICK).ttaq_report
    assert report["budget"]["seconds"] == 4
    assert report["budget"]["taken"] < 7  # this machine may be busy
    assert sum(row["steps"] for row in report["blocks"]) >= 4 * FEWEST
    assert report["refinement"]["steps"] >= FEWEST


def test_a_budget_too_small_says_so_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = ttaq.quantize(vit(), [input_of("vit", 8)], "w4a4", budget=0.01, **QUICK).ttaq_report
    said = [str(w.message) for w in caught if "budget" in str(w.message)]
    assert len(said) == 1
    short = f"reconstruct: the budget of 0.01 s is too small for {FEWEST} steps in each of 4 blocks, about "
    assert said[0].startswith(short)
    assert [row["steps"] for row in report["blocks"]] == [FEWEST] * 4
    assert report["refinement"]["steps"] == FEWEST
    assert report["budget"]["enough"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "soon"}, "^budget: wanted seconds above 0"),
        ({"budget": 1, "steps": {"patches": 3}}, "^reconstruct: give steps by block or a budget, not both"),
        (
            {"steps": {"patches": 3}},
            "^reconstruct: steps has no number for layers.0, layers.1, head; give one for each",
        ),
        ({"steps": {}}, "^steps: wanted a number, whole numbers by block, or a ttaq_report"),
        ({"steps": {"patches": 1.5}}, "^steps: wanted a number"),
        ({"method": "rtn", "budget": 3}, "^quantize: rounding to nearest takes no batch_size, budget"),
        (
            {"method": "rtn", "resume": "x", "cache": 1},
            "^quantize: rounding to nearest takes no batch_size, cache, resume",
        ),
        ({"cache": "much"}, "^cache: wanted bytes"),
        ({"graph": True}, "^reconstruct: graph=True needs the model on a GPU, it is on cpu; leave graph=None"),
    ],
    ids=str,
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ttaq.quantize(vit(), [input_of("vit", 8)], "w4a4", **QUICK | options)
