"""Data sets: layouts on disk, order, preprocessing, and what is said of broken ones."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttaq.streams import CifarC, ImageNetC, Images, load_digits, load_image_folder, load_npz

SHARED = Path(__file__).parents[1].parent / "shared/data"


def noise(count, height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_cifar_c(folder, count=4, names=("fog", "snow")):
    """Write a small CIFAR-C: `count` images at each of five severities; pixels tell where they came from."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        np.save(folder / f"{name}.npy", noise(5 * count, seed=number))
    np.save(folder / "labels.npy", np.tile(np.arange(count), 5))
    return folder


def write_images(folder, classes=("b", "a"), count=2, size=(30, 20)):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k, image in enumerate(noise(count, size[1], size[0], seed=number)):
            Image.fromarray(image).save(folder / name / f"{k}.png")
    return folder


def assert_one_sentence(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_batches_are_walked_through_again():
    images = Images(noise(10), np.arange(10) % 3)
    batches = images.batches(4)
    assert len(batches) == 3
    first, second = list(batches), list(batches)
    assert [len(x) for x, _ in first] == [4, 4, 2]
    for (x, y), (again, labels) in zip(first, second, strict=True):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
    assert images.classes == ("0", "1", "2")


def test_preprocess_is_the_formula():
    images = Images(noise(2), [0, 1], mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = images.preprocess(images.pixels())
    assert x.shape == (2, 3, 32, 32)
    assert x.is_contiguous()
    expected = (images.images[1, 5, 7, 2] / 255 - 0.3) / 0.7
    assert x[1, 2, 5, 7].item() == pytest.approx(expected, abs=1e-6)


def test_take_shares_pixels_and_keeps_the_origin():
    images = Images(noise(10), np.arange(10))
    part = images.take(np.array([7, 2, 5])).take([2, 0])
    assert part.images is images.images
    assert part.index.tolist() == [5, 7]
    assert part.labels.tolist() == [5, 7]
    np.testing.assert_array_equal(part.pixels(), images.images[[5, 7]])
    assert images.take(images.labels > 6).index.tolist() == [7, 8, 9]


def test_arrays_and_tensors_of_any_layout():
    pixels = noise(3, 8, 9)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for given in (tensor, tensor.numpy(), tensor.double() / 255, torch.from_numpy(pixels)):
        np.testing.assert_array_equal(Images(given, [0, 1, 2]).pixels(), pixels)
    grey = Images(pixels[..., 0], [0, 1, 2]).pixels()
    np.testing.assert_array_equal(grey, pixels[..., :1].repeat(3, axis=3))


@pytest.mark.parametrize(
    ("images", "labels", "extra", "message"),
    [
        (noise(3), [0, 1], {}, "one for each of the 3 images, got 2"),
        (noise(3), [0.0, 1.0, 2.0], {}, "must be integers"),
        (noise(3), [0, 1, 5], {"classes": ["a", "b"]}, "must lie in 0..1, got 0 to 5"),
        (noise(3), [0, -1, 1], {}, "must lie in"),
        (noise(3).astype(np.float32), [0, 1, 2], {}, "floats must lie in 0..1"),
        (np.full((1, 4, 4, 3), np.nan), [0], {}, "floats must lie in 0..1"),
        (noise(3).astype(np.int64), [0, 1, 2], {}, "must be uint8"),
        (np.zeros((3, 5, 8, 8), np.uint8), [0, 1, 2], {}, "shape must be"),
        (noise(3), [0, 1, 2], {"std": (0.1, 0.0, 0.1)}, "std positive"),
        (noise(3), [0, 1, 2], {"mean": (0.1,)}, "3 numbers each"),
    ],
)
def test_unfit_arrays_are_refused(images, labels, extra, message):
    with pytest.raises(ValueError, match=message) as error:
        Images(images, labels, **extra)
    assert_one_sentence(error)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Images(noise(1), [0]).batches(0)


def test_cifar_c_maps_one_severity(tmp_path):
    source = CifarC(write_cifar_c(tmp_path), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert source.corruptions == ("snow", "fog")
    domain = source.domain("snow", 3)
    assert isinstance(domain.images, np.memmap)
    np.testing.assert_array_equal(domain.pixels(), noise(20, seed=1)[8:12])
    assert domain.labels.tolist() == [0, 1, 2, 3]
    assert domain.std == (0.25,) * 3
    assert sum(len(y) for _, y in domain.batches(3)) == 4


def test_cifar_c_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"labels.npy and <corruption>.npy.*no such folder") as error:
        CifarC(tmp_path / "absent")
    assert_one_sentence(error)
    with pytest.raises(ValueError, match="an empty folder"):
        CifarC(tmp_path)
    source = CifarC(write_cifar_c(tmp_path))
    with pytest.raises(ValueError, match=r"frost.npy is missing; .*snow, fog"):
        source.domain("frost", 1)
    with pytest.raises(ValueError, match="severity must be"):
        source.domain("fog", 0)
    np.save(tmp_path / "labels.npy", np.arange(7))
    with pytest.raises(ValueError, match=r"must hold 20 labels like fog\.npy") as error:
        CifarC(tmp_path).domain("fog", 1)
    assert_one_sentence(error)
    np.save(tmp_path / "fog.npy", noise(7))
    with pytest.raises(ValueError, match=r"uint8 \(5 x images, H, W, 3\)"):
        source.domain("fog", 1)


def test_cifar_c_never_unpickles(tmp_path):
    write_cifar_c(tmp_path)
    np.save(tmp_path / "fog.npy", np.array([{"a": 1}] * 5), allow_pickle=True)
    with pytest.raises(ValueError, match="plain numbers") as error:
        CifarC(tmp_path).domain("fog", 1)
    assert_one_sentence(error)
    (tmp_path / "snow.npy").write_bytes((tmp_path / "snow.npy").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"snow.npy must be a .npy file"):
        CifarC(tmp_path).domain("snow", 1)


@pytest.mark.parametrize("group", ["", "weather"])
def test_imagenet_c_is_read_as_it_is(tmp_path, group):
    write_images(tmp_path / group / "fog" / "5", classes=("n02", "n01"), size=(24, 24))
    source = ImageNetC(tmp_path)
    assert source.corruptions == ("fog",)
    domain = source.domain("fog", 5)
    assert domain.classes == ("n01", "n02")
    assert domain.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(domain.pixels([2, 3]), noise(2, 24, 24, seed=0))
    ordered = ImageNetC(tmp_path, classes=["n00", "n02", "n01"]).domain("fog", 5)
    assert ordered.labels.tolist() == [2, 2, 1, 1]
    with pytest.raises(ValueError, match=r"fog.1 must hold <class>/<image>.*no such folder"):
        source.domain("fog", 1)
    with pytest.raises(ValueError, match="snow is missing"):
        source.domain("snow", 5)
    with pytest.raises(ValueError, match="no other class folders than `classes` names, got n02"):
        ImageNetC(tmp_path, classes=["n01"]).domain("fog", 5)


def test_imagenet_c_says_its_layout(tmp_path):
    with pytest.raises(ValueError, match=r"<corruption>/<severity>/<class>/<image>\.JPEG.*an empty folder") as error:
        ImageNetC(tmp_path)
    assert_one_sentence(error)


def test_image_folder_resizes_and_crops(tmp_path):
    write_images(tmp_path, size=(40, 20))
    images = load_image_folder(tmp_path, 14, crop=0.7, interpolation="bicubic")
    assert images.classes == ("a", "b")
    assert images.labels.tolist() == [0, 0, 1, 1]
    picture = Image.fromarray(noise(1, 20, 40, seed=1)[0])
    expected = np.asarray(picture.resize((40, 20), Image.Resampling.BICUBIC))[3:17, 13:27]
    np.testing.assert_array_equal(images.pixels(slice(0, 1))[0], expected)
    assert load_image_folder(tmp_path, 7).pixels().shape == (4, 7, 7, 3)


def test_image_folder_names_the_broken_image(tmp_path):
    write_images(tmp_path)
    whole = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    images = load_image_folder(tmp_path, 8)
    assert images.pixels([0]).shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match=r"a.1\.png must be an image that Pillow can read") as error:
        list(images.batches(4))
    assert_one_sentence(error)
    (tmp_path / "a" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.png"):
        images.pixels()


def test_image_folder_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_image_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"must hold <class>/<image>.*an empty folder") as error:
        load_image_folder(tmp_path)
    assert_one_sentence(error)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="must hold <class>/<image>"):
        load_image_folder(tmp_path)
    with pytest.raises(ValueError, match="interpolation bilinear or bicubic"):
        load_image_folder(tmp_path, interpolation="magic")


