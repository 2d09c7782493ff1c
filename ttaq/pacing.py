"""A time budget: read, shared out over the blocks by what their steps cost, and found too small."""

import re
import time
import warnings
from collections.abc import Callable, Mapping

import torch

__all__ = [
    "FEWEST",
    "MOST",
    "PILOT",
    "REFINE",
    "Deadline",
    "Pace",
    "now",
    "seconds_of",
    "steps_of",
    "time_calls",
]

FEWEST = 20  # steps that a block gets however little time there is
MOST = 20_000  # steps that a block gets unless steps= says otherwise: what published block reconstruction takes
PILOT, REFINE = "(pilot)", "(refine)"  # beside the names of blocks: no module can be called so
_LONG = 0.1  # seconds
_UNITS = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


def seconds_of(budget: str | float) -> float:
    """Read a time: 90, "90s", "5min", "1h", "1h30min".

    Raises:
        ValueError: It is none, or not above 0.
    """
    total = float(budget) if isinstance(budget, int | float) and not isinstance(budget, bool) else 0.0
    if isinstance(budget, str):
        text = budget.strip().lower()
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
        whole = re.fullmatch(r"(\d+(?:\.\d+)?\s*[a-z]*\s*)+", text)
        known = whole and all(unit in _UNITS for _, unit in parts)
        total = sum(float(number) * _UNITS[unit] for number, unit in parts) if known else 0.0
    if not 0 < total < float("inf"):
        raise ValueError(f'budget: wanted seconds above 0, or "90s", "5min" or "1h", got {budget!r}')
    return total


class Deadline:
    """A moment at which work is to be done.

    Args:
        budget: As for `seconds_of`, from now on.
    """

    def __init__(self, budget: str | float):
        self.seconds = seconds_of(budget)
        self._end = time.perf_counter() + self.seconds
        self._whole: Deadline | None = None
        self._missed = False

    @classmethod
    def of(cls, budget: "str | float | Deadline | None") -> "Deadline | None":
        """Take what a verb was given: a budget, one that another verb has begun, or none."""
        return budget if budget is None or isinstance(budget, Deadline) else cls(budget)

    @property
    def left(self) -> float:
        """Seconds until then; below 0 afterwards."""
        return self._end - time.perf_counter()

    @property
    def missed(self) -> bool:
        """Whether it was found too early."""
        return (self._whole or self)._missed

    def part(self, share: float) -> "Deadline":
        """Return the deadline of a share of the time that is left."""
        part = Deadline(max(share * self.left, 1e-6))
        part._whole = self
        return part

    def spend(self, seconds: float) -> None:
        """Count time that was spent before this process began."""
        self._end -= seconds
        if self._whole:
            self._whole.spend(seconds)

    def miss(self, verb: str, needed: str) -> None:
        """Warn, once for all parts of a budget, that it was too small."""
        whole = self._whole or self
        if not whole._missed:
            whole._missed = True
            warnings.warn(f"{verb}: the budget of {whole.seconds:.3g} s is too small for {needed}", stacklevel=2)


class Pace:
    """Shares the time out: every block gets as many steps as fit for it and all blocks ahead.

    Args:
        deadline: When all blocks are to be done.
        costs: Seconds of a step of each block by name, as tried before, in the order in which they are learned.
        most: Steps that a block gets at most.
    """

    def __init__(self, deadline: Deadline, costs: dict[str, float], most: int):
        self.deadline, self.costs, self.most = deadline, dict(costs), most
        self._other = self._done = 0.0  # seconds beside the steps, and the cost of the blocks that took them
        self._planned = self._taken = 0.0  # seconds of the steps of the blocks that are done
        self._next = 0.0  # those foreseen for the next block
        self.short = False

    def open(self, verb: str) -> None:
        """Warn before hours go by if even the fewest steps take longer than there is time."""
        fewest, count = min(FEWEST, self.most), len(self.costs)
        needed = fewest * sum(self.costs.values())
        if needed > self.deadline.left:
            steps = f"{fewest} steps in each of {count} blocks, about {needed:.3g} s"
            self.deadline.miss(verb, f'{steps} beside all else; take more time or method="gptq"')

    def steps(self, name: str, seconds: float | None = None) -> int:
        """Choose the steps of the next block.

        Args:
            name: Of the block.
            seconds: Of a step in the form in which it will run, where that is another than was tried.
        """
        ahead, fewest = sum(self.costs.values()), min(FEWEST, self.most)
        other = self._other / self._done * ahead if self._done else 0.0
        slower = 1.0 if seconds is None else seconds / self.costs[name]
        slower = self._taken / self._planned if self._planned else slower
        wanted = (self.deadline.left - other) / (ahead * max(slower, 1e-9))
        self.short |= wanted < fewest
        chosen = max(min(int(wanted), self.most), fewest)
        self._next = chosen * self.costs[name]
        return chosen

    def end(self, name: str, seconds: float, learning: float) -> None:
        """Note that a block is done, and took so many seconds, so many of them in its steps.

        Both are 0 where another process learned it.
        """
        if seconds:
            self._other += seconds - learning
            self._done += self.costs[name]
            self._taken += learning
            self._planned += self._next
        self._next = 0.0
        del self.costs[name]

    def close(self, verb: str, count: int) -> None:
        """Warn if blocks got more steps than there was time for."""
        if self.short:
            fewest = min(FEWEST, self.most)
            self.deadline.miss(verb, f"{fewest} steps in each of {count} blocks; take more time or fewer images")


def steps_of(given: Mapping) -> dict[str, int]:
    """Read how many steps each block is to take, or took: so a run under a budget is repeated bit for bit.

    Args:
        given: Steps by block, those of a pilot run of PEM's rule under `PILOT` and those of the whole network under
            `REFINE`; or a whole `ttaq_report`.

    Raises:
        ValueError: There are none, or not whole numbers.
    """
    if isinstance(given.get("blocks"), list):
        report, given = given, {row["name"]: row["steps"] for row in given["blocks"]}
        if "pilot_steps" in (report.get("pem") or {}):
            given[PILOT] = report["pem"]["pilot_steps"]
        if "refinement" in report:
            given[REFINE] = report["refinement"]["steps"]
    if not given or not all(isinstance(n, int) and n >= 0 for n in given.values()):
        raise ValueError(f"steps: wanted a number, whole numbers by block, or a ttaq_report, got {given!r}")
    return dict(given)


def time_calls(run: Callable[[], object], times: int | None = None) -> float:
    """Return the seconds that a call takes, after a first one that is not counted; short ones are repeated.

    Args:
        run: What is timed.
        times: How often; None goes by the clock.
    """
    run()
    start, calls, taken = now(), 0, 0.0
    while calls < (times or 3) and (times or taken < _LONG):
        run()
        calls, taken = calls + 1, now() - start
    return taken / calls


def now() -> float:
    """Return the time at which all that was asked of the devices is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
