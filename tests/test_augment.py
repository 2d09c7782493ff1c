import pytest
import torch

from ttaq.augment import add_noise, change_light, perturb, shift_and_flip

ALL = [shift_and_flip, add_noise, change_light, perturb]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x():
    return torch.randn(6, 3, 16, 20, generator=seeded(1)) * 2 + 0.5


@pytest.mark.parametrize("change", ALL)
def test_seeds_decide_and_nothing_else(change, x):
    original, state = x.clone(), torch.get_rng_state()
    y = change(x, seeded())
    assert torch.equal(change(x, seeded()), y)
    assert not torch.equal(change(x, seeded(7)), y)
    assert not torch.equal(y, x)
    assert torch.equal(x, original)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype_are_kept(change, x, dtype):
    y = change(x.to(dtype), seeded())
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.isfinite().all()


@pytest.mark.parametrize("change", ALL)
@pytest.mark.parametrize("bad", [torch.ones(3, 8, 8), torch.ones(1, 3, 8, 8, dtype=torch.uint8)])
def test_other_tensors_are_refused(change, bad):
    with pytest.raises(ValueError, match=r"floating point \(N, C, H, W\)"):
        change(bad, seeded())


def test_every_image_is_a_shifted_or_flipped_window(x):
    y = shift_and_flip(x, seeded(), pixels=2)
    padded = torch.nn.functional.pad(x, [2] * 4, mode="reflect")
    seen = set()
    for before, after in zip(padded, y, strict=True):
        windows = {
            (i, j, flip): before[:, i : i + 16, j : j + 20].flip(2) if flip else before[:, i : i + 16, j : j + 20]
            for i in range(5)
            for j in range(5)
            for flip in (False, True)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, after)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 3


def test_a_shift_beyond_the_image_is_refused(x):
    with pytest.raises(ValueError, match="take a smaller shift"):
        shift_and_flip(x, seeded(), pixels=16)


@pytest.mark.parametrize("snr", [10.0, 30.0])
def test_noise_has_the_asked_level_in_each_image(snr):
    x = torch.randn(4, 3, 64, 64, generator=seeded(2)) * torch.tensor([0.1, 1.0, 5.0, 20.0]).view(4, 1, 1, 1)
    noise = add_noise(x, seeded(), snr) - x
    measured = 10 * torch.log10(x.square().mean((1, 2, 3)) / noise.square().mean((1, 2, 3)))
    assert (measured - snr).abs().max() < 0.3


def test_light_is_an_affine_change_within_bounds(x):
    y = change_light(x, seeded(), brightness=0.1, contrast=0.3)
    ratio = y.std((1, 2, 3)) / x.std((1, 2, 3))
    shift = (y.mean((1, 2, 3)) - x.mean((1, 2, 3))) / x.std((1, 2, 3), correction=0)
    assert ((ratio >= 0.7) & (ratio <= 1.3)).all()
    assert (shift.abs() <= 0.1 + 1e-5).all()
    assert ratio.unique().numel() == len(x)
    centred = (y - y.mean((1, 2, 3), keepdim=True)) / ratio.view(-1, 1, 1, 1)
    torch.testing.assert_close(centred, x - x.mean((1, 2, 3), keepdim=True))
