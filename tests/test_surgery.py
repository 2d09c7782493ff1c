import pytest
import torch
from torch import nn

from ttaq.surgery import copy_model, device_of, names_of, replace


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.right = self.left[0]
        self.register_buffer("codes", torch.arange(7, dtype=torch.uint8))

    def forward(self, x):
        return self.right(self.left(x))


@pytest.fixture
def twins():
    torch.manual_seed(0)
    return Twins().eval()


def test_replace_changes_a_nested_module(twins):
    assert replace(twins, "left.1", nn.GELU()) == ("left.1",)
    assert isinstance(twins.left[1], nn.GELU)
    x = torch.randn(3, 4)
    assert torch.equal(twins(x), twins.right(nn.functional.gelu(twins.left[0](x))))


@pytest.mark.parametrize("name", ["left.0", "right"])
def test_a_shared_module_stays_shared(twins, name):
    newcomer = nn.Linear(4, 4)
    assert replace(twins, name, newcomer) == ("left.0", "right")
    assert twins.left[0] is newcomer
    assert twins.right is newcomer
    assert names_of(twins, newcomer) == ("left.0", "right")


def test_a_shared_holder_is_changed_once():
    inner = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": inner, "b": inner})
    newcomer = nn.Linear(2, 2)
    assert replace(model, "b.0", newcomer) == ("a.0", "b.0")
    assert inner[0] is newcomer


def test_the_newcomer_takes_over_the_mode(twins):
    replace(twins, "left.1", nn.Dropout(0.5))
    assert not twins.left[1].training


@pytest.mark.parametrize("name", ["", "left.7", "middle", "codes"])
def test_replace_refuses_names_that_lead_nowhere(twins, name):
    with pytest.raises(ValueError, match="replace: the"):
        replace(twins, name, nn.ReLU())


def test_a_copy_is_independent_but_equal(twins):
    twin = copy_model(twins)
    x = torch.randn(5, 4)
    before = twins(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.right.weight.add_(1.0)
    assert torch.equal(twins(x), before)
    assert twin.left[0] is twin.right
    assert twin.codes is not twins.codes


def test_a_copy_shares_only_what_is_chosen(twins):
    twin = copy_model(twins, share=lambda name, tensor: tensor.dtype == torch.uint8)
    assert twin.codes is twins.codes
    assert twin.right.weight is not twins.right.weight
    assert torch.equal(twin.right.weight, twins.right.weight)


def test_a_tensor_is_shared_under_any_of_its_names(twins):
    twin = copy_model(twins, share=lambda name, tensor: name == "right.weight")
    assert twin.left[0].weight is twins.left[0].weight
    assert twin.left[0].bias is not twins.left[0].bias


def test_a_copy_keeps_hooks_and_flags_and_drops_gradients(twins):
    calls = []
    twins.right.register_forward_hook(lambda *_: calls.append(1))
    twins.right.bias.requires_grad_(False)
    twins(torch.randn(2, 4)).sum().backward()
    calls.clear()
    twin = copy_model(twins)
    twin(torch.randn(2, 4))
    assert len(calls) == 2
    assert not twin.training
    assert not twin.right.bias.requires_grad
    assert twin.right.weight.grad is None


def test_device_of():
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")
    with pytest.raises(ValueError, match="got cpu, meta"):
        device_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
