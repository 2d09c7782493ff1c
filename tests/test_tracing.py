import gc

import torch
from nets import Net, conv, images
from torch import nn
from torch.nn import functional as F

from ttaq.tracing import leaves, swap, trace


def record(model, x=None):
    x = images(8) if x is None else x
    with torch.no_grad():
        return trace(model.eval(), x, lambda: model(x), (nn.Linear, nn.Conv2d))


def calls(watch):
    found, waiting = {}, [*watch.root.children]
    while waiting:
        call = waiting.pop()
        found.setdefault(call.name, call)
        waiting += call.children
    return found


def test_a_view_is_the_value_and_a_write_is_a_new_one():
    model = Net(lambda net, x: net.c(net.b(net.a(x)).add_(1.0)), a=nn.Identity(), b=nn.Flatten(), c=nn.Identity())
    found = calls(record(model))
    assert found["a"].source.same(found["a"].result)
    assert found["b"].source.value is found["b"].result.value
    assert not found["b"].source.same(found["b"].result)
    assert found["c"].source.value is not found["b"].result.value


def test_what_is_live_depends_on_the_frame():
    model = Net(lambda net, x: x + net.side(x), side=nn.Sequential(conv(), nn.ReLU(), conv()))
    watch = record(model)
    found = calls(watch)
    middle = found["side.1"]
    assert watch.live(middle.end, watch.root) == {found["side"].source.value, middle.result.value}
    assert watch.live(middle.end, found["side"]) == {middle.result.value}
    assert watch.live(found[""].end, watch.root) == {found[""].result.value}


def test_shapes_and_parameters_make_constants():
    def flow(net, x):
        return net.b(x), net.b(torch.zeros_like(x)), net.b(net.a.weight * 2), net.b(x.new_ones(3))

    model = Net(flow, a=conv(), b=nn.ReLU())
    b = [call for call in record(model).root.children[0].children if call.name == "b"]
    assert [call.result is not None for call in b] == [True, False, False, False]


def test_a_weight_that_is_read_without_its_layer_is_noted():
    def flow(net, x):
        return F.linear(net.called(x), net.read.weight[:, :4].reshape(4, 4).t())

    model = Net(flow, called=nn.Linear(4, 4), read=nn.Linear(4, 4))
    watch = record(model, torch.randn(2, 4))
    assert calls(watch)[""].uses[0] == "read"
    assert set(calls(watch)[""].uses) == {"read"}


def test_two_layers_with_one_weight_are_two_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    watch = record(model, torch.randn(2, 4))
    assert not any(call.uses for call in calls(watch).values())


def test_activations_are_not_kept_alive():
    def flow(net, x):
        for _ in range(20):
            x = net.a(x)
        return x.mean()

    model, x = Net(flow, a=nn.Softsign()), torch.randn(64, 3, 8, 8)
    watch = record(model, x)
    gc.collect()
    alive = [item for item in gc.get_objects() if type(item) is torch.Tensor and item.shape == x.shape]
    assert [item for item in alive if item is not x] == []
    values = {id(call.result.value) for call in watch.root.children[0].children}
    assert len(values) == 20


def test_leaves_and_swap_go_through_nested_containers():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    tree = ([a, (b, "text")], {"key": {"deep": c}, "other": a})
    assert [leaf.numel() for leaf in leaves(tree)] == [1, 2, 3, 1]
    swapped = swap(tree, a, None)
    assert swapped == ([None, (b, "text")], {"key": {"deep": c}, "other": None})
    assert swapped[1]["key"]["deep"] is c
