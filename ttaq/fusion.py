"""fuse: a packed model for inference alone, in which layers hand over codes instead of floats where the graph allows.

What follows a packed layer moves into the pass that multiplies: a frozen BatchNorm, a residual, an activation, and,
where all that reads the result are packed layers on one and the same grid, the quantiser of these. Between such layers
a value takes one byte, and is written and read once.
"""

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from .attention import Attend
from .layers import QuantConv2d, QuantLinear, QuantMatMul, activation_grid, pads_apart
from .norms import FrozenBatchNorm, freeze
from .packed_layers import PackedConv2d, PackedLinear
from .quantizers import ActivationQuantizer
from .surgery import copy_model
from .windows import SplitWindows

_PACKED = (PackedLinear, PackedConv2d)
_WHOLE = (*_PACKED, QuantLinear, QuantConv2d, QuantMatMul, FrozenBatchNorm, Attend, SplitWindows)  # as one call each
_IN_PLACE = {getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "setitem")}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATIONS = {
    **dict.fromkeys([nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"], "relu"),
    **dict.fromkeys([nn.ReLU6, F.relu6], "relu6"),
    **dict.fromkeys([nn.GELU, F.gelu], "gelu"),
}


def fuse(model: nn.Module, example: object) -> nn.Module:
    """Give the packed model another form for inference: norms frozen, and codes handed from layer to layer.

    The result equals that of the quantised model with frozen norms (`norms.freeze`) bit for bit on the CPU, except
    behind a GELU, which each backend computes in its own way; the model itself, whose BatchNorm rounds differently,
    it equals but for roundings that fall the other way. It cannot be adapted or saved: keep the packed model for that.

    Args:
        model: A packed model that torch.fx can trace; left as it is.
        example: An input of the model, a tensor or a tuple of its arguments; it tells the shapes, not the values.

    Returns:
        A torch.fx.GraphModule in eval mode; `ttaq_report["fused"]` says by layer what has moved into it.

    Raises:
        ValueError: Nothing is packed, or the model cannot be traced.
    """
    if not any(isinstance(module, _PACKED) for module in model.modules()):
        raise ValueError("fuse: the model holds no packed layer; call ttaq.pack on the quantised model first")
    report = dict(getattr(model, "ttaq_report", {}))
    fused = _traced(freeze(copy_model(model)).eval().requires_grad_(False))
    with torch.no_grad():
        ShapeProp(fused).propagate(*(example if isinstance(example, tuple) else (example,)))
    followed = dict(_follow(fused))
    _lay_out(fused)
    fused.recompile()
    fused.delete_all_unused_submodules()
    fused.ttaq_report = report | {"fused": followed}
    return fused


class Fused(nn.Module):
    """A packed layer and what follows it, in one pass.

    Args:
        layer: PackedLinear or PackedConv2d.
        norm: The frozen BatchNorm that follows, or None.
        after: "none", "relu", "relu6" or "gelu".
        reader: Quantiser of the layers that take the codes, or None to return floats.
        dtype: Of floats that come out.
    """

    def __init__(
        self, layer: nn.Module, norm: FrozenBatchNorm | None, after: str, reader: ActivationQuantizer | None,
        dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__()
        self.layer, self.norm, self.after, self.reader, self.dtype = layer, norm, after, reader, dtype

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map an input, or its codes, and what is added to it, to floats or codes."""
        follows = {f"y_{name[2:]}": value for name, value in activation_grid(self.reader, x).items()}
        if self.norm is not None:
            follows |= {"gain": self.norm.gain, "shift": self.norm.shift}
        return self.layer(x, residual=residual, after=self.after, dtype=self.dtype, **follows)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, _WHOLE) or super().is_leaf_module(module, name)


def _traced(model):
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # what code makes of proxies
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"fuse: torch.fx cannot trace {type(model).__name__} ({reason}); run the packed model as it is"
        ) from error
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
    for node in list(traced.graph.nodes):  # what does nothing in eval mode
        if isinstance(_module(traced, node), (nn.Identity, nn.Dropout)) and len(node.all_input_nodes) == 1:
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
    return traced


def _follow(model: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """Move what follows each packed layer into it; yield its name and what that was."""
    codes = set()  # nodes that give them
    for node in list(model.graph.nodes):
        layer = _module(model, node)
        if not isinstance(layer, _PACKED) or len(_calls(model, layer)) > 1 or len(node.args) != 1:
            continue
        chain, norm, residual, after, said = [node], None, None, "none", []
        if isinstance(_module(model, _next(model, chain)), FrozenBatchNorm):
            chain.append(_next(model, chain))
            norm, said = _module(model, chain[-1]), ["frozen BatchNorm"]
        if other := _added(chain[-1], _next(model, chain)):
            chain.append(_next(model, chain))
            residual, said = other, [*said, "residual"]
        if kind := _activation(model, _next(model, chain)):
            chain.append(_next(model, chain))
            after, said = kind, [*said, kind]
        reader = _common_quantizer(model, chain[-1])
        said += [f"{reader.spec.bits}-bit codes"] if reader is not None else []
        said = ["from codes", *said] if node.args[0] in codes else said
        if not said:
            continue
        fused = Fused(layer, norm, after, reader, node.meta["tensor_meta"].dtype)
        made = _replace(model, chain, fused, node.args if residual is None else (*node.args, residual))
        if reader is not None:
            codes.add(made)
        yield node.target, ", ".join(said)


def _replace(model, chain, module, args):
    """Put one call in the place of a chain of them, under the name of the first."""
    model.set_submodule(chain[0].target, module)
    with model.graph.inserting_before(chain[-1]):
        made = model.graph.call_module(chain[0].target, args)
    made.meta = chain[-1].meta
    chain[-1].replace_all_uses_with(made)
    for node in reversed(chain):
        model.graph.erase_node(node)
    return made


def _next(model, chain):
    """Return the one node that reads the end of a chain, or None; nothing between may write in place."""
    if len(chain[-1].users) != 1:
        return None
    reader, node = next(iter(chain[-1].users)), chain[0]
    while (node := node.next) is not reader:
        if node not in chain and _writes(model, node):
            return None
    return reader


def _writes(model, node):
    """Tell whether a node may change one of its inputs."""
    module = _module(model, node)
    if module is not None:
        return getattr(module, "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or node.target in _IN_PLACE or node.kwargs.get("inplace", False) or "out" in node.kwargs


def _module(model, node):
    """Return the module that a node calls, or None."""
    return model.get_submodule(node.target) if node is not None and node.op == "call_module" else None


def _calls(model, module):
    return [node for node in model.graph.nodes if _module(model, node) is module]


def _added(node, add):
    """Return what `add` adds to a node, of the same shape and dtype, or None."""
    if add is None or add.target not in _ADDS or add.kwargs or len(add.args) != 2:
        return None
    other = add.args[1] if add.args[0] is node else add.args[0]
    if not isinstance(other, fx.Node) or other is node:
        return None
    one, two = node.meta.get("tensor_meta"), other.meta.get("tensor_meta")
    return other if one and two and (one.shape, one.dtype) == (two.shape, two.dtype) else None


def _activation(model, node):
    """Name the activation that a node is, or None."""
    if node is None:
        return None
    module = _module(model, node)
    if module is None:
        return _ACTIVATIONS.get(node.target) if len(node.args) == 1 and _plain(node.kwargs) else None
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    return _ACTIVATIONS.get(type(module))


def _plain(keywords):
    return all(name == "inplace" or (name, value) == ("approximate", "none") for name, value in keywords.items())


def _common_quantizer(model, node) -> ActivationQuantizer | None:
    """Return the quantiser of the inputs of all that reads a node, where these are packed layers on one grid."""
    layers = [_module(model, user) for user in node.users]
    if not layers or not all(_takes_codes(layer) and len(_calls(model, layer)) == 1 for layer in layers):
        return None
    first, *others = (layer.input_quantizer for layer in layers)
    same = all(
        q.spec.bits == first.spec.bits and torch.equal(q.scale, first.scale) and torch.equal(q.zero, first.zero)
        for q in others
    )
    return first if same else None


def _takes_codes(layer):
    """Tell whether a layer may be given codes: it has one grid, and pads with zeros that the op itself adds."""
    if not isinstance(layer, _PACKED) or layer.input_quantizer is None:
        return False
    if layer.input_quantizer.spec.granularity != "tensor" or not layer.input_quantizer.ready:
        return False
    return isinstance(layer, PackedLinear) or not pads_apart(layer)


def _lay_out(model):
    """Bring images that a packed convolution reads into the order in which it reads them: channels last."""
    for node in list(model.graph.nodes):
        if node.op != "placeholder" or not any(
            isinstance(_convolution(model, user), PackedConv2d) for user in node.users
        ):
            continue
        readers = list(node.users)
        with model.graph.inserting_after(node):
            moved = model.graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
        for reader in readers:
            reader.replace_input_with(node, moved)


def _convolution(model, node):
    module = _module(model, node)
    return module.layer if isinstance(module, Fused) else module
