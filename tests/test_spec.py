import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttaq import QuantSpec, Recipe
from ttaq.spec import parse_widths


@pytest.mark.parametrize("bits", [1, 0, -4, 9, 16, 4.0, "4", None, True])
def test_bits_outside_2_to_8(bits):
    with pytest.raises(ValueError, match=r"^QuantSpec: bits must be 2 to 8, got .*; use 16 in a recipe to keep floats"):
        QuantSpec(bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "row"}, r"granularity must be one of \('tensor', 'channel', 'group', 'token'\), got 'row'"),
        ({"granularity": "group"}, "granularity 'group' does not go with group=0; use granularity"),
        ({"group": 32}, "granularity 'tensor' does not go with group=32; .* or group=0"),
        ({"group": -1}, "does not go with group=-1"),
        ({"granularity": "group", "group": -8}, "does not go with group=-8"),
        ({"observer": "kl"}, r"observer must be one of \('mse', 'minmax', 'percentile'\), got 'kl'"),
    ],
)
def test_a_spec_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(4, **options)


@given(st.integers(2, 8))
def test_the_highest_code(bits):
    assert QuantSpec(bits).qmax == 2**bits - 1


def test_a_spec_is_a_value():
    assert QuantSpec(4, "channel") == QuantSpec(4, "channel")
    assert len({QuantSpec(4), QuantSpec(4), QuantSpec(3)}) == 2
    with pytest.raises(FrozenInstanceError):
        QuantSpec(4).bits = 3


@given(st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16, 32]), st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16, 32]))
def test_widths(w, a):
    assert parse_widths(f" W{w}a{a} ") == (None if w > 8 else w, None if a > 8 else a)


@pytest.mark.parametrize("text", ["", "w4", "a4", "4", "w4a4x", "w-4a4", "w4.5a4", "int4", 4, None, b"w4a4"])
def test_a_text_that_is_no_recipe(text):
    with pytest.raises(ValueError, match=r'^recipe: wanted a text such as "w4a4" or "w4a16", got '):
        Recipe.parse(text)


@pytest.mark.parametrize(("text", "bits"), [("w1a4", 1), ("w4a9", 9), ("w0a8", 0), ("w12a16", 12), ("w4a64", 64)])
def test_widths_that_are_not_served(text, bits):
    with pytest.raises(ValueError, match=rf"^recipe '{text}': bits must be 2 to 8, or 16 to keep floats, got {bits}$"):
        Recipe.parse(text)


def test_parse():
    recipe = Recipe.parse("w2a4")
    assert recipe.weight == QuantSpec(2, "channel")
    assert recipe.activation == QuantSpec(4, "tensor")
    assert recipe.first_last == 8
    assert str(recipe) == "w2a4, first and last layer at 8 bits"
    grouped = Recipe.parse("w4a8", group=32, token=True, first_last=None)
    assert grouped.weight == QuantSpec(4, "group", 32)
    assert grouped.activation == QuantSpec(8, "token")
    assert str(grouped) == "w4a8"
    assert Recipe.parse("w4a16").activation is None
    assert Recipe.parse("w16a8").weight is None
    assert Recipe.parse(recipe) is recipe
    with pytest.raises(ValueError, match="does not go with group=-4"):
        Recipe.parse("w4a4", group=-4)


def test_the_edges_get_at_least_their_bits():
    recipe = Recipe.parse("w2a4", first_last=6)
    assert [s.bits for s in recipe.specs("conv1", edge=True)] == [6, 6]
    assert [s.bits for s in recipe.specs("conv1")] == [2, 4]
    assert [s.bits for s in Recipe.parse("w8a8", first_last=4).specs("conv1", edge=True)] == [8, 8]
    assert [s.bits for s in Recipe.parse("w2a4", first_last=None).specs("conv1", edge=True)] == [2, 4]
    weight, activation = Recipe.parse("w2a16").specs("conv1", edge=True)
    assert weight.bits == 8
    assert activation is None


def test_overrides_win_over_edges_and_exclusion_over_both():
    recipe = Recipe.parse(
        "w4a4",
        exclude=("head", "aux.*"),
        overrides={"*": "w3a3", "stem*": "w2a16", "aux.fc": "w8a8", "deep.*": "w16a8"},
    )
    assert recipe.specs("head", edge=True) == (None, None)
    assert recipe.specs("aux.fc") == (None, None)
    assert recipe.specs("stem.conv", edge=True) == (QuantSpec(2, "channel"), None)
    assert recipe.specs("body", edge=True) == (QuantSpec(3, "channel"), QuantSpec(3, "tensor"))
    assert recipe.specs("deep.a") == (None, QuantSpec(8, "tensor"))
    assert recipe.specs("Head") == recipe.specs("body")  # patterns heed case


def test_an_override_keeps_the_granularity_of_the_recipe():
    recipe = Recipe.parse("w4a4", group=16, token=True, overrides={"a": "w2a8"})
    assert recipe.specs("a") == (QuantSpec(2, "group", 16), QuantSpec(8, "token"))
    floats = Recipe.parse("w16a16", overrides={"a": "w2a8"})
    assert floats.specs("a") == (QuantSpec(2, "channel"), QuantSpec(8, "tensor"))
    assert floats.specs("b") == (None, None)


def test_the_last_override_that_matches_counts():
    assert Recipe.parse("w4a4", overrides={"a*": "w2a2", "*": "w8a8"}).specs("ab")[0].bits == 8
    assert Recipe.parse("w4a4", overrides={"*": "w8a8", "a*": "w2a2"}).specs("ab")[0].bits == 2


def test_one_pattern_may_be_a_plain_text():
    recipe = Recipe.parse("w4a4", exclude="head*")
    assert recipe.exclude == ("head*",)
    assert recipe.specs("head.fc") == (None, None)
    assert recipe.specs("e")[0].bits == 4  # not taken letter by letter
    assert Recipe.parse("w4a4", exclude=["a", "b"]).exclude == ("a", "b")


@pytest.mark.parametrize("first_last", [1, 9, 16, 0, "8", 4.5])
def test_odd_edges(first_last):
    with pytest.raises(ValueError, match=r"first_last must be 2 to 8 bits or None, got .*; name the layers in exclude"):
        Recipe.parse("w4a4", first_last=first_last)


@pytest.mark.parametrize("text", ["w9a4", "4", 4])
def test_odd_overrides_are_refused_at_once(text):
    with pytest.raises(ValueError, match="recipe"):
        Recipe.parse("w4a4", overrides={"head": text})


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.parse("w4a4"),
        Recipe.parse("w3a16", group=8, exclude=("a", "b*"), overrides={"z": "w8a8", "a": "w2a2"}, first_last=None),
        Recipe(
            QuantSpec(5, "channel", symmetric=True, observer="minmax"), QuantSpec(7, "token", observer="percentile")
        ),
        Recipe.parse("w16a8"),
    ],
)
def test_json_round_trip(recipe):
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert list(again.overrides) == list(recipe.overrides)
    assert isinstance(again.exclude, tuple)


def test_a_recipe_does_not_follow_the_mapping_it_was_made_from():
    given = {"a": "w2a2"}
    recipe = Recipe.parse("w4a4", overrides=given)
    given["a"] = "w8a8"
    assert recipe.specs("a")[0].bits == 2
