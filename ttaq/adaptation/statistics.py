"""BatchNorm with the moments of the test data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..surgery import replace

STATISTICS = ("source", "batch", "blend", "ema")
FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


class AdaptiveBatchNorm(nn.Module):
    """Normalise with a mixture of stored moments and those of the batch.

    ``mean = (1 - s) * stored + s * batch`` and the variance (biased) alike; ``s`` is 1 for "batch", alpha or
    ``n / (n + prior)`` for "blend", and the momentum for "ema", where what is stored is the moving average itself.
    Gradients flow through the batch moments. Where a channel has a single value (one image, no extent) its
    variance says nothing: then the stored variance is kept, and "batch" blends the mean as "blend" does.

    A forward pass changes nothing: it leaves the mixture in `pending` until `commit` writes it to `running_mean`
    and `running_var`, the statistics that `restored` hands to the plain layer.
    Source: Schneider et al., arXiv:2006.16971, section 3 (blend); Yuan et al., arXiv:2303.13899, section 3.2 (ema).

    Args:
        norm: A BatchNorm of torch, or one that adds modules behind it in order (timm's BatchNormAct2d); its
            parameters, buffers and children are taken over under their names.
        statistics: "batch", "blend" or "ema".
        alpha: Share of the batch under "blend", 0 to 1; None for ``n / (n + prior)`` with n images.
        prior: The number of images that the stored moments count for.
        momentum: Share of the batch under "ema", 0 to 1.
    """

    def __init__(self, norm: _BatchNorm, statistics: str, alpha: float | None, prior: float, momentum: float) -> None:
        super().__init__()
        self.norm = (norm,)  # in a tuple: not a child, so it adds no keys to the state_dict
        self.eps, self.statistics = norm.eps, statistics
        self.alpha, self.prior, self.momentum = alpha, prior, momentum
        for name, parameter in norm._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in norm._buffers.items():
            self.register_buffer(name, buffer)
        for name, child in norm._modules.items():
            self.add_module(name, child)
        self.register_buffer("source_mean", norm.running_mean.clone(), persistent=False)
        self.register_buffer("source_var", norm.running_var.clone(), persistent=False)
        self.pending: tuple[Tensor, Tensor] | None = None
        # Of the share of a batch, set by a guard; what is stored is then a moving average.
        self.cap: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        single = x.numel() == x.shape[1]
        if self.statistics == "batch" and self.cap is None and not single:
            y = self._batch(x)
        else:
            y = self._mixture(x, single)
        for child in self.children():
            y = child(y)
        return y

    def _batch(self, x: Tensor) -> Tensor:
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        count = x.numel() // x.shape[1]
        self.pending = mean, var * ((count - 1) / count)  # torch keeps the unbiased variance
        return y

    def _mixture(self, x: Tensor, single: bool) -> Tensor:
        stored_mean, stored_var = self._stored()
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(values, [d for d in range(x.dim()) if d != 1], correction=0)
        share = self._share(x.shape[0])
        mean = torch.lerp(stored_mean.to(mean.dtype), mean, share)
        var = stored_var.to(var.dtype) if single else torch.lerp(stored_var.to(var.dtype), var, share)
        self.pending = mean.detach().to(stored_mean.dtype), var.detach().to(stored_var.dtype)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        along = [1, -1] + [1] * (x.dim() - 2)
        return torch.addcmul(shift.view(along), values, scale.view(along)).to(x.dtype)

    def _stored(self) -> tuple[Tensor, Tensor]:
        if self.statistics != "ema" and self.cap is None:
            return self.source_mean, self.source_var
        return self.pending or (self.running_mean, self.running_var)  # pending: a layer used twice in one pass

    def _share(self, images: int) -> float:
        if self.cap is not None:
            return min(self.cap, self._wanted(images))
        return self._wanted(images)

    def _wanted(self, images: int) -> float:
        if self.statistics == "batch" and self.cap is not None:
            return 1.0
        if self.statistics == "ema":
            return self.momentum
        return images / (images + self.prior) if self.alpha is None else self.alpha

    def restored(self) -> _BatchNorm:
        """Return the plain layer, holding the affine and the committed statistics."""
        (norm,) = self.norm
        norm._parameters.update(self._parameters)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(norm, name, getattr(self, name))
        return norm.eval()


def discard(norms: Iterable[AdaptiveBatchNorm]) -> None:
    """Forget the statistics of the last forward pass."""
    for norm in norms:
        norm.pending = None


@contextmanager
def aside(norms: Iterable[AdaptiveBatchNorm]) -> Iterator[None]:
    """Let forward passes run whose statistics are forgotten; what waits for `commit` waits on."""
    held = [(norm, norm.pending) for norm in norms]
    try:
        yield
    finally:
        for norm, moments in held:
            norm.pending = moments


def pending(norms: Iterable[AdaptiveBatchNorm]) -> list[Tensor]:
    """Return the statistics of the last forward pass that wait for `commit`."""
    return [moment for norm in norms if norm.pending for moment in norm.pending]


def commit(norms: Iterable[AdaptiveBatchNorm]) -> None:
    """Write the statistics of the last forward pass to the running ones."""
    used = [norm for norm in norms if norm.pending]
    if used:
        with torch.no_grad():
            torch._foreach_copy_([m for norm in used for m in (norm.running_mean, norm.running_var)], pending(used))
    discard(used)


def adapt_statistics(
    model: nn.Module,
    statistics: str,
    alpha: float | None = None,
    prior: float = 16,
    momentum: float = 0.1,
) -> dict[str, AdaptiveBatchNorm]:
    """Swap every BatchNorm of a model, in place, for one that follows the test data.

    Layers without running statistics always use those of the batch and stay; "source" swaps nothing.

    Args:
        model: Any network; its own norm layers are taken over, not copied.
        statistics: One of `STATISTICS`.
        alpha: See `AdaptiveBatchNorm`, as are `prior` and `momentum`.
        prior: A number of images, above 0.
        momentum: 0 to 1.

    Returns:
        The new layers by name.

    Raises:
        ValueError: An argument is out of range, or a layer subclasses BatchNorm with a forward of its own.
    """
    _check(statistics, alpha, prior, momentum)
    if statistics == "source":
        return {}
    found = {name: norm for name, norm in model.named_modules() if _follows(name, norm)}
    norms = {name: AdaptiveBatchNorm(norm, statistics, alpha, prior, momentum) for name, norm in found.items()}
    for name, norm in norms.items():
        replace(model, name, norm)
    return norms


def restore_statistics(model: nn.Module) -> None:
    """Swap every AdaptiveBatchNorm of a model back, in place, for the plain layer with its present state."""
    for name, norm in list(model.named_modules()):
        if isinstance(norm, AdaptiveBatchNorm):
            replace(model, name, norm.restored())


def _follows(name: str, module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or module.running_mean is None or not name:
        return False
    own = type(module).forward not in FORWARDS
    if own and set(module._modules) != {"drop", "act"}:
        raise ValueError(
            f"adapt: {name} is a {type(module).__name__} whose forward is not that of BatchNorm, so its statistics "
            'cannot be swapped; replace it by nn.BatchNorm2d or use statistics="source"'
        )
    return True


def _check(statistics: str, alpha: float | None, prior: float, momentum: float) -> None:
    if statistics not in STATISTICS:
        raise ValueError(f"adapt: statistics must be one of {', '.join(STATISTICS)}, got {statistics!r}; use one")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"adapt: alpha must lie in 0 to 1, got {alpha}; use None for n / (n + prior)")
    if not prior > 0:
        raise ValueError(f"adapt: prior must be a number of images above 0, got {prior}; use 16")
    if not 0 < momentum <= 1:
        raise ValueError(f"adapt: momentum must lie above 0 and up to 1, got {momentum}; use 0.1")


def running(norms: dict[str, AdaptiveBatchNorm]) -> dict[str, Tensor]:
    """Name the running statistics of layers as the model's state_dict does."""
    return {
        f"{name}.{key}": getattr(norm, key) for name, norm in norms.items() for key in ("running_mean", "running_var")
    }
