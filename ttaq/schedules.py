"""How a block is learned: steps, rates, and the two roundings there are."""

from dataclasses import dataclass

from .roundings import AdaRound, StraightThrough

__all__ = ["ROUNDINGS", "Schedule"]

ROUNDINGS = {"adaround": AdaRound, "ste": StraightThrough}
DTYPES = ("float32", "bfloat16")  # float16 would need its losses scaled


@dataclass(frozen=True)
class Schedule:
    """How a block is learned.

    Args:
        steps: Of Adam, for each block.
        batch_size: Images a step.
        rounding: "adaround" or "ste".
        rounding_lr: Of the roundings (adaround), or of the weights as a share of their scale (ste).
        scale_lr: Of the activation scales, as a share of each scale; decays to 0 along a cosine.
        drop: Share of elements that pass unquantised while learning, in the block's input and in its activations.
        penalty: Weight of AdaRound's regulariser, after the first `warmup` share of the steps.
        warmup: Share of the steps without the regulariser.
        statistics: "source" learns a block under the stored BatchNorm statistics; "batch" under those of each batch,
            and then measures the stored ones again.
        dtype: Of the block's products while it learns, "float32" or "bfloat16" (also as torch.bfloat16): autocast, so
            that norms, softmax, quantisers and the loss stay in float32. "float32" leaves a half-precision model as it
            is.
        seed: Of the order of images and of what is dropped.
    """

    steps: int = 1000
    batch_size: int = 32
    rounding: str = "adaround"
    rounding_lr: float = 3e-3
    scale_lr: float = 1e-3
    drop: float = 0.5
    penalty: float = 0.01
    warmup: float = 0.2
    statistics: str = "source"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if self.dtype not in DTYPES:
            raise ValueError(f"reconstruct: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"reconstruct: rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"reconstruct: steps and batch_size must be 1 or more, got {self.steps}, {self.batch_size}"
            )
        if self.statistics not in ("source", "batch"):
            raise ValueError(f'reconstruct: statistics must be "source" or "batch", got {self.statistics!r}')
        if not (0 <= self.drop <= 1 and 0 <= self.warmup <= 1):
            raise ValueError(f"reconstruct: drop and warmup are shares from 0 to 1, got {self.drop}, {self.warmup}")
