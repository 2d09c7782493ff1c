"""prepare: put quantised layers in the place of float ones; the model computes as before until it is calibrated."""

from dataclasses import replace as replace_spec

from torch import nn

from .files import fingerprint
from .layers import MatMul, QuantConv2d, QuantLinear, QuantMatMul
from .quantizers import Quantizer
from .spec import QuantSpec, Recipe
from .surgery import copy_model, replace

_UNSERVED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.RNNBase)
_READS_WEIGHTS = (
    "MultiheadAttention", "TransformerEncoderLayer", "ShiftedWindowAttention", "ShiftedWindowAttentionV2"
)  # fmt: skip


def prepare(model: nn.Module, recipe: str | Recipe = "w4a4", *, inplace: bool = False) -> nn.Module:
    """Replace every nn.Linear, nn.Conv2d and ttaq.MatMul by its quantised twin.

    The quantised layers keep the float parameters and behave as the float layers until `calibrate`. Normalisation
    layers stay as they are. The first and the last layer, in the order of registration, follow the recipe's policy.

    Args:
        model: Any model; left as it is unless `inplace`.
        recipe: "w4a4" and the like, or a Recipe.
        inplace: Change `model` itself.

    Returns:
        The prepared model; `model.ttaq_report` lists the layers with their bits, and what was left out and why.

    Raises:
        ValueError: The model has nothing to quantise, or is already prepared.
    """
    recipe = Recipe.parse(recipe)
    if any(isinstance(m, Quantizer) for m in model.modules()):
        raise ValueError("prepare: the model holds quantised layers already; start from the float model")
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise ValueError("prepare: the model has lazy layers without weights; run it on a batch first")
    chosen, left_out = _choose(model)
    if not chosen:
        raise ValueError(_nothing_to_quantise(model, left_out))
    weighted = [name for name, module in chosen.items() if not isinstance(module, MatMul)]
    edges = {weighted[0], weighted[-1]} if weighted else set()
    report = {"recipe": recipe.to_json(), "fingerprint": fingerprint(model), "layers": {}, "left_out": left_out}
    model = model if inplace else copy_model(model)
    twins = {}
    for name in chosen:
        specs = recipe.specs(name, edge=name in edges)
        twin = _twin(name, model.get_submodule(name), *specs)
        if twin is None:
            left_out[name] = "kept in float by the recipe"
            continue
        twins[name] = twin
        weight_bits, activation_bits = (spec.bits if spec else None for spec in specs)
        kind = type(chosen[name]).__name__
        report["layers"][name] = {"kind": kind, "weight_bits": weight_bits, "activation_bits": activation_bits}
    if not twins:
        raise ValueError("prepare: the recipe keeps every layer in float; loosen its exclude patterns or its widths")
    for name, twin in twins.items():
        replace(model, name, twin)
    model.ttaq_report = report
    return model


def _choose(model):
    """Find the layers to quantise, and say of every other layer with a weight matrix why it is left out."""
    chosen, left_out, closed = {}, {}, []
    for name, module in model.named_modules():
        if name.startswith(tuple(closed)):
            continue
        if any(kind.__name__ in _READS_WEIGHTS for kind in type(module).__mro__):
            left_out[name] = f"{type(module).__name__} reads its weights past its layers, so these cannot be swapped"
            closed.append(name and name + ".")
        elif not name:
            continue
        elif isinstance(module, MatMul):
            chosen[name] = module
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            plain = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
            if type(module).forward is not plain.forward or "forward" in vars(module):
                left_out[name] = f"{type(module).__name__} has a forward of its own"
            elif hasattr(module, "parametrizations") or "weight" not in module._parameters:
                left_out[name] = "its weight is parametrised; remove the parametrisation first"
            else:
                chosen[name] = module
        elif hasattr(module, "fused_attn"):
            left_out[name] = "its products of attention stay in float; its linear layers are quantised"
        elif isinstance(module, _UNSERVED):
            left_out[name] = f"{type(module).__name__} is not served"
    return chosen, left_out


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
        return activation and QuantMatMul(QuantSpec(activation.bits, observer=activation.observer), auto=False)
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
