import pytest
import torch
from torch import nn

from ttaq.batches import call, collect, pieces

CPU = torch.device("cpu")


def test_labels_are_left_out_and_order_is_kept():
    x = [torch.full((2, 3), float(i)) for i in range(4)]
    entries = collect("verb", [x[0], (x[1], 1), [x[2]], {"a": x[3], "labels": x[0], "label": x[0], "y": x[0]}], CPU)
    assert all(a is b for a, b in zip(entries[:3], x[:3], strict=True))
    assert entries[3].keys() == {"a"}


def test_a_single_tensor_is_one_batch():
    x = torch.randn(4, 3)
    assert collect("verb", x, CPU)[0] is x


def test_integer_inputs_pass():
    ids = torch.arange(6).reshape(2, 3)
    assert collect("verb", [{"ids": ids}], CPU)[0]["ids"] is ids


def test_everything_goes_where_the_model_is():
    with pytest.raises(ValueError, match=r"^verb: the model is on meta and holds no weights; load them first$"):
        collect("verb", [torch.randn(2, 2)], torch.device("meta"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["tensor", "pair", "dict"])
def test_one_bad_value_is_found_in_every_form(form, value):
    x = torch.randn(2, 3)
    x[1, 2] = value
    batch = {"tensor": x, "pair": (x, torch.zeros(2)), "dict": {"good": torch.ones(2), "bad": x}}[form]
    with pytest.raises(ValueError, match=r"^verb: batch 1 holds NaN or infinite values; clean the calibration images$"):
        collect("verb", [torch.ones(2, 3), batch], CPU)


def test_labels_may_hold_anything():
    x = torch.randn(2, 3)
    assert collect("verb", [(x, torch.tensor([torch.nan]))], CPU)[0] is x


def test_call():
    class Model(nn.Module):
        def forward(self, x, twice=None):
            return x * 2 if twice is not None else x

    x = torch.randn(2)
    model = Model()
    assert call(model, x, None) is x
    assert torch.equal(call(model, {"x": x, "twice": x}, None), 2 * x)
    assert torch.equal(call(model, x, lambda net, entry: net(entry) + 1), x + 1)


@pytest.mark.parametrize("total", [0, 1, 127, 128, 129, 300, 1024])
def test_pieces_are_few_and_of_equal_size(total):
    parts = [range(total)[piece] for piece in pieces(total, 128)]
    assert [i for part in parts for i in part] == list(range(total))
    assert len(parts) == -(-total // 128)
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1
