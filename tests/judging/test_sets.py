"""Named evaluation sets: what they mean, and one line for what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_arm.errors import InputError
from mergekit_arm.judging.sets import HeldOutSet, MetricSet, better, read_sets


def test_a_set_is_data_or_a_command() -> None:
    found = read_sets(
        {
            "code": {"dataset": "./code.jsonl", "at_most": 0.02},
            "math": {"metric_command": "./score.sh {model}", "goal": "maximize", "weight": 2},
        },
        "evaluation",
    )
    code, math = found["code"], found["math"]
    assert isinstance(code, HeldOutSet)
    assert (code.goal, code.weight, code.at_most, code.samples) == ("minimize", 1, 0.02, 256)
    assert isinstance(math, MetricSet)
    assert (math.goal, math.weight, math.timeout) == ("maximize", 2, None)
    assert better("minimize", 1, 2)
    assert better("maximize", 2, 1)
    assert not better("maximize", 2, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "tuning.evaluation: must be named sets such as"),
        ({}, "tuning.evaluation: must be named sets such as"),
        ({"code": "./code.jsonl"}, "tuning.evaluation.code: must be a set such as"),
        ({"code": {"samples": 3}}, "tuning.evaluation.code: a set has either a dataset or"),
        (
            {"code": {"dataset": "x", "sample": 3}},
            "tuning.evaluation.code: unknown key 'sample' (did you mean 'samples'?)",
        ),
        ({"code": {"dataset": "x", "samples": 0}}, "tuning.evaluation.code: samples: input should"),
        ({"code": {"dataset": "x", "weight": 0}}, "tuning.evaluation.code: weight: input should"),
        ({"m": {"metric_command": "x {model}"}}, "tuning.evaluation.m: goal: field required"),
        (
            {"m": {"metric_command": "x", "goal": "minimize"}},
            "tuning.evaluation.m: metric_command must say where the model goes: {model}",
        ),
    ],
)
def test_mistakes_are_one_line(given: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_sets(given, "tuning.evaluation")
    assert caught.value.message.startswith(said)
    assert "\n" not in caught.value.message
