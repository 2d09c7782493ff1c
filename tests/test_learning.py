"""What the verbs that learn share."""

import pytest
import torch
from torch import nn

from ttaq.learning import adam


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_optimiser_gives_what_the_default_one_gives(dtype):
    draws = [torch.randn(shape, dtype=dtype) for shape in ((), (7, 5), (40, 33), (3,))]
    ours, plain = ([nn.Parameter(t.clone()) for t in draws] for _ in range(2))
    rates = (1e-3, 3e-3, 0.02, 0.5)
    optimizers = [
        kind([{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)])
        for kind, params in ((adam, ours), (torch.optim.Adam, plain))
    ]
    assert optimizers[0].defaults["fused"]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
    for _ in range(40):
        for p, q in zip(ours[:3], plain[:3], strict=True):  # the last one gets no gradient
            p.grad = torch.randn_like(p) * 10 ** torch.randn(())
            q.grad = p.grad.clone()
        for each in (*optimizers, *schedules):
            each.step()
    for p, q in zip(ours, plain, strict=True):
        moved = 40 * max(rates)
        assert (p - q).abs().max() <= 4 * torch.finfo(dtype).eps * moved
    assert torch.equal(ours[3], draws[3])


def test_other_devices_get_the_default_one():
    assert not adam([{"params": [nn.Parameter(torch.ones(3, device="meta"))]}]).defaults["fused"]
