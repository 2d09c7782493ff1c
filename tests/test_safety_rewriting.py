"""Rewritten transformers compute what they did: Hadamard rotations, the survey of a model, and the three measures."""

import pytest
import torch
from outliers import tame
from test_vits import FAMILIES
from tiny import images
from torch import nn
from torch.nn import functional as F

from ttaq.batches import logits_of
from ttaq.files import fingerprint
from ttaq.safety.hadamard import hadamard, refuses, spread_about_mean
from ttaq.safety.measures import extremes, migrate, reparameterise, rotate
from ttaq.safety.structure import Proof, opened, survey
from ttaq.surgery import copy_model

SIZES = (1, 2, 4, 12, 64, 80, 88, 104, 192, 384, 768)  # heads of 64 to 104, streams of ViT-Ti, S and B
BUILD = {"ttaq": tame} | FAMILIES
WHOLE = ("ttaq", "vit", "deit", "dinov2 with registers", "torchvision vit", "transformers vit")
REFUSED = {  # the stream is not rotated, and why
    "siglip": "something else",
    "swin": "its width changes",
    "swin v2": "is read by more than linear layers",
    "cait": "something else",
    "transformers dinov2": "is read by more than linear layers",
    "dinov3": "has no bias",
}


def generator():
    return torch.Generator().manual_seed(0)


def built(name):
    """Build a model with parameters that are not trivial, its view, and what may be rewritten."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILD[name]().eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.ndim == 1 or "head" in key:
                    p.add_(torch.randn_like(p) * 0.1)
    x = images(2, 16 if name == "ttaq" else 32)
    view = opened(model)
    proof = Proof(view, x, None)
    return model, view, proof, survey(view, proof)


def error(model, x, before):
    with torch.no_grad():
        return ((logits_of(model(x)) - before).norm() / before.norm()).item()


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_matrices_are_orthogonal_and_flat(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize("size", [768, 1024, 1152, 1280, 1408, 1536, 1664])
def test_the_widths_of_large_transformers_have_one(size):
    assert refuses(size) is None


@pytest.mark.parametrize("size", [0, 3, 56, 100])
def test_other_sizes_are_refused_by_name(size):
    assert str(size) in refuses(size)
    with pytest.raises(ValueError, match="unrotated"):
        hadamard(size)


@pytest.mark.parametrize("size", [4, 12, 64, 80, 384])
def test_the_rotation_of_a_stream_commutes_with_layer_norm(size):
    rotation = spread_about_mean(size, generator())
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(rotation.sum(1), torch.ones(size, dtype=torch.float64))
    x = torch.randn(5, size, dtype=torch.float64, generator=generator()) + 3
    torch.testing.assert_close(F.layer_norm(x @ rotation.mT, (size,)), F.layer_norm(x, (size,)) @ rotation.mT)


@pytest.mark.parametrize("name", [*WHOLE, *REFUSED])
def test_every_measure_leaves_the_logits(name):
    model, view, proof, found = built(name)
    with torch.no_grad():
        before = logits_of(model(proof.entry))
    made, shapes = fingerprint(model), {key: p.shape for key, p in model.named_parameters()}
    read = {next(iter(j.readers)) for j in found.joints} | {h.reader[0] for h in found.values}
    seen = extremes(view, [proof.entry], read, None)
    assert found.joints
    reparameterise(found, seen)
    assert error(model, proof.entry, before) < 1e-4
    migrate(found, extremes(view, [proof.entry], read, None))
    assert error(model, proof.entry, before) < 1e-4
    done, left = rotate(view, found, proof)
    assert error(model, proof.entry, before) < 1e-4
    assert fingerprint(model) == made
    assert {key: p.shape for key, p in model.named_parameters()} == shapes
    assert ("the residual stream" in done) == (name in WHOLE)
    assert REFUSED.get(name, "") in left.get("the residual stream", "")


def test_a_rotated_model_keeps_layer_norms_with_parameters_and_spreads_an_outlier():
    model, view, proof, found = built("ttaq")
    with torch.no_grad():
        model.patches.bias[3] += 30
    rotate(view, found, Proof(view, proof.entry, None))
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        assert isinstance(norm.weight, nn.Parameter)
        assert norm.weight.requires_grad
        assert torch.equal(norm.weight, torch.ones(32))
        assert torch.equal(norm.bias, torch.zeros(32))
    assert model.patches(proof.entry).abs().max() < 20


def test_layer_scale_goes_into_the_layer_before_it():
    model, view, proof, found = built("dinov2 with registers")
    rotate(view, found, proof)
    assert torch.equal(model.blocks[0].ls1.gamma, torch.ones_like(model.blocks[0].ls1.gamma))


def test_a_rotation_that_fails_leaves_every_bit():
    model, view, proof, found = built("siglip")
    before = copy_model(model).state_dict()
    found.scores, found.values = [], []
    assert rotate(view, found, proof)[0] == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_survey_leaves_every_bit():
    model, view, proof, _ = built("ttaq")
    before = copy_model(model).state_dict()
    survey(view, proof)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit, normed queries", "dinov3", "eva02"])
def test_queries_that_are_normed_or_turned_by_position_stay(name):
    *_, found = built(name)
    assert found.scores == []
    assert any("queries and keys" in key for key in found.refused)


def test_ranges_and_zeros_become_equal():
    *_, view, proof, found = built("ttaq")
    read = {next(iter(j.readers)) for j in found.joints}
    reparameterise(found, extremes(view, [proof.entry], read, None))
    for given in extremes(view, [proof.entry], read, None).values():
        for ends in (given.high, given.low):
            torch.testing.assert_close(ends, torch.full_like(ends, ends.mean().item()), rtol=1e-4, atol=1e-4)


def test_migration_balances_activations_and_weights():
    *_, view, proof, found = built("ttaq")
    read = {h.reader[0] for h in found.values}
    migrate(found, extremes(view, [proof.entry], read | {next(iter(j.readers)) for j in found.joints}, None))
    for name, given in extremes(view, [proof.entry], read, None).items():
        ratio = given.largest / view.get_submodule(name).weight.detach().abs().amax(0)
        torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()), rtol=1e-2, atol=1e-3)
