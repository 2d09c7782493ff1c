"""Where a reconstruction is, in a file that is written after each block, so that a killed one goes on bit for bit."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import write_atomically
from .learning import generators, quantizers_by_name, set_generators
from .norms import MOMENTS, batch_norms
from .surgery import device_of

__all__ = ["Savepoint", "identity"]

_FORMAT = 1
_KEY = "ttaq-resume"
_DIFFERENT = {
    "model": "a model of other weights",
    "recipe": "another recipe",
    "images": "other images",
    "seed": "another seed",
    "settings": "other steps, rates or terms",
}


class Savepoint:
    """The file of one reconstruction.

    Args:
        path: A file, or a folder in which it is called resume.safetensors.
        model: What is being learned.
        belongs: What `identity` says of it; a file of another is refused.
    """

    def __init__(self, path: str | os.PathLike, model: nn.Module, belongs: Mapping[str, str]):
        self.path = Path(path) / "resume.safetensors" if Path(path).is_dir() else Path(path)
        self.model, self.belongs = model, dict(belongs)

    def write(self, rows: list[dict], rule: dict) -> None:
        """Write the model as learned so far, the random numbers' state, and what is reported."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in _learned(self.model)}
        tensors |= {f"generator.{i}": state for i, state in enumerate(generators(device_of(self.model)))}
        header = {"format": _FORMAT, "belongs": self.belongs, "rows": rows, "rule": rule}
        metadata = {_KEY: json.dumps(header)}
        write_atomically(self.path, lambda draft: save_file(tensors, draft, metadata))

    def read(self) -> tuple[list[dict], dict]:
        """Put what the file holds into the model and the generators; return (rows, rule), both empty without a file.

        Raises:
            ValueError: It is no such file, or that of another reconstruction; the model is then as it was.
        """
        if not self.path.exists():
            return [], {}
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                header = json.loads((file.metadata() or {}).get(_KEY, "null"))
                self._check(header)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"resume: {self.path} is damaged or no such file ({error}); give another name") from error
        self._restore(tensors)
        rule = header["rule"]
        if "errors" in rule:
            rule["errors"] = {float(strength): error for strength, error in rule["errors"].items()}
        return header["rows"], rule

    def _check(self, header):
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise ValueError(f"resume: {self.path} was not written by this version's resume=; give another name")
        odd = [text for key, text in _DIFFERENT.items() if header["belongs"].get(key) != self.belongs[key]]
        if odd:
            raise ValueError(
                f"resume: {self.path} belongs to {' and '.join(odd)}; give another name, or remove it to start again"
            )

    def _restore(self, tensors):
        for name, quantizer in quantizers_by_name(self.model).items():
            quantizer.scale.data.copy_(tensors[f"{name}.scale"])
            quantizer.zero.copy_(tensors[f"{name}.zero"])
            if f"{name}.codes" in tensors:
                quantizer.codes = tensors[f"{name}.codes"].to(quantizer.scale.device)
        for i, norm in enumerate(batch_norms(self.model)):
            for name in (*MOMENTS, "float_mean", "float_var"):
                values = tensors.get(f"norm {i}.{name}")
                if values is not None and not hasattr(norm, name):
                    norm.register_buffer(name, values.to(norm.running_mean.device), persistent=False)
                elif values is not None:
                    getattr(norm, name).copy_(values)
        set_generators(device_of(self.model), [tensors[k] for k in sorted(tensors) if k.startswith("generator.")])


def identity(model: nn.Module, inputs: list, schedule: object, **more: object) -> dict[str, str]:
    """Say what a reconstruction is one of, in hashes: the model, its recipe, the images, the seed, the settings.

    Args:
        model: Calibrated; ranges do not count, a savepoint brings its own.
        inputs: Entries of `batches.collect`.
        schedule: A dataclass with a seed.
        more: Further settings, plain or dataclasses.
    """
    found = quantizers_by_name(model)
    own = {id(t) for q in found.values() for t in (*q.parameters(), *q.buffers())}
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if not n.endswith("nonfinite"))]
    plain = {key: asdict(value) if hasattr(value, "__dataclass_fields__") else value for key, value in more.items()}
    settings = asdict(schedule)
    return {
        "model": _digest((name, t) for name, t in named if id(t) not in own),
        "recipe": _hash(f"{name} {q.spec}" for name, q in found.items()),
        "images": _digest(_images(inputs)),
        "seed": str(settings.pop("seed")),
        "settings": _hash([json.dumps([settings, plain], sort_keys=True)]),
    }


def _learned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, quantizer in quantizers_by_name(model).items():
        yield f"{name}.scale", quantizer.scale
        yield f"{name}.zero", quantizer.zero
        if getattr(quantizer, "codes", None) is not None:
            yield f"{name}.codes", quantizer.codes
    for i, norm in enumerate(batch_norms(model)):
        for name in (*MOMENTS, "float_mean", "float_var"):
            if hasattr(norm, name):
                yield f"norm {i}.{name}", getattr(norm, name)


def _images(inputs):
    for i, entry in enumerate(inputs):
        yield from ((f"{i} {k}", v) for k, v in (entry if isinstance(entry, dict) else {"x": entry}).items())


def _digest(named):
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _hash(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
