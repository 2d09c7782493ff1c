"""Remedies as the command line gives them: what messages say in Python becomes options; near names are suggested."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import typer

_OPTIONS = {"method": "--method", "telemetry": "--telemetry", "bank": "--bank", "measures": "--safety"}
_RECIPE = re.compile(r'Recipe\.parse\("(\w+)"((?:, \w+=\w+)*)\)')
_ARGUMENT = re.compile(rf"(?<![\w/.-])({'|'.join(_OPTIONS)})=([\"']?)([\w-]+)\2(?![\w/.-])")


def as_options(sentence: str) -> str:
    """Write the arguments that a message names, such as ``method="ttaq"``, as options: ``--method ttaq``.

    What no option stands for is left as it is. In messages of `ttaq.adapt` the method is an adapter.
    """
    options = _OPTIONS | ({"method": "--adapter"} if sentence.startswith("adapt: ") else {})
    sentence = _RECIPE.sub(_recipe, sentence)
    return _ARGUMENT.sub(lambda found: f"{options[found[1]]} {found[3]}", sentence)


def _recipe(found: re.Match) -> str:
    pairs = (pair.split("=") for pair in found[2].split(", ") if pair)
    return " ".join([f"--bits {found[1]}", *(f"--{k}" if v == "True" else f"--{k} {v}" for k, v in pairs)])


def suggest(known: Iterable[str]) -> Callable[[typer.CallbackParam, str], str]:
    """Make the callback of an option that refuses a name, or one of several, that is nearly one of `known`.

    A name that is near to none passes: what it is for refuses it.
    """
    known = list(known)

    def check(param: typer.CallbackParam, text: str) -> str:
        for name in (part.strip() for part in text.split(",")):
            if name not in known and (near := get_close_matches(name, known, 1)):
                there = ", ".join(known)
                raise ValueError(f"{param.opts[0]}: there is no {name!r} among {there}; did you mean {near[0]}?")
        return text

    return check
