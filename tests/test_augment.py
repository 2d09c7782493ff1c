import pytest
import torch

from ttaq.augment import add_noise, blur, change_colour, change_light, distort, perturb, shift_and_flip, warp

ALL = [shift_and_flip, add_noise, change_light, perturb, change_colour, warp, blur, distort]


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


def test_colour_turns_about_grey_and_keeps_it(x):
    y = change_colour(x, seeded(), saturation=0.3, hue=0.1)
    torch.testing.assert_close(y.mean(1), x.mean(1), rtol=0, atol=1e-5)
    ratio = (y - y.mean(1, keepdim=True)).norm(dim=1) / (x - x.mean(1, keepdim=True)).norm(dim=1)
    assert ((ratio > 0.699) & (ratio < 1.301)).all()
    spread = ratio.amax((1, 2)) - ratio.amin((1, 2))
    assert (spread < 1e-3).all()  # a rotation keeps lengths: one factor an image
    grey = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(change_colour(grey, seeded()), grey)
    two = change_colour(x[:, :2], seeded(), saturation=0.0)
    torch.testing.assert_close(two, x[:, :2])


def test_warp_without_strength_is_the_image_or_its_mirror(x):
    y = warp(x, seeded(), angle=0.0, shift=0.0, scale=0.0)
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(x, y, strict=True)]
    mirrored = [torch.allclose(a.flip(2), b, atol=1e-4) for a, b in zip(x, y, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert any(same)
    assert any(mirrored)


def test_warp_turns_a_quarter(monkeypatch):
    monkeypatch.setattr("ttaq.augment._uniform", lambda n, generator, like: torch.ones(n))
    x = torch.randn(2, 3, 12, 12, generator=seeded(4))
    y = warp(x, seeded(), angle=90.0, shift=0.0, scale=0.0)
    assert any(torch.allclose(x.rot90(k, (2, 3)), y, atol=1e-4) for k in (1, 3))


def test_blur_keeps_flat_images_and_smooths_the_others(x):
    flat = torch.full((2, 3, 9, 7), 1.5)
    torch.testing.assert_close(blur(flat, seeded(), sigma=2.0), flat)
    rough = (x.diff(dim=3) ** 2).mean((1, 2, 3))
    assert ((blur(x, seeded(), sigma=3.0).diff(dim=3) ** 2).mean((1, 2, 3)) < rough).all()
    assert blur(torch.ones(1, 1, 1, 1), seeded()).shape == (1, 1, 1, 1)
