"""`--config`: a YAML file that holds the arguments and options of one command."""

from difflib import get_close_matches
from pathlib import Path

import typer


def configure(ctx: typer.Context, path: Path | None) -> None:
    """Let a file set what the command line leaves open; the callback of `--config`.

    A key is the name of an argument or option, with - or _; a list stands for what takes several values or has commas.

    Raises:
        ValueError: The file cannot be read, is no mapping, or names what the command does not take.
    """
    if path is None or ctx.resilient_parsing:
        return
    known = {param.name: param for param in ctx.command.params if param.name != "config"}
    ctx.default_map = {}
    for key, value in _read(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else f"see ttaq {ctx.command.name} --help"
            raise ValueError(f"config: {path} sets {key!r}, which ttaq {ctx.command.name} does not take; {hint}")
        ctx.default_map[name] = _plain(path, key, value, known[name])


def _plain(path, key, value, param):
    """Give a value as the command line would: text, a list of texts, or a bool for a flag."""
    several = param.nargs == -1 or getattr(param, "multiple", False)
    if getattr(param, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError(f"config: {key} in {path} must be true or false, got {value!r}")
        return value
    if isinstance(value, dict):
        raise ValueError(f"config: {key} in {path} must be one value or a list, got a mapping")
    if several:
        return [str(one) for one in value] if isinstance(value, list) else [str(value)]
    if value is None:
        return None
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _read(path: Path) -> dict:
    try:
        import yaml
    except ImportError as error:
        raise ValueError('config: a file needs PyYAML; pip install "ttaq[yaml]"') from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config: cannot read {path} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config: {path} is no YAML ({reason}); write lines such as `bits: w4a4`") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} must hold lines such as `bits: w4a4`, got a {type(content).__name__}")
    return content
