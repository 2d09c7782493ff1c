from types import SimpleNamespace

import pytest
import torch
from tiny import assert_unchanged, images, resnet, snapshot
from torch import nn

import ttaq
from ttaq import evaluate
from ttaq.evaluation import Result


def batch(logits, labels, domain, first=False):
    return SimpleNamespace(images=torch.tensor(logits), labels=torch.tensor(labels), domain=domain, first=first)


class Echo(nn.Module):
    """Gives the images back as logits, and counts its resets."""

    def __init__(self):
        super().__init__()
        self.resets = 0

    def forward(self, x):
        assert not torch.is_grad_enabled()
        return x


STREAM = [
    batch([[1.0, 2.0], [3.0, 1.0]], [1, 0], "fog", True),
    batch([[1.0, 2.0], [3.0, 1.0]], [0, 0], "fog"),
    batch([[0.0, 2.0]], [0], "snow", True),
]


def test_errors_are_counted_per_domain():
    counted = []
    result = evaluate(Echo(), STREAM, progress=counted.append)
    assert result.errors == {"fog": 25.0, "snow": 100.0}
    assert result.images == {"fog": 4, "snow": 1}
    assert result.mean_error == 62.5
    assert result.seconds > 0
    assert counted == [2, 2, 1]
    assert list(result.errors) == ["fog", "snow"]


def test_errors_are_counted_per_class():
    """Class 0: of 4 images two are wrong; class 1: none of 1; class 2, never guessed here: 1 of 1."""
    stream = [*STREAM, batch([[1.0, 2.0, 0.0]], [2], "snow")]
    result = evaluate(Echo(), stream)
    assert result.class_images == {0: 4, 1: 1, 2: 1}
    assert result.class_wrong == {0: 2, 1: 0, 2: 1}
    assert list(result.class_images) == list(result.class_wrong) == [0, 1, 2]
    assert result.mean_class_error == 50.0
    assert result.errors == {"fog": 25.0, "snow": 100.0}
    assert result.mean_error == 62.5
    assert result.sample_error == 50.0


def test_classes_and_domains_of_different_sizes_weigh_as_they_should():
    result = Result({"a": 10.0, "b": 30.0}, {"a": 30, "b": 10}, 0.0, {4: 36, 7: 4}, {4: 2, 7: 4})
    assert result.mean_error == 20.0
    assert result.sample_error == 15.0
    assert result.mean_class_error == pytest.approx((100 * 2 / 36 + 100) / 2)


def test_an_image_with_nan_among_its_logits_is_an_error():
    stream = [batch([[torch.nan, 1.0], [torch.nan, torch.nan], [2.0, 1.0]], [0, 0, 0], "clean")]
    assert evaluate(Echo(), stream).errors["clean"] == pytest.approx(200 / 3)


def test_forward_chooses_the_logits():
    result = evaluate(Echo(), STREAM, forward=lambda net, x: -net(x))
    assert result.errors == {"fog": 75.0, "snow": 0.0}


def test_the_model_is_left_as_it_was():
    model = resnet().train()
    model.bn1.eval()
    before = snapshot(model)
    stream = [SimpleNamespace(images=images(), labels=torch.zeros(8, dtype=torch.long), domain="a", first=True)]
    first, second = evaluate(model, stream), evaluate(model, stream)
    assert first.errors == second.errors
    assert_unchanged(model, before)


def test_reset_where_a_domain_begins():
    model = resnet()
    adapter = ttaq.adapt(model, "tent", lr=0.1)
    stream = [
        SimpleNamespace(images=images(seed=s), labels=torch.zeros(8, dtype=torch.long), domain=d, first=f)
        for s, d, f in [(1, "a", True), (2, "a", False), (1, "b", True), (2, "b", False)]
    ]
    state = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    together = evaluate(adapter, stream, reset=True)
    assert together.errors["a"] == together.errors["b"]
    assert any(not torch.equal(v, adapter.model.state_dict()[k]) for k, v in state.items())
    calls = []
    adapter.reset = lambda: calls.append(1)
    evaluate(adapter, stream)
    assert calls == []
    evaluate(adapter, stream, reset=True)
    assert len(calls) == 2


def test_reset_wants_an_adapter():
    with pytest.raises(ValueError, match=r"^evaluate: reset wants an Adapter; wrap the model with ttaq.adapt"):
        evaluate(Echo(), STREAM, reset=True)


def test_an_empty_stream():
    with pytest.raises(ValueError, match=r"^evaluate: the stream is empty; give a source with images$"):
        evaluate(Echo(), [])


def test_mean_error_weighs_domains_alike():
    assert Result({"a": 10.0, "b": 30.0}, {"a": 1, "b": 999}).mean_error == 20.0
