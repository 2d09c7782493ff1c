"""Quantise a model that does not fit: its architecture on `meta`, its float weights read from a file when used.

The weights of the quantised layers are never all there: a layer reads its own, and as many bytes as the largest block
has stay for the steps that follow. Codes are kept as packed words in host memory. Everything else - calibration,
blocks, reconstruction - runs as it does on a model that fits, and gives the same bits.
"""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import ops
from .batches import Forward
from .blocks import find_blocks
from .layers import QuantConv2d, QuantLinear
from .norms import forget_float
from .packed_layers import PackedConv2d, PackedLinear
from .quantizers import Quantizer, WeightQuantizer
from .surgery import replace

__all__ = ["METHODS", "Streamed"]

METHODS = ("qdrop", "gptq", "rtn")  # those that need one block at a time
_DIGEST = "ttaq_weights"


class Weights:
    """A .safetensors file of float weights, of which the ones used last are kept.

    Args:
        path: The file.
        device: Where they are used.

    Raises:
        ValueError: It cannot be read.
    """

    def __init__(self, path: str | os.PathLike, device: torch.device):
        self.path, self.device = Path(path), device
        self.room = 0  # bytes that may be kept
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        if not self.path.is_file():
            raise ValueError(f"weights: there is no file {path}; give a local .safetensors file")
        try:
            with safe_open(path, framework="pt") as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"weights: {path} is no .safetensors file that can be read ({error})") from error

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor on the device: one that is kept, or read anew; the mapping of the file is closed again."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_tensor(name).to(self.device, dtype, copy=True)
        if tensor.nbytes <= self.room:
            self._kept[name] = tensor
        while sum(held.nbytes for held in self._kept.values()) > self.room:
            self._kept.popitem(last=False)
        return tensor

    def digest(self) -> Tensor:
        """Return the SHA-256 of the file, (32,) uint8."""
        with open(self.path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").digest()
        return torch.frombuffer(bytearray(found), dtype=torch.uint8).to(self.device)


class _Streamed:
    """A layer whose weight is read when it is asked for."""

    @property
    def weight(self) -> Tensor:
        """The float weight; nothing is learned in it."""
        return self.source()


class _StreamedLinear(_Streamed, QuantLinear):
    pass


class _StreamedConv2d(_Streamed, QuantConv2d):
    pass


_TWINS = {QuantLinear: _StreamedLinear, QuantConv2d: _StreamedConv2d}


class _PackedCodes(WeightQuantizer):
    """A quantiser that keeps its codes as words in host memory."""

    @property
    def codes(self) -> Tensor | None:
        """The codes, unpacked at each look."""
        if self.words is None:
            return None
        words, shape = self.words.to(self.scale.device), self.shape
        return ops.unpack_codes(words, self.spec.bits, shape[1:].numel()).view(shape)

    @codes.setter
    def codes(self, codes: Tensor | None) -> None:
        self.words = None if codes is None else ops.pack_codes(codes.flatten(1), self.spec.bits).cpu()


class Streamed:
    """A prepared model whose quantised layers read their weights from a file.

    Args:
        model: Prepared, on `meta`; changed in place.
        path: A .safetensors file of the float model's state_dict.
        example: An entry of `batches.collect`; where it lies the work is done.
        forward: Runs the model on one entry.
        hashed: Let the model hold a digest of the file, by which `resuming.identity` tells it from others.

    Raises:
        ValueError: The file or the model does not serve.
    """

    def __init__(
        self, model: nn.Module, path: str | os.PathLike, example: object, forward: Forward | None, hashed: bool
    ):
        first = next(iter(example.values())) if isinstance(example, dict) else example
        self.model, self.weights = model, Weights(path, first.device)
        self.layers = _connect(model, self.weights)
        blocks = find_blocks(model, example, forward)
        sizes = {name: layer.source.nbytes for name, layer in self.layers.items()}
        self.weights.room = max(sum(sizes.get(name, 0) for name in block.layers) for block in blocks)
        if hashed:
            model.register_buffer(_DIGEST, self.weights.digest(), persistent=False)

    @torch.no_grad()
    def pack(self) -> nn.Module:
        """Pack one layer after the other into host memory, whither all the rest follows; return the packed model."""
        self.weights.room, words = 0, {}
        for name, layer in self.layers.items():
            twin = PackedLinear if isinstance(layer, QuantLinear) else PackedConv2d
            packed = twin.from_quantized(layer).cpu()
            replace(self.model, name, packed)
            words[name] = packed.words.numel()
        self.model._buffers.pop(_DIGEST, None)
        self.model._non_persistent_buffers_set.discard(_DIGEST)
        forget_float(self.model)
        self.model.ttaq_report["packed"] = words
        return self.model.cpu().eval()


class _Source:
    """Reads one weight."""

    def __init__(self, weights: Weights, name: str, like: Tensor):
        self.weights, self.name, self.dtype = weights, name, like.dtype
        self.nbytes = like.numel() * like.element_size()

    def __call__(self) -> Tensor:
        return self.weights.read(self.name, self.dtype)

    def __deepcopy__(self, memo):
        return self


def _connect(model, source):
    """Let the quantised layers read their weights, and load everything else; return those layers by name."""
    layers = {}
    for name, layer in model.named_modules():
        if type(layer) in _TWINS and layer.weight_quantizer is not None:
            layers[name] = layer
            meta = layer._parameters.pop("weight")
            if not meta.is_meta:
                raise ValueError('quantize: weights= wants the architecture alone; build it under torch.device("meta")')
            _check(source, f"{name}.weight", meta)
            layer.source = _Source(source, f"{name}.weight", meta)
            _keep_packed(layer.weight_quantizer, meta.shape)
            layer.__class__ = _TWINS[type(layer)]
    for name, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    held[key] = _real(source, module, f"{name}.{key}".lstrip("."), key, tensor)
    model.to(source.device)  # quantisers of products, which no weight of theirs puts on meta
    return layers


def _keep_packed(quantizer, shape):
    del quantizer._buffers["codes"]
    quantizer.shape, quantizer.words = shape, None
    if quantizer.spec.bits in (2, 3, 4, 8):
        quantizer.__class__ = _PackedCodes
    else:
        raise ValueError(
            f"quantize: weights of {quantizer.spec.bits} bits are not packed, and weights= keeps packed codes alone; "
            "choose 2, 3, 4 or 8"
        )


def _real(source, module, name, key, tensor):
    """Give a tensor in the place of one on meta: that of the file, or what a fresh quantiser holds."""
    if isinstance(module, Quantizer) and key in ("scale", "zero"):
        value = torch.full(tensor.shape, torch.nan if key == "scale" else 0.0, dtype=tensor.dtype, device=source.device)
    elif key == "nonfinite" or (key == "num_batches_tracked" and name not in source.shapes):
        value = torch.zeros(tensor.shape, dtype=tensor.dtype, device=source.device)
    else:
        _check(source, name, tensor)
        value = source.read(name, tensor.dtype)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _check(source, name, tensor):
    found = source.shapes.get(name)
    if found is None:
        raise ValueError(
            f"weights: {source.path} holds no {name}; save the whole state_dict of this architecture, or build the "
            "model with its weights where a file cannot hold them"
        )
    if found != tuple(tensor.shape):
        raise ValueError(f"weights: {name} in {source.path} has shape {found}, the model wants {tuple(tensor.shape)}")
