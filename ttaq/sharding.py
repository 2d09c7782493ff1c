"""Images shared out over the processes of a team: which are whose, and where a share lies in the batch of all."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import count, take
from .distributed import Team

__all__ = ["Shard", "Share"]


@dataclass(frozen=True)
class Share:
    """This process's part of one batch: random numbers are drawn for the whole batch and taken where its images lie.

    A process that the batch has no image for takes one that counts nothing, so that all run the same operations.

    Args:
        size: Images of the whole batch.
        places: Where its own lie in it, (n,), on the device.
        picked: Their numbers in this process's stores, (n,), on the device.
        on_host: The same numbers on the host.
        weight: Share of the loss of the whole batch: n over `size`, or 0.
    """

    size: int
    places: Tensor
    picked: Tensor
    on_host: Tensor
    weight: float

    def within(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Run what draws by an element's place in memory on (n k, ...) as it would lie in the whole batch.

        Where the first axis does not count the images it runs on `x` as it is, which draws other numbers.
        """
        if len(x) % len(self.places):
            return run(x)
        rows, order = self._rows(x), _order(x)
        room = self.room(x).permute(order).zero_()
        at = order.index(0)
        whole = room.index_copy(at, rows, x.permute(order)).permute(_inverse(order))
        return self.taken(run(whole), rows)

    def taken(self, whole: Tensor, rows: Tensor | None = None) -> Tensor:
        """Take this share of a whole batch, laid out alike."""
        order = _order(whole)
        part = whole.permute(order).index_select(order.index(0), self._rows(whole, True) if rows is None else rows)
        return part.permute(_inverse(order))

    def room(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return room for the whole batch, laid out as `x` (n k, ...), in the order of its strides."""
        order = _order(x)
        shape = (self.size * len(x) // len(self.places), *x.shape[1:])
        empty = torch.empty([shape[d] for d in order], dtype=dtype or x.dtype, device=x.device)
        return empty.permute(_inverse(order))

    def _rows(self, x, whole=False):
        each = len(x) // (self.size if whole else len(self.places))
        if each == 1:
            return self.places
        return (self.places[:, None] * each + torch.arange(each, device=x.device)).flatten()


class Shard:
    """The images r, r + W, ... of rank r among W processes.

    Args:
        team: The processes.
        total: Images of all of them.

    Raises:
        ValueError: There are fewer images than processes.
    """

    def __init__(self, team: Team, total: int):
        if total < team.size:
            raise ValueError(
                f"distributed: there must be an image for each process, got {total} images for {team.size} processes; "
                "start fewer"
            )
        self.team, self.total = team, total
        self.count = self.below(total)

    def below(self, number: int, rank: int | None = None) -> int:
        """Count the images of a rank, this process's unless it is given, among the first `number` of all."""
        rank = self.team.rank if rank is None else rank
        return max(0, -(-(number - rank) // self.team.size))

    def entries(self, inputs: list) -> list:
        """Take this process's images out of entries of `batches.collect`; entries without any are left out."""
        found, start = [], 0
        for entry in inputs:
            end = start + count(entry)
            mine = [g - start for g in range(start, end) if g % self.team.size == self.team.rank]
            if mine:
                found.append(take(entry, slice(mine[0], None, self.team.size)))
            start = end
        return found

    def rows(self, store: Tensor) -> int:
        """Count the rows of all processes' stores of which this is one.

        Raises:
            ValueError: They do not belong to images, as many to each.
        """
        if len(store) % self.count:
            raise ValueError(
                f"distributed: a block is given {len(store)} rows of {self.count} images, which cannot be shared out; "
                "use one process"
            )
        return self.total * (len(store) // self.count)

    def share(self, picked: Tensor, store: Tensor, device: torch.device) -> Share:
        """Return this process's part of a batch.

        Args:
            picked: Numbers of rows, of all there are, on the host.
            store: One of this process's.
            device: Where the share is used.
        """
        each = len(store) // self.count
        image, row = picked // each, picked % each
        mine = (image % self.team.size == self.team.rank).nonzero().flatten()
        local = (image[mine] // self.team.size) * each + row[mine]
        weight = len(mine) / len(picked)
        if not len(mine):
            mine = local = torch.zeros(1, dtype=torch.int64)
        return Share(len(picked), mine.to(device), local.to(device), local, weight)

    def part(self, piece: slice, store: Tensor, device: torch.device) -> tuple[Share, slice]:
        """Return this process's share of rows `piece` of all, and where it lies in its store."""
        each = len(store) // self.count
        begin, end = (self.below(-(-edge // each)) * each for edge in (piece.start, piece.stop))
        own = slice(begin, end) if end > begin else slice(0, 1)
        numbers, size = torch.arange(own.start, own.stop), piece.stop - piece.start
        return Share(size, numbers.to(device), numbers.to(device), numbers, max(0, end - begin) / size), own

    def first(self, store: Tensor, number: int, device: torch.device) -> Tensor:
        """Return the first `number` rows of all processes' stores, in the order of the images."""
        each = len(store) // self.count
        images = min(self.total, -(-number // each))
        lengths = [self.below(images, rank) for rank in range(self.team.size)]
        mine = store[: lengths[self.team.rank] * each].to(device).contiguous()
        parts = self.team.gather(mine, [length * each for length in lengths])
        whole = torch.empty(images, each, *mine.shape[1:], dtype=mine.dtype, device=device)
        for rank, part in enumerate(parts):
            whole[rank :: self.team.size] = part.view(lengths[rank], each, *mine.shape[1:])
        return whole.flatten(0, 1)[:number]

    def mean(self, total: float | Tensor, rows: float) -> float:
        """Return the mean over all processes of what sums up to `total` over so many rows here."""
        both = torch.tensor([float(total), float(rows)], dtype=torch.float64, device=self.team.device)
        both = self.team.add_up(both)
        return (both[0] / both[1]).item()


def _order(x):
    """Order the axes as they lie in memory, outermost first; those of one element have no place."""
    return sorted(range(x.ndim), key=lambda d: (x.shape[d] > 1, -x.stride(d)))


def _inverse(order):
    return sorted(range(len(order)), key=order.__getitem__)
