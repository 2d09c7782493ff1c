"""One block at work: what a step is given, and what it gives."""

import pytest
import torch
from tiny import calibrated, input_of

from ttaq.blocks import find_blocks, run_block
from ttaq.blockwise import BlockLearner, Schedule
from ttaq.learning import frozen
from ttaq.quantizers import disabled


def _first_block(dtype=torch.float32):
    """Give a model, its first block, inputs of the float prefix and the block's targets."""
    model = calibrated("resnet", "w4a4").to(dtype)
    floats = input_of("resnet").to(dtype)
    block = find_blocks(model, floats)[0]
    with torch.no_grad(), disabled(model):
        return model, block, floats, run_block(model, block, floats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [0.0, 0.25, 1.0])
def test_the_share_that_is_dropped_comes_from_the_float_model(drop, dtype):
    model, block, floats, targets = _first_block(dtype)
    seen = []
    with frozen(model):
        learner = BlockLearner(model, block, Schedule(steps=3, drop=drop))
        learner.learn(floats - 100, floats, targets, lambda step, x, *rest: seen.append(x) or 0.0)
    assert len(seen) == 3
    for x in seen:
        dropped = x > -50
        assert dropped.float().mean().item() == pytest.approx(drop, abs=0.03)
        known = torch.cat([floats.flatten(), (floats - 100).flatten()]).unique()
        assert torch.isin(x, known).all()


def test_learning_is_running_every_step():
    learned = []
    for exhaust in (True, False):
        torch.manual_seed(1)
        model, block, x, targets = _first_block()
        with frozen(model):
            learner = BlockLearner(model, block, Schedule(steps=4, batch_size=4))
            if exhaust:
                losses = list(learner.steps(x, x, targets))
            else:
                learner.learn(x, x, targets)
        learned.append([r.v.detach().clone() for r in learner.roundings])
    assert len(losses) == 4
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)
    for first, second in zip(*learned, strict=True):
        assert torch.equal(first, second)
