"""Adapt a packed network to a stream that changes: three methods side by side, the guard, and what drifted.

    python examples/adapt_stream.py --out adapting

Trains a small ResNet on scikit-learn's digits, quantises and packs it, and lets corruptions come again and again.
Writes errors.png, drift.png and history.jsonl. Needs scikit-learn and matplotlib (ttaq[demo]).
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import ttaq
from ttaq.adaptation import write_history
from ttaq.models import ResNet
from ttaq.report import draw_drift
from ttaq.streams import load_digits
from ttaq.training import Training, train_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("adapting"), help="folder of the pictures")
parser.add_argument("--bits", default="w4a4", help="of weights and activations")
parser.add_argument("--epochs", type=int, default=12, help="of training the float network")
parser.add_argument("--steps", type=int, default=60, help="of reconstruction")
parser.add_argument("--images", type=int, default=150, help="of each corruption, in each visit; at most 500")
parser.add_argument("--visits", type=int, default=2, help="how often the corruptions come")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

torch.manual_seed(0)
model = ResNet(depth=8, width=8)
train_model(model, load_digits("train"), Training(epochs=options.epochs))
calibration = [x for x, _ in load_digits("calibration").batches(64)]
packed = ttaq.pack(ttaq.quantize(model, calibration, options.bits, steps=options.steps, progress=False))


def walk(adapter, stream):
    """Return the error of each batch in percent; the labels serve nothing else."""
    return [100 * (adapter(batch.images).argmax(1) != batch.labels).float().mean().item() for batch in stream]


def tell(name, errors):
    """Print the mean error of a walk."""
    print(f"  {name:<22}{sum(errors) / len(errors):5.1f} % error")


names, digits = ("gaussian_noise", "impulse_noise", "glass_blur", "fog", "contrast"), load_digits("test")
order = {"corruptions": names, "visits": options.visits, "images": options.images, "concentration": None}
stream = list(ttaq.recurring(digits, batch_size=50, **order))
print(f"{options.bits}, {len(names)} corruptions {options.visits} times, {len(stream)} batches of 50:")
tent = ttaq.adapt(packed, "tent", lr=1e-2, telemetry=2, reference=calibration)
adapters = {"as it is": ttaq.adapt(packed, "source"), "batch statistics": ttaq.adapt(packed, "norm"), "Tent": tent}
errors = {name: walk(adapter, stream) for name, adapter in adapters.items()}
for name, found in errors.items():
    tell(name, found)

singles = list(ttaq.continual(digits, corruptions=names[-2:], images=options.images, batch_size=1))
print(f"the last two corruptions, {len(singles)} single images:")
tell("as it is", walk(packed, singles))
for guard in (True, False):
    tell(f"Tent, guard {'on' if guard else 'off'}", walk(ttaq.adapt(packed, "tent", guard=guard), singles))

figure = Figure(figsize=(9, 3.6), layout="constrained")
axes = figure.subplots()
for name, found in errors.items():
    axes.plot(range(1, len(found) + 1), found, marker="o", markersize=3, label=name)
for number, batch in enumerate(stream, 1):
    if batch.first:
        axes.axvline(number - 0.5, color="#bbbbbb", linewidth=0.8)
        axes.text(number - 0.3, 101, batch.domain.replace("_", " "), fontsize=7)
axes.set(xlabel="batch", ylabel="error, %", xlim=(0.5, len(stream) + 0.5), ylim=(0, 100))
figure.legend(frameon=False, loc="outside lower right", ncols=3)
figure.savefig(options.out / "errors.png", dpi=110)
(options.out / "drift.png").write_bytes(draw_drift(tent.history))
write_history(tent.history, options.out / "history.jsonl")
print(f"wrote errors.png, drift.png and history.jsonl into {options.out}")
