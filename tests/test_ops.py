"""What holds for every op alike: samples, registration, shapes on meta tensors, torch.compile, CUDA graphs."""

import pytest
import torch
from backends import assert_same
from cases import SAMPLES, cases
from torch._subclasses import FakeTensorMode

from ttaq import dispatch, ops
from ttaq.declarations import RAW

ALL = [case for op in SAMPLES for case in cases(op)]
FINITE = {op: [case for case in cases(op) if "not_finite" not in case.name] for op in SAMPLES}
FEW = [case for found in FINITE.values() for case in found[:: max(1, len(found) // 4)]]


def _typed(case):
    """Return (the typed function of the op, its tensors, its keywords) for a case of the raw op."""
    args = dict(zip(_names(case.op), case.args, strict=False))  # the last ones may be left to their defaults
    function = getattr(ops, case.op)
    tensors = {n: a for n, a in args.items() if isinstance(a, torch.Tensor)}
    keywords = {n: a for n, a in args.items() if n not in tensors and n in function.__annotations__}
    if tensors.get("x_scale") is not None:  # the typed function makes the codes itself
        tensors["x"] = tensors["x"].float()
    return function, tensors, keywords


def _names(op):
    return [argument.name for argument in getattr(RAW, op).default._schema.arguments]


def test_every_op_has_samples():
    assert set(dispatch.OPS) == set(SAMPLES)


@pytest.mark.parametrize("op", sorted(dispatch.OPS))
def test_an_op_and_its_backward_list_the_same_backends(op):
    names = [i.name for i in dispatch.OPS[op].implementations]
    assert names[-1] == "reference"
    if op.endswith("_backward"):
        assert names == [i.name for i in dispatch.OPS[op.removesuffix("_backward")].implementations]


@pytest.mark.parametrize("case", ALL, ids=lambda c: f"{c.op}-{c.name}")
def test_outputs_are_allocated_as_the_fake_says(case):
    real = _listed(getattr(RAW, case.op)(*case.args))
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in case.args]
        fake = _listed(getattr(RAW, case.op)(*args))
    assert [_layout(t) for t in real] == [_layout(t) for t in fake]
    with dispatch.backend("reference"):
        assert [_layout(t) for t in _listed(getattr(RAW, case.op)(*case.args))] == [_layout(t) for t in real]


def _listed(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _layout(tensor):
    return tensor.dtype, tensor.shape, tensor.stride() if tensor.numel() else None


@pytest.mark.parametrize("case", FEW, ids=lambda c: f"{c.op}-{c.name}")
def test_opcheck(case):
    torch.library.opcheck(getattr(RAW, case.op).default, case.args)


@pytest.mark.parametrize("op", sorted(op for op in dispatch.OPS if not op.endswith("_backward")))
def test_typed_function_compiles_in_one_graph(op):
    case = next((c for c in cases(op) if "channels_last" in c.name), cases(op)[0])
    function, tensors, keywords = _typed(case)

    def call(tensors):
        return function(**tensors, **keywords)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)(tensors)
    for got, wanted in zip(_present(compiled), _present(call(tensors)), strict=True):
        assert_same(got, wanted)


def _present(outputs):
    return [t for t in _listed(outputs) if t is not None]


LEARNS = {
    "fake_quant": ("x", "scale", "zero"),
    "perturbed_fake_quant": ("x", "scale"),
    "soft_round": ("v",),
    "packed_linear": ("x", "x_scale"),
    "packed_conv2d": ("x", "x_scale"),
}


@pytest.mark.parametrize("op", LEARNS)
def test_gradients_compile_in_one_graph(op):
    case = next((c for c in cases(op) if "channels_last" in c.name), cases(op)[0])
    function, tensors, keywords = _typed(case)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items() if n in LEARNS[op] and t.is_floating_point()}
    assert leaves

    def loss(leaves):
        y = _present(function(**{**tensors, **leaves}, **keywords))
        return sum(t.float().square().sum() for t in y if t.requires_grad)

    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves), leaves.values())
    for got, wanted in zip(compiled, torch.autograd.grad(loss(leaves), leaves.values()), strict=True):
        assert_same(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in FEW if c.args[0].numel()], ids=lambda c: f"{c.op}-{c.name}")
def test_op_survives_a_cuda_graph(case):
    args = case.on("cuda")
    wanted = _listed(getattr(RAW, case.op)(*args))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _listed(getattr(RAW, case.op)(*args))
    for output in outputs:
        output.fill_(0)
    graph.replay()
    for got, expected in zip(outputs, wanted, strict=True):
        assert_same(got, expected)
