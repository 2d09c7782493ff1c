"""Open attention: both its products become `MatMul` modules, `scores` and `mix`, which can be quantised.

    output = softmax(Q K' / sqrt(d) + mask) V

Attention of torch, torchvision, timm and transformers computes this within one function. Opened, a module keeps its
place and computes the same up to rounding; one that calls torch's fused operator keeps its class, options and names,
too. `prepare` and `load` open the same modules, so that a checkpoint finds them again. `multihead` and `windows` hold
the forms that are written anew.
"""

import copy
import dis
import inspect
from functools import cache
from itertools import pairwise
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .layers import MatMul
from .multihead import SplitMultihead
from .quantizers import Quantizer
from .windows import SplitTokenWindows, SplitWindows

__all__ = ["OPENED", "Attend", "FusedAttention", "attention_in", "open_attention", "reads_past", "reads_weights"]

_FUSED, _INTERFACE = "scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"
_PRODUCTS = {
    "matmul", "bmm", "baddbmm", "einsum", "multi_head_attention_forward", "flex_attention", "flash_attn_func",
    "memory_efficient_attention",
}  # fmt: skip
_TORCHVISION = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
_TIMM_SWIN_V2 = ("timm.models.swin_transformer_v2", "WindowAttention")
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_FLOAT = "its products of attention stay in float"


class Attend(nn.Module):
    """Torch's fused attention as two products: `scores` of queries and keys, `mix` of probabilities and values."""

    def __init__(self):
        super().__init__()
        self.scores, self.mix = MatMul(), MatMul()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Compute what `F.scaled_dot_product_attention` does: (..., L, D), (..., S, D), (..., S, E) to (..., L, E)."""
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        logits = self.scores(query, key.transpose(-2, -1))
        if is_causal:
            attn_mask = torch.ones_like(logits, dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, torch.finfo(logits.dtype).min)
        elif attn_mask is not None:
            logits = logits + attn_mask
        weights = logits.softmax(-1)
        return self.mix(F.dropout(weights, dropout_p) if dropout_p else weights, value)

    @property
    def idle(self) -> bool:
        """Whether both products are in float and nobody looks at their operands."""
        parts = [part for product in (self.scores, self.mix) for part in (product, *product._modules.values())]
        return not any(part._forward_hooks or part._forward_pre_hooks or _active(part) for part in parts)


class _Composing(TorchFunctionMode):
    """Compute torch's fused attention by a module."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            func = self.attend
        return func(*args, **(kwargs or {}))


class FusedAttention(nn.Module):
    """Goes before the class of a module that calls torch's fused attention: its own forward runs, but for that call.

    That goes to the part `attend`; while this is idle the fused operator itself runs.
    """

    def forward(self, *args, **kwargs):
        """Map what the class maps."""
        if self.attend.idle:
            return super().forward(*args, **kwargs)
        with _Composing(self.attend):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _blank, (type(self).__mro__[2],), self.__dict__


