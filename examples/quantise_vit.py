r"""Quantise a vision transformer of timm within a time, pack it, save it, and time it against the float one.

    python examples/quantise_vit.py      # random weights and images, 64 x 64: the road, not the accuracy
    python examples/quantise_vit.py --model vit_small_patch16_224 --weights vit.safetensors --images calibration/ \
        --count 1024 --budget 30min

Nothing is downloaded: weights are a local state_dict, images are class folders. Needs timm (ttaq[bench]).
"""

import argparse
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import ttaq
from ttaq.pipeline import decisions
from ttaq.sources import open_data, preprocessing_of
from ttaq.zoo import build_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="vit_tiny_patch16_224", help="a name of timm.list_models()")
parser.add_argument("--weights", type=Path, help=".safetensors or .pth of a state_dict; default: random")
parser.add_argument("--images", type=Path, help="class folders of calibration images; default: random ones")
parser.add_argument("--count", type=int, default=64, help="images to calibrate on; a thousand are better")
parser.add_argument("--size", type=int, help="side of the images; default: with weights the model's own")
parser.add_argument("--bits", default="w4a8", help="of weights and activations")
parser.add_argument("--budget", default="30s", help="time to quantise in, such as 90s, 5min or 1h")
parser.add_argument("--out", type=Path, default=Path("vit.safetensors"), help="where the packed model goes")
options = parser.parse_args()

torch.manual_seed(0)
side = options.size or (None if options.weights else 64)
reference, sized = f"timm:{options.model}", {"img_size": side} if side else {}
model = build_model(reference, options.weights, **sized)  # timm.create_model does as well
preparation = preprocessing_of(model, reference, size=side)
if options.images:
    source = open_data(options.images, preparation)
    chosen = torch.randperm(len(source))[: options.count + 16].numpy()
    images = torch.cat([x for x, _ in source.take(chosen).batches(32)])
else:
    images = torch.randn(options.count + 16, 3, preparation["size"], preparation["size"])
held, calibration = images[:16], images[16:]

quantised = ttaq.quantize(
    model, calibration.split(16), options.bits, budget=options.budget, safety="auto", progress=False
)
spent = quantised.ttaq_report["budget"]
short = "" if spent["enough"] else ", too few: every block took the fewest steps there are"
print(f"{options.model} at {options.bits}: quantised in {spent['taken']:.0f} of {spent['seconds']:.0f} s{short}")
for sentence in decisions(quantised.ttaq_report):
    print(f"  {sentence}")

ttaq.save(ttaq.pack(quantised), options.out, reference=reference, preprocessing=preparation)
with torch.device("meta"):  # no float weight is held from here on
    architecture = build_model(reference, **sized)
packed = ttaq.load(options.out, architecture)
forms = {"float32": model, "packed": packed}
try:
    forms["fused"] = ttaq.fuse(packed, held)  # for inference alone: codes handed from layer to layer
except ValueError as error:  # as with models of timm that take images of any size
    print(error)

floats = sum(p.numel() * p.element_size() for p in model.parameters())
size = options.out.stat().st_size
print(f"{options.out}: {size:,} bytes, {size / floats:.2f} of {floats:,} in float32")
with torch.inference_mode():
    wanted, logits = model(held), packed(held)
    same = torch.equal(logits, quantised(held))
    noise = 10 * torch.log10(wanted.square().sum() / (wanted - logits).square().sum())
    agree = (wanted.argmax(1) == logits.argmax(1)).float().mean()
    print(f"logits of 16 images held out: {noise:.1f} dB above the noise of quantisation, top class kept {agree:.0%}")
    print(f"loaded and fake-quantised logits the same: {same}")
    for name, form in forms.items():
        timer = Timer("form(x)", globals={"form": form, "x": held[:1]}, num_threads=torch.get_num_threads())
        print(f"{name:<8}{1e3 * timer.blocked_autorange(min_run_time=1.0).median:8.1f} ms an image, batch 1")
