import os

import pytest
import torch
from torch import nn

from ttaq.files import fingerprint, write_atomically


def test_bytes_are_written_and_nothing_else_is_left(tmp_path):
    path = write_atomically(tmp_path / "new" / "codes.bin", b"\x01\x02\xff")
    assert path.read_bytes() == b"\x01\x02\xff"
    assert os.listdir(path.parent) == ["codes.bin"]


def test_a_writer_gets_a_path_with_the_same_suffix(tmp_path):
    seen = []

    def writer(draft):
        seen.append(draft)
        draft.write_text("drawing")

    path = write_atomically(tmp_path / "figure.png", writer)
    assert path.read_text() == "drawing"
    assert seen[0].suffix == ".png"
    assert seen[0].parent == tmp_path
    assert not seen[0].exists()


def test_a_failed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def writer(draft):
        draft.write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, writer)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_writer_that_hides_its_file_does_not_decide_the_mode(tmp_path):
    (tmp_path / "plain").write_bytes(b"x")

    def write(path):
        path.write_bytes(b"y")
        path.chmod(0o600)

    path = write_atomically(tmp_path / "file", write)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="add a file name"):
        write_atomically(tmp_path, b"x")
    assert os.listdir(tmp_path) == []


def build(width=8, *, stride=1, act=nn.ReLU, drop=0.0, eps=1e-5):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=stride, bias=False),
        nn.BatchNorm2d(width, eps=eps),
        act(),
        nn.Dropout(drop) if drop else nn.Identity(),
        nn.Flatten(),
        nn.Linear(width * 4, 10),
    )


def test_the_fingerprint_knows_no_value_dtype_device_or_mode():
    with torch.device("meta"):
        expected = fingerprint(build())
    assert len(expected) == 64
    model = build()
    assert fingerprint(model) == expected
    assert fingerprint(model.eval().to(torch.float64)) == expected
    assert fingerprint(build(drop=0.3)) == expected
    model.register_buffer("cache", torch.ones(3), persistent=False)
    assert fingerprint(model) == expected


@pytest.mark.parametrize(
    "other",
    [{"width": 16}, {"stride": 2}, {"act": nn.GELU}, {"eps": 1e-3}],
    ids=["width", "stride", "activation", "eps"],
)
def test_the_fingerprint_tells_architectures_apart(other):
    assert fingerprint(build(**other)) != fingerprint(build())


def test_the_fingerprint_knows_names_and_missing_biases():
    a = nn.ModuleDict({"a": nn.Linear(3, 3)})
    assert fingerprint(a) != fingerprint(nn.ModuleDict({"b": nn.Linear(3, 3)}))
    assert fingerprint(a) != fingerprint(nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)}))
