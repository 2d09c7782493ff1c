import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttaq import QuantSpec
from ttaq.observers import choose_range, dynamic_range


def quantise(rows, scale, zero, spec):
    scale, zero = scale[:, None], zero[:, None]
    return ((rows / scale).round().add(zero).clamp(0, spec.qmax) - zero) * scale


def samples(kind, rows=6, n=500):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, n, generator=generator) * torch.logspace(-3, 2, rows)[:, None]
    return {
        "normal": x,
        "positive": x.abs(),
        "negative": -x.abs(),
        "skewed": x.exp().clamp(max=1e4) - 0.2,
        "outlier": torch.cat([x, 50 * x.abs().amax(1, keepdim=True)], 1),
        "offset": x.abs() + 3,
        "constant": torch.ones(rows, n) * torch.linspace(-3, 3, rows)[:, None],
        "half": x.half(),
    }[kind]


KINDS = ["normal", "positive", "negative", "skewed", "outlier", "offset", "constant", "half"]


@pytest.mark.parametrize("observer", ["mse", "minmax", "percentile"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_grid_is_sound(kind, bits, symmetric, observer):
    spec = QuantSpec(bits, "channel", symmetric=symmetric, observer=observer)
    rows = samples(kind)
    scale, zero = choose_range(rows, spec)
    assert scale.shape == zero.shape == (len(rows),)
    assert scale.dtype == zero.dtype == torch.float32
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.equal(zero, zero.round())
    assert ((zero >= 0) & (zero <= spec.qmax)).all()
    if symmetric:
        assert (zero == (spec.qmax + 1) // 2).all()
    # 0.0 has a code of its own
    assert torch.equal(quantise(torch.zeros(len(rows), 1), scale, zero, spec), torch.zeros(len(rows), 1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_is_never_worse_than_min_max_in_its_own_metric(kind, bits, symmetric):
    rows = samples(kind).float()
    errors = {}
    for observer in ("mse", "minmax"):
        spec = QuantSpec(bits, "channel", symmetric=symmetric, observer=observer)
        errors[observer] = (quantise(rows, *choose_range(rows, spec), spec) - rows).abs().pow(2.4).sum(1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    if kind == "normal" and bits <= 4:
        assert (errors["mse"] < 0.9 * errors["minmax"]).all()


def test_the_search_is_as_good_as_trying_every_range():
    """At 2 bits a brute-force walk over scales and zeros finds nothing more than a few percent better."""
    spec = QuantSpec(2, "channel")
    rows = samples("normal", 3, 400) + 0.02
    scale, zero = choose_range(rows, spec)
    got = (quantise(rows, scale, zero, spec) - rows).abs().pow(2.4).sum(1)
    best = torch.full_like(got, torch.inf)
    spread = rows.amax(1) - rows.amin(1)
    for share in torch.linspace(0.02, 0.6, 150):
        for z in range(4):
            tried = (quantise(rows, spread * share, torch.full_like(spread, z), spec) - rows).abs().pow(2.4).sum(1)
            best = torch.minimum(best, tried)
    assert (got <= 1.05 * best).all()


def test_min_max_spans_the_values():
    spec = QuantSpec(8, "channel", observer="minmax")
    rows = samples("normal")
    scale, zero = choose_range(rows, spec)
    low, high = -zero * scale, (spec.qmax - zero) * scale
    assert (low <= rows.amin(1) + scale / 2).all()
    assert (high >= rows.amax(1) - scale / 2).all()


def test_percentile_leaves_single_outliers_out():
    rows = torch.randn(1, 4000)
    rows[0, 7] = 1e4
    narrow, _ = choose_range(rows, QuantSpec(8, observer="percentile"))
    wide, _ = choose_range(rows, QuantSpec(8, observer="minmax"))
    assert narrow < wide / 100


def test_two_bits_asymmetric():
    """Codes 0..3 of values that lie on such a grid come back exactly, wherever 0.0 lies in it."""
    spec = QuantSpec(2, "channel")
    for zero in range(4):
        rows = ((torch.arange(64) % 4).float() - zero)[None] * 0.37
        scale, found = choose_range(rows, spec)
        assert found.item() == zero
        torch.testing.assert_close(quantise(rows, scale, found, spec), rows)


def test_rows_do_not_know_each_other():
    rows = samples("skewed")
    spec = QuantSpec(3, "channel")
    together = choose_range(rows, spec)
    apart = [choose_range(row[None], spec) for row in rows]
    for i in range(2):
        assert torch.equal(together[i], torch.cat([a[i] for a in apart]))


def test_chunks_change_nothing(monkeypatch):
    rows, spec = samples("normal", 11, 90), QuantSpec(4, "channel")
    whole = choose_range(rows, spec)
    monkeypatch.setattr("ttaq.observers._CHUNK", 200)
    assert all(torch.equal(a, b) for a, b in zip(whole, choose_range(rows, spec), strict=True))


def test_the_values_stay_as_they_are():
    rows = samples("normal")
    before = rows.clone()
    choose_range(rows, QuantSpec(4, "channel"))
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (torch.tensor([[1.0, torch.nan]]), "NaN or infinite values"),
        (torch.tensor([[1.0, -torch.inf]]), "NaN or infinite values"),
        (torch.empty(3, 0), "no value"),
        (torch.empty(0, 3), "no value"),
    ],
)
def test_ranges_of_nothing_or_of_nan(rows, what):
    with pytest.raises(ValueError, match=rf"^ranges: wanted finite values .*, got {what}; check weights and images$"):
        choose_range(rows, QuantSpec(4))


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=40),
    st.integers(2, 8),
    st.booleans(),
)
def test_error_is_half_a_step_inside_the_range(values, bits, symmetric):
    """Inside the range |x - q(x)| <= scale / 2; rounding the zero can cost one end of min-max half a step more."""
    spec = QuantSpec(bits, observer="minmax", symmetric=symmetric)
    rows = torch.tensor([values])
    scale, zero = choose_range(rows, spec)
    low, high = (0 - zero) * scale, (spec.qmax - zero) * scale
    inside = (rows >= low[:, None]) & (rows <= high[:, None])
    error = (quantise(rows, scale, zero, spec) - rows).abs()
    slack = rows.abs() * 1e-6
    assert (error <= scale[:, None] / 2 + slack)[inside].all()
    ends = scale[:, None] * (0.5001 if symmetric else 1.0001)
    assert (error <= ends + slack).all()


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30), st.integers(2, 8))
def test_quantising_twice_is_quantising_once(values, bits):
    spec = QuantSpec(bits)
    rows = torch.tensor([values])
    grid = choose_range(rows, spec)
    once = quantise(rows, *grid, spec)
    assert torch.equal(quantise(once, *grid, spec), once)


def test_dynamic_ranges_follow_each_row():
    spec = QuantSpec(8, "token")
    x = torch.randn(2, 5, 33) * torch.logspace(-4, 3, 5)[:, None]
    scale, zero = dynamic_range(x, spec)
    assert scale.shape == zero.shape == (2, 5)
    assert zero.dtype == torch.int32
    wanted, origin = choose_range(x.flatten(0, 1), QuantSpec(8, "token", observer="minmax"))
    assert torch.equal(scale.flatten(), wanted)
    assert torch.equal(zero.flatten(), origin.int())
    assert torch.equal(dynamic_range(x[0, 3], spec)[0], scale[0, 3])
    assert dynamic_range(x.requires_grad_(), spec)[0].requires_grad is False
