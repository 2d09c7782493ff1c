import pickle
import types

import pytest
import torch
from safetensors.torch import save_file
from tiny import assert_unchanged, snapshot
from torch import nn

from ttaq.models import ResNet
from ttaq.zoo import build_model

OWN = "ttaq.models:ResNet"
SIZES = {"depth": 8, "classes": 5, "width": 4}


@pytest.mark.parametrize(
    ("reference", "options"),
    [
        ("timm:resnet18", {"num_classes": 7}),
        ("torchvision:shufflenet_v2_x0_5", {"num_classes": 7}),
        (OWN, {"classes": 7}),
    ],
)
def test_models_by_name(reference, options):
    pytest.importorskip(reference.partition(":")[0])
    model = build_model(reference, **options)
    assert isinstance(model, nn.Module)
    assert not model.training
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
def test_weights_from_a_file(suffix, wrapped, tmp_path):
    state = {name: torch.randn(t.shape) for name, t in ResNet(**SIZES).state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapped: state, "epoch": 3} if wrapped else state, path)
    model = build_model(OWN, path, **SIZES)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_counters_of_training_steps_may_be_missing(tmp_path):
    state = {n: t for n, t in ResNet(**SIZES).state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    build_model(OWN, tmp_path / "w.safetensors", **SIZES)


@pytest.mark.parametrize("reference", ["", "resnet50", "timm:", ":name", ".models:ResNet", "timm"])
def test_references_that_cannot_be_read(reference):
    with pytest.raises(
        ValueError, match=r'^model: wanted "timm:NAME", "torchvision:NAME" or "package.module:function"'
    ):
        build_model(reference)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("timm:no_such_net", r"timm has no 'no_such_net'; timm.list_models\(\) lists what there is"),
        ("torchvision:no_such_net", "torchvision has no 'no_such_net'; torchvision.models.list_models"),
        (
            "no_such_package.models:net",
            "cannot import 'no_such_package.models' .*; install it or correct the reference",
        ),
        ("ttaq.models:NoSuchNet", "ttaq.models has no function 'NoSuchNet'; correct the reference"),
        (
            "types:SimpleNamespace",
            "types:SimpleNamespace gives a SimpleNamespace; name a function that returns a nn.Module",
        ),
    ],
)
def test_models_that_are_not_there(reference, message):
    assert types
    with pytest.raises(ValueError, match=f"^model: {message}"):
        build_model(reference)


def write(path, content):
    torch.save(content, path)
    return path


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("a pickle was loaded",))


def test_pickles_are_never_run(tmp_path, capsys):
    path = tmp_path / "trap.pth"
    torch.save({"conv1.weight": torch.ones(1), "trap": Trap()}, path)
    with pytest.raises(ValueError, match=r"^weights: .*trap.pth holds no state_dict that can be read safely"):
        build_model(OWN, path, **SIZES)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="holds no state_dict that can be read safely"):
        build_model(OWN, plain, **SIZES)
    assert "a pickle was loaded" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_that_are_not_whole(suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    with pytest.raises(ValueError, match=r"^weights: there is no file .*; give a local .safetensors or .pth file$"):
        build_model(OWN, path, **SIZES)
    state = ResNet(**SIZES).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="holds no state_dict that can be read safely"):
            build_model(OWN, path, **SIZES)


@pytest.mark.parametrize(
    "content", [torch.ones(3), [1, 2], {"state_dict": 5}, {"a": torch.ones(1), "b": "text"}], ids=str
)
def test_files_that_hold_no_state(content, tmp_path):
    with pytest.raises(ValueError, match=r"^weights: .* is no state_dict; save model.state_dict\(\) into"):
        build_model(OWN, write(tmp_path / "w.pth", content), **SIZES)


def test_weights_that_do_not_fit(tmp_path):
    state = ResNet(**SIZES).state_dict()
    less = {n: t for n, t in state.items() if n != "conv1.weight"}
    with pytest.raises(
        ValueError, match=r"does not fit the model: 1 tensors missing, 0 too many, conv1.weight among them"
    ):
        build_model(OWN, write(tmp_path / "less.pth", less), **SIZES)
    more = state | {"module.extra": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"0 tensors missing, 1 too many, module.extra among them; check the reference"
    ):
        build_model(OWN, write(tmp_path / "more.pth", more), **SIZES)
    with pytest.raises(
        ValueError, match=r"linear.weight in .* has shape \(5, 16\), the model wants \(6, 16\); pass --num-classes 5"
    ):
        build_model(OWN, write(tmp_path / "shape.pth", state), **SIZES | {"classes": 6})


def test_a_wrong_file_changes_no_weight(tmp_path):
    from ttaq import zoo

    model = ResNet(**SIZES)
    before = snapshot(model)
    state = {n: t + 1 for n, t in model.state_dict().items()} | {"linear.bias": torch.ones(9)}
    with pytest.raises(ValueError, match="has shape"):
        zoo._load_weights(model, write(tmp_path / "w.pth", state))
    assert_unchanged(model, before)
