"""One step of block reconstruction: ours, the same step composed of torch ops, and the step of the float block.

All learn the same block from the same images. Ours and its rival run forward, QDrop, AdaRound with its regulariser,
squared distance, backward and Adam; the float block's step is what both cannot do without: the same modules, matrix
products and convolutions, forward and backward by inputs and weights.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

import ttaq
from ttaq import ops
from ttaq.blocks import Block, run_block
from ttaq.blockwise import BlockLearner, Schedule
from ttaq.learning import frozen
from ttaq.models import Layer

from . import rivals
from .rows import Row
from .timing import in_turn, peak_bytes

OP = "reconstruction_step"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::convolution_backward")


@dataclass(frozen=True)
class Subject:
    """A block of a network: its modules with random weights, and the shape of what one image gives it."""

    name: str
    build: Callable[[], nn.Sequential]
    shape: tuple[int, ...]


def subjects() -> list[Subject]:
    """List what is measured; timm's attention is left in float, `ttaq.models` has the same in modules."""
    import timm

    return [
        Subject("ViT-S block, quantised products", lambda: nn.Sequential(Layer(384, 6)), (197, 384)),
        Subject("ViT-B block, quantised products", lambda: nn.Sequential(Layer(768, 12)), (197, 768)),
        Subject("ViT-S block of timm", lambda: timm.create_model("vit_small_patch16_224").blocks[:1], (197, 384)),
        Subject("ViT-B block of timm", lambda: timm.create_model("vit_base_patch16_224").blocks[:1], (197, 768)),
        Subject("ResNet-50 layer3", lambda: timm.create_model("resnet50").layer3, (512, 28, 28)),
    ]


