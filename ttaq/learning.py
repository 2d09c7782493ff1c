"""What the verbs that learn share: the layers at hand, and a model that is put back when the work ends early."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .layers import QuantConv2d, QuantLinear
from .norms import MOMENTS, batch_norms, forget_float
from .quantizers import ActivationQuantizer, Quantizer


def quant_layers(model: nn.Module) -> dict[str, QuantLinear | QuantConv2d]:
    """Name the quantised layers of a model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantConv2d))}


def quantizers(model: nn.Module) -> list[Quantizer]:
    """List the quantisers of a model."""
    return [m for m in model.modules() if isinstance(m, Quantizer)]


def quantizers_by_name(model: nn.Module) -> dict[str, Quantizer]:
    """Name the quantisers of a model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def activation_quantizers(modules: Iterable[nn.Module]) -> list[ActivationQuantizer]:
    """List the quantisers of activations in some modules."""
    return [q for m in modules for q in m.modules() if isinstance(q, ActivationQuantizer)]


def learned_in(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Give what learning leaves in some modules: grids, codes and running statistics."""
    for module in modules:
        for quantizer in quantizers(module):
            codes = getattr(quantizer, "codes", None)
            yield from (quantizer.scale, quantizer.zero) if codes is None else (quantizer.scale, quantizer.zero, codes)
        for norm in batch_norms(module):
            yield from (getattr(norm, name) for name in MOMENTS)


def check_ready(verb: str, model: nn.Module) -> None:
    """Refuse a model that is not calibrated, or in which calibration did not reach a layer."""
    waiting = [name for name, q in model.named_modules() if isinstance(q, Quantizer) and not q.ready]
    if not quant_layers(model) or len(waiting) == len(quantizers(model)):
        raise ValueError(f"{verb}: the model is not calibrated; call ttaq.prepare and ttaq.calibrate first")
    if waiting:
        raise ValueError(
            f"{verb}: layer {waiting[0].rpartition('.')[0]} has no ranges, because calibration never reached it; "
            "exclude such layers in the recipe"
        )


def settings(verb: str, kind: type, given: object | None, options: dict) -> object:
    """Return the settings of a verb: an instance of `kind`, or one made of its fields; refuse both at once."""
    known = [field.name for field in fields(kind)]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{verb}: there is no option {', '.join(unknown)}; there are {', '.join(known)}")
    if given is not None and options:
        raise ValueError(f"{verb}: give a schedule or its fields, not both; got {', '.join(options)} beside one")
    return given or kind(**options)


def adam(groups: list[dict], *, capturable: bool = False) -> torch.optim.Adam:
    """Give Adam over groups of dense parameters: an update in one pass over their memory where torch has that.

    Args:
        groups: Parameters and their rates.
        capturable: A CUDA graph may hold its steps: rates and counts are tensors on the device.
    """
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for group in groups for p in group["params"])
    if capturable:
        groups = [group | {"lr": torch.tensor(group["lr"], device=group["params"][0].device)} for group in groups]
    return torch.optim.Adam(groups, fused=fused, capturable=capturable)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of the model learn but those that are switched on inside."""
    before = {p: p.requires_grad for p in model.parameters()}
    for p in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, learns in before.items():
            p.requires_grad_(learns)
            p.grad = None


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Put every quantiser and every statistic back when anything, an interrupt included, ends the work early."""
    state = Learned(model)
    try:
        yield
    except BaseException:
        state.restore()
        raise


class Learned:
    """A copy of all that learning changes in a model: grids, codes and running statistics.

    Args:
        model: A calibrated model.
    """

    def __init__(self, model: nn.Module):
        self._quantizers = [
            (q, q.scale.detach().clone(), q.zero.clone(), getattr(q, _held(q), None)) for q in quantizers(model)
        ]
        self._norms = [
            (n, [getattr(n, name).clone() for name in MOMENTS], hasattr(n, "float_mean")) for n in batch_norms(model)
        ]

    def restore(self) -> None:
        """Write the copy back."""
        for quantizer, scale, zero, codes in self._quantizers:
            quantizer.scale.data.copy_(scale)
            quantizer.zero.copy_(zero)
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.drop = 0.0
            else:
                setattr(quantizer, _held(quantizer), codes)
                quantizer.rounding = None
        for norm, moments, apart in self._norms:
            for name, values in zip(MOMENTS, moments, strict=True):
                getattr(norm, name).copy_(values)
            if not apart:  # the float model's statistics are these again
                forget_float(norm)


def _held(quantizer):
    """Name what holds the codes of a weight: as words, where its float weight is in a file (`streaming`)."""
    return "words" if hasattr(quantizer, "words") else "codes"


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed inside, and leave the global generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generators(device: torch.device) -> list[Tensor]:
    """Return the states of the random numbers' generators: the host's, and that of a GPU."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_generators(device: torch.device, states: list[Tensor]) -> None:
    """Set what `generators` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def progress_bar(shown: bool, *, whole: bool = False) -> Progress:
    """Make the bar that shows how far the work has come, and the time that is left.

    Args:
        shown: Whether there is one.
        whole: Show the share of the whole instead of so many of so many.
    """
    share = TaskProgressColumn() if whole else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), share, TimeRemainingColumn())
    return Progress(*columns, disable=not shown, transient=True)
