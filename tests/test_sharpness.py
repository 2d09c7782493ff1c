"""SAR: where it differs from the public code on purpose, and the way down from above."""

import functools
import math

import pytest
from straight_lines import CLASSES, adapter_of, configured, h, same, sharp, stream
from tiny import resnet

from ttaq.adaptation import adapt


def test_sar_recovers_below_a_share_of_the_largest_entropy_not_below_fixed_nats():
    """Deliberate: the published 0.2 nats are for 1,000 classes."""
    x, bound = stream(1)[0], 0.2 * math.log(CLASSES) / math.log(1000)
    for factor in (100.0, 2000.0):
        adapter = adapter_of(resnet(), "sar", factor, lr=0.0, rho=0.0)
        average = h(factor * configured(resnet())[0](x))
        average = average[average < 0.4 * math.log(CLASSES)].mean().item()
        adapter(x)
        assert average < 0.2
        if average < bound:
            assert adapter.history[-1].reason.startswith(f"collapse: the entropy averaged {average:.3g}, below 0.0519")
            assert adapter.history[-1].skipped
        else:
            assert adapter.method.average == pytest.approx(average, rel=1e-4)
            assert adapter.steps == 1
    assert average < bound  # the second factor
    never = adapter_of(resnet(), "sar", 2000.0, recovery=0.0)
    never(x)
    assert never.steps == 1


def test_sar_starts_its_average_anew_after_a_recovery():
    """Deliberate: with a stale average the next batch, which is no collapse, would be taken for one."""
    options = {"recovery": 1.0, "loss": "abl", "statistics": "ema"}
    adapter, x = adapter_of(resnet(), "sar", 15.0, **options), stream(1)[0]
    source, bound = adapter.state_dict(), math.log(CLASSES) / math.log(1000)
    adapter(x)
    first = average = adapter.method.average
    adapter.method.forward = functools.partial(sharp, 1e5)
    while adapter.history[-1].reason is None:
        average = adapter.method.average
        adapter(x)
    assert len(adapter.history) > 2
    assert adapter.history[-1].reason.startswith("collapse")
    after = adapter.state_dict()
    assert same(after["tensors"], source["tensors"])
    assert same(after["memory"], source["memory"])
    adapter.method.forward = functools.partial(sharp, 15.0)
    adapter(x)
    assert adapter.history[-1].reason is None
    assert adapter.method.average == first > bound
    stale = 0.9 * average  # the entropies of the collapse are next to nothing
    assert 0.9 * stale + 0.1 * first < bound


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("fault", ["flat", "interrupted", "bad"])
def test_sar_comes_down_whatever_happens_above(guard, fault):
    calls = []

    def second(model, x):
        calls.append(len(x))
        if len(calls) != 2:
            return 18 * model(x)
        if fault == "interrupted":
            raise KeyboardInterrupt
        return model(x) * (1e-3 if fault == "flat" else math.nan)

    adapter = adapt(resnet(), "sar", forward=second, guard=guard, rho=1.0)
    before = [p.detach().clone() for p in adapter.method.parameters.values()]
    if fault == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            adapter(stream(1)[0])
    else:
        adapter(stream(1)[0])
        assert adapter.skipped == 1
        bad = fault == "bad" and guard
        assert adapter.history[-1].reason == ("NaN or Inf in logits" if bad else "no image was selected")
    assert same(list(adapter.method.parameters.values()), before)
    assert adapter.method.average is None
    adapter(stream(1)[0])
    assert adapter.history[-1].reason is None
