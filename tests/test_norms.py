import pytest
import torch
from tiny import calibrated, images, input_of, resnet
from torch import nn

from ttaq.norms import MOMENTS, batch_norms, forget_float, live, measure_again
from ttaq.quantizers import Quantizer, disabled


def stored(model):
    return [getattr(n, name).clone() for n in batch_norms(model) for name in (*MOMENTS, "num_batches_tracked")]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def settings(norms):
    return [(n.training, n.momentum, n.track_running_stats) for n in norms]


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (9, 4)), (nn.BatchNorm2d, (3, 4, 5, 5))])
def test_live_norms_use_the_statistics_of_the_batch_and_keep_the_stored_ones(kind, shape):
    norm = kind(4).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x, before = 3 * torch.randn(shape) + 1, stored(norm)
    axes = [d for d in range(len(shape)) if d != 1]
    moments = (x.double().mean(axes, keepdim=True), x.double().var(axes, correction=0, keepdim=True))
    with live([norm]):
        y = norm(x)
    torch.testing.assert_close(y.double(), (x - moments[0]) / (moments[1] + norm.eps).sqrt(), rtol=1e-5, atol=1e-5)
    assert same(stored(norm), before)
    assert settings([norm]) == [(False, 0.1, True)]
    assert not torch.allclose(norm(x), y)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_live_norms_are_put_back_when_an_exception_ends_it(momentum):
    model = resnet()
    norms = batch_norms(model)
    norms[0].momentum, norms[1].training = momentum, True
    before, how = stored(model), settings(norms)

    def interrupt(module, args, output):
        raise KeyboardInterrupt

    model.linear.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), live(norms):
        model(images())
    assert same(stored(model), before)
    assert settings(norms) == how


def test_infinite_activations_do_not_reach_the_stored_statistics():
    norm = nn.BatchNorm2d(3).eval()
    before = stored(norm)
    with live([norm]):
        norm(torch.full((2, 3, 4, 4), torch.inf))
    assert same(stored(norm), before)


def test_norms_without_statistics_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3), nn.BatchNorm1d(3))
    assert batch_norms(model) == [model[2]]


def test_statistics_measured_again_are_means_over_the_passes():
    norm = nn.BatchNorm2d(4).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    floats = [getattr(norm, name).clone() for name in MOMENTS]
    batches = [torch.randn(n, 4, 3, 3) * n + n for n in (2, 3, 5)]
    measure_again([norm], (lambda x=x: norm(x) for x in batches))
    columns = [x.double().transpose(0, 1).flatten(1) for x in batches]
    torch.testing.assert_close(norm.running_mean.double(), sum(c.mean(1) for c in columns) / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), sum(c.var(1) for c in columns) / 3, rtol=1e-5, atol=1e-6)
    assert same([norm.float_mean, norm.float_var], floats)
    assert norm.num_batches_tracked == 0
    assert settings([norm]) == [(False, 0.1, True)]
    measure_again([norm], [lambda: norm(batches[0])])
    assert same([norm.float_mean, norm.float_var], floats)  # those of the first time


def test_later_norms_are_measured_under_the_batch_statistics_of_earlier_ones():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    x = 5 * torch.randn(16, 4) + 3
    measure_again(batch_norms(model), [lambda: model(x)])
    with torch.no_grad():
        centred = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(model[2].running_mean, model[1](centred).mean(0), rtol=1e-4, atol=1e-5)


def test_measuring_nothing_changes_nothing():
    measure_again([], [lambda: pytest.fail("nothing is to run")])


def refined_statistics():
    model = calibrated("resnet", "w4a4")
    measure_again(batch_norms(model), [lambda: model(images(seed=5) + 1)])
    return model


def test_the_float_model_has_its_own_statistics_again():
    model, plain, x = refined_statistics(), resnet(), input_of("resnet", seed=2)
    before = stored(model)
    assert not same(before, stored(plain))
    with disabled(model), torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert same(stored(model), stored(plain))
    assert same(stored(model), before)


def test_the_quantised_statistics_are_back_when_an_exception_ends_it():
    model = refined_statistics()
    before = stored(model)
    with pytest.raises(KeyboardInterrupt), disabled(model):
        raise KeyboardInterrupt
    assert same(stored(model), before)
    assert all(q.enabled for q in model.modules() if isinstance(q, Quantizer))


def test_the_float_model_within_the_float_model_is_the_float_model():
    model, plain, x = refined_statistics(), resnet(), input_of("resnet", seed=2)
    before = stored(model)
    with disabled(model), torch.no_grad():
        with disabled(model):
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), plain(x))
    assert same(stored(model), before)


def test_float_statistics_are_forgotten():
    model = refined_statistics()
    keys, before = set(resnet().state_dict()), stored(model)
    assert {n for n in model.state_dict() if "running" in n or "float_" in n} <= keys
    forget_float(model)
    assert not any("float_" in name for name, _ in model.named_buffers())
    assert same(stored(model), before)
    with disabled(model):
        assert same(stored(model), before)
    measure_again(batch_norms(model), [lambda: model(images())])
    assert same([n.float_mean for n in batch_norms(model)], before[::3])
