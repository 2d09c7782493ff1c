"""What an unlabelled batch can say about a classifier: losses computed from logits alone."""

from __future__ import annotations

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Measure how unsure every prediction is.

    ``H = -sum_c p_c log p_c`` with ``p = softmax(logits)``, in float32.
    Source: Wang et al., Tent, arXiv:2006.10726, section 3.1.

    Args:
        logits: (batch, classes), any float dtype.

    Returns:
        (batch,), float32, in nats.
    """
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
