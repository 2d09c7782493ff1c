"""The application: what all commands share, how it refuses, and the options that several of them have."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import __version__
from ..adaptation import METHODS
from ..pipeline import METHODS as LEARNING
from ..report import Results, find, tabulate
from ..streams import CORRUPTIONS, STREAMS
from ..workbench import ANCHORED
from ._settings import configure
from ._wording import as_options, suggest

EXIT_CODES = (
    "Exit codes: 0 done; 1 a fault that ttaq did not foresee, with its traceback; 2 a call or an input that is "
    "refused, in one sentence on stderr; 130 interrupted. `ttaq adapt` saves its state on SIGTERM and SIGINT, and "
    "ends with 0."
)


class _Sentences(TyperGroup):
    """Commands whose bad input ends in one sentence and exit code 2."""

    def invoke(self, ctx):
        """Run the command; turn what it refuses, and what it warns of, into sentences."""
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            try:
                return super().invoke(ctx)
            except (ValueError, OSError, ImportError) as error:
                say(as_options(str(error)))
                raise typer.Exit(2) from error
            except KeyboardInterrupt as error:
                say("interrupted")
                raise typer.Exit(130) from error


app = typer.Typer(cls=_Sentences, no_args_is_help=True, pretty_exceptions_enable=False)


def say(sentence: str) -> None:
    """Print a sentence on stderr, on one line however narrow the terminal."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"ttaq: {sentence}")


def _warn(message, category, filename, lineno, file=None, line=None):
    """Show a warning of ours as a sentence, without the line of code that it comes from."""
    if category is UserWarning:
        say(f"warning: {as_options(str(message))}")
    else:
        say(warnings.formatwarning(message, category, filename, lineno, line).strip())


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ttaq {__version__}")
        raise typer.Exit()


@app.callback(
    help="Quantise vision models to 2-8 bits, and keep them accurate while the world they look at changes.",
    epilog=EXIT_CODES,
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def _complete(*names):
    """Offer names to the shell, and the next one after a comma."""

    def offer(incomplete: str):
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in names if name.startswith(last)]

    return offer


File = Annotated[Path, typer.Argument(help="A checkpoint that `ttaq quantize` wrote.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same numbers.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Data = Annotated[Path, typer.Option(help="Class folders or an .npz file; evaluate also takes CIFAR-C and ImageNet-C.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Model = Annotated[str | None, typer.Option(help="What builds the architecture, if not what the file says.")]
Side = Annotated[int | None, typer.Option(min=1, help="Side of the images; default: what the file says.")]
Classes = Annotated[
    Path | None, typer.Option(help="Text file: one class folder's name a line, in the order of the model's outputs.")
]
Triple = Annotated[
    str | None,
    typer.Option(help="Three numbers with commas between, of each channel, in 0..1.", rich_help_panel="Images"),
]
Method = Annotated[
    str,
    typer.Option(
        help="ttaq, pem, pcr, qdrop, gptq (seconds a block) or rtn (round to nearest).",
        autocompletion=_complete(*LEARNING),
        callback=suggest(LEARNING),
    ),
]
Adapter = Annotated[
    str,
    typer.Option(help=f"{', '.join(METHODS)}.", autocompletion=_complete(*METHODS), callback=suggest(METHODS)),
]
Adapters = Annotated[
    str,
    typer.Option(
        help=f"One, or several with commas between: {', '.join(METHODS)}.",
        autocompletion=_complete(*METHODS),
        callback=suggest(METHODS),
    ),
]
Anchor = Annotated[
    Path | None,
    typer.Option(
        help=f"Clean images, class folders or an .npz file, a few hundred of which {ANCHORED} take for the source."
    ),
]
Order = Annotated[
    str,
    typer.Option(
        help=f"clean, corruptions (all, one after another), {', '.join(STREAMS)}, or names with commas between.",
        autocompletion=_complete("clean", "corruptions", *STREAMS, *CORRUPTIONS),
    ),
]
Settings = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=configure,
        is_eager=True,
        help="YAML file of arguments and options by name; what the command line says counts more.",
    ),
]


def print_results(results: Results) -> None:
    """Print the table of results, what it says, and the notes."""
    console = Console(highlight=False)
    console.print(tabulate(results, console.width))
    for sentence in [*find(results), *results.notes]:
        console.print(f"• {sentence}", markup=False)


def progress_console(quiet: bool) -> Console | None:
    """Return where bars go, None for nowhere."""
    return None if quiet else Console(stderr=True)


def triple(name: str, text: str | None) -> tuple[float, ...] | None:
    """Read three numbers; refuse anything else, naming the option."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"--{name}: wanted three numbers in 0..1 such as 0.485,0.456,0.406, got {text!r}")
    return values


def names(path: Path | None) -> list[str] | None:
    """Read a text file of one name a line."""
    return None if path is None else path.read_text(encoding="utf-8").splitlines()
