"""Read the code blocks of README.md and docs/, and run them as a reader would, at a size that takes seconds."""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

import ttaq
from ttaq import cli
from ttaq.adaptation import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash", "json", "yaml", "text")
SHELL = ("pip ", "ttaq ", "find ", "tar ", "torchrun ", "TTAQ_")

# (pattern, what takes its place, why): the examples name the networks and the times of real work.
SMALLER = [
    (r"timm:vit_\w+", "timm:test_vit --classes classes.txt", "21 and 86 million parameters; three made-up classes"),
    (r'"vit_\w+", pretrained=True', '"test_vit"', "the weights would be downloaded"),
    (r"torchvision:resnet\d+(?=[ ].*--data)", "ttaq.models:ResNet --classes ten.txt --size 32", "11 and 26 million"),
    (r'"torchvision:resnet18"', '"ttaq.models:ResNet"', "as above"),
    (r"from torchvision.models import (resnet\d+)", r"from ttaq.models import ResNet as \1", "as above"),
    (r'weights="DEFAULT"', "", "the weights would be downloaded"),
    (r"model: torchvision:resnet\d+", "model: ttaq.models:ResNet\nclasses: ten.txt\nsize: 32", "as above"),
    (r"budget: 5min", "steps: 2", "five minutes"),
    (r"find /camera", "find camera", "no folder of the tests lies at the root"),
    (r"size=224", "size=32", "as above"),
    (r'table="imagenet", images=200', "images=8", "15 corruptions of 200 images"),
    (r"1, 3, 224, 224", "1, 3, 32, 32", "as above"),
    (r'budget="5min"', "steps=2", "five minutes"),
    (r"--budget 5min", "--steps 2", "five minutes"),
    (r"(ttaq quantize (?!.*--(steps|budget|method (rtn|gptq))).*)", r"\1 --steps 2", "20,000 steps a block"),
    (r"(ttaq evaluate (?!.*--(images|stream)).*)", r"\1 --images 4", "15 corruptions of 1,000 images"),
]
# (pattern, why): not run; of what names a command of ttaq the options are checked.
NOT_RUN = [
    (r"pip install", "it changes the environment; .ci/run and the workflows install"),
    (r"pytest", "it would run itself"),
    (r"ttaq demo", "four minutes; test_demo.py runs it smaller"),
    (r"torchrun", "it starts processes; test_distributed.py runs it"),
    (r"--device cuda", "it needs a GPU"),
    (r"--target tensorrt", "it refuses models that are not symmetric; test_export.py runs it"),
]


@dataclass(frozen=True)
class Block:
    """One block of code: where it starts, its language, and what follows the language on its first line."""

    line: int
    language: str
    title: str
    text: str


def blocks(path: Path) -> list[Block]:
    """List the fenced blocks of a page, and its indented ones that are commands."""
    found, open_fence, indented = [], None, []
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], 1):
        if match := re.match(r"( *)```(\w*)(.*)$", line):
            if open_fence is None:
                open_fence = Block(number, match[2], match[3].strip(), "")
            else:
                found.append(open_fence)
                open_fence = None
        elif open_fence is not None:
            open_fence = Block(open_fence.line, open_fence.language, open_fence.title, open_fence.text + line + "\n")
        elif line.startswith("    "):
            indented.append((number, line[4:]))
        elif indented:
            if indented[0][1].startswith(SHELL):
                found.append(Block(indented[0][0], "bash", "", "".join(f"{text}\n" for _, text in indented)))
            indented = []
    assert open_fence is None, f"{path.name}: a fence is never closed"
    return found


def smaller(text: str) -> str:
    """Put small networks and few steps in the place of real ones."""
    for pattern, small, _ in SMALLER:
        text = re.sub(pattern, small, text)
    return text


def run_page(path: Path, folder: Path, monkeypatch) -> int:
    """Run the blocks of a page one after another in a folder; return how many there were."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    names, count = {"__name__": "page"}, 0
    for block in blocks(path):
        assert block.language in LANGUAGES, f"{path.name}:{block.line}: name the language, one of {LANGUAGES}"
        if block.language in ("python", "yaml") and (title := re.search(r'title="(.+)"', block.title)):
            Path(title[1]).write_text(smaller(block.text) if block.language == "yaml" else block.text, encoding="utf-8")
        elif block.language == "python":
            padding = "\n" * block.line  # so that a traceback names the line of the page
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(padding + smaller(block.text), str(path), "exec"), names)
        elif block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                for command in re.sub(r"\s+# .*", "", smaller(line)).split(" && "):
                    _run_command(command.strip(), f"{path.name}:{block.line}: {command}", monkeypatch)
        elif block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)
        count += block.language != "text"
    return count


def _run_command(command: str, where: str, monkeypatch) -> None:
    if not command:
        return
    if any(re.search(pattern, command) for pattern, _ in NOT_RUN):
        check_options(command, where)
        return
    *before, last = re.split(r" \|\s+", command)
    given = subprocess.run(" | ".join(before), shell=True, check=True, capture_output=True).stdout if before else b""
    last, _, target = re.match(r"(.*?)\s*(>>?\s*(\S+))?$", last).groups()
    forced, words = None, shlex.split(last)
    if words[0].startswith("TTAQ_BACKEND="):  # read when Python starts; here it has
        forced = words.pop(0).partition("=")[2]
    assert words[0] == "ttaq", f"{where}: no command that a test can run; add it to NOT_RUN with a reason"
    with ttaq.backend(forced):
        code, out, err = run_ttaq(words[1:], given, monkeypatch)
    assert code == 0, f"{where}: exit code {code}\n{out}{err}"
    if target:
        with open(target, "a" if ">>" in command else "w", encoding="utf-8") as file:
            file.write(out)


def run_ttaq(words: list[str], given: bytes, monkeypatch) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    held = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(given))))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.app(words, prog_name="ttaq")
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    return 0, out.getvalue(), err.getvalue()


def check_options(command: str, where: str) -> None:
    """Hold the command and the options of a line that is not run to those that there are."""
    words = shlex.split(command)
    if "ttaq" not in words:
        return
    words = words[words.index("ttaq") + 1 :]
    commands = typer.main.get_command(cli.app).commands
    assert words[0] in commands, f"{where}: there is no command {words[0]}"
    known = {option for p in commands[words[0]].params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    unknown = [word for word in words[1:] if word.startswith("--") and word not in known]
    assert unknown == [], f"{where}: no such options"


def sentences() -> list[re.Pattern]:
    """Return a pattern for every text of 18 signs and more in the sources, f-strings with a gap for each value."""
    found = set()
    for path in [*(ROOT / "ttaq").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), ROOT / "setup.py"]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
            id(node) for node in nodes if isinstance(node, ast.JoinedStr)
        }
        for node in nodes:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) else None for p in parts]
            plain = all(text is None or isinstance(text, str) for text in texts)
            if id(node) not in inner and plain and len("".join(filter(None, texts))) >= 18:
                found.add("".join(".*?" if text is None else re.escape(text) for text in texts))
    return [re.compile(pattern) for pattern in sorted(found)]


@contextlib.contextmanager
def forgotten(folder: Path):
    """Forget the modules that a page wrote into its folder, and the methods it named, when it is done."""
    before, methods = set(sys.modules), dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(methods)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(folder) + os.sep):
            del sys.modules[name]
