"""Images whose object is destroyed."""

import torch
from straight_lines import destroyed

from ttaq.adaptation.destruction import occlude, shuffle_patches, shuffle_pixels


def test_patches_change_places_whole_and_each_image_by_itself():
    x = torch.arange(2 * 3 * 16 * 16.0).reshape(2, 3, 16, 16)
    y = shuffle_patches(x, torch.Generator().manual_seed(3))
    assert torch.equal(y, destroyed(x, torch.Generator().manual_seed(3)))
    assert not torch.equal(y[0] - x[0], y[1] - x[1])
    z = shuffle_pixels(x, torch.Generator().manual_seed(3))
    for changed in (y, z):
        assert torch.equal(changed.flatten(2).sort().values, x.flatten(2))
    assert torch.equal(z[:, 1] - z[:, 0], torch.full((2, 16, 16), 256.0))  # the channels of a pixel stay together


def test_what_patches_do_not_divide_stays_and_the_middle_is_covered():
    x = torch.randn(2, 3, 10, 7)
    y = shuffle_patches(x, torch.Generator().manual_seed(0))
    assert torch.equal(y[:, :, 8:], x[:, :, 8:])
    assert torch.equal(y[:, :, :, 4:], x[:, :, :, 4:])
    assert not torch.equal(y, x)
    x = torch.randn(2, 3, 8, 12)
    y = occlude(x)
    assert torch.equal(y[0, 1, 2:6, 3:9], x[0, 1].mean().expand(4, 6))
    y[:, :, 2:6, 3:9] = x[:, :, 2:6, 3:9]
    assert torch.equal(y, x)
