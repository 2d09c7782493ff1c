"""What the guard makes of predictions: batches of few classes, tiny batches, and models that collapse."""

import json

import pytest
import torch
from test_adapter import cnn, images
from torch import nn

from ttaq.adaptation import adapt, write_history
from ttaq.adaptation.gradient import GradientMethod
from ttaq.adaptation.watch import Collapse, Correlation, classes_of

CLASSES = 10


def logits_for(labels, sure=8.0):
    return sure * nn.functional.one_hot(torch.as_tensor(labels), CLASSES).float()


def stream_of_labels(correlated, batches=40, n=100, seed=0):
    random = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        if correlated:
            labels = torch.randint(0, CLASSES, (2,), generator=random).repeat_interleave(n // 2)
        else:
            labels = torch.randint(0, CLASSES, (n,), generator=random)
        yield logits_for(labels)


def phi_of(logits, **options):
    watch = Correlation([], **options)
    for batch in logits:
        watch.observe(batch)
    return watch


def test_independent_batches_keep_all_of_their_say_and_correlated_ones_lose_it():
    calm, torn = phi_of(stream_of_labels(False)), phi_of(stream_of_labels(True))
    assert 0.5 < calm.phi < 1.5
    assert calm.share(100) is None
    assert torn.phi > 10
    assert torn.share(100) < 0.15
    assert calm.share(1) == pytest.approx(1 / (max(1, calm.phi) + 64), rel=0.05)


def test_a_model_that_always_prefers_some_classes_is_no_evidence_of_correlation():
    random = torch.Generator().manual_seed(1)
    skewed = torch.tensor([0.55] + [0.05] * 9)
    batches = [logits_for(torch.multinomial(skewed, 100, replacement=True, generator=random)) for _ in range(200)]
    assert phi_of(batches).phi < 2


def test_domains_in_which_the_model_prefers_some_classes_are_not_taken_for_neighbours_that_share_them():
    random = torch.Generator().manual_seed(2)

    def collapsing():
        for domain in range(15):
            shares = torch.full((CLASSES,), 0.02)
            shares[domain % CLASSES] = 0.8
            for _ in range(3):
                yield logits_for(torch.multinomial(shares, 100, replacement=True, generator=random))

    torn, fooled = phi_of(stream_of_labels(True)), phi_of(collapsing())
    assert torn.shared
    assert torn.local > 5
    assert fooled.evident
    assert 0.3 < fooled.local < 1.7
    assert not fooled.shared
    assert 0.5 < phi_of(stream_of_labels(False)).local < 1.5


def test_single_images_are_counted_together():
    ones = [logits_for([label]) for label in torch.randint(0, CLASSES, (400,)).tolist()]
    runs = [logits_for([label]) for label in range(CLASSES) for _ in range(40)]
    assert phi_of(ones).phi < 2 < phi_of(runs).phi


def test_the_guard_averages_the_statistics_of_single_images_and_says_so():
    adapter = adapt(cnn(), "norm")
    adapter(images(32))
    adapter(images(1))
    adapter(images(1, 1))
    adapter(images(32, 1))
    says = [" ".join(step.events) for step in adapter.history]
    assert says[1].startswith("BatchNorm averages the statistics of batches (1 images)")
    assert says[2] == ""
    assert says[3] == "" or says[3].startswith("BatchNorm uses the statistics of each batch again")
    before = adapter.model[1].running_mean.clone()
    adapter(images(1, 2))
    assert 0 < (adapter.model[1].running_mean - before).abs().max() < 0.2


@pytest.mark.parametrize("guard", [False, "finite"])
def test_without_a_watch_nothing_is_averaged(guard):
    adapter = adapt(cnn(), "norm", guard=guard)
    for seed in range(3):
        adapter(images(1, seed))
    assert all(not step.events for step in adapter.history)
    assert adapter.model[1].cap is None


def test_effective_classes_run_from_one_to_all():
    assert classes_of(torch.zeros(4, CLASSES)) == pytest.approx(CLASSES, rel=1e-5)
    assert classes_of(logits_for([3] * 5, sure=50.0)) == pytest.approx(1, rel=1e-5)


def test_collapse_goes_half_way_back_and_then_all_the_way():
    watch, all_of_them, few = Collapse(every=2), logits_for([*range(CLASSES)] * 2), logits_for([0] * 18 + [1] * 2)
    assert watch.judge(all_of_them, all_of_them)[0] == ""
    assert watch.judge(few, few)[0] == ""  # a batch of few classes is none
    verdict, finding = watch.judge(few, all_of_them)
    assert (verdict, "90% of the predictions changed" in finding) == ("half", True)
    assert watch.judge(few, all_of_them)[0] == "full"
    for _ in range(6):
        watch.judge(all_of_them, all_of_them)
    assert watch.judge(few, all_of_them)[0] == "half"


def test_single_images_are_judged_together():
    watch, verdicts = Collapse(), []
    for label in [*range(CLASSES)] * 4:
        verdicts.append(watch.judge(logits_for([0]), logits_for([label]))[0])
    assert verdicts.index("half") == 15
    assert "full" in verdicts


class Drifting(GradientMethod):
    """Prefer class 0 more with every step: collapses for certain."""

    def loss(self, x, logits):
        return -logits.log_softmax(1)[:, 0].mean()


def test_a_method_that_collapses_is_put_back_and_the_history_says_so(tmp_path):
    def run(guard):
        adapter = adapt(cnn(), Drifting, lr=0.05, guard=guard)
        logits = [adapter(images(64, seed)) for seed in range(100)]
        return adapter, logits

    loose, wild = run(False)
    held, kept = run(True)
    assert classes_of(wild[-1]) < 1.5
    events = [event for step in held.history for event in step.events if event.startswith("collapse")]
    assert any("halfway back to the source" in event for event in events)
    assert not loose.guard.active
    share = [classes_of(k) for k in kept]
    assert sum(share) / len(share) > sum(classes_of(w) for w in wild) / len(wild)
    lines = write_history(held.history, tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) == 100
    assert [json.loads(line)["batch"] for line in lines] == list(range(100))


def test_the_watch_resumes_bit_for_bit():
    one = adapt(cnn(), Drifting, lr=0.05)
    for seed in range(25):
        one(images(5, seed))
    two = adapt(cnn(), Drifting, lr=0.05)
    two.load_state_dict(one.state_dict())
    for seed in range(25, 60):
        assert torch.equal(one(images(5, seed)), two(images(5, seed)))
    assert one.guard.state_dict() == two.guard.state_dict()
    one.reset()
    assert one.guard.state_dict() == adapt(cnn(), Drifting).guard.state_dict()


def test_an_unknown_guard_is_refused():
    with pytest.raises(ValueError, match=r'^adapt: guard must be True, "finite" or False, got'):
        adapt(cnn(), "norm", guard="all")


def test_a_look_that_fails_leaves_what_adapted():
    adapter = adapt(cnn(), Drifting, lr=0.05)
    for seed in range(5):
        adapter(images(64, seed))
    live = adapter.method.tensors()
    before = {name: tensor.detach().clone() for name, tensor in live.items()}

    def broken(model, x):
        raise RuntimeError("no second pass")

    adapter.method.forward, adapter.guard.collapse.every = broken, 1
    with pytest.raises(RuntimeError, match="no second pass"):
        adapter.guard.observe(images(64), logits_for([0, 1])[:, :5], adapter._first)
    assert all(torch.equal(before[name], tensor) for name, tensor in live.items())
