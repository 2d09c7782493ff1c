"""Read the YAML files of a well-known benchmark of test-time adaptation, and say the same in ttaq's words.

The keys are those of https://github.com/mariodoebler/test-time-adaptation (MODEL.ADAPTATION, SETTING, OPTIM.LR ...).
What a file leaves out has that benchmark's default where the stream is concerned, and ttaq's where the method is.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch.optim import SGD, Adam

from .streams import STREAMS, Stream

SETTINGS = {
    "continual": ("continual", False),
    "reset_each_shift": ("continual", True),
    "gradual": ("gradual", False),
    "mixed_domains": ("mixed", False),
    "correlated": ("correlated", False),
    "reset_each_shift_correlated": ("correlated", True),
    "mixed_domains_correlated": ("mixed-correlated", False),
}
ADAPTATIONS = {
    "norm_test": ("norm", {"statistics": "batch"}),
    "norm_alpha": ("norm", {"statistics": "blend", "alpha": 0.1}),
    "norm_ema": ("norm", {"statistics": "ema"}),
    **{name: (name, {}) for name in ("source", "tent", "eta", "eata", "sar", "deyo", "cotta", "rotta", "roid", "lame")},
}
_EATA = {"EATA.MARGIN_E0": "margin", "EATA.D_MARGIN": "d"}
_TEACHER = {"M_TEACHER.MOMENTUM": "teacher_momentum"}
OPTIONS = {  # of each adaptation: key of the file -> argument of the method
    "norm_alpha": {"BN.ALPHA": "alpha"},
    "eta": _EATA,
    "eata": _EATA | {"EATA.FISHER_ALPHA": "anchor_weight"},
    "sar": {"SAR.RESET_CONSTANT_EM": "recovery", "SAR.RHO": "rho"},
    "deyo": {"DEYO.MARGIN": "margin", "EATA.MARGIN_E0": "weight_margin", "DEYO.PLPD": "plpd",
             "DEYO.AUG_TYPE": "transform"},
    "cotta": _TEACHER | {"COTTA.MT": "teacher_momentum", "COTTA.RST": "restore", "COTTA.AP": "threshold",
                         "TEST.N_AUGMENTATIONS": "views"},
    "rotta": {
        "ROTTA.MEMORY_SIZE": "capacity", "ROTTA.UPDATE_FREQUENCY": "frequency", "ROTTA.NU": "nu",
        "ROTTA.ALPHA": "momentum", "ROTTA.LAMBDA_T": "lambda_t", "ROTTA.LAMBDA_U": "lambda_u",
    },
    "roid": {
        "ROID.MOMENTUM_SRC": "source_momentum", "ROID.MOMENTUM_PROBS": "frequency_momentum",
        "ROID.TEMPERATURE": "temperature", "ROID.USE_PRIOR_CORRECTION": "correct",
    },
    "lame": {"LAME.KNN": "k"},
}  # fmt: skip
_KINDS = {
    "capacity": int,
    "frequency": int,
    "k": int,
    "views": int,
    "transform": str,
    "correct": bool,
}  # all others are floats
_GRADIENT = ("tent", "eta", "eata", "sar", "deyo", "cotta", "rotta", "roid")

# What ttaq does in one way alone: another value is refused.
FIXED = {
    "MODEL.EPISODIC": False, "TEST.WINDOW_LENGTH": 1, "DEYO.PATCH_LEN": 4, "DEYO.REWEIGHT_ENT": True,
    "DEYO.REWEIGHT_PLPD": True, "LAME.AFFINITY": "kNN", "LAME.FORCE_SYMMETRY": False, "ROID.USE_WEIGHTING": True,
    "ROID.USE_CONSISTENCY": True,
}  # fmt: skip
# Where files lie, what is logged, and what the caller brings: the model and the images.
IGNORED = (
    "DATA_DIR", "CKPT_DIR", "SAVE_DIR", "CKPT_PATH", "LOG_DEST", "LOG_TIME", "DESC", "DETERMINISM", "PRINT_EVERY",
    "CUDNN.BENCHMARK", "MODEL.ARCH", "MODEL.WEIGHTS", "TEST.NUM_WORKERS", "SOURCE.NUM_WORKERS", "SOURCE.PERCENTAGE",
    "SOURCE.NUM_SAMPLES", "EATA.NUM_SAMPLES",
)  # fmt: skip
READ = (
    "SETTING", "RNG_SEED", "MODEL.ADAPTATION", "CORRUPTION.DATASET", "CORRUPTION.TYPE", "CORRUPTION.SEVERITY",
    "CORRUPTION.NUM_EX", "TEST.BATCH_SIZE", "TEST.ALPHA_DIRICHLET", "TEST.DELTA_DIRICHLET", "OPTIM.STEPS", "OPTIM.LR",
    "OPTIM.METHOD", "OPTIM.BETA", "OPTIM.MOMENTUM", "OPTIM.DAMPENING", "OPTIM.NESTEROV", "OPTIM.WD",
)  # fmt: skip
KNOWN = {*READ, *IGNORED, *FIXED, *(key for keys in OPTIONS.values() for key in keys)}


@dataclass(frozen=True)
class StreamSettings:
    """Which stream a file asks for.

    Attributes:
        order: A name in `streams.STREAMS`.
        arguments: Of that function, but for the source.
        reset: Whether an adapter is reset where a domain begins, as `evaluate(reset=...)` takes it.
        dataset: As the file names it, "cifar10_c", "imagenet_c" or the like.
    """

    order: str
    arguments: dict[str, Any] = field(default_factory=dict)
    reset: bool = False
    dataset: str = "cifar10_c"

    def make(self, source) -> Stream:
        """Build the stream from clean `Images`, `CifarC`, `ImageNetC` or the like."""
        return STREAMS[self.order](source, **self.arguments)


class Configuration(NamedTuple):
    """What a file asks for: ``adapt(model, method, **options)`` on ``stream.make(source)``."""

    stream: StreamSettings
    method: str
    options: dict[str, Any]


def read_configuration(source: str | os.PathLike | Mapping) -> Configuration:
    """Read a YAML file of the benchmark, or the mapping that it holds.

    Deliberate differences: OPTIM.LR holds for batches of any size (``full_batch=0``); SAR's bound of recovery, given
    for 1,000 classes, scales with ln C; EATA needs ``anchor=`` of the caller, and is ETA where FISHER_ALPHA is 0;
    RNG_SEED is that of the stream alone. Keys of other methods than the one asked for are known, and not used.

    Args:
        source: A path, or a mapping of sections to keys to values.

    Returns:
        Stream settings, the method's name and its options.

    Raises:
        ValueError: A key is unknown, or a value is one that ttaq has no equal of; the sentence names the key.
    """
    values = _flatten(_load(source))
    if unknown := sorted(values.keys() - KNOWN):
        section = unknown[0].rpartition(".")[0]
        near = sorted(key for key in KNOWN if key.rpartition(".")[0] == section) or sorted(READ)
        raise ValueError(f"configuration: {', '.join(unknown)} is not known; take it out, or use {', '.join(near)}")
    for key, only in FIXED.items():
        if key in values and values[key] != only:
            raise ValueError(f"configuration: {key} must be {only}, got {values[key]!r}; ttaq knows no other")
    take = partial(_take, values)
    method, options = _method(values, take)
    return Configuration(_stream(values, take), method, options)


def _method(values, take: Callable) -> tuple[str, dict[str, Any]]:
    adaptation = _choose("MODEL.ADAPTATION", values.get("MODEL.ADAPTATION", "source"), ADAPTATIONS)
    method, options = ADAPTATIONS[adaptation][0], dict(ADAPTATIONS[adaptation][1])
    for key, name in OPTIONS.get(adaptation, {}).items():
        if key in values:
            options[name] = take(key, _KINDS.get(name, float))
    if method == "eata" and options.get("anchor_weight") == 0:
        method = "eta"
        del options["anchor_weight"]
    if method in _GRADIENT and any(key.startswith("OPTIM.") for key in values):
        options |= {"lr": take("OPTIM.LR", float, 1e-3), "full_batch": 0, "optimizer": _optimizer(values, take)}
        if (steps := take("OPTIM.STEPS", int, 1)) != 1:  # not every method takes more
            options["steps"] = steps
    return method, options


def _optimizer(values, take: Callable) -> Callable:
    """Return what makes the optimizer; what is not given has the benchmark's defaults."""
    decay = take("OPTIM.WD", float, 0.0)
    if _choose("OPTIM.METHOD", values.get("OPTIM.METHOD", "Adam"), ("Adam", "SGD")) == "Adam":
        return partial(Adam, betas=(take("OPTIM.BETA", float, 0.9), 0.999), weight_decay=decay)
    momentum, dampening = take("OPTIM.MOMENTUM", float, 0.9), take("OPTIM.DAMPENING", float, 0.0)
    nesterov = take("OPTIM.NESTEROV", bool, True)
    return partial(SGD, momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov)


