from dataclasses import dataclass

import pytest
import torch
from nets import Net, check, conv, head, images, names
from torch import nn
from torch.nn import functional as F

from ttaq.blocks import block_input, find_blocks, run_block


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_layers_that_do_not_run_are_named():
    model = Net(lambda net, x: net.head(net.conv(x)), conv=conv(), head=head(), spare=nn.Linear(2, 2))
    blocks = find_blocks(model, images())
    assert blocks.idle == ("spare",)
    assert "never run: spare" in repr(blocks)
    check(model, images(), blocks)


def test_a_function_between_modules_breaks_the_chain():
    def flow(net, x):
        return net.head(net.b(F.relu(net.a(x), inplace=True)))

    blocks = find_blocks(Net(flow, a=conv(), b=conv(), head=head()), images())
    assert names(blocks) == ["a", "b", "head.2"]
    assert not any(block.chained for block in blocks)


def test_views_and_dropout_keep_the_chain():
    model = nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(192, 8), nn.Dropout())
    blocks = find_blocks(model, images(8))
    assert [block.modules for block in blocks] == [("0", "1", "2", "3"), ("4",)]
    assert blocks[1].chained
    check(model, images(8), blocks)


def test_a_residual_written_as_a_function_is_joined_with_its_module():
    def residual(net, x):
        return x + net.b(F.relu(net.a(x)))

    def flow(net, x):
        return net.head(net.body(net.stem(x)))

    model = Net(flow, stem=conv(), body=Net(residual, a=conv(), b=conv()), head=head())
    blocks = find_blocks(model, images())
    assert names(blocks) == ["stem", "body", "head.2"]
    assert blocks[1].layers == ("body.a", "body.b")


def test_branches_outside_of_modules_are_cut_within_themselves():
    def flow(net, x):
        for attend, feed in zip(net.attend, net.feed, strict=True):
            x = attend(x) + x
            x = feed(x) + x
        return net.head(x)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x):
            return self.down(F.gelu(self.up(self.norm(x))))

    parts = {"attend": nn.ModuleList(Pair() for _ in range(6)), "feed": nn.ModuleList(Pair() for _ in range(6))}
    model = Net(flow, **parts, head=head())
    blocks = find_blocks(model, images())
    assert names(blocks) == [*(f"{part}.{i}" for i in range(6) for part in ("attend", "feed")), "head.2"]
    check(model, images(), blocks)


def test_a_branch_that_all_else_passes_by_is_one_block():
    def flow(net, x):
        return net.head(net.last(net.side(x) + net.first(x)))

    model = Net(flow, first=conv(), side=nn.Sequential(conv(), nn.ReLU(), conv()), last=conv(), head=head())
    blocks = find_blocks(model, images())
    check(model, images(), blocks)
    assert names(blocks) == ["side.0..1", "side.2", "first", "last", "head.2"]
    assert blocks[0].chained is False


@pytest.mark.parametrize("deep", [False, True])
def test_a_layer_that_runs_twice_is_served_by_the_module_around_both(deep):
    twice = Net(lambda net, x: net.a(F.relu(net.a(x))), a=conv())
    model = Net(lambda net, x: net.head(net.body(x)), body=twice, head=head()) if deep else twice
    blocks = find_blocks(model, images())
    assert names(blocks) == (["body", "head.2"] if deep else ["model"])
    check(model, images(), blocks)


def test_a_layer_that_runs_twice_without_a_module_around_is_refused_by_name():
    model = Net(lambda net, x: net.a(x), a=conv())
    with pytest.raises(ValueError, match=r"find_blocks: every layer .* got a outside"):
        find_blocks(model, images(), lambda model, x: model(x) + model(x.flip(3)))


def test_blocks_that_write_into_their_input_get_a_copy():
    body = Net(lambda net, x: F.relu_(x) + net.b(F.relu(net.a(x))), a=conv(), b=conv())
    model = Net(lambda net, x: net.head(net.body(net.stem(x))), stem=conv(), body=body, head=head())
    blocks = find_blocks(model, images())
    assert [block.inplace for block in blocks] == [False, True, False]
    check(model, images(), blocks)


def test_in_place_sums_are_new_values():
    def residual(net, x):
        y = net.b(F.relu_(net.a(x)))
        y += x
        return F.relu_(y)

    body = nn.Sequential(*(Net(residual, a=conv(), b=conv()) for _ in range(2)))
    model = Net(lambda net, x: net.head(net.body(net.stem(x))), stem=conv(), body=body, head=head())
    blocks = find_blocks(model, images())
    assert names(blocks) == ["stem", "body.0", "body.1", "head.2"]
    assert [block.chained for block in blocks] == [False, True, True, False]


def test_extra_arguments_are_given_back():
    @dataclass
    class Result:
        features: torch.Tensor
        note: str

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, factor, *, features):
            return Result(features + factor * self.b(F.relu(self.a(features))), "done")

    def flow(net, x):
        x = net.stem(x)
        for part in net.body:
            x = part(torch.full((1,), 0.5), features=x).features
        return {"logits": net.head(x), "depth": 2}

    model = Net(flow, stem=conv(), body=nn.ModuleList([Scaled(), Scaled()]), head=head())
    blocks = find_blocks(model, images())
    assert names(blocks) == ["stem", "body.0", "body.1", "head.2"]
    assert blocks[2].chained
    x, extras = block_input(model.eval(), blocks[1], images())
    expected = model.body[0](torch.full((1,), 0.5), features=x).features
    assert torch.equal(run_block(model, blocks[1], x, extras), expected)
    assert torch.equal(run_block(model, blocks[1], x), expected)


def test_a_block_that_does_not_repeat_is_joined_with_its_surroundings():
    class Counting(nn.Conv2d):
        def forward(self, x):
            self.count += 1
            return super().forward(x) * self.count

    def reset(net, x):
        net.inner.count = 0
        return net.inner(F.relu(net.before(x)))

    body = Net(reset, before=conv(), inner=Counting(3, 3, 1))
    model = Net(
        lambda net, x: net.head(net.body(net.stem(x))), stem=conv(), body=nn.Sequential(body, conv()), head=head()
    )
    blocks = find_blocks(model, images())
    assert names(blocks) == ["stem", "body.0", "body.1", "head.2"]
    check(model, images(), blocks)


def test_constants_and_shapes_are_not_activations():
    def flow(net, x):
        table = net.table.weight.t() @ net.table.weight
        empty = torch.zeros_like(x)
        y = net.b(F.relu(net.a(x)))
        return net.head(y + table.mean() + empty[:1])

    model = Net(flow, a=conv(), b=conv(), head=head(), table=nn.Embedding(4, 4))
    assert names(find_blocks(model, images())) == ["a", "b", "head.2"]