class Stage:
    """A quantised copy of a subject and the tensors that it learns from.

    Args:
        subject: What to build, the same at each call.
        batch: Images a step; twice as many are cached.
        drop: As in `Schedule`.
    """

    def __init__(self, subject: Subject, batch: int, drop: float = 0.5):
        torch.manual_seed(0)
        self.floating = subject.build().eval()
        self.inputs = torch.randn(2 * batch, *subject.shape)
        self.quantised = self.inputs + 0.01 * torch.randn_like(self.inputs)
        with torch.no_grad():
            self.targets = torch.cat([self.floating(x) for x in self.inputs.split(batch)])
        recipe = ttaq.Recipe.parse("w4a4", first_last=None)
        self.model = ttaq.prepare(self.floating, recipe, attention=False).eval()
        ttaq.calibrate(self.model, [self.inputs[: max(2, batch // 4)]])
        layers = tuple(n for n, m in self.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        self.block = Block(subject.name, tuple(name for name, _ in self.model.named_children()), layers, False)
        self.schedule = Schedule(steps=1 << 20, batch_size=batch, drop=drop, warmup=0.0)

    def ours(self) -> Iterator[Tensor]:
        """Give the loss of one step after the other."""
        with frozen(self.model):
            learner = BlockLearner(self.model, self.block, self.schedule)
            yield from learner.steps(self.quantised, self.inputs, self.targets)

    def composed(self) -> Iterator[Tensor]:
        """Give the loss of one step after the other, all of them made of torch ops and torch's default Adam."""
        schedule, channels = self.schedule, 1 if self.targets.ndim == 4 else -1
        with frozen(self.model):
            learner = BlockLearner(self.model, self.block, schedule)
            scales = [q.scale.requires_grad_() for q in learner.activations]
            for quantizer in learner.activations:
                quantizer.drop = schedule.drop
            groups = [{"params": [r.v for r in learner.roundings], "lr": schedule.rounding_lr}]
            groups += [{"params": [scale], "lr": schedule.scale_lr * scale.item()} for scale in scales]
            optimizer = torch.optim.Adam(groups)
            while True:
                picked = torch.randint(len(self.targets), (schedule.batch_size,))
                x, target = self.quantised[picked], self.targets[picked]
                if schedule.drop:
                    x = torch.where(torch.rand_like(x) < schedule.drop, self.inputs[picked], x)
                optimizer.zero_grad()
                with composed_ops():
                    loss = (run_block(self.model, self.block, x) - target).square().sum(channels).mean()
                loss = loss + schedule.penalty * sum(r.penalty for r in learner.roundings)
                loss.backward()
                optimizer.step()
                yield loss.detach()

    def floats(self) -> Iterator[Tensor]:
        """Give the loss of one float step after the other, which changes no weight."""
        model, batch = copy.deepcopy(self.floating), self.schedule.batch_size
        x, target = self.quantised[:batch].clone().requires_grad_(), self.targets[:batch]
        while True:
            loss = nn.functional.mse_loss(model(x), target)
            model.zero_grad()
            loss.backward()
            yield loss.detach()


@contextmanager
def composed_ops() -> Iterator[None]:
    """Let quantisers compute with compositions of torch ops while the context is open."""
    with patch.multiple(ops, fake_quant=rivals.lsq, perturbed_fake_quant=_dropped, soft_round=_rounded):
        yield


def _dropped(x, scale, zero, *, qmin, qmax, spread, kind, seed, axis):
    return torch.where(torch.rand_like(x) < spread, x, rivals.lsq(x, scale, zero, qmin=qmin, qmax=qmax))


def _rounded(*tensors, qmax, axis, group, conv_groups):
    return *rivals.soft_round(*tensors), None


def measure(subject: Subject, origin: dict[str, str], *, batch: int, seconds: float) -> Row:
    """Time one subject on the CPU.

    Args:
        subject: What to time.
        origin: The columns that say where and of what the row is.
        batch: Images a step.
        seconds: For each contestant.

    Returns:
        A row: the rival is the composed step, the ceiling the float one; `max_error` is the difference of the first
        loss to the rival's, nothing dropped, as a share of it.
    """
    stage = Stage(subject, batch)
    steps = {"ours": copy.deepcopy(stage).ours(), "composed": stage.composed(), "float": stage.floats()}
    calls = {name: [lambda step=step: next(step)] for name, step in steps.items()}
    held = peak_bytes(calls["ours"][0], "cpu")
    timings = in_turn(calls, "cpu", seconds)
    ours = timings["ours"]
    return Row(
        **origin,
        op=OP,
        backend="cpu",
        dtype="float32",
        case=f"{subject.name}, W4A4, batch {batch}",
        p20_us=ours.p20 * 1e6,
        p50_us=ours.p50 * 1e6,
        p80_us=ours.p80 * 1e6,
        gbps=None,
        tflops=None,
        percent_of_roofline=100 * timings["float"].p50 / ours.p50,
        peak_mib=held / 2**20,
        max_error=difference(subject, batch),
        rival="composed eager step",
        ratio=timings["composed"].p50 / ours.p50,
    )


def difference(subject: Subject, batch: int) -> float:
    """Return how far the first losses of both variants are apart, nothing dropped, as a share of the rival's."""
    stage, losses = Stage(subject, batch, drop=0.0), []
    for steps in (copy.deepcopy(stage).ours(), stage.composed()):
        torch.manual_seed(0)
        losses.append(next(steps).item())
    return abs(losses[0] - losses[1]) / abs(losses[1])


def products_share(subject: Subject, batch: int) -> float:
    """Return the share of our step that matrix products and convolutions take."""
    step = Stage(subject, batch).ours()
    next(step)
    with torch.profiler.profile() as profile:
        next(step)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(name, 0) for name in PRODUCTS) / sum(times.values())


def compiled(subject: Subject, batch: int, seconds: float) -> dict[str, float]:
    """Time a forward and backward pass of the simulated block: the opaque ops and their compositions, compiled or not.

    Returns:
        Median seconds by name; "compiled, composed" is what Inductor makes of a traceable reference.
    """
    stage = Stage(subject, batch)

    def call(model, context):
        run = lambda: model(stage.inputs[:batch]).square().mean().backward()  # noqa: E731
        return lambda: _within(context, run)

    calls = {}
    for name, context in (("opaque", nullcontext), ("composed", composed_ops)):
        eager = copy.deepcopy(stage.model).train()
        calls[f"eager, {name}"] = [call(eager, context)]
        calls[f"compiled, {name}"] = [call(torch.compile(copy.deepcopy(eager)), context)]
    torch.compiler.reset()
    return {name: timing.p50 for name, timing in in_turn(calls, "cpu", seconds).items()}


def _within(context, run):
    with context():
        run()
