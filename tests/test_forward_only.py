"""LAME and T3A against plain loops over the formulas of their papers, and what all methods without gradients share."""

import copy
import io

import pytest
import torch
from tiny import calibrated, images, resnet, timm_vit, vit
from torch import nn

import ttaq
from ttaq.adaptation import adapt
from ttaq.adaptation.features import Moments, moments_of, pooled

SIZES = [8, 8, 1, 5]
FORMS = {
    "float": resnet,
    "float vit": vit,
    "fake-quantised": lambda: calibrated("resnet", "w4a4"),
    "fake-quantised vit": lambda: calibrated("vit", "w4a4"),
    "packed": lambda: ttaq.pack(calibrated("resnet", "w4a4")),
    "packed vit": lambda: ttaq.pack(calibrated("vit", "w4a4")),
}
ANCHOR = [images(16, seed=90), images(16, seed=91)]
METHODS = {
    "lame": {},
    "t3a": {"filter_k": 3},
    "zeroth-order": {"anchor": ANCHOR},
    "align": {"anchor": ANCHOR},
}


def shifted(n, seed):
    return 2 * images(n, seed=seed) + 1


def run(adapter, sizes=SIZES, seed=0):
    return [adapter(shifted(n, seed + i)) for i, n in enumerate(sizes)]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def head_of(model):
    return model.linear if hasattr(model, "linear") else model.head


def features_and_logits(model, x):
    """Run the network up to its head, and through it."""
    found = []
    hook = head_of(model).register_forward_hook(lambda layer, args, output: found.append(args[0]))
    with torch.no_grad():
        logits = model(x)
    hook.remove()
    return found[0], logits


def lame_by_hand(features, logits, k):
    """Iterate arXiv:2201.05718, equation 5, image by image, in float64."""
    features, p = features.double(), logits.double().softmax(1)
    z = p.clone()
    neighbours = []
    for i, f in enumerate(features):
        cosines = [(f @ g / (f.norm() * g.norm())).item() for g in features]
        others = sorted((j for j in range(len(features)) if j != i), key=lambda j: -cosines[j])
        neighbours.append(others[:k])
    for _ in range(100):
        old = z.clone()
        for i, near in enumerate(neighbours):
            weights = p[i] * sum((old[j] for j in near), torch.zeros_like(p[i])).exp()
            z[i] = weights / weights.sum()
    return z


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 5])
def test_lame_solves_its_fixed_point(form, k):
    model = FORMS[form]()
    adapter = adapt(model, "lame", k=k, guard="finite")
    for i, n in enumerate(SIZES):
        x = shifted(n, i)
        expected = lame_by_hand(*features_and_logits(model, x), k)
        torch.testing.assert_close(adapter(x).double().exp(), expected, rtol=1e-5, atol=1e-5)
        assert adapter.history[-1].returned.endswith("adjusted to neighbours in the batch")


def test_lame_leaves_a_single_image_alone():
    x = shifted(1, 0)
    torch.testing.assert_close(adapt(resnet(), "lame", guard=False)(x), resnet()(x).log_softmax(1))


def test_lame_pulls_images_with_like_features_together():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    model[1].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[0.6, 3.0], [0.6, 3.1], [-0.1, 3.0], [-0.8, -3.0], [-0.8, -3.1], [0.1, -3.0]])
    assert model(x).argmax(1).tolist() == [0, 0, 1, 1, 1, 0]
    assert adapt(model, "lame", k=2, guard=False)(x).argmax(1).tolist() == [0, 0, 0, 1, 1, 1]


