"""`ttaq adapt`: every image of a stream gets an answer, whatever it is; a signal loses nothing; memory stays flat."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import noise
from tiny import calibrated, resnet

import ttaq
from ttaq.deployment import Reader, Stop, line, preprocessor, receive, serve, walk
from ttaq.models import ResNet
from ttaq.serving import adapt_stream


def encoded(seed=0, mode="RGB", side=40, kind="PNG"):
    pixels = noise(1, side, side, seed=seed)[0]
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels)
    image = image if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def bomb():
    """Write the head of a PNG of 30,000 x 30,000 pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


GOOD = {
    "plain": encoded(),
    "grey": encoded(mode="L"),
    "grey16": encoded(mode="I;16"),
    "palette": encoded(mode="P"),
    "alpha": encoded(mode="RGBA"),
    "cmyk": encoded(mode="CMYK", kind="JPEG"),
    "jpeg": encoded(kind="JPEG", side=400),
    "wide": encoded(side=9),
}
BAD = {
    "truncated": (encoded()[:600], "truncated|broken|unrecognized|not enough|incomplete"),
    "text": (b"no image at all", "cannot identify image file"),
    "empty": (b"", "cannot identify image file"),
    "huge": (bomb(), "30000x30000 pixels are more than 67108864; raise --most-pixels|exceeds limit"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_sound_image_is_read(kind, tmp_path):
    reader = Reader(32)
    pixels = reader.read(GOOD[kind])
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 2
    (tmp_path / "file").write_bytes(GOOD[kind])
    assert np.array_equal(reader.read(tmp_path / "file"), pixels)


def test_sixteen_bits_of_grey_are_read_as_eight():
    assert np.array_equal(Reader(32).read(GOOD["grey16"])[..., 0], Reader(32).read(GOOD["grey16"])[..., 2])
    assert 60 < Reader(32).read(GOOD["grey16"]).mean() < 200


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_sound_image_is_named(kind):
    data, says = BAD[kind]
    with pytest.raises(ValueError, match=says):
        Reader(32).read(data)


def test_pipes_hold_paths_or_an_archive(tmp_path):
    lines = io.BufferedReader(io.BytesIO(b"a.png\nfolder/b c.png\r\n\nlast"))
    assert list(receive(lines)) == [(n, Path(n)) for n in ("a.png", "folder/b c.png", "last")]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("x/one.png", "two"):
            member = tarfile.TarInfo(name)
            member.size = len(GOOD["plain"])
            archive.addfile(member, io.BytesIO(GOOD["plain"]))
    found = list(receive(io.BufferedReader(io.BytesIO(file.getvalue()))))
    assert found == [("x/one.png", GOOD["plain"]), ("two", GOOD["plain"])]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/2").touch()
    (tmp_path / "a").touch()
    assert [name for name, _ in walk(tmp_path)] == ["a", "b/2"]


def test_each_image_gets_one_answer_and_the_last_batch_may_be_short():
    adapter, said, saved = ttaq.adapt(resnet(), "tent"), [], []
    images = [(f"{n}-{kind}", data) for n in range(3) for kind, data in [*GOOD.items(), ("text", b"text")]]
    counts = serve(
        adapter, images, Reader(16), said.append, preprocess=preprocessor((0.5,) * 3, (0.5,) * 3), batch_size=5,
        save=lambda: saved.append(adapter.images), save_every=2, classes=list("abcdef"),
    )  # fmt: skip
    assert counts == {"predicted": 24, "refused": 3, "batches": 5}
    answers = {one["image"]: one for one in said if "image" in one}
    assert len(answers) == len([one for one in said if "image" in one]) == len(images)
    assert [name for name, one in answers.items() if "error" in one] == [f"{n}-text" for n in range(3)]
    assert all(one["class"] == "abcdef"[one["label"]] for one in answers.values() if "label" in one)
    assert saved == [10, 20, 24]


def test_the_end_may_be_asked_for_while_waiting_and_in_between():
    adapter, said = ttaq.adapt(resnet(), "norm"), []
    stop = Stop()

    def images():
        for number in range(7):
            if number == 3:
                stop.handle()  # as a signal would while an image is waited for
            yield str(number), GOOD["plain"]

    prepare = preprocessor((0.5,) * 3, (0.5,) * 3)
    counts = serve(adapter, images(), Reader(16), said.append, preprocess=prepare, batch_size=2, stop=stop)
    assert counts["predicted"] == 3
    stop = Stop()
    stop.handle()
    assert serve(adapter, images(), Reader(16), said.append, preprocess=prepare, stop=stop)["predicted"] == 0


def test_a_checkpoint_need_not_say_how_images_are_cropped(tmp_path):
    said = []
    packed = ttaq.pack(calibrated("resnet", "w4a4"))
    chosen = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    ttaq.save(packed, tmp_path / "m.safetensors", reference="tiny:resnet", preprocessing=chosen)
    counts = adapt_stream(tmp_path / "m.safetensors", [("a", GOOD["plain"])], said.append, reference="tiny:resnet")
    assert counts["predicted"] == sum("image" in one for one in said) == 1


def test_what_telemetry_measures_is_written_once_a_measurement_and_is_sound_json():
    packed = ttaq.pack(calibrated("resnet", "w4a4"))
    adapter, said = ttaq.adapt(packed, "norm", telemetry=2, reference=[torch.rand(6, 3, 16, 16)]), []
    images = [(str(n), GOOD["plain"]) for n in range(20)]
    prepare = preprocessor((0.5,) * 3, (0.5,) * 3)
    serve(adapter, images, Reader(16), said.append, preprocess=prepare, batch_size=4)
    measured = [one for one in said if "drift" in one]
    assert [one["batch"] for one in measured] == [step.batch for step in adapter.history if step.drift]
    assert json.loads(line(measured[0])) == measured[0]
    step = next(step for step in adapter.history if step.drift)
    name, row = next(iter(step.drift["layers"].items()))
    assert measured[0]["drift"]["layers"][name] == {key: round(value, 4) for key, value in row.items()}
    assert measured[0]["entropy"] == round(step.entropy, 4)
    assert sum("image" in one for one in said) == 20


def tiny():
    """Build the network that these tests name as "test_deployment:tiny"."""
    return ResNet(depth=8, classes=3, width=4)


def checkpoint(folder):
    torch.manual_seed(0)
    batches = [torch.rand(16, 3, 32, 32) * 2 - 1]
    packed = ttaq.pack(ttaq.quantize(tiny().eval(), batches, "w4a8", method="rtn"))
    chosen = {"size": 32, "crop": 1.0, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    ttaq.save(packed, folder / "m.safetensors", reference="test_deployment:tiny", preprocessing=chosen)
    return folder / "m.safetensors"


def pipe(model, folder, images, stop_after=None):
    """Feed a tar archive through a pipe into `ttaq adapt`; return its lines, and how it ended.

    `stop_after` sends SIGTERM once so many lines have come.
    """
    code = "from ttaq.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "adapt",
        str(model),
        "-",
        "--state",
        str(folder / "state"),
        "--batch-size",
        "16",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [*command, "--model", "test_deployment:tiny", "--bank", "4"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment, text=False,
    )  # fmt: skip

    def feed():
        try:
            with process.stdin, tarfile.open(fileobj=process.stdin, mode="w|") as archive:
                for name, data in images:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        except (BrokenPipeError, ValueError):
            pass

    threading.Thread(target=feed, daemon=True).start()
    lines, resident = [], []
    for text in process.stdout:
        lines.append(json.loads(text))
        if len(lines) % 100 == 0:
            resident.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096 / 2**20)
        if stop_after and len(lines) == stop_after:
            process.send_signal(signal.SIGTERM)
    error = process.stderr.read().decode()
    return lines, process.wait(), error.strip().splitlines()[-1], resident


def mixture(count):
    """Name images, broken ones among them."""
    draw = random.Random(0)
    kinds = [*((name, data) for name, data in GOOD.items()), *((name, data) for name, (data, _) in BAD.items())]
    return [(f"{n}-{name}", data) for n in range(count) for name, data in [draw.choice(kinds)]]


@pytest.mark.parametrize("count", [80, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_pipe_that_is_stopped_and_taken_up_again_loses_nothing(tmp_path, count):
    images = mixture(count)
    model = checkpoint(tmp_path)
    lines, status, said, resident = pipe(model, tmp_path, images, stop_after=count // 2)
    assert status == 0
    assert "stopped by a signal" in said
    answered = [one["image"] for one in lines if "image" in one]
    assert sorted(answered) == sorted(name for name, _ in images[: len(answered)])
    assert (tmp_path / "state").exists()
    rest = [one for one in images if one[0] not in set(answered)]
    more, status, said, second = pipe(model, tmp_path, rest)
    assert status == 0
    before = sum("label" in one for one in lines)
    assert f"after {before} before" in said
    everything = [one for one in [*lines, *more] if "image" in one]
    assert sorted(one["image"] for one in everything) == sorted(name for name, _ in images)
    for one in everything:
        assert ("error" in one) == (one["image"].partition("-")[2] in BAD), one
    for mebibytes in (resident, second):
        if len(mebibytes) > 20:
            assert max(mebibytes[len(mebibytes) // 2 :]) < max(mebibytes[: len(mebibytes) // 2]) + 30
    if count > 1000:
        print(said, [round(values) for values in (resident[0], resident[-1], second[0], second[-1])])
