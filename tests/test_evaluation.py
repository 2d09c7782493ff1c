import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_order import Domains, small
from tiny import assert_unchanged, calibrated, images, resnet, snapshot
from torch import nn

import ttaq
from ttaq import evaluate
from ttaq.adaptation import Tent
from ttaq.evaluation import Result
from ttaq.meters import CalibrationError


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


def test_errors_of_a_mixed_batch_are_counted_by_image():
    mixed = batch([[1.0, 2.0], [3.0, 1.0], [1.0, 2.0]], [0, 0, 1], "mixed", True)
    mixed.domains = ("fog", "snow", "fog")
    result = evaluate(Echo(), [mixed, batch([[1.0, 2.0]], [0], "snow")])
    assert result.errors == {"fog": 50.0, "snow": 50.0}
    assert result.images == {"fog": 2, "snow": 2}


def test_a_mixed_stream_errs_as_its_domains_do():
    """A model that does not adapt errs on each image alike, whatever stands beside it."""
    arguments = {"corruptions": ("snow", "fog"), "images": 40, "batch_size": 7}
    source = ttaq.streams.Images(small(40).pixels().repeat(4, 1).repeat(4, 2), np.arange(40) % 6)
    apart, together = (evaluate(resnet(), make(source, **arguments)) for make in (ttaq.continual, ttaq.mixed))
    assert together.errors == apart.errors
    assert together.class_wrong == apart.class_wrong


def test_errors_are_counted_per_visit():
    stream = ttaq.recurring(Domains(small(8)), visits=3, corruptions=("snow", "fog"), images=8, batch_size=8)
    seen = []

    def guess(model, x):
        seen.append(len(x))
        logits = torch.zeros(len(x), 10)
        if len(seen) > 2:
            logits[:, 3] = 1
        return logits

    result = evaluate(Echo(), stream, forward=guess)
    assert result.visit_errors == {0: 87.5, 1: 87.5, 2: 87.5}  # one image of each class: 0 first, 3 after
    assert result.errors == {"snow": 87.5, "fog": 87.5}
    assert result.images == {"snow": 24, "fog": 24}
    assert evaluate(Echo(), STREAM).visit_errors == {0: 40.0}


def expected_calibration_error(probabilities, labels, bins):
    """Sum it up bin by bin, as Guo et al. write it down."""
    total = 0.0
    confidence, guesses = probabilities.max(1), probabilities.argmax(1)
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            total += inside.mean() * abs((guesses == labels)[inside].mean() - confidence[inside].mean())
    return 100 * total


@pytest.mark.parametrize("bins", [1, 15])
def test_calibration(bins):
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(500, 5, generator=generator)
    labels = torch.randint(5, (500,), generator=generator)
    meter = CalibrationError(bins)
    for part in (slice(3), slice(3, 3), slice(3, 500)):
        meter.add(logits[part], logits[part].argmax(1) == labels[part])
    wanted = expected_calibration_error(logits.softmax(1).double().numpy(), labels.numpy(), bins)
    assert meter.percent() == pytest.approx(wanted, abs=1e-9)


def test_calibration_of_sure_and_of_broken_answers():
    sure = batch([[100.0, 0.0], [0.0, 100.0]], [0, 0], "clean")
    assert evaluate(Echo(), [sure]).ece == pytest.approx(50.0)
    broken = batch([[torch.nan, 1.0], [torch.inf, 0.0]], [0, 0], "clean")
    assert evaluate(Echo(), [sure, broken]).ece == pytest.approx(50.0)
    result = evaluate(Echo(), [broken])
    assert (result.ece, result.errors) == (None, {"clean": 50.0})


class Twice(Tent):
    """Looks at the first half of each batch once more, and descends from there too."""

    def loss(self, x, logits):
        return super().loss(x, logits) + self.forward(self.model, x[: len(x) // 2]).pow(2).mean()


@pytest.mark.parametrize(
    ("method", "options", "forwards", "backwards"),
    [
        ("source", {}, 1, 0),
        ("norm", {}, 1, 0),
        ("tent", {}, 1, 1),
        ("tent", {"steps": 3}, 3, 3),
        (Twice, {}, 1.5, 1.5),
    ],
)
@pytest.mark.parametrize("build", [resnet, lambda: ttaq.pack(calibrated("resnet", "w4a4"))], ids=["float", "packed"])
def test_passes_are_counted(build, method, options, forwards, backwards):
    adapter = ttaq.adapt(build(), method, guard="finite", **options)
    forward = adapter.method.forward
    stream = [batch(images(seed=seed).tolist(), [0] * 8, "a") for seed in range(2)]
    result = evaluate(adapter, stream)
    assert (result.forwards, result.backwards) == (forwards, backwards)
    assert adapter.method.forward is forward
    with adapter.frozen():
        again = evaluate(adapter, stream)
    assert (again.forwards, again.backwards) == (1, 0)


def test_counting_changes_nothing():
    stream = [batch(images(seed=seed).tolist(), [0] * 8, "a") for seed in range(3)]
    one, other = (ttaq.adapt(resnet(), "tent") for _ in range(2))
    evaluate(one, stream)
    for step in stream:
        other(step.images)
    for name, tensor in one.method.tensors().items():
        assert torch.equal(tensor, other.method.tensors()[name])


def test_a_plain_model_and_memory_on_the_cpu():
    class Large(Echo):
        def forward(self, x):
            torch.ones(1 << 26).sum()  # 256 MiB
            return x

    result = evaluate(Large(), STREAM)
    assert (result.forwards, result.backwards) == (1, 0)
    assert result.allocated_bytes is None
    assert result.resident_growth_bytes >= 0
    assert evaluate(Echo(), STREAM).resident_growth_bytes < 1 << 26  # the process was larger before


@pytest.mark.gpu
def test_memory_on_cuda():
    model = resnet().cuda()
    result = evaluate(model, [batch(images().tolist(), [0] * 8, "a")])
    assert result.allocated_bytes >= sum(p.nbytes for p in model.parameters()) + images().nbytes


def test_a_result_goes_to_json_and_back(tmp_path):
    result = evaluate(Echo(), [*STREAM, batch([[1.0, 2.0, 0.0]], [2], "snow")])
    assert Result.read(result.write(tmp_path / "a.json")) == result
    assert Result.from_dict(json.loads(json.dumps(Result({"a": 1.0}, {"a": 3}).to_dict()))) == Result(
        {"a": 1.0}, {"a": 3}
    )
    for content in ({}, [], result.to_dict() | {"format": 0}, result.to_dict() | {"more": 1}):
        with pytest.raises(ValueError, match=r"^Result: expected what to_dict gives, in format 1; evaluate again$"):
            Result.from_dict(content)


def test_a_result_goes_to_csv(tmp_path):
    result = evaluate(Echo(), STREAM)
    with open(result.write(tmp_path / "a.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["domain"], row["images"], row["error"]) for row in rows] == [
        ("fog", "4", "25.0"),
        ("snow", "1", "100.0"),
    ]
    assert {float(row["mean_error"]) for row in rows} == {62.5}
    assert float(rows[0]["ece"]) == pytest.approx(result.ece)
    assert rows[0]["allocated_bytes"] == ""
    with pytest.raises(ValueError, match=r"must end in .json or .csv, got .*a.txt; name it so"):
        result.write(tmp_path / "a.txt")
