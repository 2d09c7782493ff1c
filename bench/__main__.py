"""`python -m bench run|step|quantize|models|map|compare|report|accuracy|adapters|endurance|overhead|memory|export`."""

import argparse
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from . import accuracy, adapters, endurance, export, machine, memory, models, overhead, quantize, rows, step, tables
from .cases import CASES, cases
from .map import add_command as add_map
from .measure import measure

TESTS = machine.ROOT / "tests"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Measure an op once its tests are green, and append the rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    origin = machine.commit(options.commit) | machine.facts(device)
    if not gate(TESTS / f"test_{options.op}.py"):
        print(f"bench: the tests of {options.op} are not green, so nothing was measured and no row was written")
        return 1
    failed, written = 0, None
    seconds = 0.2 if options.quick or device == "cuda" else 1.0
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)  # deprecated rivals
    for case in cases(options.op, device):
        if (options.quick and not case.quick) or options.case not in case.name:
            continue
        try:
            found = measure(case, device, origin, backend=options.backend, seconds=seconds)
        except RuntimeError as error:  # one case that cannot run here leaves the others standing
            failed += 1
            print(f"bench: {case.op}, {case.name}, {case.dtype}: failed: {error}", file=sys.stderr)
            continue
        written = rows.append(found, options.results)
        print(tables.summary(found), flush=True)
    print(f"{written or 'no row was written'}; {failed} cases failed")
    return 1 if failed or written is None else 0


def time_steps(options: argparse.Namespace) -> int:
    """Time a step of reconstruction on the CPU once its tests are green, and append the rows."""
    origin = machine.commit(options.commit) | machine.facts("cpu")
    if not gate(TESTS / "test_step.py"):
        print("bench: the tests of the step are not green, so nothing was measured and no row was written")
        return 1
    for subject in step.subjects():
        if options.case in subject.name:
            row = step.measure(subject, origin, batch=options.batch, seconds=1.0 if options.quick else 10.0)
            rows.append([row], options.results)
            share = step.products_share(subject, options.batch)
            print(f"{tables.summary([row])}; products are {share:.0%} of ours", flush=True)
            if options.compiled:
                passes = step.compiled(subject, options.batch, 10.0)
                print("; ".join(f"{name} {time * 1e3:.0f} ms" for name, time in passes.items()), flush=True)
    return 0


def gate(tests: Path) -> bool:
    """Run the tests of an op with plain `pytest`, quietly when they pass."""
    if not tests.is_file():
        print(f"bench: there is no {tests}")
        return False
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    pytest = shutil.which("pytest", path=beside)
    if pytest is None:
        raise ValueError('bench: pytest is not installed, and no row is written without it; pip install "ttaq[test]"')
    done = subprocess.run([pytest, "-q", "-x", str(tests)], cwd=machine.ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-40 if done.returncode else -1 :] or [done.stderr.strip()]), flush=True)
    return done.returncode == 0


def compare(options: argparse.Namespace) -> int:
    """Print what changed between two selections of rows."""
    here = options.machine or machine.name("cuda" if torch.cuda.is_available() else "cpu")
    before = rows.select(options.before, here, options.results)
    after = rows.select(options.after or str(options.results / f"{here}.csv"), here, options.results)
    print(tables.compare(before, after), end="")
    return 0


def report(options: argparse.Namespace) -> int:
    """Print the tables of all machines, or of one."""
    paths = sorted(options.results.glob(f"{options.machine or '*'}.csv"))
    if not paths:
        raise ValueError(f"bench: {options.results} holds no rows; `python -m bench run <op>` writes them")
    found = [row for path in paths for row in rows.latest(rows.read(path))]
    text = tables.short(found) if options.short else tables.report(found)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure ttaq against its rivals.")
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="measure one op, after its tests")
    runs.add_argument("op", choices=CASES)
    runs.add_argument("--backend", help="force one implementation")
    runs.add_argument("--quick", action="store_true", help="few cases, little time")
    runs.add_argument("--case", default="", help="only the cases whose name holds this")
    runs.add_argument("--commit", help="of a tree that travels without its history")
    runs.set_defaults(command=run)
    steps = commands.add_parser("step", help="measure a step of reconstruction against the same step in eager torch")
    steps.add_argument("--batch", type=int, default=32, help="images a step")
    steps.add_argument("--quick", action="store_true", help="little time")
    steps.add_argument("--compiled", action="store_true", help="also time a pass of each block under torch.compile")
    steps.add_argument("--case", default="", help="only the blocks whose name holds this")
    steps.add_argument("--commit", help="of a tree that travels without its history")
    steps.set_defaults(command=time_steps)
    compares = commands.add_parser("compare", help="compare two selections: REV, FILE.csv or FILE.csv@REV")
    compares.add_argument("before")
    compares.add_argument("after", nargs="?", help="by default the latest rows of this machine")
    compares.set_defaults(command=compare)
    reports = commands.add_parser("report", help="print the tables for the README")
    reports.add_argument("--short", action="store_true", help="a line for each op")
    reports.add_argument("--output", type=Path, help="write them to a file instead")
    reports.set_defaults(command=report)
    for command in (runs, steps, compares, reports):
        command.add_argument("--results", type=Path, default=rows.RESULTS, help="the folder of the CSV files")
    for command in (compares, reports):
        command.add_argument("--machine", help="the name of a CSV file, without .csv")
    accuracy.add_command(commands)
    adapters.add_command(commands)
    endurance.add_command(commands)
    export.add_command(commands)
    memory.add_command(commands)
    models.add_command(commands)
    overhead.add_command(commands)
    add_map(commands, gate)
    quantize.add_command(commands, gate)
    return parser


if __name__ == "__main__":
    sys.exit(main())