def _stream(values, take: Callable) -> StreamSettings:
    setting = _choose("SETTING", values.get("SETTING", "continual"), SETTINGS)
    order, reset = SETTINGS[setting]
    dataset = str(values.get("CORRUPTION.DATASET", "cifar10_c"))
    levels = values.get("CORRUPTION.SEVERITY", 5)
    levels = list(levels) if isinstance(levels, list | tuple) else [levels]
    if not levels or (len(levels) > 1 and order != "gradual"):
        raise ValueError(
            f"configuration: CORRUPTION.SEVERITY must be one, got {levels}; only gradual walks through all"
        )
    images = take("CORRUPTION.NUM_EX", int, -1)
    arguments = {
        "severity": max(int(level) for level in levels),
        "images": None if images == -1 else images,
        "batch_size": take("TEST.BATCH_SIZE", int, 128),
        "seed": take("RNG_SEED", int, 1),
        "table": "imagenet" if dataset.startswith("imagenet") else "cifar",
    }
    if "CORRUPTION.TYPE" in values:
        names = values["CORRUPTION.TYPE"]
        arguments["corruptions"] = (names,) if isinstance(names, str) else tuple(names)
    for key in ("TEST.ALPHA_DIRICHLET", "TEST.DELTA_DIRICHLET"):
        if key in values and order in ("correlated", "mixed-correlated"):
            arguments["concentration"] = take(key, float)
    return StreamSettings(order, arguments, reset, dataset)


