"""prepare: put quantised layers in the place of float ones; the model computes as before until it is calibrated."""

import warnings
from collections.abc import Iterator
from dataclasses import replace as replace_spec

from torch import nn

from .attention import FusedAttention, attention_in, open_attention, reads_past, reads_weights
from .files import fingerprint
from .layers import MatMul, QuantConv2d, QuantLinear, QuantMatMul
from .quantizers import Quantizer
from .spec import Recipe
from .surgery import copy_model, replace

_UNSERVED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.RNNBase)
_POSITIONS = "cpb_mlp"  # Swin V2: computes the bias of positions, from constants
_EXCLUDED = "kept in float by the recipe"


def prepare(
    model: nn.Module, recipe: str | Recipe = "w4a4", *, attention: bool = True, strict: bool = False,
    inplace: bool = False,
) -> nn.Module:  # fmt: skip
    """Replace every nn.Linear, nn.Conv2d and ttaq.MatMul by its quantised twin.

    Attention of torch, torchvision, timm and transformers, and any module that calls torch's fused attention once, is
    opened first: its two products become `MatMul`s called `scores` and `mix`. The quantised layers keep the float
    parameters and behave as the float layers until `calibrate`, opened attention but for rounding. Normalisation layers
    stay as they are. The first and the last layer, in the order of registration, follow the recipe's policy.

    Args:
        model: Any model; left as it is unless `inplace`.
        recipe: "w4a4" and the like, or a Recipe.
        attention: Open attention; False leaves what is not written with ttaq.MatMul in float, without a warning.
        strict: Refuse a model of which anything with a weight, or the products of attention, would stay in float
            for another reason than the recipe.
        inplace: Change `model` itself.

    Returns:
        The prepared model; `model.ttaq_report` lists the layers with their bits, and what was left out and why.

    Raises:
        ValueError: The model has nothing to quantise, or is already prepared, or `strict` finds something left out.
    """
    recipe = Recipe.parse(recipe)
    if any(isinstance(m, Quantizer) for m in model.modules()):
        raise ValueError("prepare: the model holds quantised layers already; start from the float model")
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise ValueError("prepare: the model has lazy layers without weights; run it on a batch first")
    opened, closed = _open(model, attention)
    chosen, left_out = _choose(model, opened, closed)
    if not chosen:
        raise ValueError(_nothing_to_quantise(model, left_out))
    odd = {name: reason for name, reason in left_out.items() if any(recipe.specs(name))}
    _speak(odd, closed if attention else {}, strict)
    weighted = [name for name, module in chosen.items() if not isinstance(module, MatMul)]
    edges = {weighted[0], weighted[-1]} if weighted else set()
    report = {"recipe": recipe.to_json(), "fingerprint": fingerprint(model), "layers": {}, "left_out": left_out}
    if "safety" in getattr(model, "ttaq_report", {}):
        report["safety"] = model.ttaq_report["safety"]
    if not inplace:
        model = copy_model(model)
        opened = {name: open_attention(model.get_submodule(name)) for name in opened}
    there, twins = dict(_walk(model, opened)), {}
    for name in chosen:
        specs = recipe.specs(name, edge=name in edges)
        twin = _twin(name, there[name], *specs)
        if twin is None:
            left_out[name] = _EXCLUDED
            continue
        twins[name] = twin
        weight_bits, activation_bits = (spec.bits if spec else None for spec in specs)
        kind = type(chosen[name]).__name__
        report["layers"][name] = {"kind": kind, "weight_bits": weight_bits, "activation_bits": activation_bits}
    if not twins:
        raise ValueError("prepare: the recipe keeps every layer in float; loosen its exclude patterns or its widths")
    for name, module in opened.items():
        if _needed(name, module, twins):
            replace(model, name, module)
    for name, twin in twins.items():
        replace(model, name, twin)
    model.ttaq_report = report
    return model


