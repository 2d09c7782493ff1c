"""Imports point down, the public names are documented, and every op has a reference."""

import ast
from pathlib import Path

import pytest

import ttaq
from ttaq import declarations, dispatch

ROOT = Path(ttaq.__file__).parent
KERNELS = Path(declarations.cd.__file__).parent

LAYERS = {
    **dict.fromkeys(["spec", "files", "augment", "batches", "stores", "distributed", "kernels"], 0),
    "dispatch": 1,
    **dict.fromkeys(["checks", "declarations", "gradients", "code_ops", "fake_ops", "product_ops", "ops"], 2),
    "observers": 3,
    **dict.fromkeys(["quantizers", "roundings", "schedules"], 4),
    **dict.fromkeys(["layers", "norms", "moments", "learning", "blocks", "tracing", "partition", "surgery"], 5),
    **dict.fromkeys(["distances", "caching", "sharding", "packed_layers", "attention", "multihead", "windows"], 5),
    **dict.fromkeys(["pacing", "stepping", "resuming"], 5),
    **dict.fromkeys(["preparation", "calibration", "perturbation", "consistency", "blockwise", "objectives"], 6),
    **dict.fromkeys(["costs", "reconstruction", "refinement", "closed_form", "packing", "fusion"], 6),
    **dict.fromkeys(["onnx_layers", "onnx_graph", "streaming"], 6),
    **dict.fromkeys(["checkpoint", "adaptation", "streams", "models", "safety"], 6),
    **dict.fromkeys(["pipeline", "zoo", "training", "meters", "evaluation", "report", "sources", "configuration"], 7),
    **dict.fromkeys(["allocation", "deployment", "export"], 7),
    **dict.fromkeys(["demo", "doctor", "workbench", "serving", "inspection", "folders"], 8),
    **dict.fromkeys(["cards", "jobs", "measurement", "plans"], 8),
    **dict.fromkeys(["cli", "__main__", "__init__"], 8),
}

# Within a layer a module imports nothing but what is named here; dispatch and streams import less than their layer may.
BESIDE = {
    "declarations": {"dispatch"},
    "gradients": {"declarations"},
    "code_ops": {"checks", "declarations"},
    "fake_ops": {"checks", "declarations", "gradients"},
    "product_ops": {"checks", "declarations", "gradients"},
    "ops": {"code_ops", "fake_ops", "product_ops"},
    "layers": {"surgery"},
    "multihead": {"layers"},
    "windows": {"layers"},
    "attention": {"layers", "multihead", "windows"},
    "blocks": {"tracing", "partition", "surgery"},
    "partition": {"tracing"},
    "roundings": {"quantizers"},
    "schedules": {"roundings"},
    "learning": {"layers", "norms"},
    "norms": {"surgery"},
    "packed_layers": {"layers"},
    "moments": {"layers"},
    "caching": {"blocks", "distances", "sharding", "surgery"},
    "stepping": {"sharding"},
    "costs": {"blockwise"},
    "resuming": {"learning", "norms", "surgery"},
    "objectives": {"perturbation", "consistency", "blockwise"},
    "reconstruction": {"perturbation", "consistency", "blockwise", "objectives", "costs"},
    "closed_form": {"perturbation", "reconstruction"},
    "safety": {"preparation", "calibration"},
    "pipeline": {"report"},
    "onnx_graph": {"onnx_layers"},
    "evaluation": {"meters"},
    "report": {"evaluation"},
}
ONLY = {"dispatch": set(), "streams": {"spec", "streams"}}
KERNELS_MAY = {"_epilogue", "_library", "_native", "_operands", "_products", "_taps", "_tiles", "_triton", "codes"}


