"""Resident memory of fresh processes that run a packed W4A8 ViT-B, or adapt it, against the float bytes or its twin.

One process builds, quantises, packs and saves the model (random weights, rounding to nearest); a second one imports,
takes its resident size as the zero, and then builds the architecture on `meta`, loads the file and runs. With
`--adapting`, two processes adapt by Tent: one the loaded file, one the fake-quantised twin.
"""

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

MODEL = "vit_base_patch16_224"
BATCH = 8  # images that an adapter sees at once
_MIB = 2**20


def add_command(commands) -> None:
    """Add `memory` to the command line; its two steps are processes of their own."""
    parser = commands.add_parser("memory", help="the resident memory of a packed ViT-B in a fresh process")
    parser.add_argument("--step", choices=_STEPS, help="run one step and print JSON")
    parser.add_argument("--adapting", action="store_true", help="by Tent, against the fake-quantised twin")
    parser.add_argument("--file", type=Path, help="the packed model that a step writes or reads")
    parser.set_defaults(command=run)


def run(options: Namespace) -> int:
    """Print what the process grew by, phase by phase; the status is 1 where that exceeds the float model's bytes."""
    if options.step:
        print(json.dumps(_STEPS[options.step](options.file)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "packed.safetensors"
        if options.adapting:
            _fresh("build", path)
            return _compare({name: _fresh(name, path) for name in ("adapt", "adapt-twin")})
        built, grown = _fresh("build", path), _fresh("load", path)
    print(f"{MODEL}, w4a8, batch 1; MiB")
    print(f"float model {built['float'] / _MIB:.1f}, file {built['file'] / _MIB:.1f}")
    for phase, (peak, resident) in grown.items():
        print(f"{phase:>8}: peak {peak / _MIB:.1f}, resident afterwards {resident / _MIB:.1f} above import")
    most = max(peak for peak, _ in grown.values())
    fits = most < built["float"]
    print(f"peak growth {most / _MIB:.1f}: {'below' if fits else 'NOT below'} the float model's bytes")
    return 0 if fits else 1


def _compare(grown):
    """Print what both processes grew by; the status is 1 where the packed model does not take less."""
    print(f"{MODEL}, w4a8, Tent, batch {BATCH}; MiB above import")
    for name, (resident, peak) in grown.items():
        print(f"{name:>10}: {resident / _MIB:.1f} before a step, at most {peak / _MIB:.1f} in it")
    packed, twin = (grown[name][1] for name in ("adapt", "adapt-twin"))
    print(f"the packed model takes {packed / twin:.0%} of its twin")
    return 0 if packed < twin else 1


def build(path: Path) -> dict[str, int]:
    """Quantise, pack and save the model; return the bytes of the float model and of the file."""
    import ttaq

    quantised = _quantised()
    ttaq.save(ttaq.pack(quantised, inplace=True), path)
    whole = sum(p.numel() * p.element_size() for p in _architecture().parameters())
    return {"float": whole, "file": path.stat().st_size}


def _quantised():
    import timm

    from .models import quantise

    torch.manual_seed(0)
    return quantise(timm.create_model(MODEL, pretrained=False).eval())


def _architecture():
    import timm

    with torch.device("meta"):
        return timm.create_model(MODEL, pretrained=False)


def adapt(path: Path) -> tuple[int, int]:
    """Load the file and adapt it; return (resident before a step, peak in it) in bytes above import."""
    import ttaq

    return _adapted(lambda: ttaq.load(path, _architecture()))


def adapt_twin(path: Path) -> tuple[int, int]:
    """Quantise anew and adapt without packing; return what `adapt` does."""
    return _adapted(_quantised)


def _adapted(make):
    import ttaq

    _wake()
    zero = _resident()["VmRSS"]
    adapter = ttaq.adapt(make(), "tent", inplace=True)
    images = torch.randn(BATCH, 3, 224, 224)
    adapter(images)
    gc.collect()
    _trim()
    _forget_peak()
    resident = _resident()["VmRSS"] - zero
    adapter(images)
    return resident, _resident()["VmHWM"] - zero


def load(path: Path) -> dict[str, tuple[int, int]]:
    """Load and run the model; return (peak, resident afterwards) in bytes above import for each phase."""
    import ttaq

    _wake()
    model = _architecture()
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


_STEPS = {"build": build, "load": load, "adapt": adapt, "adapt-twin": adapt_twin}


def _fresh(step, path):
    command = [sys.executable, "-m", "bench", "memory", "--step", step, "--file", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise ValueError(f"bench memory: the step {step} failed with status {done.returncode}; see its error above")
    return json.loads(done.stdout.splitlines()[-1])


def _wake():
    """Start the thread pool and the BLAS library, whose memory is nobody's model."""
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))


def _trim():
    """Give memory that nothing uses back to the system, so that both processes begin alike."""
    ctypes.CDLL(None).malloc_trim(0)


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