def _load(source) -> Mapping:
    if isinstance(source, Mapping):
        return source
    try:
        import yaml
    except ImportError as error:
        raise ValueError('configuration: a file needs PyYAML; pip install "ttaq[yaml]"') from error
    try:
        content = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"configuration: cannot read {source} ({error.strerror}); give a YAML file") from error
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"configuration: {source} is no YAML ({reason}); give a file of sections and keys") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"configuration: {source} must hold sections and keys, got {type(content).__name__}; fill it")
    return content


def _flatten(content: Mapping, prefix: str = "") -> dict[str, Any]:
    """Turn sections into dotted keys."""
    found = {}
    for key, value in content.items():
        found |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _take(values, key: str, kind: type, default: Any = None):
    """Read a value; YAML 1.1 takes "1e-3" for text."""
    value = values.get(key, default)
    if kind is str:
        return str(value)
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError(value)
            return value
        number = float(value)
        if kind is int and not number.is_integer():
            raise ValueError(value)
        return kind(number)
    except (TypeError, ValueError) as error:
        wanted = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        raise ValueError(f"configuration: {key} must be {wanted}, got {value!r}; write it so") from error


def _choose(key: str, value: Any, there) -> str:
    if value not in there:
        raise ValueError(f"configuration: {key} must be one of {', '.join(there)}, got {value!r}; use one of them")
    return value
