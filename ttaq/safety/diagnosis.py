"""diagnose: which layers of a model break when it is quantised, and why."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ..batches import Forward, call, collect, count, pieces, take
from ..blocks import Block, find_blocks
from ..calibration import calibrate
from ..layers import QuantConv2d, QuantLinear, QuantMatMul
from ..preparation import prepare
from ..quantizers import Quantizer, disabled
from ..spec import Recipe
from ..surgery import device_of, evaluating
from ..tracing import leaves
from .structure import flat

_LAYERS = (QuantLinear, QuantConv2d, QuantMatMul)
PIECE = 4  # images whose activations are held at once


def diagnose(
    model: nn.Module,
    batches: Iterable,
    recipe: str | Recipe = "w8a8",
    *,
    images: int = 32,
    forward: Forward | None = None,
) -> dict:
    """Measure where quantisation hurts: at every layer, at every block and at the output.

    A layer breaks where its SQNR, alone, is under `bound` of its width: that of a layer of two bits less, or half of
    the decibels that its width gives, whichever is the higher.

    Args:
        model: A float model, which is rounded to nearest on a copy, or a calibrated one, which is measured as it is.
        batches: An iterable of tensors, (x, y) pairs or dicts; some dozen images.
        recipe: Of the copy.
        images: At most so many are used.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.

    Returns:
        "recipe"; "output", |y' - y| / |y|; "layers", of each in dB "alone" (on float inputs) and "prefix" (behind the
        quantised layers before it), its "bound", and "ratio", the range of the widest input channel over the
        median one's (None for products and convolutions); "blocks", of each the "error" |y' - y| / |y| and the
        "cosine"; "broken", the layers that break with the reason in words.

    Raises:
        ValueError: The model or the images do not serve.
    """
    inputs = first(collect("diagnose", batches, device_of(model)), images)
    if not any(isinstance(m, Quantizer) for m in model.modules()):
        model = prepare(model, recipe).eval()
        calibrate(model, inputs, forward=forward)
    return measure(model, inputs, forward, find_blocks(model, take(inputs[0], slice(0, 2)), forward))


@torch.no_grad()
def measure(model: nn.Module, inputs: list, forward: Forward | None, blocks: Iterable[Block] = ()) -> dict:
    """Diagnose a calibrated model, see `diagnose`, and the blocks that are given."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and not (module.ready or module.auto):
            raise ValueError(f"diagnose: {name} has no range; call ttaq.calibrate on the prepared model first")
    watch = _Watch(model, blocks)
    with evaluating(model):
        for entry in inputs:
            for piece in pieces(count(entry), PIECE):
                watch.compare(partial(call, model, take(entry, piece), forward))
    recipe = getattr(model, "ttaq_report", {}).get("recipe")
    return {"recipe": recipe and str(Recipe.from_json(recipe)), **watch.rows()}


def first(inputs: list, images: int) -> list:
    """Take the first images of the entries of `batches.collect`."""
    found = []
    for entry in inputs:
        if images <= 0:
            break
        found.append(take(entry, slice(0, images)))
        images -= count(found[-1])
    return found


def output_error(model: nn.Module, targets: list[Tensor], inputs: list, forward: Forward | None) -> float:
    """Return |y' - y| / |y| over what a model returns for `inputs`, y the `targets`."""
    found = outputs(model, inputs, forward)
    wrong = sum((a - b).square().sum().item() for a, b in zip(found, targets, strict=True))
    return _ratio(wrong, sum(b.square().sum().item() for b in targets))


@torch.no_grad()
def outputs(model: nn.Module, inputs: list, forward: Forward | None) -> list[Tensor]:
    """Return what a model gives for each entry, float64, laid out in one vector."""
    with evaluating(model):
        return [flat(call(model, entry, forward)).double() for entry in inputs]


def bound(bits: int) -> float:
    """Return the least SQNR, dB, of a layer that is sound: 6 bits - 6 is what layers without outliers have."""
    sound = 6.0 * bits - 6
    return sound - min(12.0, sound / 2)


