"""Many processes that quantise one model together, by torch.distributed: NCCL between GPUs, Gloo between CPUs."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Team", "join", "placed"]

_WAIT = 600.0  # seconds that a process waits for the others, as at the checkpoint that one of them writes


class Team:
    """The processes of one job, each of which runs the same verbs on the same images and weights.

    Args:
        rank: Of this process, from 0.
        size: How many there are.
        device: That of this process.
    """

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank, self.size, self.device = rank, size, device

    @property
    def leads(self) -> bool:
        """Whether this is the process that shows and writes."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place; all of them get the same bits."""
        self._run(dist.all_reduce, tensor)
        return tensor

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, through which gradients flow back to what each of them gave."""
        return _Sum.apply(tensor, self)

    def add_up_gradients(self, parameters: Iterable[Tensor], loss: Tensor) -> Tensor:
        """Sum the gradients of parameters, and a loss (), in one bucket of float32; return the loss."""
        grads = [p.grad for p in parameters if p.grad is not None]
        bucket = self.add_up(torch.cat([t.detach().float().flatten() for t in (*grads, loss)]))
        *parts, total = bucket.split([g.numel() for g in grads] + [1])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return total[0]

    def gather(self, tensor: Tensor, lengths: list[int]) -> list[Tensor]:
        """Return what each process holds, (lengths[r], ...) of rank r; every process gets all of it."""
        most = max(lengths)
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in lengths]
        self._run(dist.all_gather, found, padded)
        return [part[:length] for part, length in zip(found, lengths, strict=True)]

    def share(self, value: object) -> list:
        """Return what each process gives here, rank by rank: plain values, sent between the job's own processes."""
        found: list = [None] * self.size
        self._run(dist.all_gather_object, found, value)
        return found

    @torch.no_grad()
    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Take over the first process's values, in place."""
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            self._run(dist.broadcast, whole, 0)
            tensor.copy_(whole)

    def choose(self, number: float) -> float:
        """Return the first process's number: what a clock says must be the same for all."""
        held = torch.tensor([number], dtype=torch.float64, device=self.device)
        self.follow([held])
        return held.item()

    def agree(self, verb: str, what: str, tensors: Iterable[Tensor]) -> None:
        """Compare a checksum of tensors over the processes.

        Raises:
            ValueError: It is not the same everywhere; all processes raise it.
        """
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(self.device)
        others = self.gather(mine, [len(mine)] * self.size)
        if odd := [rank for rank, other in enumerate(others) if not torch.equal(other, others[0])]:
            raise ValueError(
                f"{verb}: the processes disagree about {what}: rank {odd[0]} has other codes than rank 0; give all of "
                "them the same images, weights and kind of device"
            )

    def _run(self, collective, *args):
        try:
            collective(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConnectionError(
                f"distributed: rank {self.rank} of {self.size} lost another process ({reason}); start the job again, "
                "and with resume= it goes on from the last block that is done"
            ) from error


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, team):
        ctx.team = team
        return team.add_up(tensor.clone())

    @staticmethod
    def backward(ctx, grad):
        return ctx.team.add_up(grad.clone(memory_format=torch.contiguous_format)), None


def placed() -> tuple[int, int]:
    """Return (rank, size) as torchrun says in RANK and WORLD_SIZE; (0, 1) where it says nothing."""
    size = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else 1
    return (int(os.environ["RANK"]), size) if size > 1 else (0, 1)


@contextmanager
def join(device: str = "cpu", *, wait: float = _WAIT) -> Iterator[Team | None]:
    """Join the other processes of a job that torchrun started, and leave them at the end.

    Args:
        device: "cpu", or "cuda" for the GPU that LOCAL_RANK names.
        wait: Seconds after which a process that hears nothing of the others gives up.

    Yields:
        The team; None in a job of one process.

    Raises:
        ConnectionError: Another process is gone.
    """
    rank, size = placed()
    if size == 1:
        yield None
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", dist.get_node_local_rank(0))
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=wait))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(f"distributed: rank {rank} of {size} found no others ({reason}); use torchrun") from error
    try:
        yield Team(rank, size, place)
    except BaseException:
        if backend == "gloo":  # NCCL would wait for those that are gone
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
