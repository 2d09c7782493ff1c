"""Data sets as they lie on disk: CIFAR-C and ImageNet-C, image folders, .npz files, scikit-learn's digits.

Every loader gives `Images`. Nothing is ever unpickled.
"""

import itertools
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ._images import IMAGENET_MEAN, IMAGENET_STD, Encoded, Images
from .corruptions import CORRUPTIONS, check_corruption

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_DIGITS_TEST, _DIGITS_CALIBRATION = 500, 256


class CifarC:
    """Read the published CIFAR-10-C or CIFAR-100-C: ``<corruption>.npy``, five severities in sequence, and labels.npy.

    The arrays are mapped, not loaded. Source: arXiv:1903.12261.

    Args:
        folder: Holds the .npy files.
        classes: Name of each class; None numbers them.
        mean: Of each channel, in units of the full scale.
        std: Alike.

    Raises:
        ValueError: The folder does not look like that.
    """

    def __init__(self, folder, classes=None, *, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        self.folder = Path(folder)
        self.corruptions = tuple(name for name in CORRUPTIONS if (self.folder / f"{name}.npy").is_file())
        if not self.corruptions or not (self.folder / "labels.npy").is_file():
            raise ValueError(
                f"CifarC: {self.folder} must hold labels.npy and <corruption>.npy, as fog.npy, got "
                f"{_list(self.folder)}; unpack CIFAR-10-C.tar or CIFAR-100-C.tar there"
            )
        self.labels = _load_array(self.folder / "labels.npy")
        self.classes, self.mean, self.std = classes, mean, std

    def domain(self, name, severity):
        """Return the `Images` of one corruption at one severity, 1 to 5."""
        check_corruption(name, severity, "cifar")
        path = self.folder / f"{name}.npy"
        if name not in self.corruptions:
            raise ValueError(f"CifarC: {path} is missing; unpack it or choose among {', '.join(self.corruptions)}")
        pixels = _load_array(path)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) % 5:
            raise ValueError(
                f"CifarC: {path} must hold uint8 (5 x images, H, W, 3), got {pixels.dtype} {pixels.shape}; "
                "unpack the archive again"
            )
        if self.labels.shape != (len(pixels),):
            raise ValueError(
                f"CifarC: labels.npy must hold {len(pixels)} labels like {path.name}, got {self.labels.shape}; "
                "take both from one archive"
            )
        count = len(pixels) // 5
        part = slice((severity - 1) * count, severity * count)
        return Images(pixels[part], self.labels[part], self.classes, mean=self.mean, std=self.std)


