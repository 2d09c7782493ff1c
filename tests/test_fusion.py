"""Fused models: the bits of the quantised model with frozen norms, and what is handed over as codes."""

import copy

import pytest
import torch
from tiny import BUILDERS, calibrated, input_of, settle
from torch import nn
from torch.nn import functional as F

import ttaq
from ttaq.fusion import Fused
from ttaq.norms import FrozenBatchNorm, freeze


def both(name, recipe, **options):
    """Return (packed, fused, quantised with frozen norms, an input)."""
    quantised, x = calibrated(name, recipe), input_of(name, seed=2)
    packed = ttaq.pack(quantised)
    return packed, ttaq.fuse(packed, x), freeze(copy.deepcopy(quantised)).eval(), x


def laid_out(x):
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@pytest.mark.parametrize("recipe", ["w4a8", "w2a4", "w4a16"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_fused_network_gives_the_bits_of_the_quantised_one_with_frozen_norms(name, recipe):
    packed, fused, twin, x = both(name, recipe)
    with torch.no_grad():
        got, wanted, plain = fused(x), twin(laid_out(x)), packed(x)
    assert fused.ttaq_report["fused"]
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
    if recipe == "w4a16":
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_fused_network_is_one_graph(name):
    _, fused, _, x = both(name, "w4a8")
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), fused(x))


class Chains(nn.Module):
    """Every way in which layers follow each other."""

    def __init__(self):
        super().__init__()
        width = 16
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.reflected = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.relu(self.norms[0](self.stem(x)))  # read by first and by the sum: floats
        y = F.relu6(self.norms[1](self.first(x)))  # read by second alone: codes
        y = self.norms[2](self.second(y))
        y += x
        x = self.relu(y)  # read by reflected, which pads before the op: floats
        x = self.norms[3](self.reflected(x)).relu().mean((2, 3))
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


def chains(recipe="w4a8"):
    torch.manual_seed(5)
    x = torch.randn(4, 3, 12, 12)
    model = settle(Chains(), x)
    return ttaq.quantize(model, [x], ttaq.Recipe.parse(recipe), method="rtn", progress=False), x


def test_what_follows_moves_into_the_layer_and_codes_are_handed_over_where_all_readers_agree():
    quantised, x = chains()
    fused = ttaq.fuse(ttaq.pack(quantised), x)
    assert fused.ttaq_report["fused"] == {
        "stem": "frozen BatchNorm, relu",
        "first": "frozen BatchNorm, relu6, 8-bit codes",
        "second": "from codes, frozen BatchNorm, residual, relu",
        "reflected": "frozen BatchNorm, relu",
        "fc1": "relu, 8-bit codes",
        "fc2": "from codes",
    }
    assert not any(isinstance(m, (FrozenBatchNorm, nn.ReLU, nn.Dropout)) for m in fused.children())
    seen = {}
    for name, module in fused.named_modules():
        if isinstance(module, Fused):
            module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: y.dtype}))
    with torch.no_grad():
        fused(x)
    assert [name for name, dtype in seen.items() if dtype == torch.uint8] == ["first", "fc1"]


def test_the_packed_model_is_left_as_it_is():
    quantised, x = chains()
    packed = ttaq.pack(quantised)
    with torch.no_grad():
        before = packed(x)
        ttaq.fuse(packed, x)
        assert torch.equal(packed(x), before)
    assert isinstance(packed.norms[0], nn.BatchNorm2d)


def test_counters_of_bad_inputs_go_on_counting():
    quantised, x = chains()
    fused = ttaq.fuse(ttaq.pack(quantised), x)
    x = x.clone()
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        fused(x)
    assert fused.stem.layer.nonfinite > 0


class Mischief(nn.Module):
    """Sums that are no residuals, and an input that is overwritten before its product would be read."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x) + torch.ones(4, 1, 1)  # broadcasts
        z = self.other(y)
        y.mul_(3.0)
        return F.relu(z) + y + torch.add(self.conv(y), y, alpha=2)


def test_nothing_moves_where_it_would_change_the_result():
    torch.manual_seed(6)
    x = torch.randn(2, 4, 5, 5)
    quantised = ttaq.quantize(Mischief().eval(), [x], "w4a8", method="rtn", progress=False)
    packed = ttaq.pack(quantised)
    fused = ttaq.fuse(packed, x)
    with torch.no_grad():
        assert torch.equal(fused(x), packed(laid_out(x)))
    assert fused.ttaq_report["fused"] == {}


def test_a_frozen_norm_is_its_norm_to_a_rounding_and_keeps_the_dtype():
    torch.manual_seed(7)
    norm = nn.BatchNorm2d(8).train()
    norm(torch.randn(32, 8, 5, 5) * 3 + 1)
    frozen, x = FrozenBatchNorm(norm.eval()), torch.randn(4, 8, 5, 5)
    torch.testing.assert_close(frozen(x), norm(x), rtol=1e-5, atol=1e-6)
    assert frozen(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(
        FrozenBatchNorm(nn.BatchNorm1d(3, affine=False))(torch.ones(2, 3)).round(decimals=3), torch.ones(2, 3)
    )


class Norming(nn.BatchNorm2d):
    """A norm with an activation of its own, as timm has them."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_a_norm_with_an_activation_of_its_own_keeps_it():
    model = nn.Sequential(Norming(3))
    x = torch.randn(2, 3, 4, 4)
    wanted = model.eval()(x)
    torch.testing.assert_close(freeze(model)(x), wanted)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def test_wrong_calls_get_one_sentence_with_the_remedy(tmp_path):
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"^fuse: the model holds no packed layer; call ttaq.pack"):
        ttaq.fuse(nn.Linear(4, 4), x)
    packed = ttaq.pack(ttaq.quantize(Untraceable(), [x], "w4a8", method="rtn", progress=False))
    with pytest.raises(ValueError, match=r"^fuse: torch.fx cannot trace Untraceable \(.*\); run the packed model as"):
        ttaq.fuse(packed, x)
    quantised, x = chains()
    fused = ttaq.fuse(ttaq.pack(quantised), x)
    with pytest.raises(ValueError, match=r"^save: the model is fused; save the packed model"):
        ttaq.save(fused, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="are for inference"):
        fused(x.requires_grad_())
