"""protect: rewrite a float transformer before it is quantised, by the measures asked for or by those that it needs."""

import warnings
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import nn

from ..batches import Forward, collect, count, take
from ..calibration import calibrate
from ..preparation import prepare
from ..quantizers import Quantizer
from ..spec import Recipe
from ..surgery import copy_model, device_of
from .diagnosis import first, measure, output_error, outputs
from .measures import extremes, migrate, reparameterise, rotate
from .structure import Proof, kept, opened, survey

MEASURES = {
    "reparameterisation": "equal ranges for all channels of a LayerNorm's output (arXiv:2212.08254)",
    "migration": "outliers of activations moved into weights (arXiv:2211.10438)",
    "rotation": "residual stream and heads rotated by Hadamard matrices (arXiv:2404.00456)",
}
CANDIDATES = (("migration",), ("reparameterisation",), ("rotation",), ("migration", "rotation"))
GAIN = 0.9  # of the error without measures: one that leaves more is not worth it
CLOSE = 1.1  # times the least error: the first candidate that is as near is taken
IMAGES = 64  # for the ranges, and as many for the errors
DIAGNOSED = 32  # of the latter, layer by layer
WIDE = 4.0  # times the median range: a channel that takes two bits from the others


def protect(
    model: nn.Module,
    batches: Iterable,
    measures: str | Iterable[str] = "auto",
    *,
    recipe: str | Recipe = "w8a8",
    alpha: float = 0.5,
    seed: int = 0,
    attention: bool = True,
    forward: Forward | None = None,
) -> nn.Module:
    """Rewrite a float model so that it is safe to quantise; it computes what it did, but for rounding.

    Classes, names and shapes stay as they are, and so the checkpoint of the quantised model loads into the architecture
    of the original. The affine parameters of LayerNorm change their values and stay free to adapt.

    Args:
        model: A float model; left as it is.
        batches: A re-iterable of tensors, (x, y) pairs or dicts; some hundred images.
        measures: Names of `MEASURES`, one or several, done in this order; "off" for none; "auto" for those that leave
            the least error of the output, where layers break (`diagnose`) whose inputs have outlier channels.
        recipe: What "auto" tries: rounding to nearest.
        alpha: Of the migration: 0 leaves outliers in the activations, 1 moves them into the weights.
        seed: Of the rotation.
        attention: As in `prepare`.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.

    Returns:
        The rewritten copy. `ttaq_report["safety"]`, which `prepare` hands on, says what was done and why: "asked",
        "measures", "why"; "done" and "left", of each measure; and under "auto" the layers that are "broken", those that
        are so "after", and "errors", the |y' - y| / |y| of each choice.

    Raises:
        ValueError: A measure is not known, the model is quantised already, or the images do not serve.
    """
    if any(isinstance(m, Quantizer) for m in model.modules()):
        raise ValueError("protect: the model holds quantised layers already; start from the float model")
    inputs = collect("protect", batches, device_of(model))
    settings = {"alpha": alpha, "seed": seed, "attention": attention, "forward": forward}
    made, report = secure(model, inputs, measures, recipe, **settings)
    made = copy_model(model) if made is model else made
    made.ttaq_report = getattr(model, "ttaq_report", {}) | {"safety": report}
    return made


@torch.inference_mode(False)
def secure(
    model: nn.Module, inputs: list, measures: str | Iterable[str], recipe: str | Recipe, *, alpha: float = 0.5,
    seed: int = 0, attention: bool = True, forward: Forward | None = None,
) -> tuple[nn.Module, dict]:  # fmt: skip
    """Do as `protect`, on entries of `collect`; return `model` itself where nothing is done, and the report."""
    names = _names(measures)
    report = {"asked": measures if isinstance(measures, str) else list(names), "measures": []}
    if not any(isinstance(m, nn.LayerNorm) for m in model.modules()):
        return model, report | {"why": "it has no LayerNorm"}
    if measures == "off" or any(isinstance(m, Quantizer) for m in model.modules()):
        return model, report | {"why": "not asked for"}
    rewriter = _Rewriter(model, inputs, alpha, seed, forward)
    if measures == "auto":
        names, found = _choose(rewriter, Recipe.parse(recipe), attention)
        report |= found
    else:
        report["why"] = "asked for"
    if not names:
        return model, report
    report["done"], report["left"] = rewriter.rewrite(names)
    report["measures"] = list(names)
    if not rewriter.proof.holds():
        raise ValueError(
            f"protect: the model must compute the same after {', '.join(names)}, got an output that differs by "
            f"{rewriter.proof.error():.2g}; use measures='off'"
        )
    return rewriter.model, report


