"""quantize: prepare, calibrate, reconstruct and refine in one call."""

import os
import time
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from .batches import Forward, collect, count, has_images
from .blockwise import Schedule
from .calibration import calibrate
from .closed_form import solve
from .consistency import PCR
from .distributed import Team
from .learning import quantizers
from .pacing import REFINE, Deadline, steps_of
from .perturbation import PEM
from .preparation import prepare
from .reconstruction import reconstruct
from .refinement import Refinement, refine
from .safety import explain_safety, secure
from .spec import Recipe
from .streaming import METHODS as STREAMED
from .streaming import Streamed
from .surgery import device_of

METHODS = {
    "ttaq": "PEM and PCR: regularised blocks learned under batch statistics, then the whole network refined",
    "pem": "QDrop's blocks with PEM alone",
    "pcr": "blocks learned under batch statistics, then the whole network refined: PCR alone",
    "qdrop": "block reconstruction (arXiv:2203.05740)",
    "gptq": "codes in closed form, layer by layer, no gradient step (arXiv:2210.17323, arXiv:2504.02692)",
    "rtn": "rounding to nearest",
}
TAKES = {"rtn": (), "gptq": ("pem", "cache", "refinement", "damping")}  # of the arguments below, where not all
SPLIT = 0.5  # of the steps or the time asked for: that of the blocks, and that of the network, where a method refines
ENOUGH, ENOUGH_AT_8 = 1024, 256  # images that are known to suffice: in general, and with activations of 8 bits and more


def quantize(
    model: nn.Module,
    batches: Iterable,
    recipe: str | Recipe = "w4a4",
    *,
    method: str = "ttaq",
    pem: PEM | None = None,
    pcr: PCR | None = None,
    refinement: Refinement | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    attention: bool = True,
    safety: str | Iterable[str] = "auto",
    budget: str | float | None = None,
    cache: str | int | None = None,
    resume: str | os.PathLike | None = None,
    graph: bool | None = None,
    team: Team | None = None,
    weights: str | os.PathLike | None = None,
    **options,
) -> nn.Module:
    """Quantise a float model after training, on a few hundred unlabelled images.

    Args:
        model: The float model; left as it is.
        batches: An iterable of tensors, (x, y) pairs or dicts; read once.
        recipe: "w4a4" and the like, or a Recipe.
        method: One of `METHODS`: "ttaq" (arXiv:2412.09899, in our form), "pem" or "pcr" alone, "qdrop", "gptq", "rtn".
        pem: In place of the method's PEM, whose noise is measured on the images (20 dB where inputs are none).
        pcr: PCR in the blocks, which no method has by itself.
        refinement: In place of the method's.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.
        progress: Show a bar.
        attention: As in `prepare`: open the attention of libraries, so that its products are quantised.
        safety: Measures that rewrite a transformer first, see `safety.protect`: "auto" takes some where layers break.
        budget: Time to take, "90s", "5min", "1h" or seconds, from the call to the return: as in `reconstruct`, and half
            of it for the whole network where the method refines.
        cache: As in `reconstruct`.
        resume: As in `reconstruct`; the refinement of the whole network, which comes last, begins anew.
        graph: As in `reconstruct`.
        team: Work together with other processes, see `distributed.join`; all of them end with the same bits, which are
            those of one process but for the rounding of sums.
        weights: A .safetensors file of the float weights of a `model` on meta, too large to be held: a layer reads its
            own when it is used, on the device where the batches lie. For "qdrop", "gptq" and "rtn".
        options: Fields of `schedules.Schedule`, such as steps and seed. "ttaq" and "pcr" take half of the steps for
            each block and half of them for the whole network, which lasts about as long as "qdrop" and a half.
            `steps=other.ttaq_report` takes those of another run, which repeats one under a budget.

    Returns:
        The quantised model in eval mode, not yet packed, or under `weights` packed and in host memory; `ttaq_report`
        says what was done.

    Raises:
        ValueError: The model, the recipe or the images do not serve.
    """
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {method!r}")
    start, deadline = time.perf_counter(), Deadline.of(budget)
    extras = {"pem": pem, "pcr": pcr, "refinement": refinement}
    loop = {"budget": deadline, "cache": cache, "resume": resume, "graph": graph}
    given = list(options) + [name for name, value in (extras | loop).items() if value is not None]
    if foreign := [name for name in given if name not in TAKES.get(method, given)]:
        raise ValueError(
            f"quantize: {METHODS[method].partition(',')[0]} takes no {', '.join(foreign)}; use method='ttaq'"
        )
    if weights is not None and (method not in STREAMED or refinement is not None or safety not in ("auto", "off")):
        raise ValueError(
            f"quantize: weights= reads one block at a time, and so takes method {', '.join(STREAMED)} without a "
            f"refinement or measures of safety, got {method!r}; build the model with its weights for the others"
        )
    inputs = collect("quantize", batches, None if weights is not None else device_of(model))
    if weights is None:
        model, secured = secure(model, inputs, safety, recipe, attention=attention, forward=forward)
    else:
        secured = {"asked": safety, "measures": [], "why": "its weights stay in a file"}
    quantised = prepare(model, recipe, attention=attention).eval()
    quantised.ttaq_report["safety"] = secured
    streamed = Streamed(quantised, weights, inputs[0], forward, resume is not None) if weights is not None else None
    _warn_of_few(sum(map(count, inputs)), Recipe.parse(recipe))
    calibrate(quantised, inputs, forward=forward)
    if team:
        team.follow(grid for q in quantizers(quantised) for grid in (q.scale, q.zero))
    settings = {"forward": forward, "progress": progress, "team": team}
    refines = method in ("ttaq", "pcr") or refinement is not None
    if method == "gptq":
        solve(quantised, inputs, pem=pem, cache=cache, **settings, **options)
    elif method != "rtn":
        if method in ("ttaq", "pem"):
            pem = pem or PEM(snr=None if has_images(inputs[0]) else 20.0)
        if method in ("ttaq", "pcr"):
            options = {"statistics": "batch"} | options
            if "steps" in options or not deadline:
                options["steps"] = _part(options.get("steps", Schedule.steps))
        loop["budget"] = deadline.part(SPLIT) if deadline and refines else deadline
        reconstruct(quantised, inputs, pem=pem, pcr=pcr, **settings, **loop, **options)
    if refines:
        refinement = refinement or _matching(quantised.ttaq_report["schedule"], options.get("steps"))
        refine(quantised, inputs, refinement=refinement, budget=deadline, **settings)
    if deadline:
        taken = round(time.perf_counter() - start, 3)
        quantised.ttaq_report["budget"] = {"seconds": deadline.seconds, "taken": taken, "enough": not deadline.missed}
    quantised.ttaq_report["method"] = method
    return streamed.pack() if streamed else quantised


