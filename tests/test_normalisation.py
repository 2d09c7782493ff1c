"""A stream that is normalised otherwise than calibration was is said so, once; a corrupted one never is."""

import functools
import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from tiny import calibrated, resnet

import ttaq
from ttaq.adaptation import adapt
from ttaq.adaptation.normalisation import KNOWN, judge
from ttaq.batches import Extent
from ttaq.streams import CORRUPTIONS, Images, corrupt, load_digits

RAW, PLAIN, HALF, IMAGENET = (KNOWN[k] for k in (0, 1, 2, 4))
COMMON = [known for known in KNOWN if len(known[0]) == 3 or known in (PLAIN, HALF)]
ODD = ((0.3, 0.4, 0.5), (0.2, 0.1, 0.3))


@functools.cache
def pictures(kind):
    """Return pixels to calibrate on and pixels of a stream, uint8 (64, side, side, 3)."""
    if kind == "digits":
        return load_digits("calibration").pixels(np.arange(64)), load_digits("test").pixels(np.arange(64))
    smooth = gaussian_filter(np.random.default_rng(0).standard_normal((128, 48, 48, 3)), (0, 4, 4, 0))
    pixels = np.clip(128 + 70 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    return pixels[:64], pixels[64:]


def normalise(pixels, known):
    mean, std = (3 * values if len(values) == 1 else values for values in known)
    return Images(pixels, np.zeros(len(pixels), int), mean=mean, std=std).preprocess(pixels)


def record(*batches):
    extent = Extent()
    for x in batches:
        extent.add(x)
    return extent.record()


@pytest.fixture(scope="module")
def packed():
    model = ttaq.prepare(resnet(), "w4a4")
    ttaq.calibrate(model, normalise(pictures("digits")[0], IMAGENET).split(20))
    return ttaq.pack(model)


def stream(known=IMAGENET, images=32):
    return normalise(pictures("digits")[1][:images], known)


def found(adapter, x):
    """Adapt to a batch; return what was said of its normalisation, in the history and as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter(x)
    said = [event.removeprefix("normalisation: ") for event in adapter.history[-1].events if "normalis" in event]
    assert [str(warning.message) for warning in caught] == [f"adapt: {sentence}" for sentence in said]
    assert all(warning.category is UserWarning for warning in caught)
    return said


@pytest.mark.parametrize("kind", ["digits", "smooth"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_images_of_the_right_normalisation_are_never_accused(kind, name):
    clean, after = pictures(kind)
    for table in ("cifar", "imagenet"):
        bad = corrupt(after, name, 5, table=table)
        for known in (*COMMON, RAW, ODD):
            before = record(normalise(clean, known))
            for part in (slice(1), slice(1, 2), slice(2, 3), slice(8), slice(64)):
                assert judge(record(normalise(bad[part], known)), before) is None


@pytest.mark.parametrize("images", [1, 8, 64])
@pytest.mark.parametrize("kind", ["digits", "smooth"])
def test_another_normalisation_of_clipped_images_is_found(kind, images):
    clean, after = pictures(kind)
    for then in (PLAIN, HALF, IMAGENET):
        for now in (RAW, PLAIN, HALF, IMAGENET):
            said = judge(record(normalise(after[:images], now)), record(normalise(clean, then)))
            assert (said is None) == (now is then), (then, now)


def test_what_unclipped_or_synthetic_images_show_is_no_evidence():
    clean, after = (normalise(pixels, IMAGENET) for pixels in pictures("digits"))
    generator = torch.Generator().manual_seed(0)
    noisy = after + 0.7 * torch.randn(after.shape, generator=generator)
    assert judge(record(noisy), record(clean)) is None
    assert judge(record(after), record(noisy)) is None
    assert judge(record(3 * after), record(torch.randn(after.shape, generator=generator))) is None
    assert judge(record(after.clamp(-1, 1.1)), record(clean.clamp(-1, 1))) is None


def test_calibration_says_what_the_images_were(packed):
    x = normalise(pictures("digits")[0], IMAGENET)
    inputs = packed.ttaq_report["calibration"]["inputs"]
    flat = x.movedim(1, 0).flatten(1).double()
    ends = torch.stack([(flat == flat.amin(1, True)).sum(1), (flat == flat.amax(1, True)).sum(1)]).amin(0)
    wanted = {"low": flat.amin(1), "high": flat.amax(1), "mean": flat.mean(1), "std": flat.std(1, correction=0)}
    wanted["clipped"] = ends / flat.shape[1]
    assert inputs.keys() == wanted.keys()
    for key, values in wanted.items():
        assert inputs[key] == pytest.approx(values.tolist(), rel=1e-4)
        assert all(type(value) is float for value in inputs[key])
    assert record(torch.zeros(4, 3)) is None
    assert record(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)) is None
    assert record(torch.zeros(0, 3, 4, 4)) is None
    assert record(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)) is None


def test_an_adapter_says_it_once_in_its_history_and_as_a_warning(packed, tmp_path):
    adapter = adapt(packed, "tent")
    (said,) = found(adapter, stream(PLAIN))
    assert said == (
        "the images look like pixels from 0 to 1 normalised with mean 0 and std 1, those of calibration with mean "
        "(0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225); normalise both alike"
    )
    assert found(adapter, stream(PLAIN)) == []
    again = adapt(packed, "tent")
    again.resume(adapter.save(tmp_path / "state.pt"))
    assert found(again, stream(PLAIN)) == []
    again.reset()
    assert found(again, stream(PLAIN)) == [said]
    assert found(adapt(packed, "tent"), stream()) == []
    for guard in (False, "finite"):
        assert found(adapt(packed, "tent", guard=guard), stream(PLAIN)) == []


@pytest.mark.parametrize("method", ["source", "cotta", "rotta", "roid", "lame", "zeroth-order"])
def test_every_kind_of_method_is_looked_at(packed, method):
    assert len(found(adapt(packed, method), stream(HALF, 8))) == 1
    assert found(adapt(packed, method), stream(IMAGENET, 8)) == []


def test_a_batch_without_images_or_with_nan_is_not_the_first(packed):
    adapter = adapt(packed, "tent")
    broken = stream(PLAIN, 4)
    broken[0, 0, 0, 0] = torch.nan
    assert found(adapter, stream(PLAIN, 0)) == found(adapter, broken) == []
    assert len(found(adapter, stream(PLAIN, 4))) == 1


def test_the_record_survives_files_and_fusion(packed, tmp_path):
    loaded = ttaq.load(ttaq.save(packed, tmp_path / "model.safetensors"), resnet())
    assert loaded.ttaq_report["calibration"] == packed.ttaq_report["calibration"]
    assert len(found(adapt(loaded, "tent"), stream(HALF))) == 1
    fused = ttaq.fuse(loaded, stream(images=2))
    assert len(found(adapt(fused, "source"), stream(HALF))) == 1


def test_what_the_model_is_given_counts_whatever_forward_does(packed):
    def prepared(model, x):
        return model((x - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1))

    assert found(adapt(packed, "tent", forward=prepared), stream(PLAIN)) == []
    model = ttaq.prepare(resnet(), "w4a4")
    ttaq.calibrate(model, [normalise(pictures("digits")[0], PLAIN)], forward=prepared)
    assert found(adapt(model, "tent"), stream()) == []
    assert len(found(adapt(model, "tent"), stream(PLAIN))) == 1


def test_without_a_record_there_are_the_reference_and_pixels():
    model = resnet()
    assert found(adapt(model, "tent"), stream(PLAIN)) == []
    assert found(adapt(model, "tent"), stream(RAW)) == [
        "the images look like pixels from 0 to 255; give the model (x / 255 - mean) / std with the mean and std of "
        "training"
    ]
    reference = normalise(pictures("digits")[0], IMAGENET).split(16)
    assert len(found(adapt(model, "tent", reference=iter(reference), telemetry=2), stream(PLAIN))) == 1
    assert found(adapt(model, "tent", reference=reference), stream()) == []
    assert found(adapt(model, "tent", reference=[normalise(pictures("digits")[0], RAW)]), stream(RAW)) == []
    random = calibrated("resnet", "w4a4")  # on random numbers
    assert found(adapt(random, "tent"), stream(PLAIN)) == []
    assert "the mean and std of training" in found(adapt(random, "tent"), stream(RAW))[0]
    vectors = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
    assert found(adapt(vectors, "tent"), 100 * torch.rand(8, 4)) == []
