"""The documentation builds without a warning, is complete and self-contained, and what it shows runs."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
import typer
from doc_blocks import NOT_RUN, PAGES, ROOT, SMALLER, blocks, forgotten, run_page, run_ttaq, sentences
from safetensors.torch import save_file
from test_datasets import noise, write_cifar_c, write_images

import ttaq
from ttaq import adaptation, cli, ops, report, safety, streams
from ttaq.models import ResNet

DOCS = ROOT / "docs"
CLASSES = ("cat", "dog", "ship")


class _Links(HTMLParser):
    """Collect what a page loads, links to, and may be linked at."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values.get("href", ""))
        self.loads += [values[name] for name in ("src", "data", "poster") if name in values and tag != "a"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as the workflow does; give its pages by path."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "mkdocs.yml", "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    return {path: _Links(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")} | {None: folder}


def pages(site):
    return {path: found for path, found in site.items() if path is not None}


def test_the_site_loads_its_own_files_alone(site):
    for path, found in pages(site).items():
        for target in found.loads:
            assert not urlsplit(target).netloc, f"{path.relative_to(site[None])} loads {target}"
    for path in site[None].rglob("*.css"):
        loaded = re.findall(r"url\(\s*['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8"))
        assert loaded == [], f"{path.name} loads something from elsewhere"


def test_links_and_anchors_of_the_built_site_lead_somewhere(site):
    root = site[None]
    for path, found in pages(site).items():
        if path.name == "404.html":  # its links are absolute
            continue
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            where = f"{path.relative_to(root)} links to {link}"
            assert target.is_file(), where
            if parts.fragment and target in site and target.suffix == ".html":
                assert unquote(parts.fragment) in site[target].anchors | {"__skip"}, where


@pytest.mark.parametrize(
    ("module", "extra"),
    [(ttaq, ()), (adaptation, ()), (streams, ()), (report, ()), (safety, ()), (ops, ())],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_public_name_stands_in_the_reference(site, module, extra):
    """Under its own name or, as what two modules share, under that of the other."""
    there = set().union(*(found.anchors for path, found in pages(site).items() if "api" in path.parts))
    places = ["ttaq", *(f"ttaq.{name}" for name in ("adaptation", "streams", "report", "safety", "kernels._taps"))]
    missing = []
    for name in set(module.__all__):
        own = [module.__name__, *(place for place in places if name in extra or _same(place, name, module))]
        if not any(f"{place}.{name}" in there for place in own):
            missing.append(name)
    assert sorted(missing) == []


def _same(place, name, module):
    other = sys.modules.get(place)
    return other is not None and getattr(other, name, None) is getattr(module, name)


def test_every_command_and_option_stands_on_its_page(site):
    text = (site[None] / "cli/index.html").read_text(encoding="utf-8")
    commands = typer.main.get_command(cli.app).commands
    for name, command in commands.items():
        section = text.partition(f'id="ttaq-{name}"')[2].partition("<h2")[0]
        assert section, f"no section for ttaq {name}"
        for parameter in command.params:
            shown = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            assert all(f"<code>{option}" in section for option in shown if option != "--help"), parameter.name


def test_files_that_pages_name_are_there():
    """In `code`: what looks like a path into the repository."""
    for path in PAGES:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for name in re.findall(r"`((?:bench|docs|tests|ttaq|kernels|csrc|examples)/[\w./*-]+)`", text):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_settings_cite_figures_that_were_measured():
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    sources = {"measured.md": ROOT / "README.md"}
    cited = 0
    for passage in re.split(r"\n(?=\|)|\n\n", text):
        targets = {target.partition("#")[0] for target in re.findall(r"\]\(([\w./-]+\.md[^)]*)\)", passage)}
        targets |= {ROOT / name for name in re.findall(r"`(bench/[\w/.-]+\.csv)`", passage)}
        figures = re.findall(r"`([+-]?\d[\d.]*(?: ± [\d.]+)?(?: %)?)`", passage)
        held = "\n".join(sources.get(name, DOCS / name).read_text(encoding="utf-8") for name in targets)
        missing = [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", held)]
        assert missing == [], f"{missing} not in {targets}: {passage}"
        cited += len(figures)
    assert cited > 40


def test_sentences_of_failures_are_those_of_the_sources():
    known, looked = sentences(), 0
    for path in (DOCS / "failures.md", DOCS / "cli.md"):
        for line in "".join(block.text for block in blocks(path)).splitlines():
            if path.name == "failures.md" or line.startswith("ttaq: "):
                assert any(pattern.search(line) for pattern in known), f"{path.name}: nothing says: {line}"
                looked += 1
    assert looked > 40


def test_bad_input_ends_as_the_page_of_commands_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, said = run_ttaq(["inspect", "missing.safetensors"], b"", monkeypatch)
    assert (code, out) == (2, "")
    assert f"$ ttaq inspect missing.safetensors\n{said}$ echo $?\n2\n" in (DOCS / "cli.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Make the images and weights that the pages name, small."""
    import timm

    root = tmp_path_factory.mktemp("world")
    for name in ("calibration", "validation"):
        write_images(root / name, CLASSES, count=4, size=(40, 36))
    write_images(root / "camera", ("front",), count=4)
    for number, path in enumerate((root / "camera/front").glob("*.png")):
        path.rename(root / f"camera/{number}.jpg")
    np.savez(root / "images.npz", images=noise(24), labels=np.arange(24) % 3)
    write_cifar_c(root / "CIFAR-10-C", count=4, names=("fog", "snow"))
    write_images(root / "ImageNet-C/fog/5", CLASSES, count=2, size=(160, 160))
    for name, count in (("classes.txt", 1000), ("ten.txt", 10)):
        names = [*CLASSES, *(f"class{number}" for number in range(3, count))]
        (root / name).write_text("\n".join(names), encoding="utf-8")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), root / "vit.safetensors")
    torch.save(ResNet().state_dict(), root / "resnet18.pth")
    packed = ttaq.pack(ttaq.quantize(ResNet(), [torch.randn(16, 3, 32, 32)], "w4a4", method="rtn"))
    half = [0.5] * 3
    chosen = {"size": 32, "crop": 1.0, "interpolation": "bilinear", "mean": half, "std": half}
    ttaq.save(packed, root / "model.safetensors", reference="ttaq.models:ResNet", preprocessing=chosen)
    ttaq.adapt(packed, "tent").save(root / "camera.state")
    return root


WITH_CODE = [path for path in PAGES if any(b.language in ("python", "bash") for b in blocks(path))]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_page_shows_runs(path, world, tmp_path, monkeypatch):
    folder = shutil.copytree(world, tmp_path / "page")
    with forgotten(folder):
        assert run_page(path, folder, monkeypatch) >= 1


def test_code_stands_in_blocks_that_are_looked_at():
    """Indented blocks that are no commands are formulas, of the method alone and of what it stands on."""
    assert len(WITH_CODE) >= 10
    text = "\n".join(path.read_text(encoding="utf-8") for path in WITH_CODE)
    for pattern, *_, reason in (*SMALLER, *NOT_RUN):
        assert re.search(pattern, text), f"nothing is {pattern!r} any more; take it out"
        assert reason
