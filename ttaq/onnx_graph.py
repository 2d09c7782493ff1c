"""Changes of an exported graph: 4-bit integers get their type, and BatchNorm moves into the weight before it.

    gain = gamma / sqrt(var + eps);  scale <- scale |gain|;  bias <- bias gain + beta - mean gain

Where the gain is negative the codes of a channel are mirrored, ``code <- high - code``, ``zero <- high - zero``, so
that scales stay positive; nothing is rounded but scale and bias.
"""

import numpy as np

from .onnx_layers import COARSE, NARROW

_HIGH = {"UINT8": 255, "UINT4": 15}
_LOW = {"INT8": -128, "INT4": -8}


def narrow(model) -> None:
    """Give integers the 4-bit type that the name of their initialiser ends with, and the values that come of them."""
    import onnx_ir as ir

    for name, value in list(model.graph.initializers.items()):
        kind = name.rpartition("_")[2]
        if kind in NARROW and any(node.op_type.endswith("quantizeLinear") for node in _readers(value)):
            _store(model, value, value.const_value.numpy(), ir.DataType[kind.upper()])
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = node.inputs[2].dtype


def name_batch(model) -> None:
    """Call the free first axis of inputs and outputs "batch", wherever the graph speaks of it."""
    import onnx_ir as ir

    free = {str(value.shape[0].value) for value in model.graph.inputs if isinstance(value.shape[0], ir.SymbolicDim)}
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and str(size.value) in free:
                value.shape[axis] = ir.SymbolicDim("batch")


def fold(model, centred: bool) -> tuple[int, dict[str, str]]:
    """Fold each BatchNorm that follows a convolution of stored integers and nothing else reads.

    Args:
        model: An onnx_ir.Model; changed in place.
        centred: Whether zeros must stay 0.

    Returns:
        How many were folded, and why the others were not, by the name of their weight.
    """
    count, kept = 0, {}
    for node in [node for node in model.graph if node.op_type == "BatchNormalization"]:
        reason = _refuses(node, centred)
        if reason is None:
            _fold(model, node)
            count += 1
        else:
            kept[node.inputs[1].name.removesuffix(".weight")] = reason
    return count, kept


def _refuses(norm, centred):
    """Say why a BatchNorm stays, or None."""
    before = norm.inputs[0].producer()
    stored = before.inputs[1].producer() if before is not None and before.op_type == "Conv" else None
    if stored is None or stored.op_type != "DequantizeLinear":
        return "no convolution of stored integers comes before it"
    if any(len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output() for node in (before, stored)):
        return "something else reads the convolution before it, or its weight"
    held = [*norm.inputs[1:], *before.inputs[2:3], *stored.inputs]
    if any(value is not None and value.const_value is None for value in held):
        return "its values are computed"
    codes, _, zero = _arrays(stored.inputs)
    kind = stored.inputs[0].dtype.name
    if kind in _LOW and (centred or not zero.any()):
        gain, _ = _affine(norm)
        if (codes[gain < 0] == _LOW[kind]).any():
            return "its gain is negative and the lowest code has no counterpart"
    return None


def _fold(model, norm):
    """Move a BatchNorm into the convolution before it."""
    import onnx_ir as ir

    conv = norm.inputs[0].producer()
    stored = conv.inputs[1].producer()
    gain, shift = _affine(norm)
    codes, scale, zero = _arrays(stored.inputs)
    kind, column = stored.inputs[0].dtype, (-1,) + (1,) * (codes.ndim - 1)
    high = _HIGH.get(kind.name, 0)
    flips, gone = gain < 0, gain == 0
    codes = np.where(flips.reshape(column), high - codes, codes)
    zero = np.where(flips, high - zero, zero)
    codes = np.where(gone.reshape(column), zero.reshape(column), codes)  # and the scale stays, which is positive
    scale = np.where(gone, scale, scale * np.abs(gain)).astype(np.float32)
    held = conv.inputs[2].const_value.numpy() if len(conv.inputs) > 2 and conv.inputs[2] is not None else 0.0
    bias = (held * gain + shift).astype(np.float32)
    name = norm.inputs[0].name + ("." + COARSE if COARSE in stored.inputs[0].name else ".")
    made = ("codes", codes, kind), ("scale", scale, None), ("zero", zero, kind)
    for place, (part, array, dtype) in enumerate(made):
        stored.replace_input_with(place, _new(model, f"{name}{part}", array, dtype))
    value = _new(model, f"{name}bias", bias, None)
    conv.resize_inputs(3)
    conv.replace_input_with(2, value)
    ir.convenience.replace_all_uses_with(norm.outputs[0], conv.outputs[0], replace_graph_outputs=True)
    model.graph.remove(norm, safe=True)


