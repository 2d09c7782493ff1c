"""Build ttaq: the packages, and csrc/ as plain-C libraries that need neither torch nor each other.

TTAQ_NATIVE chooses the libraries: ``auto`` (the default) builds what the compilers at hand allow and records the rest,
``cpu`` and ``cuda`` fail unless they can build what they name (``cuda`` includes the CPU library), ``0`` builds none.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
KINDS = ("cpu", "cuda")
WANTED = {"auto": KINDS, "cpu": ("cpu",), "cuda": KINDS, "0": ()}
RECORD = "native_build.json"  # {"cpu": null or the reason why not, "cuda": ...}, read by kernels/_library.py

ERROR = re.compile(r"\b(error|fatal)\b|No such file", re.IGNORECASE)

CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -fopenmp-simd "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math"  # contraction would change codes
)
CXX_LINK = "-shared -static-libstdc++ -static-libgcc -Wl,--exclude-libs,ALL,-z,now,--no-undefined"
NVCC_FLAGS = (
    "-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden "
    "-gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a"
)
NVCC_LINK = "-shared -cudart static -Xcompiler -static-libstdc++,-static-libgcc"

# The files *kernels.cpp are compiled once for each instruction set, and the library picks one at run time: never
# -march=native.
LEVELS = {"base": ""}
if platform.machine() == "x86_64":
    LEVELS |= {"v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4"}
# Partial redundancy elimination would store every sum of a tile in each turn of its loop; the headers of AVX-512 make
# g++ 12 warn of what they leave unset on purpose.
TILED = {"": "-fno-tree-pre", "v4": "-fno-tree-pre -Wno-uninitialized -Wno-maybe-uninitialized"}
EXTRA = {"product_kernels": TILED | {"v4": TILED["v4"] + " -mavx512vnni"}, "float_kernels": TILED}


class Unavailable(Exception):
    """Why a library cannot be built here, in one sentence."""


def choice() -> str:
    """Read TTAQ_NATIVE."""
    value = os.environ.get("TTAQ_NATIVE", "auto")
    if value not in WANTED:
        raise SystemExit(f"TTAQ_NATIVE must be one of {', '.join(WANTED)}, got {value!r}")
    return value


def compiler(kind: str) -> str:
    """Find the compiler of a library."""
    if kind == "cpu":
        found = shutil.which("g++") or shutil.which("clang++")
        missing = "no C++ compiler was on PATH when ttaq was built; install g++ and ttaq again"
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        missing = "nvcc was neither on PATH nor in /usr/local/cuda when ttaq was built; install it and ttaq again"
    if found is None:
        raise Unavailable(missing)
    return found


def ninja() -> str:
    """Find ninja: that of the Python package, else the system's."""
    if importlib.util.find_spec("ninja"):
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    if found := shutil.which("ninja"):
        return found
    raise Unavailable("ninja was not found when ttaq was built; install it and ttaq again")


def sources(kind: str) -> list[str]:
    """List what a library is compiled from, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / kind).glob("*.c[pu]*"))


def escape(path: Path | str) -> str:
    """Escape a path for a build line of ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_file(kind: str, library: Path) -> str:
    """Write the rules of ninja for one library."""
    flags, link = (CXX_FLAGS, CXX_LINK) if kind == "cpu" else (NVCC_FLAGS, NVCC_LINK)
    lines = [
        f"cxx = {compiler(kind)}",
        "rule compile",
        f"  command = $cxx {flags} $level -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {link} $in -o $out -ldl",
    ]
    objects = []
    for source in sources(kind):
        for level, march in LEVELS.items() if Path(source).stem.endswith("kernels") else [("", "")]:
            objects.append(f"{Path(source).stem}{level}.o")
            lines.append(f"build {objects[-1]}: compile {escape(ROOT / source)}")
            extra = EXTRA.get(Path(source).stem, {})
            extra = extra.get(level, extra.get("", ""))
            lines.append(f"  level = {march} -DTTAQ_LEVEL={level} {extra}" if level else "  level =")
    lines.append(f"build {escape(library)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Build the native libraries with ninja, and record what was built or why not."""

    def get_ext_filename(self, fullname):
        """Name a library without the tag of a Python version: it holds no Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def run(self):
        """Build into a clean place, and leave the record beside the libraries."""
        self.outcome = dict.fromkeys(KINDS, f"ttaq was built with TTAQ_NATIVE={choice()}; unset it and install again")
        in_place = self.inplace
        for extension in self.extensions:  # else a library of an earlier build would travel on
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            (Path(self.build_lib) / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().run()
        folder = ROOT / "kernels" if in_place else Path(self.build_lib) / "ttaq" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(self.outcome, indent=1) + "\n", encoding="utf-8")

    def build_extension(self, ext):
        """Run ninja for one library; without a compiler record the reason, or fail where it was asked for by name."""
        kind = ext.name.rpartition("_")[2]
        if kind not in WANTED[choice()]:
            return
        try:
            self._ninja(kind, Path(self.get_ext_fullpath(ext.name)).resolve())
            self.outcome[kind] = None
        except Unavailable as reason:
            if choice() != "auto":
                raise SystemExit(f"TTAQ_NATIVE={choice()}: {reason}") from None
            self.outcome[kind] = str(reason)
            self.warn(f"ttaq goes without its native {kind} library: {reason}")

    def _ninja(self, kind, library):
        folder = Path(self.build_temp).resolve() / kind
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build_file(kind, library), encoding="utf-8")
        done = subprocess.run([ninja(), "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode:
            why = next((line for line in done.stdout.splitlines() if ERROR.search(line)), "see the log of the build")
            raise Unavailable(f"csrc/{kind} did not compile when ttaq was built ({why.strip()})")


class NativeWheel(bdist_wheel):
    """Tag the wheel by what it holds: plain C libraries fit every Python, and without them every machine."""

    def get_tag(self):
        """Return (python, abi, platform)."""
        libraries = Path(self.get_finalized_command("build_ext").build_lib, "ttaq", "kernels").glob("*.so")
        self.root_is_pure = not any(libraries)
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(
    packages=["ttaq", "ttaq.adaptation", "ttaq.cli", "ttaq.report", "ttaq.safety", "ttaq.streams", "ttaq.kernels"],
    package_dir={"ttaq": "ttaq", "ttaq.kernels": "kernels"},
    package_data={"ttaq": ["py.typed"]},
    ext_modules=[Extension(f"ttaq.kernels._native_{kind}", sources(kind), optional=True) for kind in KINDS],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
