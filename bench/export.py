"""`python -m bench export`: a packed checkpoint against its ONNX file in onnxruntime, on test images of CIFAR-10.

Prints for each form of the file the largest difference of a logit, the share of equal predictions, errors and bytes;
the status is 1 where fewer than 99.5 % of the predictions are equal.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from ttaq import export_onnx, load

from . import accuracy

LEAST = 0.995  # of the predictions equal
FORMS = {
    "folded": {},
    "norms kept": {"fold": False},
    "folded, opset 20": {"opset": 20},
}


def add_command(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("export", help="a packed checkpoint against onnxruntime on its ONNX file")
    parser.add_argument("file", type=Path, help="a packed CIFAR ResNet-20")
    parser.add_argument("--data", required=True, help="folder of the images and the float weights")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--batch-size", type=int, default=100, help="images at once")
    parser.set_defaults(command=run, model="resnet20")


def run(options: argparse.Namespace) -> int:
    """Export, run both, and print what differs."""
    subject, _ = accuracy.open_subject(options)
    model = load(options.file, subject.architecture())
    batches = list(subject.test.take(slice(options.images)).batches(options.batch_size))
    labels = torch.cat([y for _, y in batches])
    with torch.no_grad():
        wanted = torch.cat([model(x) for x, _ in batches])
        plain = torch.cat([subject.model(x) for x, _ in batches])
    float_bytes = sum(t.numel() * t.element_size() for t in subject.model.parameters())
    print(f"{len(labels)} images; error: float {_error(plain, labels):.2f} %, packed {_error(wanted, labels):.2f} %")
    print(f"bytes: float parameters {float_bytes:,}, packed file {options.file.stat().st_size:,}")
    least = 1.0
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in FORMS.items():
            path = Path(folder) / "model.onnx"
            said = export_onnx(model, batches[0][0], path, **settings)
            for level in ("plain", "optimised"):
                found = run_onnx(path, [x.numpy() for x, _ in batches], optimised=level == "optimised")
                equal = float((found.argmax(1) == wanted.argmax(1)).float().mean())
                least = min(least, equal)
                print(
                    f"{name}, {level}: {said['bytes']:,} bytes, {said['bytes'] / float_bytes:.3f} of float; largest "
                    f"difference {float((found - wanted).abs().max()):.4f} of logits up to "
                    f"{float(wanted.abs().max()):.2f}, equal predictions {equal:.2%}, error "
                    f"{_error(found, labels):.2f} %",
                    flush=True,
                )
    return 0 if least >= LEAST else 1


def run_onnx(path: Path, batches: list[np.ndarray], *, optimised: bool) -> torch.Tensor:
    """Run onnxruntime on one thread, with or without its own changes of the graph."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(None, {"images": x})[0]) for x in batches])


def _error(logits, labels):
    return 100 * float((logits.argmax(1) != labels).float().mean())
