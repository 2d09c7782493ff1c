"""Train the demo's small networks once, and keep them: a residual CNN and a vision transformer."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .files import fingerprint, write_atomically


@dataclass(frozen=True)
class Training:
    """How a network is trained: AdamW, one cosine with a short warm-up, small affine distortions.

    Args:
        epochs: Walks through the images.
        batch_size: Images a step.
        lr: The highest rate.
        weight_decay: Of the matrices; vectors are spared.
        turn: Largest rotation, degrees.
        stretch: Largest relative change of size.
        shift: Largest shift, as a share of the side.
        smoothing: Of the labels.
        seed: Of the initial weights, the order and the distortions.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05
    turn: float = 8.0
    stretch: float = 0.08
    shift: float = 0.06
    smoothing: float = 0.05
    seed: int = 0


def fetch_trained(
    build: Callable[[], nn.Module],
    images,
    training: Training,
    folder: str | Path,
    name: str,
    *,
    progress: Callable[[int], object] | None = None,
) -> tuple[nn.Module, Path]:
    """Read a trained network from its file, or train it and write the file.

    Args:
        build: Makes the network with fresh weights.
        images: `streams.Images` to learn from.
        training: Part of the file's name, as a hash, together with the architecture.
        folder: Where the file is or goes.
        name: What the file's name begins with.
        progress: Called with 1 after each epoch.

    Returns:
        The network in eval mode, and its file.

    Raises:
        ValueError: The file is there and cannot be read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = build()
    key = json.dumps([fingerprint(model), asdict(training), len(images)])
    path = Path(folder) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if path.is_file():
        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"training: {path} cannot be read ({error}); delete it to train again") from error
        return model.eval(), path
    train_model(model, images, training, progress=progress)
    write_atomically(path, lambda draft: save_file(model.state_dict(), draft))
    return model, path


def train_model(
    model: nn.Module, images, training: Training, *, progress: Callable[[int], object] | None = None
) -> float:
    """Train a classifier in place, the same way for the same seed.

    Args:
        model: Maps (B, 3, H, W) to logits (B, classes).
        images: `streams.Images`; all are held in memory.
        training: Epochs, rates, distortions, seed.
        progress: Called with 1 after each epoch.

    Returns:
        Seconds taken; the model is then in eval mode.
    """
    start = time.perf_counter()
    x, y = images.preprocess(images.pixels()), torch.tensor(images.labels)
    generator = torch.Generator().manual_seed(training.seed)
    batches = math.ceil(len(x) / training.batch_size)
    optimizer, scheduler = _optimizers(model, training, training.epochs * batches)
    model.train()
    for _ in range(training.epochs):
        for picked in torch.randperm(len(x), generator=generator).chunk(batches):
            logits = model(distort(x[picked], generator, training))
            loss = F.cross_entropy(logits, y[picked], label_smoothing=training.smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        if progress is not None:
            progress(1)
    optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start


def distort(x: Tensor, generator: torch.Generator, training: Training) -> Tensor:
    """Turn, stretch and shift each image a little, borders repeated.

    Args:
        x: (B, C, H, W).
        generator: On the CPU.
        training: Gives the largest turn, stretch and shift.

    Returns:
        Like `x`.
    """
    turn, wide, tall, right, down = torch.rand(5, len(x), generator=generator) * 2 - 1
    turn = turn * math.radians(training.turn)
    wide, tall = 1 + training.stretch * wide, 1 + training.stretch * tall
    right, down = 2 * training.shift * right, 2 * training.shift * down
    first = torch.stack([turn.cos() * wide, -turn.sin(), right], 1)
    second = torch.stack([turn.sin(), turn.cos() * tall, down], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _optimizers(model, training, steps):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.lr)
    warmup = max(1, steps // 10)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)