class _Watch:
    """Sums of signals and errors of all layers and blocks."""

    def __init__(self, model: nn.Module, blocks: Iterable[Block]):
        self.model = model
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, _LAYERS) and _quantizers(m)}
        self.ends = {block.name: (block.modules[-1], block.result) for block in blocks}
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.range: dict[str, tuple[Tensor, Tensor]] = {}
        self.meant: dict[str, Tensor] = {}

    def compare(self, run) -> None:
        """Run the float model, each layer alone beside it, and then the quantised one."""
        with disabled(self.model):
            self.meant = {}
            self._hooked(self._note_float, run)
        self._hooked(self._note_quantised, run)

    def rows(self) -> dict:
        """Return what `diagnose` does."""
        layers, broken = {}, {}
        for name, layer in self.layers.items():
            if ("alone", name) not in self.sums:
                continue
            bits = min(q.spec.bits for q in _quantizers(layer))
            row = {kind: self._decibels(kind, name) for kind in ("alone", "prefix")}
            layers[name] = row | {"bound": bound(bits), "ratio": self._spread(name)}
            if not row["alone"] >= bound(bits):
                wide = layers[name]["ratio"]
                why = f", its widest input channel has {wide:.3g} times the median range" if wide else ""
                broken[name] = f"SQNR {row['alone']:.3g} dB, less than {bound(bits):.3g}{why}"
        blocks = {}
        for name in self.ends:
            if ("block", name) in self.sums:
                wrong, signal, other, product = self.sums["block", name].tolist()
                cosine = round(product / max(math.sqrt(signal * other), 1e-30), 6)
                blocks[name] = {"error": _ratio(wrong, signal), "cosine": cosine}
        wrong, signal, *_ = self.sums["output", ""].tolist()
        return {"output": _ratio(wrong, signal), "layers": layers, "blocks": blocks, "broken": broken}

    def _hooked(self, note, run):
        hooks = []
        for name, layer in self.layers.items():
            hooks.append(layer.register_forward_hook(lambda m, args, y, n=name: note("layer", n, m, args, y)))
        for name, (module, place) in self.ends.items():
            picked = lambda m, args, y, n=name, p=place: note("block", n, m, args, list(leaves(y))[p])  # noqa: E731
            hooks.append(self.model.get_submodule(module).register_forward_hook(picked))
        try:
            note("output", "", None, (), flat(run()))
        finally:
            for hook in hooks:
                hook.remove()

    def _note_float(self, kind, name, module, args, y):
        self.meant[kind, name] = y.detach().clone()
        if kind != "layer":
            return
        quantizers = _quantizers(module)
        for quantizer in quantizers:
            quantizer.enabled = True
        self._add("alone", name, module.forward(*args), y)
        for quantizer in quantizers:
            quantizer.enabled = False
        if isinstance(module, QuantLinear):
            low, high = torch.aminmax(args[0].detach().flatten(0, -2), dim=0)
            before = self.range.get(name, (low, high))
            self.range[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    def _note_quantised(self, kind, name, module, args, y):
        if (kind, name) in self.meant:
            self._add("prefix" if kind == "layer" else kind, name, y, self.meant[kind, name])

    def _add(self, kind, name, y, meant):
        y, meant = y.detach().double(), meant.detach().double()
        sums = torch.stack([(y - meant).square().sum(), meant.square().sum(), y.square().sum(), (y * meant).sum()])
        self.sums[kind, name] = self.sums.get((kind, name), 0) + sums

    def _decibels(self, kind, name):
        wrong, signal, *_ = self.sums[kind, name].tolist()
        return round(10 * math.log10(max(signal, 1e-30) / max(wrong, 1e-30)), 2)

    def _spread(self, name):
        if name not in self.range:
            return None
        low, high = self.range[name]
        wide = (high - low).float()
        return round((wide.max() / wide.median().clamp(min=1e-12)).item(), 2)


def _quantizers(layer):
    return [m for m in layer.children() if isinstance(m, Quantizer)]


def _ratio(wrong, signal):
    return float(f"{math.sqrt(wrong / max(signal, 1e-30)):.6g}")