def attention_in(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Find the attention of a model.

    Returns:
        The names of the modules that `open_attention` opens, and those of the others with the reason.
    """
    openable, closed, inside = [], {}, ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        build, reason = _way(module)
        if build is not None and not name:
            build, reason = None, f"{reads_weights(module) or _FLOAT}; put the model into a nn.Sequential"
        if build is not None:
            openable.append(name)
        elif reason:
            closed[name] = reason
        if build is not None or reads_weights(module):
            inside = (*inside, name and name + ".")
    return openable, closed


def reads_past(module: nn.Module) -> set[str]:
    """Name the linear layers of a module that cannot be opened whose weights it hands to a function."""
    words = _words(type(module))
    held = [one for one, other in pairwise(words) if other == "weight"]
    linear = "linear" in words
    return {name for name in held if linear and isinstance(module._modules.get(name), nn.Linear)}


def open_attention(module: nn.Module) -> nn.Module:
    """Build the opened twin of a module that `attention_in` lists; it shares parameters and parts with the module.

    Raises:
        ValueError: The module is no such attention.
    """
    build, reason = _way(module)
    if build is None:
        kind = type(module).__name__
        raise ValueError(f"attention: {kind} cannot be opened ({reason or 'it is none'}); build the model as it was")
    twin = build(module)
    held = set(module.modules())
    for part in twin.modules():
        if part not in held:
            part.training = module.training
    return twin


def _way(module):
    """Return (what opens the module, None), (None, why it stays as it is), or (None, None) where it is no attention."""
    kind = type(module)
    if reads := reads_weights(module):
        if isinstance(module, nn.MultiheadAttention):
            reason = SplitMultihead.refuses(module)
            return (None, f"{reads} ({reason})") if reason else (SplitMultihead, None)
        windows = kind.__name__ in _TORCHVISION and kind.__module__.startswith("torchvision.")
        return (SplitWindows, None) if windows else (None, reads)
    calls, own = _calls(kind)
    if (kind.__module__, kind.__name__) == _TIMM_SWIN_V2:
        return SplitTokenWindows, None
    if not calls:
        named = any(word in kind.__name__.lower() for word in ("attention", "attn"))
        shown = own and (named or "softmax" in _words(kind))
        return None, f"{_FLOAT}, for {kind.__name__} multiplies by itself; write it with ttaq.MatMul" if shown else None
    if calls > 1:
        return None, f"{_FLOAT}, for {kind.__name__} calls torch's fused attention in several places"
    if "forward" in vars(module) or hasattr(module, "attend"):
        return None, f"{_FLOAT}, for {kind.__name__} has a forward, or a part called attend, of its own"
    if any(part is not module and _calls(type(part))[0] for part in module.modules()):
        return None, f"{_FLOAT}, for {kind.__name__} holds other attention"
    return _split, None


def _split(module):
    """Put FusedAttention before the module's class."""
    twin = _blank(type(module))
    twin.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in vars(module).items()})
    twin.attend = Attend()
    for name in ("fused_attn", "qkv_bias_separate"):  # timm: both ways compute the same, these by modules
        if hasattr(module, name):
            setattr(twin, name, True)
    if _INTERFACE in _words(type(module)):  # transformers: the layer's own copy of the choice
        twin.config = copy.copy(module.config)
        twin.config._attn_implementation = "sdpa"
    return twin


OPENED = (FusedAttention, SplitMultihead, SplitWindows)


@cache
def _dressed(kind):
    return type(kind.__name__, (FusedAttention, kind), {"__module__": __name__, "__doc__": kind.__doc__})


def _blank(kind):
    """Make an empty module of FusedAttention and a class."""
    return (dressed := _dressed(kind)).__new__(dressed)


def _active(part):
    return isinstance(part, Quantizer) and part.active


def reads_weights(module: nn.Module) -> str | None:
    """Say of a module that hands its layers' weights to a function that it does so; of another one nothing."""
    names = [base.__name__ for base in type(module).__mro__]
    if not isinstance(module, _READS_WEIGHTS) and not any(name in _TORCHVISION for name in names):
        return None
    return f"{type(module).__name__} reads its weights past its layers, so these cannot be swapped"


@cache
def _calls(kind: type) -> tuple[int, bool]:
    """Count the places where a class calls torch's fused attention, and tell whether it multiplies by itself."""
    words = _words(kind)
    return words.count(_FUSED) + words.count(_INTERFACE), any(word in _PRODUCTS or word == "@" for word in words)


@cache
def _words(kind: type) -> tuple[str, ...]:
    """List the names that a class's forward and the methods it calls use, with an @ for each product."""
    found, seen, ahead = [], set(), ["forward"]
    while ahead:
        name = ahead.pop()
        if name not in seen and (name == "forward" or not hasattr(nn.Module, name)):
            words = _words_of(kind, name)
            found += words
            ahead += words
        seen.add(name)
    return tuple(filter(None, found))


def _words_of(kind, name):
    """List the names that one method uses, and those of the methods that it extends."""
    words = []
    for base in kind.__mro__:
        method = vars(base).get(name)
        if isinstance(method, FunctionType) and base is not nn.Module:
            words += [_word(step) for step in dis.get_instructions(inspect.unwrap(method))]
            if "super" not in words:
                break
    return words


def _word(step):
    if step.opname == "BINARY_OP":
        return "@" if "@" in step.argrepr else ""
    named = step.opname.startswith("LOAD_") and step.opname != "LOAD_CONST" and isinstance(step.argval, str)
    return step.argval if named else ""
