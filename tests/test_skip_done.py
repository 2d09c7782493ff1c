"""`ttaq adapt --skip-done`, where images may come from, and remedies as the command line gives them."""

import json

import pytest
from doc_blocks import run_ttaq
from test_cli import refused
from test_deployment import GOOD, checkpoint
from tiny import resnet

import ttaq
from ttaq.cli._wording import as_options
from ttaq.deployment import answered
from ttaq.report import Stream


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def camera(tmp_path):
    """Write five images, one of which is none."""
    (tmp_path / "camera").mkdir()
    for number in range(4):
        (tmp_path / f"camera/{number}.png").write_bytes(GOOD["plain"])
    (tmp_path / "camera/4.png").write_bytes(b"no image")
    return tmp_path / "camera"


@pytest.fixture
def adapt(model, monkeypatch):
    """Give what runs `ttaq adapt`, and returns what it says on standard error."""

    def run(source, *more, given=b"", code=0):
        args = ["adapt", model, source, "--model", "test_deployment:tiny", "--batch-size", 2, *more]
        ended, _, said = run_ttaq([str(arg) for arg in args], given, monkeypatch)
        assert ended == code, said
        assert code == 0 or said.count("\n") == 1
        return said

    return run


def names(path):
    found = map(json.loads, path.read_text().splitlines())
    return sorted(one["image"] for one in found if "image" in one)


def test_a_folder_goes_on_where_it_stopped(adapt, camera, tmp_path):
    out, state = tmp_path / "said.jsonl", tmp_path / "state"
    more = ("--out", out, "--state", state, "--skip-done")
    assert adapt(camera, *more) == "4 images predicted, 1 refused, 0 left out as answered before\n"
    (camera / "5.png").write_bytes(GOOD["plain"])
    assert adapt(camera, *more) == "1 images predicted, after 4 before, 0 refused, 5 left out as answered before\n"
    assert names(out) == [f"{number}.png" for number in range(6)]
    assert Stream.read(out).count() == "5 images predicted, 1 refused"
    adapt(camera, *more[:-1])  # without it as ever: all once more, behind what is there
    assert Stream.read(out).count() == "10 predictions and 2 refusals of 6 different images"


def test_a_pipe_goes_on_where_it_stopped(adapt, camera, tmp_path):
    out = tmp_path / "said.jsonl"
    paths = [f"{camera}/{number}.png" for number in range(5)] + [f"{camera}/gone\udcff.png"]
    given = [f"{path}\n".encode(errors="surrogateescape") for path in paths]
    adapt("-", "--out", out, given=b"".join(given[2:]))
    said = adapt("-", "--out", out, "--skip-done", given=b"".join(given))
    assert said == "2 images predicted, 0 refused, 4 left out as answered before\n"
    assert names(out) == sorted(paths)


def test_a_line_that_was_cut_off_is_answered_anew(adapt, camera, tmp_path):
    out = tmp_path / "said.jsonl"
    adapt(camera, "--out", out)
    out.write_bytes(out.read_bytes()[:-9])
    assert adapt(camera, "--out", out, "--skip-done").endswith(" 4 left out as answered before\n")
    assert names(out) == [f"{number}.png" for number in range(5)]


def test_wrong_calls_are_refused_before_anything_is_written(adapt, camera, tmp_path):
    assert "none was given; pass --out FILE with it" in adapt(camera, "--skip-done", code=2)
    out = tmp_path / "said.jsonl"
    sentence = f"adapt: {tmp_path}/none is not there; give a folder of images, or - for paths on standard input"
    assert sentence in adapt(tmp_path / "none", "--out", out, code=2)
    assert "0.png is a file; give a folder of images" in adapt(camera / "0.png", "--out", out, code=2)
    assert not out.exists()
    for text in (b"hello\n", b"[1]\n3\n", b'{"image": ["a"]}\n', b"my notes"):
        out.write_bytes(text)
        assert "said.jsonl is none that ttaq adapt writes" in adapt(camera, "--out", out, "--skip-done", code=2)
        assert out.read_bytes() == text
    assert answered(tmp_path / "none.jsonl") == set()


def test_an_empty_folder_is_named(adapt, tmp_path):
    (tmp_path / "camera/below").mkdir(parents=True)
    said = "camera holds no file, so there is nothing to predict\n0 images predicted, 0 refused\n"
    assert adapt(tmp_path / "camera").endswith(said)


def test_a_state_of_other_telemetry_and_bank_says_which(adapt, camera, tmp_path):
    state = ("--state", tmp_path / "state", "--telemetry", 3, "--bank", 5)
    adapt(camera, *state)
    assert "adapt with --telemetry 3 and --bank 5" in adapt(camera, *state[:2], code=2)
    adapt(camera, *state)


def test_a_state_that_does_not_tell_its_telemetry_is_told_that_of_the_command():
    state = ttaq.adapt(resnet(), "norm", telemetry=2).state_dict()
    adapter = ttaq.adapt(resnet(), "norm")
    with pytest.raises(ValueError, match="this Adapter guard; adapt with telemetry=2 and bank=0"):
        adapter.load_state_dict(state)
    del state["parts"]["telemetry"]["every"]  # as before it was written
    with pytest.raises(ValueError, match="this Adapter guard; adapt with telemetry=10 and bank=0"):
        adapter.load_state_dict(state)
    ttaq.adapt(resnet(), "norm", telemetry=3).load_state_dict(state)


def test_names_that_are_nearly_right_are_suggested(model, camera, tmp_path):
    args = ("--data", camera, "--out", tmp_path / "x.safetensors")
    assert "did you mean qdrop?" in refused("quantize", "test_cli:tiny", *args, "--method", "qdorp")
    assert "there is no 'tnet' among source, norm" in refused("adapt", model, camera, "--adapter", "tnet")
    assert "did you mean norm?" in refused("evaluate", model, *args[:2], "--adapter", "source, nrom")


@pytest.mark.parametrize(
    ("python", "options"),
    [
        ("quantize: gptq takes no steps; use method='ttaq'", "quantize: gptq takes no steps; use --method ttaq"),
        ('adapt: x; use method="tent", which', "adapt: x; use --adapter tent, which"),
        ('with Recipe.parse("w8a8", symmetric=True)', "with --bits w8a8 --symmetric"),
        ('Recipe.parse("w4a16", group=64, symmetric=True) too', "--bits w4a16 --group 64 --symmetric too"),
        ("load: there is no file a/bank=3/b", "load: there is no file a/bank=3/b"),
        ("blocks: pass example=3", "blocks: pass example=3"),
    ],
)
def test_remedies_name_options(python, options):
    assert as_options(python) == options
