"""prepare: put quantised layers in the place of float ones; the model computes as before until it is calibrated."""

from dataclasses import replace as replace_spec

from torch import nn

from .files import fingerprint
from .layers import MatMul, QuantConv2d, QuantLinear, QuantMatMul
from .quantizers import Quantizer
from .spec import QuantSpec, Recipe
from .surgery import copy_model, replace

_UNSERVED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.RNNBase)
_READS_WEIGHTS = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")


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
    chosen, left_out = _choose(model)
    if not chosen:
        raise ValueError(
            f"prepare: {type(model).__name__} has no nn.Linear or nn.Conv2d to quantise; "
            "wrap its layers in these classes or leave it in float"
        )
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
        if isinstance(module, nn.MultiheadAttention) or type(module).__name__ in _READS_WEIGHTS:
            left_out[name] = f"{type(module).__name__} reads its weights past its layers, so these cannot be swapped"
            closed.append(name + ".")
        elif name.startswith(tuple(closed)) or not name:
            continue
        elif isinstance(module, MatMul):
            chosen[name] = module
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            plain = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
            if type(module).forward is not plain.forward:
                left_out[name] = f"{type(module).__name__} has a forward of its own"
            elif hasattr(module, "parametrizations"):
                left_out[name] = "its weight is parametrised; remove the parametrisation first"
            else:
                chosen[name] = module
        elif hasattr(module, "fused_attn"):
            left_out[name] = "its products of attention stay in float; its linear layers are quantised"
        elif isinstance(module, _UNSERVED):
            left_out[name] = f"{type(module).__name__} is not served"
    return chosen, left_out


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