class ImageNetC:
    """Read the published ImageNet-C: ``<corruption>/<severity>/<class>/<image>.JPEG``, already 224 x 224.

    The images are not resized again. Source: arXiv:1903.12261.

    Args:
        folder: Holds the corruptions, or groups of them (noise, blur, weather, digital).
        classes: Class folders in the order of the model's outputs; None takes those there are, sorted.
        mean: Of each channel, in units of the full scale.
        std: Alike.

    Raises:
        ValueError: The folder does not look like that.
    """

    def __init__(self, folder, classes=None, *, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        self.folder = Path(folder)
        found = {path.name: path for pattern in ("*", "*/*") for path in self.folder.glob(pattern) if path.is_dir()}
        self.folders = {name: found[name] for name in CORRUPTIONS if name in found}
        if not self.folders:
            raise ValueError(
                f"ImageNetC: {self.folder} must hold <corruption>/<severity>/<class>/<image>.JPEG, as "
                f"fog/5/n01440764/, got {_list(self.folder)}; unpack the archives there"
            )
        self.corruptions = tuple(self.folders)
        self.classes, self.mean, self.std = classes, mean, std

    def domain(self, name, severity):
        """Return the `Images` of one corruption at one severity, 1 to 5."""
        check_corruption(name, severity, "imagenet")
        if name not in self.folders:
            raise ValueError(
                f"ImageNetC: {self.folder / name} is missing; unpack it or choose among {', '.join(self.corruptions)}"
            )
        paths, labels, classes = _find_images("ImageNetC", self.folders[name] / str(severity), self.classes)
        images = Encoded(paths, paths, lambda picture: picture)
        return Images(images, labels, classes, mean=self.mean, std=self.std)


def load_image_folder(
    folder, size=224, *, crop=0.875, interpolation="bilinear", classes=None, mean=IMAGENET_MEAN, std=IMAGENET_STD
):
    """Read ``<class>/<image>`` folders: shorter side to size / crop, then the central square.

    Images come in the order of their classes and names, and are decoded when asked for.

    Args:
        folder: Holds one folder a class.
        size: Side of the square, in pixels.
        crop: Share of the shorter side that the square keeps.
        interpolation: "bilinear" (as torchvision's models were trained) or "bicubic" (most of timm's).
        classes: Class folders in the order of the model's outputs; None takes those there are, sorted.
        mean: Of each channel, in units of the full scale.
        std: Alike.

    Returns:
        `Images`, (size, size).

    Raises:
        ValueError: The folder does not look like that, or, when its turn comes, an image is broken.
    """
    if size < 1 or not 0 < crop <= 1 or interpolation not in _RESAMPLING:
        raise ValueError(
            f"load_image_folder: size must be positive, crop in 0..1, interpolation bilinear or bicubic, "
            f"got {size}, {crop}, {interpolation!r}"
        )
    paths, labels, classes = _find_images("load_image_folder", Path(folder), classes)

    fit = partial(fit_image, size=size, crop=crop, interpolation=interpolation)
    return Images(Encoded(paths, paths, fit), labels, classes, mean=mean, std=std)


def fit_image(picture, *, size, crop=0.875, interpolation="bilinear"):
    """Resize a Pillow picture so that its shorter side is ``size / crop``, and cut (size, size) out of its middle."""
    ratio = size / crop / min(picture.size)
    wide, tall = (max(size, int(side * ratio)) for side in picture.size)
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    return picture.resize((wide, tall), _RESAMPLING[interpolation]).crop((left, top, left + size, top + size))


def load_npz(path, classes=None, *, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Read an .npz file: images and labels, or encoded images end to end as jpeg, offset and labels.

    Args:
        path: Holds `images` (N, H, W, 3) uint8, or `jpeg` uint8 (all files end to end) and `offset` (N+1); `labels` or
            `label` (N,); and perhaps `classes`, names.
        classes: Name of each class, in place of those in the file.
        mean: Of each channel, in units of the full scale.
        std: Alike.

    Returns:
        `Images`; encoded ones are decoded when asked for.

    Raises:
        ValueError: The file does not look like that.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"load_npz: {path} must be an .npz file of plain arrays, got {error}; write one with numpy.savez"
        ) from error
    labels = arrays.get("labels", arrays.get("label"))
    encoded = {"jpeg", "offset"} <= arrays.keys()
    if labels is None or not (encoded or "images" in arrays):
        raise ValueError(
            f"load_npz: {path} must hold labels, and images or jpeg and offset, got {', '.join(arrays) or 'nothing'}; "
            "write it with numpy.savez(path, images=..., labels=...)"
        )
    images = _split_files(path, arrays["jpeg"], arrays["offset"]) if encoded else arrays["images"]
    classes = arrays.get("classes") if classes is None else classes
    return Images(images, labels, classes, mean=mean, std=std)


def load_digits(split="test", *, seed=0):
    """Read scikit-learn's handwritten digits as 32 x 32 RGB, 8 x 8 enlarged with bicubic interpolation.

    Args:
        split: "train" (1,041 images), "calibration" (256), "test" (500), which share none, or "all" (1,797).
        seed: Of the split.

    Returns:
        `Images`, mean and std 0.5; `index` counts in the whole set.

    Raises:
        ValueError: There is no such split.
        ImportError: scikit-learn is not installed.
    """
    bounds = _DIGITS_TEST, _DIGITS_TEST + _DIGITS_CALIBRATION
    parts = {"test": slice(bounds[0]), "calibration": slice(*bounds), "train": slice(bounds[1], None)}
    if split not in (*parts, "all"):
        raise ValueError(f"load_digits: split must be train, calibration, test or all, got {split!r}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("load_digits: scikit-learn must be installed; pip install 'ttaq[demo]'") from error
    digits = datasets.load_digits()
    images = np.empty((len(digits.images), 32, 32, 3), dtype=np.uint8)
    for large, small in zip(images, np.rint(digits.images * (255 / 16)).astype(np.uint8), strict=True):
        large[:] = np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC))[:, :, None]
    whole = Images(images, digits.target, range(10), mean=(0.5,) * 3, std=(0.5,) * 3)
    order = np.random.default_rng(seed).permutation(len(whole))
    return whole if split == "all" else whole.take(order[parts[split]])


def _find_images(subject, folder, classes):
    """Return paths, labels and class names of ``folder/<class>/<image>``, sorted."""
    layout = f"{folder} must hold <class>/<image>.JPEG or .png"
    there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    classes = there if classes is None else list(classes)
    unknown = [name for name in there if name not in set(classes)]
    if unknown:
        raise ValueError(
            f"{subject}: {folder} must hold no other class folders than `classes` names, got {unknown[0]}; "
            "name it or move it away"
        )
    paths, labels = [], []
    for name in there:
        inside = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in _SUFFIXES)
        paths += inside
        labels += [classes.index(name)] * len(inside)
    if not paths:
        raise ValueError(f"{subject}: {layout}, got {_list(folder)}; put one folder a class there")
    return paths, labels, classes


def _list(folder):
    """Say in a few words what a folder holds."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "an empty folder"


def _load_array(path):
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"CifarC: {path} must be a .npy file of plain numbers, got {error}; unpack the archive again"
        ) from error


def _split_files(path, jpeg, offset):
    """Cut the bytes of all files into those of each."""
    plain = jpeg.dtype == np.uint8 and jpeg.ndim == 1 and offset.ndim == 1 and offset.dtype.kind in "iu"
    if (
        not plain
        or not len(offset)
        or offset[0] < 0
        or offset[-1] > len(jpeg)
        or (np.diff(offset.astype(int)) <= 0).any()
    ):
        raise ValueError(
            f"load_npz: offset of {path} must rise from 0 to the {jpeg.size} bytes of jpeg, got "
            f"{offset.dtype} {offset.shape}; write it anew"
        )
    items = [jpeg[start:end] for start, end in itertools.pairwise(offset.tolist())]
    return Encoded(items, [f"image {number} of {path}" for number in range(len(items))], lambda picture: picture)