def _open(model, attention):
    """Return the opened twins of attention by name, and what stays closed by name with the reason."""
    openable, closed = attention_in(model)
    if attention:
        return {name: open_attention(model.get_submodule(name)) for name in openable}, closed
    return {}, closed | dict.fromkeys(openable, "its attention stays in float, as was asked")


def _walk(model, opened) -> Iterator[tuple[str, nn.Module]]:
    """Name all modules as they will be once attention is opened."""
    inside = ()
    for name, module in model.named_modules():
        if name in opened:
            yield from opened[name].named_modules(prefix=name)
            inside = (*inside, name + ".")
        elif not name.startswith(inside):
            yield name, module


def _choose(model, opened, closed):
    """Find the layers to quantise, and say of every other layer with a weight matrix why it is left out."""
    chosen, left_out, sealed = {}, {}, ()
    past = {f"{name}.{part}" for name in closed for part in reads_past(model.get_submodule(name))}
    for name, module in _walk(model, opened):
        if name.startswith(sealed):
            continue
        if name in closed:
            left_out[name] = closed[name]
        if reads_weights(module):
            sealed = (*sealed, name and name + ".")
        elif not name:
            continue
        elif isinstance(module, MatMul):
            chosen[name] = module
        elif name in past:
            left_out[name] = "its weight is read past it"
        elif _POSITIONS in name.split("."):
            left_out[name] = "it computes the bias of positions from constants"
            sealed = (*sealed, name + ".")
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            plain = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
            if type(module).forward is not plain.forward or "forward" in vars(module):
                left_out[name] = f"{type(module).__name__} has a forward of its own"
            elif hasattr(module, "parametrizations") or "weight" not in module._parameters:
                left_out[name] = "its weight is parametrised; remove the parametrisation first"
            else:
                chosen[name] = module
        elif isinstance(module, _UNSERVED):
            left_out[name] = f"{type(module).__name__} is not served"
    return chosen, left_out


def _speak(left_out, closed, strict):
    """Warn of attention that stays in float; under `strict` refuse whatever does."""
    said = list(left_out if strict else [name for name in left_out if name in closed])
    if said:
        more = f" and {len(said) - 1} more" if len(said) > 1 else ""
        text = f"{said[0] or 'the model'}{more}: {left_out[said[0]]}; exclude it in the recipe to accept that"
        if strict:
            raise ValueError(f"prepare: strict leaves nothing in float, got {text}")
        warnings.warn(f"prepare: {text}", stacklevel=3)


def _needed(name, module, twins):
    """Tell whether anything is quantised that is there only once attention is opened."""
    if isinstance(module, FusedAttention):
        name += ".attend"
    return any(twin.startswith(name + ".") for twin in twins)


def _nothing_to_quantise(model, left_out):
    kind = type(model).__name__
    if isinstance(model, (nn.Linear, nn.Conv2d, MatMul)):
        return f"prepare: the model is one {kind} by itself; use its twin Quant{kind}, or put it into a nn.Sequential"
    reasons = "".join(f"; {name or kind}: {reason}" for name, reason in list(left_out.items())[:3])
    return (
        f"prepare: {kind} has no nn.Linear or nn.Conv2d that can be quantised{reasons}; "
        "write its layers with these classes or leave it in float"
    )


def _twin(name, module, weight, activation):
    """Build the quantised twin of a layer, or give None where the recipe keeps it in float."""
    if isinstance(module, MatMul):
        spec = activation and replace_spec(activation, granularity="tensor")
        return activation and QuantMatMul(spec, auto=False)
    if weight is None and activation is None:
        return None
    if isinstance(module, nn.Conv2d):
        weight = weight and replace_spec(weight, granularity="channel", group=0)
        activation = activation and replace_spec(activation, granularity="tensor")
    twin = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
    try:
        return twin.from_float(module, (weight, activation), auto=False)
    except ValueError as error:
        raise ValueError(f"prepare: layer {name}: {error}") from error
