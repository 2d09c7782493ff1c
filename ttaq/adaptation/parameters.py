"""Which parameters of a model adapt, and a model made ready for an adaptation loop of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..quantizers import ActivationQuantizer
from ..surgery import copy_model
from .statistics import AdaptiveBatchNorm, adapt_statistics

NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, AdaptiveBatchNorm)
NORM_NAME = re.compile(r"norm(act)?([123]d)?$", re.IGNORECASE)

Parameters = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises: a norm layer of torch, or one that is named so (RmsNorm, LayerNorm2d)."""
    return isinstance(module, NORMS) or bool(NORM_NAME.search(type(module).__name__))


def scales(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Name the activation quantisers whose scale can learn: those with one scale a tensor, calibrated."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    return {name: m for name, m in found.items() if m.spec.granularity == "tensor" and m.ready}


def _affine(model: nn.Module) -> set[str]:
    return {f"{name}.{key}".lstrip(".") for name, m in model.named_modules() if is_norm(m) for key in m._parameters}


def _biases(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}


def _scales(model: nn.Module) -> set[str]:
    return {f"{name}.scale" for name in scales(model)}


GROUPS = {"norm": _affine, "bias": _biases, "activation_scales": _scales}


def choose(model: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """Find the parameters that a choice means, and change nothing.

    Args:
        model: Any network.
        parameters: Groups joined by "+", as in "norm+bias": "norm" (affine of every norm layer), "bias" (every
            parameter of that name), "activation_scales" (of quantised inputs, one a tensor); or a list of groups
            and name patterns, of which those with a "!" take away: ``["norm", "!layer4.*"]``; or a predicate
            ``(name, parameter) -> bool``.

    Returns:
        The floating-point parameters chosen, by name, each once.

    Raises:
        ValueError: A group, a pattern or the whole choice finds nothing, with what the model does hold.
    """
    held = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if callable(parameters):
        names = {name for name, p in held.items() if parameters(name, p)}
    else:
        parts = [parameters] if isinstance(parameters, str) else list(parameters)
        if isinstance(parameters, str) and set(parameters.split("+")) <= GROUPS.keys():
            parts = parameters.split("+")
        names = set()
        for part in sorted(parts, key=lambda part: part.startswith("!")):
            found = _find(model, held, part.removeprefix("!"))
            if not found:
                raise ValueError(_nothing(model, part))
            names = names - found if part.startswith("!") else names | found
    if not names & held.keys():
        raise ValueError(_nothing(model, parameters))
    return {name: p for name, p in held.items() if name in names}


def _find(model: nn.Module, held: dict[str, nn.Parameter], part: str) -> set[str]:
    if part in GROUPS:
        return GROUPS[part](model) & held.keys()
    return {name for name in held if fnmatch(name, part)}


def _nothing(model: nn.Module, parameters: Parameters) -> str:
    some = ", ".join([name for name, _ in model.named_parameters()][:3]) or "none"
    return (
        f"adapt: parameters={parameters!r} matches no parameter of {type(model).__name__} (it has {some}, ...); "
        'name others with parameters=["*.bias"], or use method="source"'
    )


def select(model: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """Choose the parameters that adapt: give each memory of its own and let it require a gradient.

    Args:
        model: The Adapter's copy, in which nothing requires a gradient.
        parameters: See `choose`, as are what is returned and what is raised.
    """
    chosen = choose(model, parameters)
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
    return chosen


def configure_model(
    model: nn.Module, *, parameters: Parameters = "norm", statistics: str = "batch", inplace: bool = False
) -> nn.Module:
    """Make a model ready for an adaptation loop of one's own, as the public code of Tent does.

    Only the chosen parameters require gradients and BatchNorm normalises with the statistics of the batch; `adapt`
    does the same and then runs the loop. Unlike there the caller's model is left as it is unless `inplace`, and
    the model is in eval mode: dropout stays off.

    Args:
        model: A classifier: float, prepared or packed.
        parameters: See `choose`.
        statistics: "batch", "blend", "ema" or "source", see `AdaptiveBatchNorm`.
        inplace: Configure the caller's own model instead of a copy that shares weights and codes with it.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: Nothing is chosen, or statistics is unknown.
    """
    with torch.inference_mode(False), torch.no_grad():
        own = model if inplace else share_model(model)
        own.eval().requires_grad_(False)
        adapt_statistics(own, statistics)
        select(own, parameters)
    return own


def collect_params(model: nn.Module, parameters: Parameters = "norm") -> tuple[list[nn.Parameter], list[str]]:
    """List what an optimizer is to step over, as the public code of Tent does.

    Args:
        model: What `configure_model` returned.
        parameters: See `choose`; as given there.

    Returns:
        The parameters and their names.

    Raises:
        ValueError: Nothing is chosen.
    """
    chosen = choose(model, parameters)
    return list(chosen.values()), list(chosen)


def share_model(model: nn.Module) -> nn.Module:
    """Copy a model whose parameters and packed codes stay where they are; all other buffers are copied."""

    def stays(name: str, tensor: Tensor) -> bool:
        return not tensor.is_inference() and (isinstance(tensor, nn.Parameter) or tensor.dtype == torch.uint8)

    own = copy_model(model, stays)
    # parameters of our own, whose requires_grad and version are not the caller's
    views: dict[nn.Parameter, nn.Parameter] = {}
    for module in own.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in views:
                    views[parameter] = nn.Parameter(parameter.data, requires_grad=False)
                module._parameters[key] = views[parameter]
    return own
