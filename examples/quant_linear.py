"""Quantised layers in a network of one's own: calibrate, train a little, pack, and compare bits and bytes.

    python examples/quant_linear.py --recipe w2a4 --epochs 3

QuantConv2d and QuantLinear take the arguments and the state_dict of torch's layers. Needs scikit-learn (ttaq[demo]).
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import ttaq


class Net(nn.Module):
    """Two convolutions and two linear layers, of whichever classes it is given."""

    def __init__(self, conv=nn.Conv2d, linear=nn.Linear):
        super().__init__()
        self.conv1, self.conv2 = conv(1, 16, 3, padding=1), conv(16, 32, 3, stride=2, padding=1)
        self.fc1, self.fc2 = linear(512, 64), linear(64, 10)

    def forward(self, x):
        """Map (B, 1, 8, 8) to logits (B, 10)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


def train(model, x, y, epochs, lr):
    """Train in place; the scales of quantised layers are parameters and learn along."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for picked in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[picked]), y[picked]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def error(model, x, y):
    """Return the share of wrong predictions in percent."""
    return 100 * (model.eval()(x).argmax(1) != y).float().mean().item()


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--recipe", default="w2a4", help="bits of weights and activations")
parser.add_argument("--epochs", type=int, default=3, help="of training with quantised layers; 0 for none")
parser.add_argument("--out", type=Path, default=Path("quant-linear.safetensors"), help="where the packed network goes")
options = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
seen, held = (images[:1300], labels[:1300]), (images[1300:], labels[1300:])

model = train(Net(), *seen, epochs=15, lr=2e-3)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(f"{'float':<28}{error(model, *held):5.1f} % error  {weights:>9,} bytes of weights")

layers = partial(ttaq.QuantConv2d, recipe=options.recipe), partial(ttaq.QuantLinear, recipe=options.recipe)
quantised = Net(*layers)
quantised.load_state_dict(model.state_dict())
ttaq.calibrate(quantised, seen[0].split(128))  # without it, each layer would take its range from its first input
print(f"{options.recipe + ', calibrated':<28}{error(quantised, *held):5.1f} % error")
train(quantised, *seen, epochs=options.epochs, lr=5e-4)
print(f"{f'{options.recipe}, {options.epochs} epochs trained':<28}{error(quantised, *held):5.1f} % error")

packed = ttaq.pack(quantised)
ttaq.save(packed, options.out)
weights, same = sum(packed.ttaq_report["packed"].values()), torch.equal(packed(held[0]), quantised(held[0]))
print(f"{'packed':<28}{error(packed, *held):5.1f} % error  {weights:>9,} bytes of codes, logits the same: {same}")
print(f"wrote {options.out}, {options.out.stat().st_size:,} bytes with scales, biases and header")