def test_the_guard_lets_lame_correct_only_where_neighbours_share_classes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 8, bias=False))
    model[1].weight.data = torch.eye(8)
    generator = torch.Generator().manual_seed(0)

    def batch(classes):
        noise = torch.randn(len(classes), 8, generator=generator)
        return 2 * nn.functional.one_hot(torch.as_tensor(classes), 8) + noise

    adapter = adapt(model, "lame")
    for _ in range(10):
        x = batch(torch.randint(8, (64,), generator=generator))
        assert torch.equal(adapter(x), model(x))
        assert adapter.history[-1].returned == "logits"
    corrected = []
    for label in (0, 3, 5, 1, 6):
        x = batch([label] * 32 + [label + 1] * 32)
        corrected.append(not torch.equal(adapter(x), model(x)))
    assert corrected == [False, True, True, True, True]
    assert adapter.history[-1].returned == "logits, log-probabilities adjusted to neighbours in the batch"
    for _ in range(12):  # what LAME itself does to predictions is no evidence for it
        adapter(batch(torch.randint(8, (64,), generator=generator)))
    assert adapter.history[-1].returned == "logits"


def t3a_by_hand(model, batches, filter_k):
    """Keep a list of (entropy, unit vector) a class, as the paper's section 3 tells it, in float64."""
    head = head_of(model)
    weight = head.weight if not hasattr(head, "weight_quantizer") else head.weight_quantizer(head.weight)
    weight, bias = weight.detach().double(), head.bias.detach().double()

    def unsure(logits):
        p = logits.softmax(-1)
        return -(p * p.log()).sum().item()

    support = [[(unsure(weight @ row + bias), row / row.norm())] for row in weight]
    for x in batches:
        features, logits = features_and_logits(model, x)
        for f, z in zip(features.double(), logits.double(), strict=True):
            support[z.argmax()].append((unsure(z), f / f.norm()))
        support = [sorted(held, key=lambda pair: pair[0])[:filter_k] for held in support]
        prototypes = torch.stack([torch.stack([v for _, v in held]).mean(0) for held in support])
        yield features.double() @ prototypes.T


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("filter_k", [1, 3, 100])
def test_t3a_classifies_by_the_means_of_its_support_sets(form, filter_k):
    model = FORMS[form]()
    adapter = adapt(model, "t3a", filter_k=filter_k)
    batches = [shifted(n, i) for i, n in enumerate(SIZES * 2)]
    for x, expected in zip(batches, t3a_by_hand(model, batches, filter_k), strict=True):
        torch.testing.assert_close(adapter(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert len(adapter.method.support[0]) <= 6 * filter_k


def test_t3a_weighs_a_packed_head_as_the_quantised_one():
    fake, packed = (adapt(FORMS[form](), "t3a") for form in ("fake-quantised vit", "packed vit"))
    assert same(fake.state_dict()["memory"], packed.state_dict()["memory"])
    assert same(run(fake), run(packed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_states_and_reset_are_exact(method, form):
    model = FORMS[form]()
    adapter = adapt(model, method, **METHODS[method])
    start, first = adapter.state_dict(), run(adapter)
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    held, twin = adapter.state_dict(), copy.deepcopy(adapter)
    later = run(adapter, seed=50)
    file.seek(0)
    resumed = adapt(model, method, **METHODS[method])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(resumed.state_dict(), held)
    assert same(run(resumed, seed=50), later)
    assert same(run(twin, seed=50), later)
    assert same(resumed.state_dict(), adapter.state_dict())
    if method != "lame":
        assert not same(held["memory"], adapter.state_dict()["memory"])
    adapter.reset()
    assert same(adapter.state_dict(), start)
    assert same(run(adapter), first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_bad_and_empty_batches_change_nothing(method, form):
    adapter = adapt(FORMS[form](), method, **METHODS[method])
    run(adapter)
    before, bad = adapter.state_dict(), shifted(4, 7)
    bad[1, 0, 0, 0] = torch.nan
    logits = adapter(bad)
    assert torch.isfinite(logits).all(1).tolist() == [True, False, True, True]
    assert adapter(bad[:0]).shape == (0, 6)
    after = adapter.state_dict()
    assert same([before["tensors"], before["memory"]], [after["tensors"], after["memory"]])
    assert [step.reason for step in adapter.history][-2:] == ["NaN or Inf in input", "empty batch"]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_goes_wrong_changes_nothing(method):
    broken = []
    adapter = adapt(resnet(), method, forward=lambda m, x: m(x) * (torch.nan if broken else 1), **METHODS[method])
    run(adapter)
    before = adapter.state_dict()
    broken.append(True)
    adapter(shifted(8, 9))
    after = adapter.state_dict()
    assert same([before["tensors"], before["memory"]], [after["tensors"], after["memory"]])
    assert adapter.history[-1].skipped


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_predicting_changes_nothing_and_leaves_no_hooks(method, form):
    model = FORMS[form]()
    one, two = (adapt(model, method, **METHODS[method]) for _ in range(2))
    for i, n in enumerate(SIZES):
        x, before = shifted(n, i), two.state_dict()
        logits = two.predict(x)
        assert same(before, two.state_dict())
        assert torch.equal(one(x), logits)
        two.update(x)
        assert not any(step.skipped for step in two.history)
    exported = one.export()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in [*exported.modules(), *one.model.modules()])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert exported.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_timm_and_inference_mode(method):
    side = {"anchor": [images(8, 32, seed=90)]} if "anchor" in METHODS[method] else {}
    with torch.inference_mode():
        adapter = adapt(ttaq.pack(calibrated("timm_vit", "w4a8")), method, **METHODS[method] | side)
        outputs = [adapter(images(4, 32, seed=i)) for i in range(2)]
    assert all(torch.isfinite(y).all() and y.shape == (4, 6) for y in outputs)
    assert not any(step.skipped for step in adapter.history)


def test_features_may_be_named():
    model = timm_vit()
    by_name, by_default = (adapt(model, "lame", guard=False, **o)(images(6, 32)) for o in ({"features": "head"}, {}))
    assert torch.equal(by_name, by_default)
    tokens = adapt(model, "lame", guard=False, features="blocks.1.mlp.fc1")(images(6, 32))
    assert tokens.shape == by_default.shape
    assert not torch.equal(tokens, by_default)


class Side(nn.Module):
    """A network with a linear layer that does not run, registered last."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        self.spare = nn.Linear(4, 3)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("model", "method", "options", "says"),
    [
        (resnet, "lame", {"k": 0}, "k must be a whole number from 1, got 0; use 5"),
        (resnet, "t3a", {"filter_k": 0.5}, "filter_k must be a whole number from 1, got 0.5; use 100"),
        (resnet, "t3a", {"features": "conv1"}, "t3a needs a linear head, got a Conv2d; name it"),
        (resnet, "lame", {"features": "nothing"}, "must name a module of ResNet, got 'nothing'; take"),
        (lambda: nn.Sequential(nn.Flatten()), "lame", {}, "Sequential has no linear layer"),
        (vit, "zeroth-order", {}, "needs batches of source images, got anchor=None; pass"),
        (vit, "align", {}, "align needs batches of source images, got anchor=None; pass"),
        (vit, "align", {"anchor": []}, "empty"),
        (resnet, "zeroth-order", {"lr": 0}, "lr and perturbation above 0"),
    ],
)
def test_wrong_calls_get_a_remedy(model, method, options, says):
    with pytest.raises(ValueError, match=says):
        adapt(model(), method, **options)


def test_a_head_that_does_not_run_or_gives_no_logits_is_told():
    for method in ("lame", "t3a"):
        with pytest.raises(ValueError, match="a module that the model calls"):
            adapt(Side(), method)(torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"t3a needs a head that gives the logits, got 16 outputs"):
        adapt(vit(), "t3a", features="layers.1.mlp.2")(images(2))


def test_pooled_moments_are_those_of_all_values():
    layer, x = nn.Linear(3, 2), torch.randn(20, 5, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    parts = [moments_of(layer, part) for part in x.split([1, 12, 7])]
    whole = moments_of(layer, x)
    for got, expected in zip(pooled(parts)[:2], whole[:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.var, x.flatten(0, 1).var(0, correction=0))
    assert pooled(parts).count == 100
    one, two = Moments(torch.zeros(1), torch.ones(1)), Moments(torch.ones(1), torch.ones(1))
    assert one.mixed(two, 0.5).var.item() == 1.25
