"""pack: turn quantised layers into integer codes and low-bit kernels."""

from torch import nn

from .files import fingerprint
from .layers import QuantConv2d, QuantLinear
from .norms import forget_float
from .packed_layers import PackedConv2d, PackedLinear
from .surgery import copy_model, replace


def pack(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace QuantLinear and QuantConv2d by packed layers that give the same bits in eval mode.

    Normalisation layers stay ordinary modules, never folded into the codes. Layers whose weight stays in float, and
    QuantMatMul, which has no weight, stay as they are.

    Args:
        model: A calibrated or reconstructed model; left as it is unless `inplace`.
        inplace: Change `model` itself.

    Returns:
        The packed model, in eval mode; `model.ttaq_report["packed"]` lists the layers and their bytes.

    Raises:
        ValueError: Nothing to pack, a layer without ranges, or weights of 5 to 7 bits; the layer is named.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantConv2d)) and m.weight_quantizer}
    if not found:
        raise ValueError("pack: the model has no layer with quantised weights; call ttaq.quantize first")
    if "" in found:
        raise ValueError("pack: the model is one layer by itself; use PackedLinear.from_quantized or PackedConv2d's")
    packed = {}
    for name, layer in found.items():
        twin = PackedLinear if isinstance(layer, QuantLinear) else PackedConv2d
        try:
            packed[name] = twin.from_quantized(layer)
        except ValueError as error:
            raise ValueError(f"pack: layer {name}: {error}") from error
    architecture = fingerprint(model)
    weights = {id(layer.weight) for layer in found.values()}
    model = model if inplace else copy_model(model, lambda name, tensor: id(tensor) in weights)
    for name, layer in packed.items():
        replace(model, name, layer)
    forget_float(model)
    report = model.ttaq_report = dict(getattr(model, "ttaq_report", {}))
    report.setdefault("fingerprint", architecture)
    report["packed"] = {name: layer.words.numel() for name, layer in packed.items()}
    return model.eval()
