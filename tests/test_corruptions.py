"""The fifteen corruptions: strength, determinism, independence of the batch, sizes, refusals."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ttaq.streams import CORRUPTIONS, corrupt
from ttaq.streams import _filters as filters
from ttaq.streams._levels import LEVELS


def scenes(count, height=32, width=32, seed=0):
    """Return (count, height, width, 3) uint8: smooth colours with a few sharp boxes, as in photographs."""
    generator = np.random.default_rng(seed)
    x = ndimage.gaussian_filter(generator.normal(size=(count, height, width, 3)), (0, 3, 3, 0), mode="wrap")
    x = 110 + 45 * x / x.std(axis=(1, 2, 3), keepdims=True)
    for image in x:
        for _ in range(3):
            top, left = generator.integers(0, height - 6), generator.integers(0, width - 6)
            image[top : top + 6, left : left + 6] = generator.integers(0, 256, 3)
    return np.clip(x, 0, 255).astype(np.uint8)


def difference(x, name, severity, table="cifar"):
    return np.abs(corrupt(x, name, severity, table=table).astype(int) - x).mean()


def test_order_is_that_of_the_benchmark():
    assert len(CORRUPTIONS) == 15
    assert CORRUPTIONS[0] == "gaussian_noise"
    assert CORRUPTIONS[7:10] == ("snow", "frost", "fog")
    assert CORRUPTIONS[-1] == "jpeg_compression"
    assert all(set(LEVELS[table]) == set(CORRUPTIONS) for table in LEVELS)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_rises_with_severity(name):
    """All but three rise at each step: the published levels of elastic, glass and frost trade one thing for another."""
    x = scenes(24)
    steps = np.array([difference(x, name, severity) for severity in range(1, 6)])
    assert (steps > 0.5).all()
    if name == "elastic_transform":
        assert steps[1:].max() < 2 * steps.min() + 10
    elif name == "glass_blur":
        assert steps[3:].max() > steps[:3].max()
    elif name == "frost":
        assert steps[1:].min() > 1.1 * steps[0]
    else:
        assert (steps[1:] > 0.9 * steps[:-1]).all()
        assert steps[-1] > 1.1 * steps[0]


@pytest.mark.parametrize("table", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_part_of_a_batch_is_the_whole(name, table):
    x = scenes(6, 24, 40)
    before = x.copy()
    whole = corrupt(x, name, 4, seed=7, table=table)
    assert whole.dtype == np.uint8
    assert whole.shape == x.shape
    np.testing.assert_array_equal(corrupt(x[2:5], name, 4, seed=7, table=table, start=2), whole[2:5])
    chosen = [4, 0, 3]
    np.testing.assert_array_equal(corrupt(x[chosen], name, 4, seed=7, table=table, index=chosen), whole[chosen])
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "motion_blur", "snow", "frost", "fog"])
def test_seeds_severities_and_images_draw_apart(name):
    x = np.repeat(scenes(1), 2, axis=0)
    first = corrupt(x, name, 3, seed=0)
    assert (first[0] != first[1]).any()
    assert (first != corrupt(x, name, 3, seed=1)).any()
    np.testing.assert_array_equal(first, corrupt(x, name, 3, seed=0))


def test_chunks_do_not_show():
    """400 images are more than are worked on at once."""
    x = np.tile(scenes(8), (50, 1, 1, 1))
    whole = corrupt(x, "elastic_transform", 5)
    np.testing.assert_array_equal(whole[350:], corrupt(x[350:], "elastic_transform", 5, start=350))


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_imagenet_table_at_224(name):
    """The elastic levels fall in mean difference: the first two move whole parts, the others ripple."""
    x = scenes(1, 224, 224)
    strongest = difference(x, name, 5, "imagenet")
    assert strongest > (0.4 if name == "elastic_transform" else 1) * difference(x, name, 1, "imagenet")


def test_imagenet_is_the_stronger_table():
    x = scenes(12)
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "brightness"):
        assert difference(x, name, 5, "imagenet") > 1.3 * difference(x, name, 5, "cifar")


def test_noise_has_the_variance_of_its_formula():
    grey = np.full((8, 32, 32, 3), 128, dtype=np.uint8)
    for severity, sigma in ((1, 0.04), (5, 0.10)):
        noisy = corrupt(grey, "gaussian_noise", severity) / 255.0
        assert noisy.std() == pytest.approx(sigma, rel=0.03)
    shot = corrupt(grey, "shot_noise", 5) / 255.0
    assert shot.std() == pytest.approx(np.sqrt(128 / 255 / 50), rel=0.03)
    hit = corrupt(grey, "impulse_noise", 5)
    assert np.isin(hit, (0, 128, 255)).all()
    assert (hit != 128).mean() == pytest.approx(0.07, rel=0.1)


def test_colour_corruptions_follow_their_formulas():
    x = scenes(4)
    flat = corrupt(x, "contrast", 5).astype(float)
    expected = (x - x.mean(axis=(1, 2), keepdims=True)) * 0.15 + x.mean(axis=(1, 2), keepdims=True)
    assert np.abs(flat - expected).max() <= 0.51
    bright = corrupt(x, "brightness", 3).astype(float).max(axis=3)
    np.testing.assert_allclose(bright, np.minimum(x.max(axis=3) + 0.15 * 255, 255), atol=0.51)


def test_filters_agree_with_scipy():
    x = scenes(2, 20, 27).astype(np.float32) / 255
    disk = filters.build_disk(3, 0.5)
    assert disk.sum() == pytest.approx(1, abs=1e-6)
    reference = ndimage.correlate(x, disk[None, :, :, None], mode="mirror")
    np.testing.assert_allclose(filters.correlate(x, disk), reference, atol=1e-5)
    rows, columns = np.mgrid[:20, :27] + np.array([0.3, -0.6])[:, None, None]
    read = filters.warp(x, np.stack([rows, rows - 40]), np.stack([columns, columns + 50]))
    for k, (row, column) in enumerate(((rows, columns), (rows - 40, columns + 50))):
        reference = ndimage.map_coordinates(x[k, ..., 1], (row, column), order=1, mode="mirror")
        np.testing.assert_allclose(read[k, ..., 1], reference, atol=1e-5)


def test_geometry_keeps_pixels():
    x = scenes(2, 16, 21).astype(np.float32)
    generators = [np.random.default_rng(k) for k in range(2)]
    places = np.stack(np.broadcast_arrays(*np.mgrid[:16, :21], 0), axis=-1)[None].repeat(2, axis=0)
    moved = np.abs(filters.scatter_pixels(places, 2, 1, generators) - places)
    assert (moved[:, 2:-2, 2:-2, :2].max(axis=-1) > 0).mean() > 0.7
    assert moved[:, :2].max() == 0
    assert moved[:, -1:].max() == 0
    planes = x.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(filters.magnify(planes, 1.0), planes, rtol=1e-6)
    right = filters.blur_motion(x, 0, 1.0, [0, 90])
    np.testing.assert_array_equal(right, x)


def test_motion_follows_its_angle():
    """A dot smears to one side: along the row at 0 degrees, along the column at 90."""
    dot = np.zeros((2, 31, 31, 1), dtype=np.float32)
    dot[:, 15, 15] = 1
    smeared = filters.blur_motion(dot, 5, 2.0, [0, 90])[..., 0]
    assert smeared[0, 15].sum() == pytest.approx(1, abs=1e-5)
    assert smeared[1, :, 15].sum() == pytest.approx(1, abs=1e-5)
    assert smeared[0, 15, 15] > smeared[0, 15, 14] > smeared[0, 15, 13] > 0


def test_frost_from_a_folder(tmp_path):
    white = np.full((400, 400, 3), 255, dtype=np.uint8)
    Image.fromarray(white).save(tmp_path / "a.png")
    x = scenes(2)
    frosted = corrupt(x, "frost", 1, frost_folder=tmp_path)
    np.testing.assert_allclose(frosted, np.minimum(x + 0.2 * 255, 255), atol=0.51)
    (tmp_path / "b.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"b\.jpg"):
        corrupt(x, "frost", 1, frost_folder=tmp_path)
    with pytest.raises(ValueError, match="frost_folder must hold"):
        corrupt(x, "frost", 1, frost_folder=tmp_path / "absent")


@pytest.mark.parametrize("table", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_tiny_and_empty_batches(name, table):
    x = scenes(1, 8, 9)[:, :1, :1]
    assert corrupt(x, name, 5, table=table).shape == (1, 1, 1, 3)
    assert corrupt(scenes(2)[:0], name, 5, table=table).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"severity": 0}, "severity must be 1, 2, 3, 4 or 5, got 0"),
        ({"severity": 6}, "severity must be"),
        ({"name": "rain"}, "name must be one of gaussian_noise.*got 'rain'"),
        ({"table": "tiny"}, "table must be"),
        ({"seed": -1}, "must not be negative"),
        ({"index": [1]}, "index must hold 2 numbers"),
        ({"images": np.ones((2, 8, 8, 3), dtype=np.float32)}, "images must be uint8 of shape"),
        ({"images": np.ones((8, 8, 3), dtype=np.uint8)}, "images must be uint8 of shape"),
    ],
)
def test_refusals_are_one_sentence(change, message):
    arguments = {"images": scenes(2), "name": "fog", "severity": 1} | change
    with pytest.raises(ValueError, match=message) as error:
        corrupt(**arguments)
    assert "\n" not in str(error.value)