def imported(source, package):
    """List what `source`, a module in `package` (as "ttaq.adaptation"), imports of ttaq, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            path = ".".join(base + ([node.module] if node.module else []))
            # `from . import ops` names modules; `from .ops import fake_quant` names what is in one
            of_modules = node.module is None or path == "ttaq"
            found += [f"{path}.{alias.name}" for alias in node.names] if of_modules else [path]
    return [name for name in found if name.split(".")[0] in ("ttaq", "kernels")]


def violations(module, source, package="ttaq"):
    """Say of each import of a module (as "layers" or "kernels.codes") that it may not make, why."""
    top = module.partition(".")[0]
    found = []
    for name in imported(source, package):
        target = name.removeprefix("ttaq.").removeprefix("ttaq").split(".")
        if top == "kernels":
            if name.split(".")[:2] != ["ttaq", "kernels"] or not KERNELS_MAY.intersection(target[1:]):
                found.append(f"{module} imports {name}: kernels know nothing but {sorted(KERNELS_MAY)}")
        elif name.startswith("kernels"):
            found.append(f"{module} imports {name}: the folder is called ttaq.kernels")
        elif target[0] not in LAYERS and LAYERS[top] < 8:
            found.append(f"{module} imports {name}: {target[0] or 'ttaq itself'} has no layer")
        elif target[0] != top and not allowed(top, target[0]):
            found.append(f"{module} (layer {LAYERS[top]}) imports {target[0]} (layer {LAYERS[target[0]]})")
    return found


def allowed(top, target):
    if top in ONLY:
        return target in ONLY[top]
    if LAYERS[top] == 8:  # these may also take what __init__ holds, such as the version
        return True
    return LAYERS[target] < LAYERS[top] or target in BESIDE.get(top, ())


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "kernels":
            yield ".".join(parts), path, ".".join(("ttaq", *parts[:-1]))
    for path in sorted(KERNELS.glob("*.py")):
        if path.stem != "__init__":
            yield f"kernels.{path.stem}", path, "ttaq.kernels"


@pytest.mark.parametrize(("module", "path", "package"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_down(module, path, package):
    assert module.partition(".")[0] in LAYERS, f"give {module} a layer in the table"
    assert violations(module, path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("spec", "ttaq", "from .ops import fake_quant"),
        ("spec", "ttaq", "def f():\n    from . import layers"),
        ("dispatch", "ttaq", "from .spec import QuantSpec"),
        ("dispatch", "ttaq", "from .kernels import codes"),
        ("observers", "ttaq", "import ttaq.layers"),
        ("layers", "ttaq", "if True:\n    from ttaq.packing import pack"),
        ("layers", "ttaq", "from ttaq import pack"),
        ("calibration", "ttaq", "from .reconstruction import reconstruct"),
        ("caching", "ttaq", "from .reconstruction import reconstruct"),
        ("blocks", "ttaq", "from .layers import QuantLinear"),
        ("evaluation", "ttaq", "from .cli import main"),
        ("adaptation.losses", "ttaq.adaptation", "from ..packing import pack"),
        ("adaptation.losses", "ttaq.adaptation", "from .. import evaluation"),
        ("streams.order", "ttaq.streams", "from ..surgery import replace"),
        ("ops", "ttaq", "from kernels import codes"),
        ("kernels.codes", "ttaq.kernels", "from ..spec import QuantSpec"),
        ("kernels.codes", "ttaq.kernels", "from ttaq.dispatch import declare"),
        ("kernels.fake_quant", "ttaq.kernels", "from .soft_round import reference"),
        ("pipeline", "ttaq", "from .nowhere import anything"),
    ],
)
def test_a_planted_upward_import_is_found(module, package, source):
    assert len(violations(module, source, package)) == 1


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("code_ops", "ttaq", "from .kernels import codes as cd\nfrom .declarations import RAW"),
        ("reconstruction", "ttaq", "from .caching import BlockCache"),
        ("adaptation.gradient", "ttaq.adaptation", "from .guard import Guard\nfrom ..surgery import replace"),
        ("kernels.packed_linear", "ttaq.kernels", "from . import _native\nfrom .codes import row_bytes\nimport torch"),
        ("cli", "ttaq", "from . import __version__, layers, pack\nimport numpy"),
    ],
)
def test_downward_imports_pass(module, package, source):
    assert violations(module, source, package) == []


def test_public_names():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    bound = {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert sorted(bound) == sorted(ttaq.__all__)
    assert len(set(ttaq.__all__)) == len(ttaq.__all__)  # ruff holds their order (RUF022)
    undocumented = [name for name in ttaq.__all__ if not (getattr(ttaq, name).__doc__ or "").strip()]
    assert undocumented == []


def test_public_functions_and_methods_of_every_module_have_docstrings():
    missing = []
    for module, path, _ in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            missing.append(module)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not module.startswith("gradients") and not ast.get_docstring(node):
                missing.append(f"{module}.{node.name}")
    assert missing == []


@pytest.mark.parametrize("name", sorted(dispatch.OPS))
def test_each_op_lists_a_reference_that_never_refuses(name):
    implementations = dispatch.OPS[name].implementations
    assert [i.name for i in implementations].count("reference") == 1
    assert implementations[-1].name == "reference"
    assert implementations[-1].refuses is dispatch.never
    assert implementations[-1].refuses("anything", None) is None


@pytest.mark.parametrize("name", sorted(n for n in dispatch.OPS if f"{n}_backward" in dispatch.OPS))
def test_an_op_and_its_backward_list_the_same_backends(name):
    forward, backward = ([i.name for i in dispatch.OPS[n].implementations] for n in (name, f"{name}_backward"))
    assert forward == backward


def test_no_pickle_is_loaded():
    """torch.load stands nowhere without weights_only=True, and no module loads pickles by other ways."""
    for module, path, _ in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr == "load" and owner == "torch":
                safe = [k.value.value for k in node.keywords if k.arg == "weights_only"]
                assert safe == [True], f"{module}:{node.lineno}: torch.load without weights_only=True"
            if node.func.attr == "load" and owner == "np":
                unsafe = [ast.unparse(k.value) for k in node.keywords if k.arg == "allow_pickle"]
                assert unsafe in ([], ["False"]), f"{module}:{node.lineno}: np.load with pickles"
            assert not (node.func.attr in ("load", "loads", "Unpickler") and owner in ("pickle", "dill", "joblib"))


def test_nothing_is_swallowed():
    """No bare except, no `except Exception`, and no environment variables beyond the two (Triton's own aside)."""
    for module, path, _ in modules():
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                assert caught not in ("", "Exception"), f"{module}:{node.lineno} swallows everything"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                assert node.args[0].value in ("TTAQ_BACKEND", "TTAQ_NATIVE", "TRITON_INTERPRET"), f"{module}"
