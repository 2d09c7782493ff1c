"""The two distances that learning lowers: between activations, and between predictions."""

from torch import Tensor
from torch.nn import functional as F


def squared_distance(output: Tensor, target: Tensor) -> Tensor:
    """Sum squared errors over channels, average over samples and positions.

    Args:
        output: (N, C, H, W), or (..., C).
        target: Alike.

    Returns:
        (), float32.
    """
    channels = output.shape[1 if output.ndim == 4 else -1]
    return F.mse_loss(output.float(), target.float()) * channels


def softened_divergence(target: Tensor, logits: Tensor, temperature: float, *, mean: bool = True) -> Tensor:
    """Return ``T^2 KL(softmax(target / T) || softmax(logits / T))``, mean over the images.

    Source: Hinton et al., arXiv:1503.02531.

    Args:
        target: (N, C) logits; receives no gradient.
        logits: (N, C).
        temperature: T.
        mean: Over the images; else each by itself.

    Returns:
        () or (N,), float32.
    """
    wanted, given = ((v.float() / temperature).log_softmax(-1) for v in (target.detach(), logits))
    terms = temperature**2 * F.kl_div(given, wanted, reduction="none", log_target=True).flatten(1).sum(1)
    return terms.mean() if mean else terms
