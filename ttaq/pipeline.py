"""quantize: prepare, calibrate and reconstruct in one call."""

from collections.abc import Iterable

from torch import nn

from .batches import Forward, collect
from .calibration import calibrate
from .preparation import prepare
from .reconstruction import reconstruct
from .spec import Recipe
from .surgery import device_of

METHODS = ("qdrop", "rtn")


def quantize(
    model: nn.Module,
    batches: Iterable,
    recipe: str | Recipe = "w4a4",
    *,
    method: str = "qdrop",
    forward: Forward | None = None,
    progress: bool = True,
    **options,
) -> nn.Module:
    """Quantise a float model after training, on a few hundred unlabelled images.

    Args:
        model: The float model; left as it is.
        batches: An iterable of tensors, (x, y) pairs or dicts; read once.
        recipe: "w4a4" and the like, or a Recipe.
        method: "qdrop" reconstructs block by block (arXiv:2203.05740); "rtn" only rounds to nearest.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.
        progress: Show a bar.
        options: Fields of `reconstruction.Schedule`, such as steps and seed.

    Returns:
        The quantised model in eval mode, not yet packed; `ttaq_report` says what was done.

    Raises:
        ValueError: The model, the recipe or the images do not serve.
    """
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "rtn" and options:
        raise ValueError(f"quantize: rounding to nearest takes no {', '.join(options)}; use method='qdrop'")
    quantised = prepare(model, recipe).eval()
    inputs = collect("quantize", batches, device_of(quantised))
    calibrate(quantised, inputs, forward=forward)
    if method == "qdrop":
        reconstruct(quantised, inputs, forward=forward, progress=progress, **options)
    quantised.ttaq_report["method"] = method
    return quantised