def decisions(report: dict) -> list[str]:
    """Say in sentences what the rules decided: measures of safety, PEM's strength, and whether refinement was kept.

    Args:
        report: `model.ttaq_report`.
    """
    found = explain_safety(report.get("safety") or {})
    if "pilot" in (report.get("pem") or {}):
        pem = report["pem"]
        errors = ", ".join(f"{strength}: {error:.4g}" for strength, error in pem["errors"].items())
        pilot = f"by the error of {pem['pilot']} on perturbed images held out"
        found.append(f"PEM: strength {pem['strength']:g}, {pilot} ({errors})")
    if "refinement" in report:
        held, kept = report["refinement"]["held_out"], report["refinement"]["kept"]
        verb = "kept" if kept else "put back"
        found.append(
            f"refinement: {verb}, divergence from the float model on perturbed images held out {_change(held)}"
        )
    return found


def _change(held):
    return f"{held['before']:.3g} -> {held['after']:.3g}" if held["before"] is not None else "not measured"


def _matching(schedule: dict, given: object) -> Refinement:
    """Make the refinement that goes with a schedule of blocks: its seed, and as many steps, or those given for it."""
    steps = schedule["steps"]
    if isinstance(given, Mapping):
        given = steps_of(given)
        steps = given.get(REFINE) or max(given.values())
    return Refinement(steps=steps, seed=schedule["seed"])


def _part(steps):
    return max(1, round(SPLIT * steps)) if isinstance(steps, int) and steps > 0 else steps


def _warn_of_few(images: int, recipe: Recipe) -> None:
    enough = ENOUGH if recipe.activation and recipe.activation.bits < 8 else ENOUGH_AT_8
    if images < enough:
        widths = str(recipe).partition(",")[0]
        warnings.warn(f"quantize: {images} images are few for {widths}; {enough:,} are known to suffice", stacklevel=3)
