"""A step of a block: no wait for the device, one form for eager and captured, lower precision where asked for."""

import copy
from collections import Counter

import pytest
import torch
from tiny import calibrated, input_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ttaq import stepping
from ttaq.blocks import find_blocks
from ttaq.blockwise import BlockLearner, Schedule
from ttaq.caching import BlockCache
from ttaq.learning import adam, frozen
from ttaq.objectives import Objectives
from ttaq.perturbation import PEM
from ttaq.stepping import Captured, Curve, draws, set_rates, undone

CPU = torch.device("cpu")
FORMS = [{"rounding": "adaround"}, {"rounding": "ste", "rounding_lr": 0.01}, {"statistics": "batch"}, {"drop": 0.0}]


class Stage:
    """A block of a tiny network with its cache."""

    def __init__(self, name, index=1, device="cpu", budget=None):
        self.model = copy.deepcopy(calibrated(name, "w3a4")).eval().to(device)
        self.inputs = [input_of(name, 16).to(device)]
        self.block = find_blocks(self.model, self.inputs[0])[index]
        self.stores = BlockCache(self.model, self.inputs, None, budget).advance(self.block)

    def learner(self, **options):
        return BlockLearner(self.model, self.block, Schedule(**{"steps": 12, "batch_size": 4} | options))

    def learn(self, learner, extra=None, seed=0, **how):
        """Learn from a seed; return the losses and what was learned."""
        with frozen(self.model):
            torch.manual_seed(seed)
            losses = [loss.item() for loss in learner.steps(*self.stores, extra, **how)]
        return losses, self.learned(learner)

    @staticmethod
    def learned(learner):
        scales = [q.scale.detach().clone() for q in learner._learned()]
        return [r.v.detach().clone() for r in learner.roundings] + scales


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "equal")


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("pem", [False, True])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_no_step_waits_for_the_device(name, pem, options):
    stage = Stage(name)
    objectives = Objectives(stage.model, stage.inputs, None, PEM(strength=0.1, form="clipped") if pem else None, None)
    learner = stage.learner(**options)
    objectives.begin(stage.block, *stage.stores)
    with frozen(stage.model):
        steps = learner.steps(*stage.stores, objectives)
        next(steps)  # the first one makes the optimiser's state
        with Counting() as counting:
            list(steps)
    assert counting.ran["_fused_adam_"] > 0
    assert counting.ran["index_select"] == 11 * (2 if options.get("drop") == 0.0 else 3)
    assert {name: counting.ran[name] for name in WAITS} == dict.fromkeys(WAITS, 0)


def test_the_count_sees_a_wait():
    with Counting() as counting:
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
    assert counting.ran["_local_scalar_dense"] == 2


def test_draws():
    torch.manual_seed(0)
    found = list(draws(10, 4, 3, CPU))
    torch.manual_seed(0)
    wanted = [torch.randint(10, (4,)) for _ in range(3)]
    assert all(torch.equal(a, w) and a is b for (a, b), w in zip(found, wanted, strict=True))


# The curve


@pytest.mark.parametrize(("total", "points"), [(1, 1), (5, 5), (32, 32), (33, 32), (1000, 32)])
def test_a_curve_has_the_mean_of_each_part_of_the_steps(total, points):
    curve, errors = Curve(CPU), torch.rand(total, generator=torch.Generator().manual_seed(0)) + 1
    for step, error in enumerate(errors):
        curve.add(step, total, error)
    parts = [[] for _ in range(points)]
    for step, error in enumerate(errors.tolist()):
        parts[step * points // total].append(error)
    assert curve.read() == [pytest.approx(sum(part) / len(part), rel=1e-3) for part in parts]
    assert all(len(f"{mean:g}".replace(".", "").lstrip("0")) <= 4 for mean in curve.read())
    assert Curve(CPU).read() == []


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_curve_is_that_of_the_distance_to_the_float_block(name, graphed, options, monkeypatch):
    monkeypatch.setattr(stepping, "_record", replayed)
    stage = Stage(name)
    learner = stage.learner(**options | {"penalty": 0.0})  # so that the loss is the distance
    losses, _ = stage.learn(learner, graph=graphed, plan=lambda seconds: 9)
    assert learner.curve.read() == [pytest.approx(loss, rel=1e-3) for loss in losses]
    stage = Stage(name)
    other = stage.learner(**options)
    stage.learn(other, lambda *_: 5.0, plan=lambda seconds: 9)
    assert other.curve.read()[0] == learner.curve.read()[0]  # neither the penalty nor other terms are in it


# What is undone, and the steps that a plan chooses


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_undone_steps_leave_nothing(lr):
    parameter = nn.Parameter(torch.randn(5))
    groups = [{"params": [parameter], "lr": lr}]
    optimizer, before = torch.optim.Adam(groups), parameter.detach().clone()

    def step(target):
        optimizer.zero_grad()
        (parameter - target).square().sum().backward()
        optimizer.step()

    state = torch.get_rng_state()
    with undone(optimizer, CPU):
        for _ in range(3):
            step(torch.randn(5))
    assert torch.equal(parameter, before)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = nn.Parameter(before.clone())
    other = torch.optim.Adam([{"params": [fresh], "lr": 0.1}])
    step(torch.ones(5))
    (fresh - 1).square().sum().backward()
    other.step()
    assert torch.equal(parameter, fresh)


def test_steps_that_fail_are_undone_too():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])

    def fail():
        with undone(optimizer, CPU):
            parameter.sum().backward()
            optimizer.step()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(parameter, torch.ones(2))


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_plan_changes_nothing_but_the_number_of_steps(name, options):
    times = []
    planned, plain = Stage(name), Stage(name)
    one = planned.learn(planned.learner(**options), plan=lambda seconds: times.append(seconds) or 7)
    other = plain.learn(plain.learner(**options | {"steps": 7}))
    assert len(times) == 1
    assert times[0] > 0
    assert one[0] == other[0]
    assert len(one[0]) == 7
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