def _affine(norm):
    """Return (gain, shift) of a BatchNorm, float64."""
    gamma, beta, mean, var = (value.const_value.numpy().astype(np.float64) for value in norm.inputs[1:5])
    gain = gamma / np.sqrt(var + norm.attributes["epsilon"].as_float())
    return gain, beta - mean * gain


def _arrays(inputs):
    """Return (codes, scale, zero) as int64, float64 and int64."""
    codes, scale, zero = (value.const_value.numpy() for value in inputs)
    return codes.astype(np.int64), scale.astype(np.float64), zero.astype(np.int64)


def _readers(value):
    return [use.node for use in value.uses()]


def _new(model, name, array, dtype):
    """Add an initialiser."""
    import onnx_ir as ir

    value = ir.Value(name=name)
    _store(model, value, array, dtype or ir.DataType.FLOAT)
    model.graph.register_initializer(value)
    return value


def _store(model, value, array, dtype):
    """Put an array into an initialiser, in a type that numpy may lack."""
    import onnx_ir as ir

    array = np.asarray(array).astype(dtype.numpy())
    value.const_value = ir.Tensor(array, dtype=dtype, name=value.name)
    value.dtype, value.shape = dtype, ir.Shape(array.shape)


def part_biases(model) -> None:
    """Take the bias out of each convolution of coarse codes, as a Sub of its negative behind it.

    onnxruntime rounds a bias within to whole products of the two scales, which costs much accuracy at 4 bits; it does
    not put a Sub back.
    """
    import onnx_ir as ir

    for conv in [node for node in model.graph if node.op_type == "Conv" and len(node.inputs) > 2]:
        stored, bias = conv.inputs[1].producer(), conv.inputs[2]
        if stored is None or COARSE not in stored.inputs[0].name or bias is None or bias.const_value is None:
            continue
        values, out = bias.const_value.numpy(), conv.outputs[0]
        conv.resize_inputs(2)
        if not values.any():
            continue
        negated = _new(model, f"{out.name}.negated_bias", -values.reshape(-1, 1, 1), None)
        apart = ir.node("Sub", [out, negated])
        apart.outputs[0].dtype, apart.outputs[0].shape = out.dtype, out.shape
        ir.convenience.replace_all_uses_with(out, apart.outputs[0], replace_graph_outputs=True)
        apart.replace_input_with(0, out)
        model.graph.insert_after(conv, apart)


def open_clips(model) -> None:
    """Write Clip before a QuantizeLinear to 4 bits as Max and Min: onnxruntime 1.32 takes none there but to 8 bits."""
    import onnx_ir as ir

    for clip in [node for node in model.graph if node.op_type == "Clip"]:
        readers = [use for use in _readers(clip.outputs[0]) if use.op_type == "QuantizeLinear"]
        if not any(reader.inputs[2].dtype.name in ("INT4", "UINT4") for reader in readers):
            continue
        value, bounds = clip.inputs[0], (*clip.inputs[1:], None, None)
        for kind, bound in (("Max", bounds[0]), ("Min", bounds[1])):
            if bound is not None:
                made = ir.node(kind, [value, bound])
                made.outputs[0].dtype, made.outputs[0].shape = clip.outputs[0].dtype, clip.outputs[0].shape
                model.graph.insert_before(clip, made)
                value = made.outputs[0]
        ir.convenience.replace_all_uses_with(clip.outputs[0], value, replace_graph_outputs=True)
        model.graph.remove(clip, safe=True)


def forget(model) -> None:
    """Drop what the exporter notes of the places in the code, which is more than the weights of a small model."""
    for thing in (model, model.graph, *model.graph):
        thing.metadata_props.clear()
        thing.doc_string = None
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
