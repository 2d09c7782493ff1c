"""What a row says of where it was measured: machine, driver, versions, commit."""

import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def slug(text: str) -> str:
    """Turn the name of a processor into part of a file name: "NVIDIA H200" becomes "h200"."""
    text = re.sub(r"\((r|tm|c)\)|nvidia|\bcpu\b|@.*|\bprocessor\b|\d+-core", " ", text.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", text)) or "unknown"


@cache
def name(device: str) -> str:
    """Name the machine: the GPU, or the processor with the number of threads that torch uses."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name(0))
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{slug(models[0].partition(':')[2] if models else '')}-{torch.get_num_threads()}-threads"


@cache
def facts(device: str) -> dict[str, str]:
    """Return the columns machine, driver, cuda, torch and triton."""
    on_gpu = device == "cuda"
    return {
        "machine": name(device),
        "driver": _driver() if on_gpu else "",
        "cuda": (torch.version.cuda or "") if on_gpu else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def commit(given: str | None = None) -> dict[str, str]:
    """Return the columns commit and dirty; rows that a run adds to bench/results do not make it dirty.

    Args:
        given: The commit of a tree that travels without its history.

    Raises:
        ValueError: Both a history and `given`, or neither.
    """
    found = rev_parse("HEAD")
    if found and given and not found.startswith(given):
        raise ValueError(f"bench: --commit is {given}, the history here says {found}; leave --commit out")
    if not found and not given:
        raise ValueError("bench: this tree has no git history, so a row would not say what it measured; pass --commit")
    if not found:
        return {"commit": given[:12], "dirty": "unknown"}
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": found[:12], "dirty": "yes" if changes else "no"}


def rev_parse(revision: str) -> str | None:
    """Return the full commit of a revision, or None where git knows none."""
    return _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")


def _git(*args):
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.strip().partition("\n")[0]
    except FileNotFoundError:
        return ""


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
