"""A time budget: read, shared out over the blocks in proportion to what they cost, and found too small."""

import re
import time
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from .batches import Forward, call
from .blocks import Block
from .quantizers import disabled

__all__ = [
    "FEWEST",
    "MOST",
    "PILOT",
    "REFINE",
    "Deadline",
    "Pace",
    "block_costs",
    "seconds_of",
    "steps_of",
    "time_calls",
]

FEWEST = 20  # steps that a block gets however little time there is
MOST = 20_000  # steps that a block gets unless steps= says otherwise: what published block reconstruction takes
PILOT, REFINE = "(pilot)", "(refine)"  # beside the names of blocks: no module can be called so
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
    """Shares the time out: every block gets steps in proportion to the time left and to what it costs.

    Args:
        deadline: When all blocks are to be done.
        costs: Of each block by name, in any unit, in the order in which they are learned.
        most: Steps that a block gets at most.
    """

    def __init__(self, deadline: Deadline, costs: dict[str, float], most: int):
        self.deadline, self.costs, self.most = deadline, dict(costs), most
        self._other = self._done = 0.0  # seconds beside the steps, and the cost of the blocks that took them
        self._planned = 0.0  # seconds of the steps of the next block
        self.short = False

    def steps(self, name: str, seconds: float) -> int:
        """Choose the steps of the next block, one of which takes so many seconds."""
        ahead = sum(self.costs.values())
        other = self._other / self._done * ahead if self._done else 0.0
        wanted = (self.deadline.left - other) * self.costs[name] / ahead / max(seconds, 1e-9)
        fewest = min(FEWEST, self.most)
        self.short |= wanted < fewest
        chosen = max(min(int(wanted), self.most), fewest)
        self._planned = chosen * seconds
        return chosen

    def end(self, name: str, seconds: float) -> None:
        """Note that a block is done, and took so many seconds; 0 where another process learned it."""
        if seconds:
            self._other += max(0.0, seconds - self._planned)
            self._done += self.costs[name]
        self._planned = 0.0
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


@torch.no_grad()
def block_costs(model: nn.Module, blocks: list[Block], entry: object, forward: Forward | None) -> dict[str, float]:
    """Time every block in one pass of the float model.

    Returns:
        Block to its share of the sum, never 0.
    """
    begun, taken, hooks = {}, {}, []

    def begin(name):
        def note(*_):
            begun.setdefault(name, _now())

        return note

    def end(name):
        def note(*_):
            if name in begun:
                taken.setdefault(name, _now() - begun[name])

        return note

    for block in blocks:
        modules = block.resolve(model)
        hooks.append(modules[0].register_forward_pre_hook(begin(block.name)))
        hooks.append(modules[-1].register_forward_hook(end(block.name)))
    try:
        with disabled(model):
            call(model, entry, forward)
    finally:
        for hook in hooks:
            hook.remove()
    total = sum(taken.values()) or 1.0
    return {block.name: max(taken.get(block.name, 0.0) / total, 1e-3 / len(blocks)) for block in blocks}


def time_calls(run, count: int = 3) -> float:
    """Return the seconds that a call takes, on average, after a first one that is not counted."""
    run()
    start = _now()
    for _ in range(count):
        run()
    return (_now() - start) / count


def _now():
    """Return the time at which all that was asked of the devices is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
