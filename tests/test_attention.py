"""Opened attention computes what torch's and torchvision's functions do, and what cannot be opened is named."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ttaq
from ttaq.attention import Attend, FusedAttention, attention_in, open_attention
from ttaq.multihead import SplitMultihead
from ttaq.windows import SplitWindows

swin = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision builds the windows")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.randn(5, 7, generator=torch.Generator().manual_seed(1))},
        {"attn_mask": torch.arange(35).view(5, 7) % 3 < 2},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_two_products_are_the_fused_operator(options):
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = torch.randn(3, 4, 5, 8), torch.randn(3, heads, 7, 8), torch.randn(3, heads, 7, 6)
    torch.testing.assert_close(Attend()(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options))


def test_dropout_of_probabilities_is_kept():
    q = torch.randn(2, 3, 5, 8)
    assert not torch.equal(Attend()(q, q, q, dropout_p=0.5), Attend()(q, q, q))


MASKS = {
    "none": {},
    "float": {"attn_mask": torch.linspace(-2, 1, 25).view(5, 5)},
    "bool": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "heads": {"attn_mask": torch.linspace(-1, 1, 3 * 2 * 25).view(6, 5, 5)},
    "padding": {"key_padding_mask": torch.arange(15).view(3, 5) % 5 > 2},
    "weights": {"need_weights": True},
    "heads' weights": {"need_weights": True, "average_attn_weights": False},
}


def multihead(**options):
    module = nn.MultiheadAttention(16, 2, **options).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "tokens first"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", MASKS.values(), ids=list(MASKS))
def test_split_multihead_attention_is_torchs(given, bias, first):
    module, x = multihead(batch_first=first, bias=bias), torch.randn(3, 5, 16)
    x = x if first else x.transpose(0, 1)
    options = {"need_weights": False} | given
    for got, wanted in zip(SplitMultihead(module)(x, x, x, **options), module(x, x, x, **options), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted)


def test_other_sequences_and_single_ones():
    module = multihead(batch_first=False)
    twin, x, y = SplitMultihead(module), torch.randn(5, 16), torch.randn(7, 16)
    torch.testing.assert_close(twin(x, y, y), module(x, y, y))
    torch.testing.assert_close(
        twin(x[:, None], y[:, None], y[:, None] * 2)[0], module(x[:, None], y[:, None], y[:, None] * 2)[0]
    )


def test_it_takes_the_state_of_the_original():
    module, twin = multihead(batch_first=True), SplitMultihead(multihead(batch_first=True))
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(twin(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("kind", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (4, 8), (3, 3)], ids=str)
@pytest.mark.parametrize("shift", [[0, 0], [2, 2], [0, 1]], ids=str)
def test_split_windows_are_torchvisions(kind, size, shift):
    module = getattr(swin, kind)(16, [4, 4], shift, 2).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, *size, 16)
    torch.testing.assert_close(SplitWindows(module)(x), module(x))


class Fused(nn.Module):
    """Attention of a user's own, through torch's fused operator."""

    def __init__(self):
        super().__init__()
        self.qkv, self.note = nn.Linear(16, 48), ["kept"]

    def forward(self, x):
        return self.attend_to(*self.qkv(x).chunk(3, -1))

    def attend_to(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Twice(Fused):
    def attend_to(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v) - F.scaled_dot_product_attention(k, q, v)


class PlainAttention(Fused):
    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class Mixing(PlainAttention):
    """The same under a name that says nothing."""


class Taken(Fused):
    attend = None


class MultiheadAttention(Fused):
    """Of torch's name, but not torch's."""

    def __init__(self):
        super().__init__()
        self.after = ttaq.MatMul()

    def forward(self, x):
        return self.after(super().forward(x), torch.ones(16, 16))


class Outer(Fused):
    def __init__(self):
        super().__init__()
        self.inner = Fused()


def test_attention_of_ones_own_is_opened():
    model = nn.Sequential(Fused(), nn.Linear(16, 3)).eval()
    prepared, x = ttaq.prepare(model, "w4a4").eval(), torch.randn(4, 5, 16)
    assert isinstance(prepared[0], FusedAttention)
    assert isinstance(prepared[0], Fused)
    assert set(prepared.ttaq_report["layers"]) == {"0.qkv", "0.attend.scores", "0.attend.mix", "1"}
    assert type(model[0]) is Fused
    assert torch.equal(prepared(x), model(x))  # the fused operator itself, while nothing is quantised
    ttaq.calibrate(prepared, [x])
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(twin(x), prepared(x))
        assert twin[0].note == ["kept"]
        assert twin[0].note is not prepared[0].note
    ttaq.prepare(model, "w4a4", inplace=True)
    assert isinstance(model[0], FusedAttention)


def test_one_image_and_none():
    prepared, x = ttaq.prepare(nn.Sequential(Fused()), "w8a8").eval(), torch.randn(4, 5, 16)
    ttaq.calibrate(prepared, [x])
    with torch.no_grad():
        packed = ttaq.pack(prepared)
        assert torch.equal(packed(x[:1]), prepared(x[:1]))
        assert packed(x[:0]).shape == (0, 5, 16)


def test_a_name_alone_closes_nothing():
    layers = ttaq.prepare(nn.Sequential(MultiheadAttention())).ttaq_report["layers"]
    assert set(layers) == {"0.qkv", "0.after", "0.attend.scores", "0.attend.mix"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "Twice calls torch's fused attention in several places"),
        (PlainAttention, "PlainAttention multiplies by itself; write it with ttaq.MatMul"),
        (Mixing, "Mixing multiplies by itself; write it with ttaq.MatMul"),
        (Taken, "Taken has a forward, or a part called attend, of its own"),
        (Outer, "Outer holds other attention"),
    ],
)
def test_what_cannot_be_opened_is_named(kind, reason):
    model = nn.Sequential(kind(), nn.Linear(16, 16))
    with pytest.warns(UserWarning, match=rf"^prepare: 0: its products of attention stay in float, for {reason}; excl"):
        prepared = ttaq.prepare(model)
    assert reason in prepared.ttaq_report["left_out"]["0"]
    x = torch.randn(2, 5, 16)
    assert torch.equal(prepared(x), model(x))
    assert ("0.qkv" in prepared.ttaq_report["layers"]) != issubclass(
        kind, PlainAttention
    )  # it reads the weight past it
    with pytest.raises(ValueError, match=rf"^prepare: strict leaves nothing in float, got 0.*: .*{reason}; exclude it"):
        ttaq.prepare(model, strict=True)
    assert type(model[0]) is kind


def test_strict_accepts_what_the_recipe_excludes(recwarn):
    model = nn.Sequential(PlainAttention(), nn.Linear(16, 16))
    ttaq.prepare(model, ttaq.Recipe.parse("w4a4", exclude="0*"), strict=True)
    assert not recwarn.list


def test_attention_can_be_left_in_float(recwarn):
    model = nn.Sequential(Fused(), multihead(), nn.Linear(16, 16))
    prepared = ttaq.prepare(model, attention=False)
    assert set(prepared.ttaq_report["layers"]) == {"0.qkv", "2"}
    assert prepared.ttaq_report["left_out"] == dict.fromkeys("01", "its attention stays in float, as was asked")
    assert not recwarn.list


@pytest.mark.parametrize("recipe", ["w4a16", ttaq.Recipe.parse("w4a4", exclude="*.attend.*")], ids=str)
def test_attention_whose_products_the_recipe_keeps_is_not_opened(recipe):
    prepared = ttaq.prepare(nn.Sequential(Fused(), nn.Linear(16, 16)), recipe)
    assert type(prepared[0]) is Fused
    assert prepared.ttaq_report["left_out"]["0.attend.mix"] == "kept in float by the recipe"


@pytest.mark.parametrize(
    "options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8}], ids=lambda options: next(iter(options))
)
def test_multihead_attention_of_other_forms_is_left_out(options):
    with pytest.warns(UserWarning, match="cannot be swapped"):
        prepared = ttaq.prepare(nn.Sequential(nn.Linear(16, 16), nn.MultiheadAttention(16, 2, **options)))
    assert "several widths, or extra keys and values" in prepared.ttaq_report["left_out"]["1"]


def test_what_is_no_attention_is_not_opened():
    with pytest.raises(ValueError, match=r"^attention: Linear cannot be opened \(it is none\); build the model as it"):
        open_attention(nn.Linear(4, 4))
    assert attention_in(nn.Sequential(nn.Linear(4, 4), nn.Sequential())) == ([], {})