def test_unequal_sizes_are_named(tmp_path):
    write_images(tmp_path / "fog" / "1", classes=("a",), size=(24, 24))
    Image.fromarray(noise(1, 20, 30)[0]).save(tmp_path / "fog" / "1" / "a" / "odd.png")
    with pytest.raises(ValueError, match=r"one size, 24x24 .*got 30x20 in .*odd\.png"):
        ImageNetC(tmp_path).domain("fog", 1).pixels()


def test_npz_of_arrays_and_of_files(tmp_path):
    pixels = noise(5, 16, 16)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(5), classes=np.array(list("abcde")))
    plain = load_npz(tmp_path / "a.npz")
    assert plain.classes == tuple("abcde")
    np.testing.assert_array_equal(plain.pixels(), pixels)
    files = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    offset = np.cumsum([0] + [len(file) for file in files])
    np.savez(tmp_path / "b.npz", jpeg=np.concatenate(files), offset=offset, label=np.arange(5, dtype=np.uint8))
    np.testing.assert_array_equal(load_npz(tmp_path / "b.npz").pixels([4, 1]), pixels[[4, 1]])


def test_npz_says_what_is_wrong(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"must be an .npz file"):
        load_npz(path)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match=r"must be an .npz file"):
        load_npz(path)
    np.save(tmp_path / "a.npy", noise(1))
    with pytest.raises(ValueError, match=r"must be an .npz file"):
        load_npz(tmp_path / "a.npy")
    np.savez(path, images=np.array([{"a": 1}]), labels=[0])
    with pytest.raises(ValueError, match="of plain arrays") as error:
        load_npz(path)
    assert_one_sentence(error)
    np.savez(path, pictures=noise(2))
    with pytest.raises(ValueError, match="must hold labels, and images or jpeg and offset, got pictures"):
        load_npz(path)
    np.savez(path, jpeg=np.zeros(9, np.uint8), offset=[0, 5, 12], labels=[0, 1])
    with pytest.raises(ValueError, match="must rise from 0 to the 9 bytes"):
        load_npz(path)
    np.savez(path, images=noise(2), labels=[0, 1, 1])
    with pytest.raises(ValueError, match="one for each of the 2 images, got 3"):
        load_npz(path)


def test_digits_are_split_without_overlap():
    parts = [load_digits(split, seed=3) for split in ("train", "calibration", "test")]
    assert [len(part) for part in parts] == [1041, 256, 500]
    assert len(np.unique(np.concatenate([part.index for part in parts]))) == 1797
    assert load_digits("test", seed=3).index.tolist() == parts[2].index.tolist()
    assert load_digits("test", seed=4).index.tolist() != parts[2].index.tolist()
    pixels = parts[1].pixels()
    assert pixels.shape == (256, 32, 32, 3)
    assert pixels.max() == 255
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert parts[1].classes == tuple("0123456789")
    assert np.bincount(parts[2].labels).min() > 30
    with pytest.raises(ValueError, match="split must be train"):
        load_digits("validation")


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the project")
def test_real_cifar10_file():
    images = load_npz(SHARED / "cifar10_test.npz")
    assert len(images) == 10000
    assert images.classes[:2] == ("airplane", "automobile")
    pixels = images.pixels(slice(0, 50))
    assert pixels.shape == (50, 32, 32, 3)
    assert pixels.std() > 40
