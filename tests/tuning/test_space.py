"""Spaces in a configuration: found wherever a number may stand, and filled with values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergekit_arm.errors import InputError
from mergekit_arm.tuning.naming import short_names
from mergekit_arm.tuning.space import Domain, find_space, parameter_names

EVERYWHERE = """
merge_method: ties
base_model: org/base
models:
  - model: org/code
    parameters:
      weight: {tune: [0.2, 1.2]}
      density: [{filter: mlp, value: {tune: [0.1, 0.9]}}, {value: [{tune: [0.0, 1.0]}, 0.5]}]
  - model: org/math
    parameters: {weight: {tune: [0.2, 1.2], name: w}}
slices:
  - sources:
      - {model: org/code, parameters: {weight: {tune: [0.2, 1.2], name: w}}}
    parameters: {density: {filter: attn, value: {tune: [1.0, 2.0]}}}
modules:
  text: {parameters: {lambda: {tune: [1.0e-3, 1.0], log: true}}}
parameters: {lambda: {tune: [1, 8], int: true}, normalize: {tune: [true, false], choice: true}}
"""


def test_a_space_may_stand_wherever_a_number_does() -> None:
    space = find_space(yaml.safe_load(EVERYWHERE))
    found = {one.name: one.domain for one in space.dimensions}
    assert found == {
        "weight of code": Domain(0.2, 1.2),
        "density of code, mlp": Domain(0.1, 0.9),
        "density of code, point 0": Domain(0.0, 1.0),
        "w": Domain(0.2, 1.2),
        "density, attn": Domain(1.0, 2.0),
        "lambda": Domain(1e-3, 1.0, log=True),
        "parameters.lambda": Domain(1, 8, integer=True),
        "normalize": Domain(choices=(True, False)),
    }
    values = {name: domain.ends()[0] for name, domain in found.items()}
    filled = space.fill("ties", values, frozenset())
    code, math_ = filled["models"]
    assert code["parameters"] == {
        "weight": 0.2,
        "density": [{"filter": "mlp", "value": 0.1}, {"value": [0.0, 0.5]}],
    }
    assert math_["parameters"] == {"weight": 0.2}
    assert filled["slices"][0]["sources"][0]["parameters"] == {"weight": 0.2}
    assert filled["slices"][0]["parameters"] == {"density": {"filter": "attn", "value": 1.0}}
    assert filled["modules"]["text"]["parameters"] == {"lambda": 1e-3}
    assert filled["parameters"] == {"lambda": 1, "normalize": True}
    assert "tune" not in str(filled)
    assert "{'tune'" in str(dict(space.document))  # the space itself is as it was


def test_methods_get_the_parameters_that_they_know() -> None:
    document = yaml.safe_load(EVERYWHERE) | {"merge_method": {"tune": ["ties", "linear"]}}
    space = find_space(document)
    assert space.methods == ("ties", "linear")
    values = {one.name: one.domain.ends()[0] for one in space.dimensions}
    filled = space.fill("linear", values, frozenset({"weight", "normalize"}))
    assert filled["merge_method"] == "linear"
    assert {name for _, name in parameter_names(filled)} == {"weight", "normalize"}


def test_an_anchor_is_a_space_at_each_of_its_places() -> None:
    document = yaml.safe_load("""
merge_method: linear
models:
  - {model: a, parameters: &both {weight: {tune: [0, 1]}}}
  - {model: b, parameters: *both}
""")
    space = find_space(document)
    filled = space.fill("linear", {"weight of a": 0.25, "weight of b": 0.75}, frozenset())
    assert [one["parameters"]["weight"] for one in filled["models"]] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"w": {"tune": []}}, "parameters.w: tune is empty"),
        ({"w": {"tune": [1]}}, "[1] is no range of two numbers; add choice: true"),
        ({"w": {"tune": [1, 2, 3]}}, "[1, 2, 3] is no range of two numbers"),
        ({"w": {"tune": ["a", "b"]}}, "is no range of two numbers"),
        ({"w": {"tune": [1, 1]}}, "the range [1, 1] is empty"),
        ({"w": {"tune": [2, 1]}}, "the range [2, 1] is empty"),
        ({"w": {"tune": [0, math.inf]}}, "is empty"),
        ({"w": {"tune": [0, 1], "log": True}}, "a logarithm needs a range above 0"),
        ({"w": {"tune": [0, 1.5], "int": True}}, "int needs whole ends"),
        ({"w": {"tune": [0, 1], "chioce": True}}, "unknown key 'chioce' (did you mean 'choice'?)"),
        ({"w": {"tune": [1, 1], "choice": True}}, "one choice stands twice"),
        ({"w": {"tune": [1, 2], "choice": True, "log": True}}, "choices have neither log nor int"),
        ({"w": {"tune": [[1], 2], "choice": True}}, "choices are numbers or words"),
        ({"w": {"tune": [0, 1], "name": 3}}, "name must be a word"),
        ({"w": 3}, "nothing is to be tuned"),
        (
            {"w": {"tune": [0, 1], "name": "n"}, "v": {"tune": [0, 2], "name": "n"}},
            "n is [0, 1] elsewhere and [0, 2] here: one name is one number",
        ),
        (
            {"w": [{"filter": {"tune": ["mlp", "attn"], "choice": True}, "value": 1}]},
            "parameters.w.0.filter: mergekit takes no number here",
        ),
    ],
)
def test_a_mistake_in_a_space_is_one_line(parameters: dict[str, Any], said: str) -> None:
    document = {"merge_method": "linear", "models": [], "parameters": parameters}
    with pytest.raises(InputError) as caught:
        find_space(document)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "document",
    [
        {"models": [{"model": {"tune": ["a", "b"], "choice": True}}]},
        {"dtype": {"tune": ["float32", "bfloat16"], "choice": True}},
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, {"tune": [1, 2]}]}]}]},
        {"tokenizer": {"parameters": {"x": {"tune": [0, 1]}}}},
    ],
)
def test_where_mergekit_takes_no_number_there_is_no_space(document: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="mergekit takes no number here"):
        find_space({"merge_method": "linear", **document})


@pytest.mark.parametrize("method", [None, 3, {"tune": []}, {"tune": "ties"}, {"tune": ["a", "a"]}])
def test_methods_are_names(method: Any) -> None:
    with pytest.raises(InputError, match="merge_method: "):
        find_space({"merge_method": method, "models": []})


@given(
    st.floats(1e-6, 1e3),
    st.floats(1.001, 1e6),
    st.booleans(),
    st.integers(2, 9),
)
def test_points_lie_within_their_range(low: float, factor: float, log: bool, count: int) -> None:
    domain = Domain(low, low * factor, log)
    points = domain.points(count)
    assert points[0] == pytest.approx(low)
    assert points[-1] == pytest.approx(low * factor)
    assert all(point in domain for point in points)
    numbers = [float(point) for point in points]
    steps = [b / a if log else b - a for a, b in itertools.pairwise(numbers)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-5)
    assert domain.middle() in domain


def test_whole_numbers_are_not_repeated() -> None:
    assert Domain(1, 3, integer=True).points(9) == [1, 2, 3]
    assert Domain(choices=("x", "y")).points(2) == ["x", "y"]


def test_models_are_told_apart_by_what_differs() -> None:
    names = short_names(["a/run/step-64", "b/run/step-64", "org/code", "code/"])
    assert list(names.values()) == ["a/run/step-64", "b/run/step-64", "org/code", "code"]
