"""Evaluate a packed checkpoint on a user's images, adapting or not: what the command `ttaq evaluate` does."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .adaptation import METHODS, adapt, options_of
from .distributed import Team
from .doctor import describe_machine
from .evaluation import Result, evaluate
from .report import Results
from .sources import make_stream, open_data
from .spec import Recipe
from .workbench import anchor_of, check_outputs, open_checkpoint
from .zoo import build_model


def evaluate_file(
    path: str | Path,
    data: str | Path,
    *,
    adapter: str = "source",
    stream: str = "corruptions",
    severity: int = 5,
    images: int | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    anchor: str | Path | None = None,
    reference: str | None = None,
    classes: list[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    floats: str | Path | None = None,
    track: Callable[[str, int], Callable[[int], object]] | None = None,
    team: Team | None = None,
) -> Results:
    """Load a packed checkpoint and measure it, adapting or not, on clean or corrupted images.

    Args:
        path: The checkpoint.
        data: Class folders, an .npz file, or the published CIFAR-C or ImageNet-C.
        adapter: A name in `adaptation.METHODS`, or several with commas between, each of which meets the stream anew.
        stream: "clean", "corruptions" (all there are), a name in `streams.STREAMS`, or names of corruptions with
            commas between.
        severity: 1 to 5.
        images: A domain; None for 1,000, or all there are if fewer.
        batch_size: Images that the adapter sees at once.
        lr: Of an adapter that has one; None for its own.
        anchor: Clean images of the source for an adapter that takes an anchor, class folders or an .npz file, of which
            the seed draws 512, or all there are if fewer; None where there are none.
        reference: Builds the architecture, in place of what the checkpoint names.
        classes: Class folders in the order of the logits, in place of the checkpoint's.
        seed: Of the choice and order of images and of the corruptions.
        device: Where to work.
        floats: File of the float model's weights: it meets the same streams, and its rows come first.
        track: Called with a name and the number of images, returns what is called with each batch's number.
        team: Processes that take the adapters in turn, or the batches if none adapts; each gets all results.

    Returns:
        Results of a row for each adapter, and before them of the float model where its weights are given.

    Raises:
        ValueError: The checkpoint or the images do not serve, or the adapter needs an anchor.
    """
    model, header, reference, chosen = open_checkpoint(path, reference, device)
    classes = classes or header["classes"]
    source = open_data(data, chosen, classes)
    batches = make_stream(source, data, stream, severity=severity, images=images, batch_size=batch_size, seed=seed)
    first = next(iter(batches))
    check_outputs(model, first.images[:1].to(device), batches.domains[0][1], data, named=classes is not None)
    names = _adapters(adapter)
    side = chosen | {"size": first.images.shape[-1]}
    forms = _forms(path, model, header, reference, floats, device)

    def options(form, name):
        given = anchor if _takes(name, names, "anchor") else None
        rate = {} if lr is None or not _takes(name, names, "lr") else {"lr": lr}
        return rate | anchor_of(name, forms[form].model, given, side, seed, device)

    found = {}
    dealt = team if names != ["source"] or len(forms) > 1 else None
    for form, name in _share([(form, name) for form in forms for name in names], dealt):
        adapted = adapt(forms[form].model, name, **options(form, name))
        progress = track and partial(track, f"{reference}, {form}, {name}")
        found[form, name] = _measure(adapted, batches, device, progress, None if dealt else team)
    if dealt:
        found = {key: result for part in team.share(found) for key, result in part.items()}
    most = max(next(iter(found.values())).images.values())
    settings = {"data": str(data), "stream": stream, "severity": severity, "images": most}
    settings |= {"batch_size": batch_size, "seed": seed, "device": device}
    settings |= ({} if anchor is None else {"anchor": str(anchor)}) | ({} if lr is None else {"lr": lr})
    results = Results(f"{Path(path).name} on {Path(data).name}", settings, describe_machine())
    for form, name in ((form, name) for form in forms for name in names):
        result, one = found[form, name], forms[form]
        results.notes.append(_describe(name if len(forms) == 1 else f"{form}, {name}", result))
        values = {"model": reference, "bits": one.bits, "method": one.method, "form": form, "adapter": name}
        clean = result.mean_error if stream == "clean" else None
        results.add(result, clean_error=clean, bytes=one.bytes, **values)
    return results


class _Form(NamedTuple):
    """A form of the model, and what its rows say of it."""

    model: nn.Module
    bits: str
    method: str
    bytes: int


def _forms(path, model, header, reference, floats, device) -> dict[str, _Form]:
    """Give the packed model, and before it the float one where there are weights."""
    recipe = str(Recipe.from_json(header["report"]["recipe"])).partition(",")[0]
    packed = _Form(model, recipe, header["report"]["method"], Path(path).stat().st_size)
    if floats is None:
        return {"packed": packed}
    whole = build_model(reference, floats, **header["report"].get("options", {})).to(device)
    size = sum(t.nbytes for t in (*whole.parameters(), *whole.buffers()))
    return {"float": _Form(whole, "float", "none", size), "packed": packed}


def _adapters(text: str) -> list[str]:
    """Read names of adapters with commas between; refuse one that is not known before anything is measured."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"adapt: method must be one of {', '.join(METHODS)}, got {unknown[0]!r}")
    return names


def _takes(name, names, option):
    """Whether an adapter is handed an option: of several those that have it; one alone refuses what it has not."""
    return len(names) == 1 or option in options_of(METHODS[name])


def _share(pairs: list, team: Team | None) -> list:
    """Deal models and adapters out: each goes through the whole stream, one image after the other, in one process."""
    return pairs[team.rank :: team.size] if team else pairs


def _measure(adapted, batches, device, track, team) -> Result:
    total = sum(len(index) for _, index in batches.order) // (team.size if team else 1)
    progress = track(total) if track else None
    return evaluate(adapted, batches, forward=lambda own, x: own(x.to(device)), progress=progress, team=team)


def _describe(adapter: str, result: Result) -> str:
    """Say what an evaluation found besides errors."""
    sure = "" if result.ece is None else f"expected calibration error (ECE) {result.ece:.1f} %, "
    return f"{adapter}: {sure}{result.forwards:.2f} forward and {result.backwards:.2f} backward passes an image"
