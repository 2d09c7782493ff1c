"""`python -m bench endurance`: 100,000 images with faults among them, killed and resumed again and again.

A child process adapts a packed model to a stream that is the same each time: runs of images of one class, independent
batches, single images, constant images, images with NaN, empty batches. It writes a line a batch into a journal and its
state every few hundred images; the parent kills it (SIGKILL) after every so many images and starts it anew. At the end
nothing may be missing, what was done twice must be the same bit for bit, and what adapted must be finite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import ttaq
from ttaq.streams import CORRUPTIONS, Corrupted

from . import accuracy, machine
from .grid import append, packed_model

CYCLE = 1000  # images of one corruption, in which all kinds of batches stand
COLUMNS = (
    "commit", "dirty", "machine", "model", "bits", "adapter", "kills", "from", "images", "error", "nan_images",
    "skipped", "events", "resident_mib", "seconds",
)  # fmt: skip


class Planned(NamedTuple):
    """One batch of the stream: which images of the test set, and what is done to them."""

    kind: str
    domain: str
    index: np.ndarray


def plan(images: int, labels: np.ndarray, seed: int = 0) -> Iterator[Planned]:
    """List the batches of a stream, the same each time.

    Of every `CYCLE` images, all under one corruption: 500 in ten runs of 50 images of one class, 300 independent in
    batches of 100, 100 independent of which one image of each batch of 50 has NaN, 50 constant ones, 50 single ones;
    and one empty batch.

    Args:
        images: In all, a multiple of `CYCLE`.
        labels: (n,), of the test set.
        seed: Of the order.

    Yields:
        The batches.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    for cycle in range(images // CYCLE):
        rng = np.random.default_rng([seed, cycle])
        independent = iter(order[(np.arange(500) + 500 * cycle) % len(order)])
        parts = [("run", rng.choice(np.flatnonzero(labels == c), 50)) for c in rng.integers(0, labels.max() + 1, 10)]
        sizes = [("independent", 100)] * 3 + [("nan", 50)] * 2 + [("constant", 50)] + [("single", 1)] * 50
        parts += [(kind, np.array([next(independent) for _ in range(size)])) for kind, size in sizes]
        parts.append(("empty", np.zeros(0, dtype=np.int64)))
        for place in rng.permutation(len(parts)):
            yield Planned(parts[place][0], CORRUPTIONS[cycle % len(CORRUPTIONS)], parts[place][1])


def make(planned: Planned, corrupted: Corrupted) -> tuple[torch.Tensor, np.ndarray]:
    """Return the images of a batch, (n, 3, H, W), faults included, and the labels, (n,)."""
    part = corrupted.domain(planned.domain, 5).take(planned.index if len(planned.index) else np.zeros(1, dtype=int))
    x = part.preprocess(part.pixels())[: len(planned.index)]
    if planned.kind == "nan":
        x[0, :, 0, 0] = float("nan")
    if planned.kind == "constant":
        x[:] = 0.5
    return x, np.array(part.labels[: len(x)])


def child(options: argparse.Namespace) -> int:
    """Adapt from where the state says, writing the journal and the state, until the stream or the process ends."""
    subject, _ = accuracy.open_subject(options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    base = {"model": subject.name, "bits": options.bits, "method": options.method, "steps": options.steps, "seed": 0}
    model, _ = packed_model(subject, Path(options.cache), "cpu", base, options.images)
    torch.manual_seed(0)
    adapter = ttaq.adapt(model, options.adapter, telemetry=10, bank=8)
    folder = Path(options.folder)
    if (folder / "state").exists():
        adapter.resume(folder / "state")
    corrupted = Corrupted(subject.test, seed=0, cache=False)
    begun, saved = adapter.steps + adapter.skipped, adapter.images
    with (folder / "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write("\n")  # ends a line that a kill may have cut short
        for number, planned in enumerate(plan(options.stream_images, np.array(subject.test.labels))):
            if number < begun:
                continue
            x, labels = make(planned, corrupted)
            logits = adapter(x)
            step = adapter.history[-1]
            line = {
                "batch": number,
                "kind": planned.kind,
                "images": len(x),
                "wrong": int((logits.argmax(1).numpy() != labels).sum()) if planned.kind != "constant" else 0,
                "nan_images": int(logits.isnan().any(1).sum()),
                "digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16],
                "skipped": step.reason,
                "events": [event.partition(" (")[0].partition(":")[0] for event in step.events],
                "resident_mib": round(_resident() / 2**20, 1),
            }
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            if adapter.images - saved >= options.save_every:
                adapter.save(folder / "state")
                saved = adapter.images
    adapter.save(folder / "state")
    live = adapter.method.tensors()
    print(json.dumps({"state": digest(live.values()), "finite": all(t.isfinite().all().item() for t in live.values())}))
    return 0


def run(options: argparse.Namespace) -> int:
    """Drive the child; judge the journal; append a row for every 5,000 images. Status 1 where a demand failed."""
    if options.child:
        return child(options)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    kills, start, final = 0, time.perf_counter(), None
    while final is None:
        until = (kills + 1) * options.kill_every
        done = _drive(options, folder, until if 0 < until < options.stream_images else 0)
        kills, final = (kills + 1, None) if done is None else (kills, json.loads(done))
    lines = read(folder / "journal.jsonl")
    failures = judge(lines, options.stream_images, final)
    whole = list({line["batch"]: line for line in lines}.values())
    facts = machine.commit(options.commit) | {"machine": machine.facts("cpu")["machine"], "model": options.model}
    facts |= {"bits": options.bits, "adapter": options.adapter, "kills": kills}
    seconds = round(time.perf_counter() - start, 1)
    for row in summarise(whole, 5000):
        append(
            facts | row | {"seconds": seconds},
            Path(options.out or machine.ROOT / "bench/results/endurance.csv"),
            COLUMNS,
        )
    error = 100 * sum(line["wrong"] for line in whole) / sum(n["images"] for n in whole if n["kind"] != "constant")
    print(f"{sum(line['images'] for line in whole)} images, {len(whole)} batches, {kills} kills, {seconds:.0f} s")
    print(f"done again after kills: {len(lines) - len(whole)} batches; error {error:.2f} %; state {final['state']}")
    print(flatness(lines))
    print("\n".join(failures) or "nothing lost, nothing not finite")
    if options.figure:
        draw(lines, Path(options.figure), f"{options.model} {options.bits}, {options.adapter}, {kills} kills")
    return bool(failures)


def _drive(options, folder, kill_at):
    """Run a child, killed once the journal has so many images; return its last line, None where it was killed."""
    command = [sys.executable, "-m", "bench", *sys.argv[1:], "--child"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=machine.ROOT)
    journal = folder / "journal.jsonl"
    while process.poll() is None:
        time.sleep(0.5)
        if kill_at and _count(journal) >= kill_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None
    output = process.stdout.read().strip()
    if process.returncode or not output:
        raise ValueError(f"bench endurance: the child ended with status {process.returncode}; see its error above")
    return output.splitlines()[-1]


def _count(journal):
    return sum({line["batch"]: line["images"] for line in read(journal)}.values()) if journal.exists() else 0


def read(journal: Path) -> list[dict]:
    """Return the lines of a journal; one that a kill cut short is none, its batch is done again."""
    lines = []
    for text in journal.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def judge(lines: list[dict], images: int, final: dict) -> list[str]:
    """Return in words what is missing, differs when done again, or is not finite."""
    by = {}
    failures = []
    for line in lines:
        first = by.setdefault(line["batch"], line)
        if first["digest"] != line["digest"]:
            failures.append(f"batch {line['batch']} differs when it is done again")
    if sorted(by) != list(range(len(by))) or sum(line["images"] for line in by.values()) != images:
        failures.append(f"{images - sum(line['images'] for line in by.values())} images are missing")
    strange = [n for n, line in by.items() if line["nan_images"] != (line["kind"] == "nan")]
    if strange:
        failures.append(f"NaN logits for sound images in the batches {strange[:5]}")
    if not final["finite"]:
        failures.append("what adapted is not finite at the end")
    return failures


def summarise(lines: list[dict], every: int) -> Iterator[dict]:
    """Return what a row holds for each `every` images."""
    group: list[dict] = []
    begun = 0
    for line in lines:
        group.append(line)
        images = sum(one["images"] for one in group)
        if images >= every:
            counted = [one for one in group if one["kind"] != "constant"]
            events = Counter(event for one in group for event in one["events"])
            yield {
                "from": begun,
                "images": images,
                "error": round(100 * sum(o["wrong"] for o in counted) / sum(o["images"] for o in counted), 2),
                "nan_images": sum(one["nan_images"] for one in group),
                "skipped": sum(one["skipped"] is not None for one in group),
                "events": "; ".join(f"{count} x {kind}" for kind, count in sorted(events.items())),
                "resident_mib": max(one["resident_mib"] for one in group),
            }
            begun, group = begun + images, []


def flatness(lines: list[dict]) -> str:
    """Say how resident memory went within the longest life of a process: medians of its second tenth and its last."""
    lives, before = [[]], -1
    for line in lines:
        if line["batch"] <= before:
            lives.append([])
        lives[-1].append(line["resident_mib"])
        before = line["batch"]
    life = max(lives, key=len)
    tenth = max(1, len(life) // 10)
    early, late = statistics.median(life[tenth : 2 * tenth] or life), statistics.median(life[-tenth:])
    return (
        f"resident MiB in the longest of {len(lives)} lives: {early:.1f} early, {late:.1f} late, most {max(life):.1f}"
    )


def draw(lines: list[dict], path: Path, title: str) -> None:
    """Draw resident memory and error along the stream."""
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.2), sharex=True, layout="constrained")
    seen = np.cumsum([line["images"] if line["batch"] > before["batch"] else 0
                      for before, line in zip([{"batch": -1}, *lines], lines, strict=False)])  # fmt: skip
    above.plot(seen, [line["resident_mib"] for line in lines], color="#2f80d0", linewidth=0.8)
    above.set(ylabel="resident, MiB", title=title, ylim=(0, None))
    rows = list(summarise(list({line["batch"]: line for line in lines}.values()), CYCLE))
    below.plot([row["from"] + row["images"] for row in rows], [row["error"] for row in rows], color="#ea7a34")
    below.set(ylabel="error, % (each 1,000 images)", xlabel="images", ylim=(0, 100))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def digest(tensors) -> str:
    """Return a short hash of the bits of tensors."""
    return hashlib.sha256(b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def _resident():
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def add_command(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("endurance", help="100,000 images with faults, killed and resumed")
    accuracy.add_subject(parser)
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--adapter", default="tent")
    parser.add_argument("--stream-images", type=int, default=100_000, help="a multiple of 1,000")
    parser.add_argument("--kill-every", type=int, default=10_000, help="images; 0 never kills")
    parser.add_argument("--save-every", type=int, default=500, help="images from one state to the next")
    parser.add_argument("--folder", default=str(machine.ROOT / ".cache/endurance"), help="of journal and state; empty")
    parser.add_argument("--figure", help="a PNG of memory and error")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(command=run)
