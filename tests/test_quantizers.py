import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ttaq import QuantLinear, QuantSpec
from ttaq.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    clamp_scales,
    dequantise,
    disabled,
)
from ttaq.roundings import AdaRound, StraightThrough

SPECS = [
    QuantSpec(2, "channel"),
    QuantSpec(4, "channel"),
    QuantSpec(3, "group", 4),
    QuantSpec(8, "channel", symmetric=True),
]


def fitted(spec, weight):
    quantizer = WeightQuantizer(spec, weight.shape)
    quantizer.fit(weight)
    return quantizer


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fake_quantised_weights_are_their_codes(spec):
    weight = torch.randn(6, 12)
    quantizer = fitted(spec, weight)
    codes, scale, zero = quantizer.integer(weight)
    assert codes.dtype == torch.uint8
    assert zero.dtype == torch.int32
    assert codes.max() <= spec.qmax
    with torch.no_grad():
        assert torch.equal(quantizer(weight), dequantise(codes, scale, zero, spec.group))
        again = quantizer(quantizer(weight))
        assert torch.equal(again, quantizer(weight))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(2, 8), st.integers(0, 50))
def test_codes_stay_in_range_and_errors_within_half_a_step(n, k, bits, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 5
    spec = QuantSpec(bits, "channel", observer="minmax")
    quantizer = fitted(spec, weight)
    codes, scale, _ = quantizer.integer(weight)
    assert codes.max() <= spec.qmax
    error = (quantizer(weight) - weight).abs().detach()
    clipped = (codes == 0) | (codes == spec.qmax)
    bound = scale.detach()[:, None] * torch.where(clipped, 1.0, 0.5)
    assert (error <= bound * 1.0001 + 1e-6).all()


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (QuantSpec(4, "tensor"), (4, 8), 'weights: granularity must be "channel" or "group", got \'tensor\''),
        (QuantSpec(4, "token"), (4, 8), "weights: granularity"),
        (
            QuantSpec(4, "group", 3),
            (4, 8),
            r"weights: groups of 3 need .* K a multiple of it, got \(4, 8\); use a group",
        ),
        (QuantSpec(4, "group", 16), (4, 8), r"groups of 16 need a linear weight"),
        (QuantSpec(4, "group", 3), (4, 3, 3, 3), r"groups of 3 need a linear weight"),
    ],
)
def test_weights_refuse_what_does_not_fit(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        WeightQuantizer(spec, torch.Size(shape))


@pytest.mark.parametrize("spec", [QuantSpec(4, "channel"), QuantSpec(4, "group", 8)])
def test_activations_refuse_what_does_not_fit(spec):
    with pytest.raises(ValueError, match=r'^activations: granularity must be "tensor" or "token"'):
        ActivationQuantizer(spec)


def test_a_first_input_with_nan_sets_nothing():
    quantizer = ActivationQuantizer(QuantSpec(8), auto=True)
    with pytest.raises(ValueError, match="ranges: wanted finite values"):
        quantizer(torch.tensor([1.0, torch.nan]))
    assert not quantizer.ready
    assert torch.isfinite(quantizer(torch.randn(9))).all()


def test_later_nan_goes_through():
    quantizer = ActivationQuantizer(QuantSpec(8), auto=True)
    quantizer(torch.randn(9))
    y = quantizer(torch.tensor([0.5, torch.nan]))
    assert torch.isfinite(y[0])
    assert y[1].isnan()


def test_until_it_is_ready_a_quantiser_passes_its_input_on():
    x = torch.randn(4, 5)
    waiting = ActivationQuantizer(QuantSpec(2))
    assert waiting(x) is x
    assert "not calibrated" in repr(waiting)
    waiting.set_range(torch.tensor(0.5), torch.tensor(1.0))
    assert waiting.ready
    assert waiting(x).unique().numel() <= 4
    model = nn.ModuleList([waiting])
    with disabled(model):
        assert waiting(x) is x
    waiting.enabled = False
    with disabled(model):
        pass
    assert not waiting.enabled


def test_disabled_ends_with_an_error_too():
    quantizer = ActivationQuantizer(QuantSpec(2))
    with pytest.raises(KeyboardInterrupt), disabled(nn.ModuleList([quantizer])):
        raise KeyboardInterrupt
    assert quantizer.enabled


def test_tokens_are_measured_anew():
    quantizer = ActivationQuantizer(QuantSpec(8, "token"), auto=True)
    assert quantizer.ready
    assert not ActivationQuantizer(QuantSpec(8, "token")).ready
    x = torch.randn(2, 3, 40) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    error = (quantizer(x) - x).abs().amax(-1)
    assert (error <= (x.amax(-1) - x.amin(-1)) / 255 * 1.01).all()
    scale = quantizer.scale.clone()
    quantizer.fit(x)
    assert torch.equal(quantizer.scale, scale)


def test_dropping_leaves_a_share_in_float():
    quantizer = ActivationQuantizer(QuantSpec(2), auto=True)
    x = torch.randn(100, 100)
    quantizer(x)
    quantizer.drop = 0.5
    share = (quantizer(x) == x).float().mean().item()
    assert 0.45 < share < 0.55
    quantizer.drop = 0.0
    assert (quantizer(x) == x).float().mean() < 0.01


def test_what_is_dropped_repeats_with_the_generator_and_passes_its_gradient():
    quantizer = ActivationQuantizer(QuantSpec(2))
    quantizer.set_range(torch.tensor(0.5), torch.tensor(1.0))
    quantizer.drop = 0.3
    x = torch.randn(8, 500, requires_grad=True)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        first, second = quantizer(x), quantizer(x)
        assert not torch.equal(first, second)
        results.append((first, *torch.autograd.grad(first.sum(), (x, quantizer.scale))))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    y, dx, dscale = results[0]
    quantizer.drop = 0.0
    plain = quantizer(x)
    dropped = y != plain
    assert torch.equal(y, torch.where(dropped, x, plain))
    assert dx[dropped].eq(1).all()
    wanted = torch.autograd.grad(plain[~dropped].sum(), quantizer.scale)[0]
    torch.testing.assert_close(dscale, wanted, rtol=1e-4, atol=1e-4)


def test_samples_hold_the_extremes_and_repeat():
    quantizer = ActivationQuantizer(QuantSpec(8))
    x = torch.randn(50, 1000, dtype=torch.bfloat16)
    one, other = (quantizer.sample(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)
    assert one.dtype == torch.float32
    assert len(one) < 10_000
    assert (one.min(), one.max()) == (x.float().min(), x.float().max())
    assert torch.equal(quantizer.sample(x[0], torch.Generator()), x[0].float())


# Learned rounding


@pytest.mark.parametrize("kind", [AdaRound, StraightThrough])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_rounding_starts_at_the_weight_and_hardens_near_it(kind, spec):
    weight = torch.randn(6, 12)
    quantizer = fitted(spec, weight)
    nearest = quantizer.integer(weight)[0]
    rounding = quantizer.rounding = kind(weight, quantizer)
    soft = quantizer(weight).detach()
    if kind is AdaRound:
        inside = (nearest > 0) & (nearest < spec.qmax)
        torch.testing.assert_close(soft[inside], weight[inside], rtol=1e-3, atol=1e-3)
    quantizer.harden()
    assert quantizer.rounding is None
    assert (quantizer.codes != nearest).float().mean() <= (0.02 if kind is AdaRound else 0.0)
    assert torch.equal(quantizer.integer(weight)[0], quantizer.codes)
    assert torch.equal(quantizer(weight), dequantise(quantizer.codes, quantizer.scale, quantizer.zero, spec.group))
    assert rounding.v.shape == weight.shape


def test_adaround_turns_codes_up_and_down_by_one():
    weight = torch.randn(4, 10)
    quantizer = fitted(QuantSpec(4, "channel"), weight)
    down = (weight / quantizer.scale.detach()[:, None]).floor() + quantizer.zero[:, None]
    for sign in (-9.0, 9.0):
        quantizer.rounding = AdaRound(weight, quantizer)
        with torch.no_grad():
            quantizer.rounding.v.fill_(sign)
        hard = dequantise(quantizer.rounding.codes(quantizer), quantizer.scale, quantizer.zero, 0)
        torch.testing.assert_close(quantizer(weight), hard)
        wanted = (down + (sign > 0)).clamp(0, 15)
        assert torch.equal(quantizer.rounding.codes(quantizer).float(), wanted)


def test_only_the_rounding_learns_under_adaround():
    weight = torch.randn(4, 10, requires_grad=True)
    quantizer = fitted(QuantSpec(4, "channel"), weight)
    quantizer.rounding = AdaRound(weight, quantizer)
    (quantizer(weight).square().sum() + quantizer.rounding.penalty).backward()
    assert weight.grad is None
    assert quantizer.scale.grad is None
    assert quantizer.rounding.v.grad.abs().sum() > 0


def test_fitting_anew_ends_the_learned_codes():
    weight = torch.randn(4, 10)
    quantizer = fitted(QuantSpec(4, "channel"), weight)
    quantizer.codes = torch.zeros(4, 10, dtype=torch.uint8)
    quantizer.fit(weight)
    assert quantizer.codes is None


def test_learned_scales_stay_positive():
    quantizer = ActivationQuantizer(QuantSpec(4))
    quantizer.set_range(torch.tensor(-0.3), torch.tensor(2.0))
    clamp_scales([quantizer])
    assert quantizer.scale > 0


# States


def fresh():
    return QuantLinear(10, 4, False, recipe="w3a16")


def learned():
    layer = fresh()
    layer.weight_quantizer.fit(layer.weight)
    layer.weight_quantizer.codes = torch.randint(8, (4, 10), dtype=torch.uint8)
    return layer


def test_codes_are_part_of_the_state():
    one, other = learned(), fresh()
    state = one.state_dict()
    assert "weight_quantizer.codes" in state
    other.load_state_dict(state)
    assert other.weight_quantizer.ready
    assert torch.equal(other.weight_quantizer.codes, one.weight_quantizer.codes)
    with torch.no_grad():
        one.weight_quantizer.codes.add_(1)  # the state that was given is not held on to
    assert not torch.equal(other.weight_quantizer.codes, one.weight_quantizer.codes)


def test_a_state_without_codes_ends_them():
    one, other = learned(), fresh()
    other.weight_quantizer.fit(other.weight)
    one.load_state_dict(other.state_dict())
    assert one.weight_quantizer.codes is None


def test_new_float_weights_end_the_codes_of_old_ones():
    layer = learned()
    layer.load_state_dict({"weight": torch.randn(4, 10)})
    assert layer.weight_quantizer.codes is None
    assert layer.weight_quantizer.ready


def test_a_partial_state_leaves_the_codes():
    model = nn.Sequential(learned(), nn.LayerNorm(4))
    codes = model[0].weight_quantizer.codes.clone()
    model.load_state_dict({"1.weight": torch.ones(4)}, strict=False)
    assert torch.equal(model[0].weight_quantizer.codes, codes)


def test_a_state_of_a_waiting_quantiser_waits():
    waiting, ready = fresh(), learned()
    ready.load_state_dict(waiting.state_dict())
    assert not ready.weight_quantizer.ready
    assert ready.weight_quantizer.codes is None


def test_states_can_be_assigned_to_meta():
    one = learned()
    with torch.device("meta"):
        other = fresh()
    other.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(other.weight_quantizer.codes, one.weight_quantizer.codes)
    assert torch.equal(other.weight_quantizer.scale, one.weight_quantizer.scale)
    assert other.weight_quantizer.ready


def test_a_state_with_half_a_grid_is_refused():
    one = learned()
    state = one.state_dict()
    del state["weight_quantizer.zero"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_quantizer.zero"):
        fresh().load_state_dict(state)


def test_copies_keep_codes_and_readiness():
    one = learned()
    two = copy.deepcopy(one)
    assert two.weight_quantizer.ready
    assert torch.equal(two.weight_quantizer.codes, one.weight_quantizer.codes)
    assert two.weight_quantizer.codes is not one.weight_quantizer.codes