# Captured


def test_rates_are_set_in_place_where_they_are_tensors():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    rate = torch.tensor(1.0)
    optimizer = torch.optim.Adam([{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": rate}])
    set_rates(optimizer, [0.5, 0.25])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[1]["lr"] is rate
    assert rate == 0.25


def replayed(run, inputs):
    """Stand in for the capture: run the step three times, then once more at each replay, on the same tensors."""
    for _ in range(3):
        loss = run(*inputs).clone()
    addresses = [t.data_ptr() for t in inputs if t is not None]

    def replay():
        assert [t.data_ptr() for t in inputs if t is not None] == addresses
        loss.copy_(run(*inputs))

    return replay, loss


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("plan", [None, lambda seconds: 9])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_captured_form_of_a_step_learns_the_same(name, plan, options, monkeypatch):
    monkeypatch.setattr(stepping, "_record", replayed)
    captured, eager = Stage(name), Stage(name)
    learner = captured.learner(**options)
    one = captured.learn(learner, graph=True, plan=plan)
    other = eager.learn(eager.learner(**options | ({"steps": 9} if plan else {})))
    assert learner.graphed
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_what_cannot_be_captured_runs_as_it_is_or_says_so(monkeypatch):
    def failing(run, inputs):
        run(*inputs)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(stepping, "_record", failing)
    tried, eager = Stage("resnet"), Stage("resnet")
    learner = tried.learner()
    one, other = tried.learn(learner, graph=None), eager.learn(eager.learner())
    assert not learner.graphed
    assert one[0] == other[0]
    with pytest.raises(ValueError, match=r"^reconstruct: block layer1.0 cannot be captured \(operation not permitted"):
        tried.learn(tried.learner(), graph=True)


def test_running_out_of_memory_is_no_reason_to_run_as_it_is(monkeypatch):
    def failing(run, inputs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stepping, "_record", failing)
    stage = Stage("resnet")
    with pytest.raises(torch.OutOfMemoryError):
        stage.learn(stage.learner(), graph=None)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*FORMS, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_graph_learns_what_the_eager_step_does(name, budget, options):
    graphed, eager = Stage(name, device="cuda", budget=budget), Stage(name, device="cuda")
    learner = graphed.learner(**options)
    one, other = graphed.learn(learner, graph=True), eager.learn(eager.learner(**options))
    assert learner.graphed
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_capturable_optimiser_holds_its_rates_on_the_device():
    parameter = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = adam([{"params": [parameter], "lr": 0.5}], capturable=True)
    assert optimizer.param_groups[0]["lr"].is_cuda
    target = torch.zeros(3, device="cuda")

    def run(goal):
        optimizer.zero_grad()
        loss = (parameter - goal).square().sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = Captured(run, (target,), optimizer)
    assert torch.equal(parameter.detach().cpu(), torch.ones(3))
    assert step(target).item() == 3.0
    set_rates(optimizer, [0.0])
    before = parameter.detach().clone()
    step(target)
    assert torch.equal(parameter, before)


# Precision


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_products_in_bfloat16_learn_nearly_the_same(name, options):
    half, full = Stage(name), Stage(name)
    seen = []
    learner = half.learner(dtype=torch.bfloat16, **options)
    layer = next(iter(learner.layers.values()))
    hook = layer.register_forward_hook(lambda m, args, y: seen.append(y.dtype))
    one, other = half.learn(learner), full.learn(full.learner(**options))
    hook.remove()
    assert set(seen) == {torch.bfloat16}
    assert all(t.dtype == torch.float32 for t in one[1])
    assert one[0] == pytest.approx(other[0], rel=0.2)
    assert one[0] != other[0]


def test_dtypes():
    assert Schedule().dtype == "float32"
    assert Schedule(dtype=torch.bfloat16) == Schedule(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"^reconstruct: dtype must be one of float32, bfloat16, got 'float16'"):
        Schedule(dtype=torch.float16)
