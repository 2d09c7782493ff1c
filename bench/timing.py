"""Time calls against each other: in turn, over rotated inputs, as quantiles; on a GPU with events and graph replays."""

import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

Call = Callable[[], object]

_SHORTEST_SAMPLE = 200e-6  # seconds; shorter calls are repeated within a sample, so that the clock does not count
_LEAST_ROUNDS, _MOST_ROUNDS = 7, 300
_DISTURBED = 0.1  # share of the cores that other processes may take while a round runs that counts
_JUDGED = 0.1  # seconds; the clock of /proc/stat ticks too slowly to judge shorter rounds
_MOST_SETS = {"cpu": 32, "cuda": 128}


@dataclass(frozen=True)
class Timing:
    """Quantiles of the seconds that one call took."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Timing":
        """Summarise samples, by linear interpolation between the nearest two.

        Raises:
            ValueError: There are no samples.
        """
        samples = sorted(samples)
        if not samples:
            raise ValueError("Timing: wanted at least one sample, got none; time the call first")
        if len(samples) == 1:
            samples *= 2
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(deciles[1], deciles[4], deciles[7])


def in_turn(contestants: dict[str, list[Call]], device: str, seconds: float, graph: bool = False) -> dict[str, Timing]:
    """Time every contestant in the same process, one after the other, round by round.

    The order of a round starts one contestant further each time, so that nobody always follows the same neighbour. On
    the CPU a round during which other processes took a tenth of the cores is taken again, until five times `seconds`
    are lost that way; after that they count, and a line on the standard error says so.

    Args:
        contestants: For each name the same call bound to every set of inputs; the sets are rotated.
        device: "cpu" or "cuda".
        seconds: Aimed at for each contestant; a few rounds are run however long they take.
        graph: On a GPU, capture the calls of all sets in one CUDA graph and time its replays.

    Returns:
        The seconds of one call, by name.
    """
    measure = {name: _sampler(calls, device, graph) for name, calls in contestants.items()}
    samples = {name: [] for name in contestants}
    names, end, patience = list(contestants), time.perf_counter() + seconds * len(contestants), 5 * seconds
    turn = disturbed = 0
    while turn < _LEAST_ROUNDS or (turn < _MOST_ROUNDS and time.perf_counter() < end):
        start, before = turn % len(names), _elsewhere()
        taken = {name: measure[name]() for name in names[start:] + names[:start]}
        if device == "cpu" and _busy_since(before) > _DISTURBED:
            if patience > 0:
                lost = time.perf_counter() - before[1]
                patience, end = patience - lost / len(names), end + lost
                continue
            disturbed += 1
        turn += 1
        for name, seconds_taken in taken.items():
            samples[name].append(seconds_taken)
    if disturbed:
        print(f"bench: other processes ran during {disturbed} of {turn} rounds that count", file=sys.stderr)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _elsewhere():
    """Return the seconds that the cores have spent on other processes, and the time; no cores where none are told."""
    own = os.times()
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system = (int(n) for n in file.readline().split()[1:4])
    except FileNotFoundError:
        return 0.0, time.perf_counter()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.user - own.system, time.perf_counter()


def _busy_since(before):
    """Return the share of the cores that other processes have taken since, or 0 where that was too short to tell."""
    took, now = _elsewhere()
    wall = now - before[1]
    return (took - before[0]) / wall / os.cpu_count() if wall > _JUDGED else 0.0


def sets_needed(set_bytes: int, device: str) -> int:
    """Count the sets of inputs that together do not fit the last cache, so that no call finds its inputs there."""
    return max(2, min(_MOST_SETS[device], math.ceil(2 * cache_bytes(device) / max(1, set_bytes))))


@cache
def cache_bytes(device: str) -> int:
    """Return the size of the last cache of `device`."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    for level in (3, 2):
        try:
            with open(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size", encoding="ascii") as file:
                return int(file.read().strip().removesuffix("K")) << 10
        except FileNotFoundError:
            continue
    return 32 << 20


def _sampler(calls, device, graph):
    """Warm up and return a function that takes one sample: the mean seconds of as many calls as make it long enough."""
    if graph:
        return _replay_sampler(calls)
    clocked = _by_events if device == "cuda" else _by_the_clock
    for call in calls:
        call()
    turns = itertools.cycle(calls)
    shortest = min(clocked(turns, 1) for _ in range(3))
    inner = min(1000, max(1, math.ceil(_SHORTEST_SAMPLE / shortest)))
    return lambda: clocked(turns, inner)


def _replay_sampler(calls):
    """Capture the calls of all sets, one after the other, on the stream that is current."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        written = [call() for call in calls]
    replays = itertools.repeat(lambda: (graph.replay(), written))
    return lambda: _by_events(replays, 1) / len(calls)


def _by_the_clock(turns, count):
    start = time.perf_counter()
    for call in itertools.islice(turns, count):
        call()
    return (time.perf_counter() - start) / count


def _by_events(turns, count):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in itertools.islice(turns, count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / count


@cache
def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Measure the operations a second of a large torch matrix product; int8 by `torch._int_mm`."""
    n = 8192 if device == "cuda" else 1024
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (n, n), dtype=dtype, device=device) for _ in range(2))
        product = torch._int_mm
    else:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = torch.mm
    timing = in_turn({"product": [lambda: product(a, b.T)]}, device, 0.3)["product"]
    return 2 * n**3 / timing.p20


def peak_bytes(call: Call, device: str) -> int:
    """Count the bytes of tensors that a call holds at most beyond those alive before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        held = call()
    del held
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@contextmanager
def _quiet() -> Iterator[None]:
    """Close the standard error of C, to which torch's profiler reports the missing GPU at every start."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
