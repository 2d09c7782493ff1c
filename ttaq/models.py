"""Two small networks, for the demo, the tests and the benchmarks: the CIFAR ResNet and a ViT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import MatMul


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: stride-2 subsampling, zero-padded channels."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6 n + 2 with option-A shortcuts. Source: He et al., arXiv:1512.03385, section 4.2.

    Args:
        depth: 8, 14, 20, ...
        classes: Width of the logits.
        width: Channels of the first stage; doubled twice.
    """

    def __init__(self, depth: int = 20, classes: int = 10, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        count = (depth - 2) // 6
        for stage, (inputs, outputs) in enumerate([(width, width), (width, 2 * width), (2 * width, 4 * width)], 1):
            blocks = [BasicBlock(inputs, outputs, 1 if stage == 1 else 2)]
            blocks += [BasicBlock(outputs, outputs, 1) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention written with modules only, so that all of it can be quantised."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.scores, self.mix = MatMul(), MatMul()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, width) to tokens."""
        b, t, width = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.scores(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1)
        return self.proj(self.mix(weights, v).transpose(1, 2).reshape(b, t, width))


class Layer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, width) to tokens."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A small vision transformer. Source: Dosovitskiy et al., arXiv:2010.11929; mean pooling instead of a class token.

    Args:
        size: Height and width of the images.
        patch: Height and width of a patch.
        width: Of the tokens.
        depth: Blocks.
        heads: Of the attention.
        classes: Width of the logits.
    """

    def __init__(
        self, size: int = 32, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 10
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.layers = nn.Sequential(*[Layer(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(x)).mean(1))
