"""SplitMultihead: torch's multi-head attention as two linear layers and two products."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import MatMul


class SplitMultihead(nn.Module):
    """Compute what nn.MultiheadAttention does by modules: `in_proj`, `scores`, `mix`, `out_proj`.

    Its layers hold the parameters of the original, whose state_dict it also takes. Attention of one sequence to itself
    projects it once; other sequences are projected apart, each by the whole of `in_proj`.

    Args:
        module: With one width for queries, keys and values, and no extra key or value.
    """

    def __init__(self, module: nn.MultiheadAttention):
        super().__init__()
        for name in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first"):
            setattr(self, name, getattr(module, name))
        self.in_proj = _linear(module.in_proj_weight, module.in_proj_bias)
        self.out_proj = _linear(module.out_proj.weight, module.out_proj.bias)
        self.scores, self.mix = MatMul(), MatMul()
        self.train(module.training)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        """Say why a module cannot be split, or None."""
        if type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module):
            return "it has a forward of its own"
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            return "it has several widths, or extra keys and values"
        if "in_proj_weight" not in module._parameters or "weight" not in module.out_proj._parameters:
            return "its weights are parametrised; remove the parametrisation first"
        return None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Take and return what nn.MultiheadAttention does; `is_causal` is a hint, as there, and `attn_mask` counts."""
        turned = not self.batch_first and query.dim() == 3
        q, k, v = (self._heads(x, turned) for x in self._project(query, key, value))
        logits = self.scores(q * self.head_dim**-0.5, k.transpose(-2, -1))
        if attn_mask is not None:
            mask = _additive(attn_mask, logits.dtype)
            logits = logits + (mask.unflatten(0, (-1, self.num_heads)) if q.dim() == 4 and mask.dim() == 3 else mask)
        if key_padding_mask is not None:
            logits = logits + _additive(key_padding_mask, logits.dtype)[..., None, None, :]
        weights = F.dropout(logits.softmax(-1), self.dropout, self.training)
        y = self.out_proj(self.mix(weights, v).transpose(-3, -2).flatten(-2))
        y = y.transpose(0, 1) if turned else y
        if not need_weights:
            return y, None
        return y, weights.mean(-3) if average_attn_weights else weights

    def _project(self, query, key, value):
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        return [self.in_proj(x).chunk(3, -1)[i] for i, x in enumerate((query, key, value))]

    def _heads(self, x, turned):
        """Map (..., T, E), or (T, B, E), to (..., heads, T, D)."""
        x = x.transpose(0, 1) if turned else x
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("weight", "bias"):
            if f"{prefix}in_proj_{name}" in state_dict:
                state_dict[f"{prefix}in_proj.{name}"] = state_dict.pop(f"{prefix}in_proj_{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def _additive(mask, dtype):
    """Turn a mask that is True where a key is left out into what is added to the logits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, torch.finfo(dtype).min)
