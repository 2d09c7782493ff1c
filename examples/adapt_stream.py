"""Adapt a packed network to a stream that changes: three methods side by side, the guard, and what drifted.

    python examples/adapt_stream.py --out adapting

Trains a small ResNet on scikit-learn's digits, quantises and packs it, and lets corruptions come again and again. Writes
errors.png, drift.png and history.jsonl. Needs scikit-learn and matplotlib (ttaq[demo]).
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
parser.add_argument("--epochs", type=int, default=8, help="of training the float network")
parser.add_argument("--steps", type=int, default=60, help="of reconstruction")
parser.add_argument("--images", type=int, default=100, help="of each corruption, in each visit")
parser.add_argument("--visits", type=int, default=3, help="how often the corruptions come")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

torch.manual_seed(0)
model = ResNet(depth=8, width=8)
train_model(model, load_digits("train"), Training(epochs=options.epochs))
calibration = [x for x, _ in load_digits("calibration").batches(64)]
packed = ttaq.pack(ttaq.quantize(model, calibration, options.bits, steps=options.steps, progress=False))

corruptions = ("gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate")
stream = ttaq.recurring(
    load_digits("test"), corruptions=corruptions, visits=options.visits, images=options.images, batch_size=50,
    concentration=None,
)  # fmt: skip
adapters = {
    "as it is": ttaq.adapt(packed, "source"),
    "batch statistics": ttaq.adapt(packed, "norm"),
    "Tent": ttaq.adapt(packed, "tent", lr=3e-3, telemetry=2, reference=calibration),
}
results = {name: ttaq.evaluate(adapter, stream) for name, adapter in adapters.items()}
print(f"{options.bits} on {len(corruptions)} corruptions, {options.visits} visits, batches of 50: error %")
for name, result in results.items():
    visits = ", ".join(f"{error:.1f}" for error in result.visit_errors.values())
    print(f"  {name:<18}{result.mean_error:5.1f}   by visit: {visits}")

singles = ttaq.continual(load_digits("test"), corruptions=corruptions[:2], images=options.images, batch_size=1)
print("single images, Tent: error %")
for guard in (True, False):
    adapter = ttaq.adapt(packed, "tent", guard=guard)
    print(f"  guard {'on' if guard else 'off':<12}{ttaq.evaluate(adapter, singles).mean_error:5.1f}")

figure = Figure(figsize=(9, 3.6), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
for place, (name, result) in enumerate(results.items()):
    left.plot([visit + 1 for visit in result.visit_errors], list(result.visit_errors.values()), marker="o", label=name)
    right.bar([k + 0.27 * (place - 1) for k in range(len(corruptions))], list(result.errors.values()), 0.25)
left.set(xlabel="visit", ylabel="error, %", ylim=(0, None), xticks=range(1, options.visits + 1))
right.set_xticks(range(len(corruptions)), [name.replace("_", "\n") for name in corruptions])
left.legend(frameon=False)
figure.savefig(options.out / "errors.png", dpi=110)
(options.out / "drift.png").write_bytes(draw_drift(adapters["Tent"].history))
write_history(adapters["Tent"].history, options.out / "history.jsonl")
print(f"wrote errors.png, drift.png and history.jsonl into {options.out}")