class _Rewriter:
    """Does measures to a copy of a model, made when it is first needed; what may be rewritten is proven once."""

    def __init__(self, model, inputs, alpha, seed, forward):
        self.original, self.inputs, self.forward = model, inputs, forward
        self.alpha, self.seed = alpha, seed

    @cached_property
    def model(self):
        return copy_model(self.original)

    @cached_property
    def view(self):
        return opened(self.model)

    @cached_property
    def proof(self):
        return Proof(self.view, take(self.inputs[0], slice(0, 4)), self.forward)

    @cached_property
    def found(self):
        return survey(self.view, self.proof)

    def rewrite(self, names):
        """Do the named measures; return what was done, and what was left with the reason, of each."""
        done, left = {}, {}
        for name in names:
            found, left[name] = self.found, dict(self.found.refused)
            if name == "rotation":
                done[name], more = rotate(self.view, found, self.proof, self.seed)
                left[name] |= more
            else:
                read = {next(iter(j.readers)) for j in found.joints} | {h.reader[0] for h in found.values}
                seen = extremes(self.view, first(self.inputs, 4 * IMAGES), read, self.forward)
                if name == "migration":
                    done[name] = migrate(found, seen, self.alpha)
                else:
                    done[name] = reparameterise(found, seen)
        return done, left


def _choose(rewriter, recipe, attention):
    """Return the measures that "auto" takes, and why."""
    ranges, held = _halves(rewriter.inputs)
    targets = outputs(rewriter.original, held, rewriter.forward)
    trial = _rounded(rewriter.original, ranges, recipe, attention, rewriter.forward)
    before = _outliers(measure(trial, first(held, DIAGNOSED), rewriter.forward))
    found = {"broken": before, "why": "no layer breaks of outlier channels"}
    if not before:
        return (), found
    errors = {"none": output_error(trial, targets, held, rewriter.forward)}
    for names in CANDIDATES:
        with kept(rewriter.model):
            if any(rewriter.rewrite(names)[0].values()):
                trial = _rounded(rewriter.model, ranges, recipe, attention, rewriter.forward)
                errors["+".join(names)] = output_error(trial, targets, held, rewriter.forward)
    found["errors"] = errors
    best = next(name for name, error in errors.items() if error <= CLOSE * min(errors.values()))
    if not errors[best] < GAIN * errors["none"]:
        found["why"] = "layers break, and no measure lowers the error of the output by a tenth"
        return (), found
    names = tuple(best.split("+"))
    with kept(rewriter.model):
        rewriter.rewrite(names)
        trial = _rounded(rewriter.model, ranges, recipe, attention, rewriter.forward)
        found["after"] = _outliers(measure(trial, first(held, DIAGNOSED), rewriter.forward))
    found["why"] = "layers break, and this leaves the least error of the output"
    return names, found


def _outliers(diagnosis):
    """Pick the layers that break and have channels far wider than the others: those that a measure can mend."""
    wide = {name for name, row in diagnosis["layers"].items() if row["ratio"] and row["ratio"] >= WIDE}
    return {name: reason for name, reason in diagnosis["broken"].items() if name in wide}


def _rounded(model, ranges, recipe, attention, forward):
    """Round a copy of the model to nearest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `prepare` says again what stays in float, when it is called in earnest
        trial = prepare(model, recipe, attention=attention).eval()
    calibrate(trial, ranges, forward=forward)
    return trial


def _halves(inputs):
    """Split images into those that set ranges and those that errors are measured on."""
    total = sum(count(entry) for entry in inputs)
    if total < 2:
        return inputs, inputs
    ranges = first(inputs, min(IMAGES, total // 2))
    skip, held = sum(count(entry) for entry in ranges), []
    for entry in inputs:
        rest = take(entry, slice(min(skip, count(entry)), None))
        skip -= count(entry) - count(rest)
        if count(rest):
            held.append(rest)
    return ranges, first(held, IMAGES)


def _names(measures):
    names = (measures,) if isinstance(measures, str) else tuple(measures)
    known = [*MEASURES, *(["auto", "off"] if isinstance(measures, str) else [])]
    for name in names:
        if name not in known:
            raise ValueError(f"protect: measures must be of {', '.join([*MEASURES, 'auto', 'off'])}, got {name!r}")
    return () if measures in ("auto", "off") else names
