"""Attention in shifted windows as modules: that of torchvision, versions 1 and 2, and that of timm's version 2."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import MatMul


class SplitWindows(nn.Module):
    """Compute what torchvision's ShiftedWindowAttention and its V2 do by modules: `qkv`, `scores`, `mix`, `proj`.

    Source: Liu et al., Swin Transformer, arXiv:2103.14030, section 3.2, and V2, arXiv:2111.09883, section 3.2: cosine
    attention with a learned scale of each head, and a bias that a small network computes; there keys have no bias.
    Parameters and buffers keep their names.

    Args:
        module: One of the two.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in vars(module).items()})
        self.cosine = hasattr(module, "logit_scale")
        self.scores, self.mix = MatMul(), MatMul()
        if self.cosine and self.qkv.bias is not None:
            self.qkv = _without_key_bias(self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same."""
        height, width = x.shape[1:3]
        (tall, wide), (down, right) = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % tall))
        padded = x.shape[1:3]
        down, right = down if tall < padded[0] else 0, right if wide < padded[1] else 0  # a window that holds all
        x = x.roll((-down, -right), (1, 2)) if down or right else x
        rows, columns = padded[0] // tall, padded[1] // wide
        windows = x.unflatten(2, (columns, wide)).unflatten(1, (rows, tall)).transpose(2, 3)
        mask = _mask(padded, (tall, wide), (down, right), x) if down or right else None
        y = self._attend(windows.flatten(3, 4).flatten(0, 2), mask)
        y = y.unflatten(1, (tall, wide)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
        y = y.flatten(3, 4).flatten(1, 2)
        y = y.roll((down, right), (1, 2)) if down or right else y
        return y[:, :height, :width].contiguous()

    def _attend(self, x, mask):
        """Map the tokens of all windows (B * windows, T, C) to tokens; `mask` is (windows, T, T) or None."""
        q, k, v = self._project(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.cosine:
            scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
            logits = self.scores(F.normalize(q, dim=-1), F.normalize(k, dim=-1).transpose(-2, -1)) * scale
        else:
            logits = self.scores(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
        logits = logits + self._bias()
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        weights = F.dropout(logits.softmax(-1), self.attention_dropout, self.training)
        y = self.proj(self.mix(weights, v).transpose(1, 2).flatten(2))
        return F.dropout(y, self.dropout, self.training)

    def _project(self, x):
        return self.qkv(x)

    def _bias(self):
        """Return the bias of relative positions, (1, heads, T, T)."""
        if self.cosine:
            table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        else:
            table = self.relative_position_bias_table
        tokens = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)[None]
        return 16 * bias.sigmoid() if self.cosine else bias


class SplitTokenWindows(SplitWindows):
    """Compute what WindowAttention of timm's Swin V2 does, whose block shifts and parts the windows, by modules.

    Args:
        module: Of that class.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.attention_dropout, self.dropout = module.attn_drop.p, module.proj_drop.p

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map the tokens of all windows (B * windows, T, C) to tokens; `mask` is (windows, T, T) or None."""
        return self._attend(x, mask)

    def _project(self, x):
        qkv = self.qkv(x)
        return qkv if self.q_bias is None else qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))


def _mask(size, window, shift, like):
    """Part the tokens of a window that a shift brought together from opposite sides, (windows, T, T)."""
    regions = []
    for length, side, moved in zip(size, window, shift, strict=True):
        place = torch.arange(length, device=like.device)
        regions.append((place >= length - side).int() + (place >= length - moved).int())
    ids = 3 * regions[0][:, None] + regions[1]
    ids = ids.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.where(ids[:, None] == ids[:, :, None], 0.0, -100.0).to(like.dtype)


def _without_key_bias(layer):
    """Give a layer of the same weight whose bias is 0 for keys."""
    width = layer.out_features // 3
    bias = layer.bias.detach().clone()
    bias[width : 2 * width] = 0
    twin = nn.Linear(layer.in_features, layer.out_features, device="meta")
    twin.weight, twin.bias = layer.weight, nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    return twin
