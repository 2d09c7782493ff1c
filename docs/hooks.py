"""Hooks of mkdocs: pages that are made from the command line's own options and from the README."""

import re
from pathlib import Path

import typer

ROOT = Path(__file__).parents[1]


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
    parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = " ".join(_usage(p) for p in parameters if p.param_type_name == "argument")
    follows = "COMMAND ..." if hasattr(command, "commands") else arguments
    usage = f"```text\n{title} [OPTIONS] {follows}".rstrip() + "\n```"
    rows = [f"| {_name(p)} | {_cell(_takes(p))} | {_cell(getattr(p, 'help', '') or '')} |" for p in parameters]
    table = "\n".join(["| | takes | |", "|---|---|---|", *rows]) if rows else "It takes no options."
    return f"## {title}\n\n{usage}\n\n{_text(command.help or '')}\n\n{table}"


def _usage(parameter) -> str:
    many = "..." if parameter.nargs == -1 else ""
    return f"{parameter.name.upper()}{many}"


def _name(parameter) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_usage(parameter)}`"
    return ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))


def _takes(parameter) -> str:
    """Say what a parameter takes: its kind, bounds, and its default or that it must be given."""
    low, high = getattr(parameter.type, "min", None), getattr(parameter.type, "max", None)
    bounds = f" {low} to {high}" if high is not None else f" from {low}" if low is not None else ""
    kind = "" if getattr(parameter, "is_flag", False) else parameter.type.name.partition(" ")[0] + bounds
    default = getattr(parameter, "default", None)
    if parameter.required:
        return f"{kind}, must be given"
    shown = "" if default in (None, False, True) else f"{', ' if kind else ''}default `{default}`"
    return (kind + shown) or ("on unless told otherwise" if default is True else "flag")


def _text(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines()).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
