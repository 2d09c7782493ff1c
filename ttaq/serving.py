"""Let a packed checkpoint adapt to images as they come, and take what it became: `ttaq adapt`, `export --state`."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from .adaptation import METHODS, adapt
from .adaptation.state import check_state, read_state
from .deployment import MOST_PIXELS, Reader, Stop, preprocessor, serve
from .workbench import anchor_of, open_checkpoint


def adapt_stream(
    path: str | Path,
    images: Iterable[tuple[str, Path | bytes]],
    emit: Callable[[dict], None],
    *,
    adapter: str = "tent",
    state: str | Path | None = None,
    anchor: str | Path | None = None,
    lr: float | None = None,
    telemetry: int = 10,
    bank: int = 0,
    batch_size: int = 32,
    save_every: int = 50,
    most_pixels: int = MOST_PIXELS,
    size: int | None = None,
    reference: str | None = None,
    classes: list[str] | None = None,
    device: str = "cpu",
    stop: Stop | None = None,
) -> dict:
    """Load a packed checkpoint and let it adapt to images as they come, see `deployment.serve`.

    Args:
        path: The checkpoint.
        images: Names, with paths or the bytes of files.
        emit: Called with each prediction, refusal and event.
        adapter: A name in `adaptation.METHODS`.
        state: File of the adapter's state: continued from if it exists, written now and then and at the end.
        anchor: As in `evaluate_file`, as are lr, reference, classes and device.
        lr: Learning rate.
        telemetry: Batches from one measurement of drift to the next; 0 for none.
        bank: Domains to remember.
        batch_size: Images that adapt at once.
        save_every: Batches from one state to the next.
        most_pixels: Of an image as it lies in its file.
        size: Side of the model's images; None for what the checkpoint says.
        reference: Builds the architecture.
        classes: Names of the labels.
        device: Where to work.
        stop: Asks for the end.

    Returns:
        What `serve` returns, with "resumed", the images that the state had seen.

    Raises:
        ValueError: The checkpoint, the adapter or the state do not serve.
    """
    model, header, reference, chosen = open_checkpoint(path, reference, device)
    size = size or chosen["size"]
    if size is None:
        raise ValueError(f"adapt: {path} does not say the side of its images; pass --size")
    held = anchor_of(adapter, model, anchor, chosen | {"size": size}, 0, device)
    options = ({} if lr is None else {"lr": lr}) | held
    adapted = adapt(model, adapter, telemetry=telemetry, bank=bank, history=1, inplace=True, **options)
    if state is not None and Path(state).exists():
        adapted.resume(state)
    resumed = adapted.images
    to_tensor = preprocessor(chosen["mean"], chosen["std"])
    read_as = {key: chosen[key] for key in ("crop", "interpolation") if key in chosen}  # save() takes any preprocessing
    counts = serve(
        adapted, images, Reader(size, **read_as, most_pixels=most_pixels), emit,
        preprocess=lambda pixels: to_tensor(pixels).to(device), classes=classes or header["classes"],
        batch_size=batch_size, save=None if state is None else lambda: adapted.save(state), save_every=save_every,
        stop=stop,
    )  # fmt: skip
    return counts | {"resumed": resumed}


def adapted_model(
    model: nn.Module, state: str | Path, *, anchor: str | Path | None = None, preprocessing: dict, device: str = "cpu"
) -> nn.Module:
    """Return a packed model as it is after a stream, to be exported or saved.

    Args:
        model: As the checkpoint holds it; it takes up what adapted.
        state: File of an adapter's state, which names its method.
        anchor: Clean images, for a method that needs an anchor to be made.
        preprocessing: As `sources.preprocessing_of` gives it.
        device: Where the model is.

    Returns:
        A plain model that predicts as the adapter did last.

    Raises:
        ValueError: The file is no state, or one of another model.
    """
    found = read_state(state, torch.device(device))
    method = found.get("method") if isinstance(found, dict) else None
    if method not in METHODS:
        raise ValueError(f"export: {state} is no state of a method that is known here; give what `ttaq adapt` wrote")
    held = anchor_of(method, model, anchor, preprocessing, 0, device)
    adapter = adapt(model, method, history=1, inplace=True, **held)
    live = adapter.method.tensors()
    check_state(found, method, live, found["parts"])
    with torch.no_grad():
        for name, tensor in found["tensors"].items():
            live[name].copy_(tensor)
    return adapter.export()
