"""What to quantise, and how finely: QuantSpec for one tensor, Recipe for a model."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase

GRANULARITIES = ("tensor", "channel", "group", "token")
OBSERVERS = ("mse", "minmax", "percentile")


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantised: ``x ~ (code - zero) * scale`` with codes 0 .. 2^bits - 1.

    Args:
        bits: 2 to 8.
        granularity: "tensor": scale (); "channel": (N,) along the output channels of a weight;
            "group": (N, K / group) along the inputs of a linear weight; "token": one scale a row of an activation,
            measured anew on every input.
        group: Inputs that share a scale under "group", else 0.
        symmetric: Put zero at the middle code.
        observer: How a range is chosen: "mse" (least |error|^2.4), "minmax" or "percentile".

    Raises:
        ValueError: A value is outside what is stated here.
    """

    bits: int
    granularity: str = "tensor"
    group: int = 0
    symmetric: bool = False
    observer: str = "mse"

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"QuantSpec: bits must be 2 to 8, got {self.bits}; use 16 in a recipe to keep floats")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"QuantSpec: granularity must be one of {GRANULARITIES}, got {self.granularity!r}")
        if self.group < 0 or (self.granularity == "group") != (self.group > 0):
            raise ValueError(
                f"QuantSpec: granularity {self.granularity!r} does not go with group={self.group}; "
                'use granularity "group" with a positive group, or group=0'
            )
        if self.observer not in OBSERVERS:
            raise ValueError(f"QuantSpec: observer must be one of {OBSERVERS}, got {self.observer!r}")

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Recipe:
    """How a whole model is quantised; `Recipe.parse("w4a4")` for the usual ones.

    Args:
        weight: For every weight, or None to keep weights in float.
        activation: For the input of every layer, or None to keep activations in float.
        first_last: Least bits of the first and the last layer, weights and activations alike; None treats them as the
            others.
        exclude: Name patterns (fnmatch) of layers that stay in float; one alone may be a plain text.
        overrides: Name pattern to "w2a8"-like widths; the last pattern that matches counts.

    Raises:
        ValueError: A width is not known.
    """

    weight: QuantSpec | None
    activation: QuantSpec | None
    first_last: int | None = 8
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
        object.__setattr__(self, "exclude", exclude)
        object.__setattr__(self, "overrides", dict(self.overrides))
        if self.first_last not in (None, 2, 3, 4, 5, 6, 7, 8):
            raise ValueError(
                f"Recipe: first_last must be 2 to 8 bits or None, got {self.first_last!r}; "
                "name the layers in exclude to keep them in float"
            )
        for text in self.overrides.values():
            parse_widths(text)

    @classmethod
    def parse(
        cls, text: "str | Recipe", *, group: int = 0, token: bool = False, symmetric: bool = False, **options
    ) -> "Recipe":  # fmt: skip
        """Read "w4a8" (weight bits, activation bits; 16 keeps floats), or return a Recipe as it is.

        Args:
            text: Such as "w4a4", "w2a4", "w8a8", "w4a16".
            group: Inputs that share a weight scale in linear layers, or 0 for one scale an output channel.
            token: Measure one activation scale a token on every input instead of calibrating one for the tensor.
            symmetric: Put every zero at the middle code, as TensorRT wants; costs activations that are never negative
                half of their codes.
            options: The other fields of Recipe.

        Raises:
            ValueError: The text is not of this form, or a width is not 2 to 8 or 16.
        """
        if isinstance(text, Recipe):
            return text
        w_bits, a_bits = parse_widths(text)
        weight = None if w_bits is None else QuantSpec(w_bits, "group" if group else "channel", group, symmetric)
        activation = None if a_bits is None else QuantSpec(a_bits, "token" if token else "tensor", symmetric=symmetric)
        return cls(weight, activation, **options)

    def specs(self, name: str, *, edge: bool = False) -> tuple[QuantSpec | None, QuantSpec | None]:
        """Give (weight, activation) for the layer called `name`; `edge` marks the first and the last one.

        Overrides win over the policy for the edges, exclusion over both.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return None, None
        weight, activation = self.weight, self.activation
        if edge and self.first_last is not None:
            weight = weight and replace(weight, bits=max(weight.bits, self.first_last))
            activation = activation and replace(activation, bits=max(activation.bits, self.first_last))
        for pattern, text in self.overrides.items():
            if fnmatchcase(name, pattern):
                w_bits, a_bits = parse_widths(text)
                weight = w_bits and replace(self.weight or QuantSpec(8, "channel"), bits=w_bits)
                activation = a_bits and replace(self.activation or QuantSpec(8), bits=a_bits)
        return weight, activation

    def to_json(self) -> dict:
        """Give plain values that `from_json` reads back."""
        return asdict(self) | {"exclude": list(self.exclude)}

    @classmethod
    def from_json(cls, values: dict) -> "Recipe":
        """Read what `to_json` gave."""
        specs = {k: values[k] and QuantSpec(**values[k]) for k in ("weight", "activation")}
        return cls(**values | specs | {"exclude": tuple(values["exclude"])})

    def __str__(self):
        widths = f"w{self.weight.bits if self.weight else 16}a{self.activation.bits if self.activation else 16}"
        return widths if self.first_last is None else f"{widths}, first and last layer at {self.first_last} bits"


def parse_widths(text: str) -> tuple[int | None, int | None]:
    """Read "w4a8" into (4, 8); 16 and 32 mean float, None."""
    found = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower()) if isinstance(text, str) else None
    if not found:
        raise ValueError(f'recipe: wanted a text such as "w4a4" or "w4a16", got {text!r}')
    widths = tuple(int(g) for g in found.groups())
    for bits in widths:
        if bits not in (2, 3, 4, 5, 6, 7, 8, 16, 32):
            raise ValueError(f"recipe {text!r}: bits must be 2 to 8, or 16 to keep floats, got {bits}")
    return tuple(None if bits > 8 else bits for bits in widths)
