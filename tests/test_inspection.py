"""`ttaq inspect` and `ttaq compare`: what is printed is what the checkpoint holds."""

import json

import pytest
from test_cli import folder, invoke, quantize, refused  # noqa: F401

from ttaq.checkpoint import read_header
from ttaq.inspection import compare, inspect


@pytest.fixture(scope="module")
def other(folder):  # noqa: F811
    out = folder / "other.safetensors"
    assert quantize(folder, out, "--bits", "w8a8").exit_code == 0
    return out


def test_a_checkpoint_says_what_it_is(folder):  # noqa: F811
    path = folder / "model.safetensors"
    found, header = inspect(path), read_header(path)
    assert [row.name for row in found.layers] == list(header["layers"])
    row = next(row for row in found.layers if row.name == "layer2.0.conv1")
    assert (row.weight, row.activation) == (4, 4)
    assert row.bytes == header["report"]["packed"][row.name]
    assert row.sqnr == header["report"]["sqnr"][row.name]
    text = invoke("inspect", path).stdout
    for part in ("test_cli:tiny", "w4a4, first and last layer at 8 bits", f"{path.stat().st_size:,}", "layer3.0.conv2"):
        assert part in text
    told = json.loads(invoke("inspect", path, "--json").stdout)
    assert told["layers"][0]["name"] == found.layers[0].name


def test_two_checkpoints_are_set_side_by_side(folder, other):  # noqa: F811
    path = folder / "model.safetensors"
    text = invoke("compare", path, other).stdout
    assert "W4A4" in text
    assert "W8A8" in text
    assert "recipe: w4a4, first and last layer at 8 bits | w8a8, first and last layer at 8 bits" in text
    table, said = compare(inspect(path), inspect(path))
    assert (table.row_count, said) == (0, ["they say the same of themselves"])


def test_what_is_no_checkpoint_is_refused(folder):  # noqa: F811
    assert "did not write" in refused("inspect", folder / "weights.safetensors")
    assert "there is no file" in refused("compare", folder / "model.safetensors", folder / "nothing")
