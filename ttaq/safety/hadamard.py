"""Rotations whose entries are all about as large, so that they spread an outlier over every channel.

Source: Ashkboos et al., QuaRot, arXiv:2404.00456, section 2; Paley, 1933 (orders q + 1, q a prime that is 3 modulo 4).
"""

import torch
from torch import Tensor


def refuses(size: int) -> str | None:
    """Say why there is no Hadamard matrix of a size here; None where there is."""
    if size > 0 and _core(size):
        return None
    return f"{size} is neither a power of two nor one times q + 1, q a prime that is 3 modulo 4"


def hadamard(size: int) -> Tensor:
    """Build an orthogonal matrix with entries ±1 / sqrt(size): Sylvester's doubling of Paley's first construction.

    Args:
        size: 2^k or (q + 1) 2^k: 80, 88, 104, 192, 384, 768, 1024, 1152, 1280, 1408, 1664 and more.

    Returns:
        (size, size), float64.

    Raises:
        ValueError: The size is another.
    """
    if reason := refuses(size):
        raise ValueError(f"hadamard: {reason}; leave this size unrotated")
    core = _core(size)
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core - 1)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix / size**0.5


def spread(size: int, generator: torch.Generator) -> Tensor:
    """Draw a Hadamard rotation: the signs of its columns are random."""
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    return hadamard(size) * signs


def spread_about_mean(size: int, generator: torch.Generator) -> Tensor:
    """Draw a Hadamard rotation that leaves the mean over channels, so that LayerNorm without affine commutes with it.

    ``Q = (1 - 2 u u') H`` with u along ``H 1 - 1``: the reflection takes H 1 back to 1, and then Q 1 = 1. So
    ``LayerNorm(Q x) = Q LayerNorm(x)``, and no LayerNorm has to become an RMSNorm.
    """
    rotation = spread(size, generator)
    away = rotation.sum(1) - 1
    if away.norm() < 1e-9:
        return rotation
    u = away / away.norm()
    return rotation - 2 * torch.outer(u, u @ rotation)


def _core(size):
    """Return the order that is doubled until it is the size: 1, or q + 1; 0 where there is none."""
    core = size
    while core % 2 == 0 and core > 4:
        if _serves(core - 1):
            return core
        core //= 2
    return {1: 1, 2: 1, 4: 1}.get(core, 0)


def _serves(q):
    return q % 4 == 3 and all(q % d for d in range(3, int(q**0.5) + 1, 2))


def _paley(q):
    """Return the Hadamard matrix of order q + 1 with entries ±1 from the squares modulo q."""
    squares = {i * i % q for i in range(1, q)}
    signs = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] = signs[(index[None] - index[:, None]) % q]
    return matrix + torch.eye(q + 1, dtype=torch.float64)
