"""Resident memory of a fresh process that loads a packed W4A8 ViT-B and runs one image, against the float bytes.

One process builds, quantises, packs and saves the model (random weights, rounding to nearest); a second one imports,
takes its resident size as the zero, and then builds the architecture on `meta`, loads the file and runs.
"""

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

MODEL = "vit_base_patch16_224"
_MIB = 2**20


def add_command(commands) -> None:
    """Add `memory` to the command line; its two steps are processes of their own."""
    parser = commands.add_parser("memory", help="the resident memory of a packed ViT-B in a fresh process")
    parser.add_argument("--step", choices=_STEPS, help="run one step and print JSON")
    parser.add_argument("--file", type=Path, help="the packed model that a step writes or reads")
    parser.set_defaults(command=run)


def run(options: Namespace) -> int:
    """Print what the process grew by, phase by phase; the status is 1 where that exceeds the float model's bytes."""
    if options.step:
        print(json.dumps(_STEPS[options.step](options.file)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "packed.safetensors"
        built, grown = _fresh("build", path), _fresh("load", path)
    print(f"{MODEL}, w4a8, batch 1; MiB")
    print(f"float model {built['float'] / _MIB:.1f}, file {built['file'] / _MIB:.1f}")
    for phase, (peak, resident) in grown.items():
        print(f"{phase:>8}: peak {peak / _MIB:.1f}, resident afterwards {resident / _MIB:.1f} above import")
    most = max(peak for peak, _ in grown.values())
    fits = most < built["float"]
    print(f"peak growth {most / _MIB:.1f}: {'below' if fits else 'NOT below'} the float model's bytes")
    return 0 if fits else 1


def build(path: Path) -> dict[str, int]:
    """Quantise, pack and save the model; return the bytes of the float model and of the file."""
    import timm

    import ttaq

    torch.manual_seed(0)
    model = timm.create_model(MODEL, pretrained=False).eval()
    images = [torch.randn(1, 3, 224, 224) for _ in range(2)]
    widths = ttaq.QuantSpec(4, "channel", observer="minmax"), ttaq.QuantSpec(8, observer="minmax")
    quantised = ttaq.quantize(model, images, ttaq.Recipe(*widths), method="rtn", progress=False)
    ttaq.save(ttaq.pack(quantised, inplace=True), path)
    return {"float": sum(p.numel() * p.element_size() for p in model.parameters()), "file": path.stat().st_size}


def load(path: Path) -> dict[str, tuple[int, int]]:
    """Load and run the model; return (peak, resident afterwards) in bytes above import for each phase."""
    import timm

    import ttaq

    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # wakes the thread pool and the BLAS library
    with torch.device("meta"):
        model = timm.create_model(MODEL, pretrained=False)
    zero, phases = _resident()["VmRSS"], {}

    def ended(phase):
        now = _resident()
        phases[phase] = (now["VmHWM"] - zero, now["VmRSS"] - zero)
        _forget_peak()

    _forget_peak()
    packed = ttaq.load(path, model)
    ended("load")
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for phase in ("first", "second"):
            logits = packed(image)
            ended(phase)
    if not logits.isfinite().all():
        raise RuntimeError("memory: the loaded model gave numbers that are not finite; check ttaq.load")
    return phases


_STEPS = {"build": build, "load": load}


def _fresh(step, path):
    command = [sys.executable, "-m", "bench", "memory", "--step", step, "--file", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise ValueError(f"bench memory: the step {step} failed with status {done.returncode}; see its error above")
    return json.loads(done.stdout.splitlines()[-1])


def _resident():
    """Read the resident size and its peak, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return {name: int(found[name][0]) << 10 for name in ("VmRSS", "VmHWM")}


def _forget_peak():
    """Let the peak begin again at the present size, where the kernel allows; else it is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except PermissionError:
        return
