"""Hooks of mkdocs: pages that are made from the command line's own options and from the README."""

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import typer

ROOT = Path(__file__).parents[1]
KINDS = {Path: "path", list: "one or several", str: "text", int: "whole number", float: "number", bool: "flag"}


def on_page_markdown(markdown: str, **_) -> str:
    """Replace the marks `<!-- commands -->` and `<!-- README: Heading -->` by what they stand for."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", describe_commands())
    return re.sub(r"<!-- README: (.+?) -->", lambda found: section(found[1]), markdown)


def section(heading: str) -> str:
    """Return what stands in the README below a heading of the second level."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0].strip()


def describe_commands() -> str:
    """Write a section for every command: what it does, its arguments and its options."""
    from ttaq.cli import app

    group = typer.main.get_command(app)
    return "\n\n".join([_describe("ttaq", group), *(_describe(f"ttaq {n}", c) for n, c in group.commands.items())])


def _describe(title: str, command) -> str:
    """Write one command as Markdown: usage, help, and a table of its parameters."""
    hints = get_type_hints(command.callback, include_extras=True)
    parameters = [p for p in command.params if p.name in hints]
    arguments = " ".join(_name(p, hints).strip("`") for p in parameters if p.param_type_name == "argument")
    usage = f"{title} [OPTIONS] {'COMMAND ...' if hasattr(command, 'commands') else arguments}".rstrip()
    rows = [f"| {_name(p, hints)} | {_takes(p, hints)} | {_cell(_help(p, hints))} |" for p in parameters]
    table = "\n".join(["| | takes | |", "|---|---|---|", *rows]) if rows else "It takes no options."
    said = "\n".join(line.strip() for line in (command.help or "").splitlines()).strip()
    return f"## {title}\n\n```text\n{usage}\n```\n\n{said}\n\n{table}"


def _name(parameter, hints: dict) -> str:
    """Give an argument's name in capitals, or all that an option is called."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}{'...' if _kind(hints[parameter.name]) is list else ''}`"
    return ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))


def _kind(hint) -> type:
    """Return the plain type below Annotated, Optional and the like."""
    plain = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if get_origin(plain) in (Union, UnionType):
        plain = next(part for part in get_args(plain) if part is not NoneType)
    return get_origin(plain) or plain


def _about(hint):
    """Return what typer was told of a parameter."""
    return next(iter(getattr(hint, "__metadata__", ())), None)


def _help(parameter, hints: dict) -> str:
    return getattr(_about(hints[parameter.name]), "help", None) or ""


def _takes(parameter, hints: dict) -> str:
    """Say what a parameter takes: its kind, bounds, and its default or that it must be given."""
    hint, default = hints[parameter.name], parameter.default
    low, high = (getattr(_about(hint), name, None) for name in ("min", "max"))
    bounds = f" {low} to {high}" if high is not None else f" from {low}" if low is not None else ""
    kind = KINDS[_kind(hint)] + bounds
    if parameter.required:
        return f"{kind}; must be given"
    if default is None or default is False:
        return kind
    return f"{kind}; default `{'on' if default is True else default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
