"""Wheels: what they hold with and without compilers, and that they serve from any directory."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import ttaq

ROOT = Path(__file__).parents[1]
PARTS = ["ttaq", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
BESIDE = ["tests", "bench", "docs", "examples", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml"]  # in no wheel

QUANTISE = """
import torch, ttaq
from ttaq.kernels import _native
x, y = torch.linspace(-1.0, 3.0, 4097), torch.full((4097,), float("nan"))
if _native.library("cpu"):
    _native.fake_quant(x, y, torch.tensor(0.25), torch.tensor(4.0), 0, 15, 1, 1, 4097)
else:
    y = torch.ops.ttaq.fake_quant(x, torch.tensor(0.25), torch.tensor(4.0), 0, 15, None, 0)
assert torch.equal(y, (torch.clamp(torch.round(x / 0.25) + 4, 0, 15) - 4) * 0.25)
print(ttaq.__file__, _native.cpu_level(), _native.reason("cpu"), sep="|")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a wheel is built from, without anything built."""
    return _copy(PARTS, tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source distribution of the whole tree."""
    place = tmp_path_factory.mktemp("sdist")
    whole = _copy([*PARTS, *BESIDE], tmp_path_factory.mktemp("whole"))
    done = _setup(whole, "--quiet", "sdist", "--dist-dir", str(place))
    assert done.returncode == 0, done.stderr
    [archive] = place.iterdir()
    return archive


def _copy(parts, place):
    built = shutil.ignore_patterns("*.so", "native_build.json", "__pycache__")
    for part in parts:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, place / part, ignore=built)
        else:
            shutil.copy(source, place / part)
    return place


def _run(command, directory, **environment):
    return subprocess.run(command, cwd=directory, env=os.environ | environment, capture_output=True, text=True)


def _setup(tree, *command, **environment):
    return _run([sys.executable, "setup.py", *command], tree, **environment)


def _install(tree, place, native):
    """Build a wheel and install it by itself into `place`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = place / "wheels"
    offline = ["--no-deps", "--no-index", "--quiet"]
    built = _run([*pip, "wheel", "--no-build-isolation", *offline, "-w", wheels, "."], tree, TTAQ_NATIVE=native)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = wheels.iterdir()
    done = _run([*pip, "install", *offline, "--target", place / "site", wheel], place)
    assert done.returncode == 0, done.stderr
    return wheel


def _ttaq(place, *arguments):
    """Run the command that was installed in `place`, from a directory that has nothing to do with the tree."""
    elsewhere = place / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = _run([place / "site/bin/ttaq", *arguments], elsewhere, PYTHONPATH=str(place / "site"), COLUMNS="100")
    assert done.returncode == 0, done.stderr
    return done.stdout


def _quantise(place):
    """Quantise with the package installed in `place`, from a directory that has nothing to do with the tree."""
    elsewhere = place / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = _run([sys.executable, "-c", QUANTISE], elsewhere, PYTHONPATH=str(place / "site"))
    assert done.returncode == 0, done.stderr
    file, level, reason = done.stdout.strip().split("|")
    assert Path(file).is_relative_to(place)
    return level, reason


@pytest.mark.slow
def test_a_wheel_serves_from_another_directory_and_a_build_without_natives_leaves_no_library_behind(archive, tmp_path):
    with tarfile.open(archive) as files:  # built from the sdist, so that what it lacks shows
        files.extractall(tmp_path / "unpacked", filter="data")
    [tree] = (tmp_path / "unpacked").iterdir()
    for native in ("auto", "0"):  # one after the other in one tree
        (tmp_path / native).mkdir()
    wheel = _install(tree, tmp_path / "auto", "auto")
    level, reason = _quantise(tmp_path / "auto")
    if shutil.which("g++"):
        assert reason == "None"
        assert level in ("base", "v3", "v4")
        assert wheel.name.startswith(f"ttaq-{ttaq.__version__}-")
        assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ttaq/py.typed", "ttaq/kernels/fake_quant.py", "ttaq/kernels/native_build.json"} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "csrc/", *(f"{part}/" for part in BESIDE)))]
    assert _ttaq(tmp_path / "auto", "--version") == f"ttaq {ttaq.__version__}\n"
    assert "Usage: ttaq demo" in _ttaq(tmp_path / "auto", "demo", "--help")
    told = _ttaq(tmp_path / "auto", "doctor")
    assert level is None or f"runs at level {level}" in told
    assert re.search(rf"^ttaq +{re.escape(ttaq.__version__)} *$", told, re.MULTILINE)

    wheel = _install(tree, tmp_path / "0", "0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    level, reason = _quantise(tmp_path / "0")
    assert level == "None"
    assert "TTAQ_NATIVE=0" in reason


@pytest.mark.slow
def test_a_source_distribution_holds_the_sources_of_the_libraries_and_all_that_its_tests_need(archive):
    assert archive.name == f"ttaq-{ttaq.__version__}.tar.gz"
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert native | {"kernels/_native.py", "ttaq/py.typed", "LICENSE"} <= names
    assert {"tests/conftest.py", "bench/cases.py", "examples/adapting.ipynb", "docs/method.md", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "native_build.json"))]


def test_the_version_stands_in_one_place_and_the_changelog_knows_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    done = _run([sys.executable, "setup.py", "--version"], ROOT)
    assert done.stdout.strip() == ttaq.__version__
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == ttaq.__version__


def test_an_unknown_choice_is_refused(tree):
    done = _setup(tree, "build_ext", TTAQ_NATIVE="yes")
    assert done.returncode != 0
    assert "TTAQ_NATIVE must be one of auto, cpu, cuda, 0, got 'yes'" in done.stderr


def test_a_named_library_without_a_compiler_fails_and_under_auto_is_recorded(tree, tmp_path):
    done = _setup(tree, "build_ext", TTAQ_NATIVE="cpu", PATH=str(tmp_path))
    assert done.returncode != 0
    assert "TTAQ_NATIVE=cpu: no C++ compiler was on PATH" in done.stderr
    done = _setup(tree, "build_ext", "--build-lib", str(tmp_path), TTAQ_NATIVE="auto", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ttaq/kernels/native_build.json").read_text())
    assert record["cpu"].startswith("no C++ compiler")
    assert record["cuda"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to fail")
def test_a_compile_error_is_recorded_in_one_sentence(tree, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)
    for source in (broken / "csrc").glob("*/*.c*"):
        source.write_text("#error planted\n")
    done = _setup(broken, "build_ext", "--build-lib", str(tmp_path), TTAQ_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    reason = json.loads((tmp_path / "ttaq/kernels/native_build.json").read_text())["cpu"]
    assert reason.startswith("csrc/cpu did not compile")
    assert "#error planted" in reason
    assert "\n" not in reason


def test_importing_the_folder_by_its_bare_name_is_refused():
    done = _run([sys.executable, "-c", "import kernels"], ROOT)
    assert done.returncode != 0
    assert "installs as ttaq.kernels" in done.stderr
