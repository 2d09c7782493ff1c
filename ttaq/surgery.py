"""Change a model's modules by name, and copy it without copying everything."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["copy_model", "device_of", "evaluating", "names_of", "replace"]


def names_of(model: nn.Module, module: nn.Module) -> tuple[str, ...]:
    """List every dotted name under which `model` holds this very module."""
    return tuple(name for name, held in model.named_modules(remove_duplicate=False) if held is module)


def replace(model: nn.Module, name: str, module: nn.Module) -> tuple[str, ...]:
    """Put `module` in the place of the one called `name`, wherever that one is held.

    A module held under several names is swapped under all of them and so stays shared. The new module
    takes over the train or eval mode of the old one; parts of the old one that it holds keep theirs.

    Args:
        model: Changed in place.
        name: Dotted name, as in `named_modules`; not the model itself.
        module: The newcomer.

    Returns:
        All names that now lead to `module`, in the order of `named_modules`.

    Raises:
        ValueError: `model` has no module of that name, or the name is empty.
    """
    if not name:
        raise ValueError("replace: the name must lead to a part of the model, got ''; swap the model yourself")
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"replace: the model must have a module {name!r}, got {type(model).__name__} without it; "
            "take the name from model.named_modules()"
        ) from None
    names = names_of(model, old)
    holders = [name.rpartition(".") for name in names]
    for holder, child in [(model.get_submodule(path), child) for path, _, child in holders]:
        holder._modules[child] = module
    kept = set(old.modules())
    for part in module.modules():
        if part not in kept:
            part.training = old.training
    return names


def copy_model(model: nn.Module, share: Callable[[str, torch.Tensor], bool] | None = None) -> nn.Module:
    """Copy a model deeply, except for the parameters and buffers that both are to hold.

    Hooks, attributes, modes and sharing within the model come along; gradients do not.

    Args:
        model: Left as it is.
        share: Called with the dotted name and the parameter or buffer; True keeps the very tensor in the
            copy. A tensor with several names is shared when one of them is. None shares nothing.

    Returns:
        A model of the same class.
    """
    shared: dict[int, torch.Tensor] = {}
    if share is not None:
        for tensors in (model.named_parameters, model.named_buffers):
            held = tensors(remove_duplicate=False)
            shared |= {id(tensor): tensor for name, tensor in held if share(name, tensor)}
    return copy.deepcopy(model, shared)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that holds the whole model; the CPU for a model without tensors.

    Raises:
        ValueError: The model is spread over several devices.
    """
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise ValueError(
            f"device_of: the model must be on one device, got {', '.join(devices)}; move it with model.to(...)"
        )
    return torch.device(devices[0] if devices else "cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode while the context is open; each gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
