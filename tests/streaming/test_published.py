"""Statistics that are there already serve as the first measurement, if they are of the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_arm.errors import InputError
from mergekit_arm.streaming import StreamOptions, stream
from tests.support.models import tiny_llama
from tests.support.streams import config, weights, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    """A run, the base's statistics in ``stats``, and another model's in ``others``."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, (1, 2))
    options = {"dataset": str(folder / "tokens.jsonl"), "statistics": ("all",)}
    measure(folder / "base", folder / "stats", **options)
    tiny_llama(5).save_pretrained(folder / "other")
    measure(folder / "other", folder / "others", **options)
    return folder


@pytest.mark.parametrize("method", ["arm", "aim"])
def test_published_statistics_are_the_first_measurement(
    run: Path, tmp_path: Path, method: str
) -> None:
    given = {"activation_stats": str(run / "stats")}
    document = config(run, merge_method=method, parameters=given)
    result = stream(document, tmp_path / "out", StreamOptions(keep="all"))
    assert [record.statistics_from for record in result.steps] == [1, 1]
    assert [record.calibration_tokens for record in result.steps] == [0, 0]
    assert not list((tmp_path / "out").rglob("statistics"))
    measured = config(run, merge_method=method, calibration={"dataset": str(run / "tokens.jsonl")})
    expected = weights(stream(measured, tmp_path / "measured").model)
    found = weights(result.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    step = yaml.safe_load((tmp_path / "out/steps/002/config.yml").read_text())["parameters"]
    metadata = json.loads((run / "stats/activation_stats.json").read_text())
    assert step["activation_stats"] == str(run / "stats")
    assert step["measured_on"] == metadata["model"]["content_hash"]


def test_later_models_are_measured_where_asked_for(run: Path, tmp_path: Path) -> None:
    document = config(
        run,
        merge_method="arm",
        parameters={"activation_stats": str(run / "stats")},
        calibration={"dataset": str(run / "tokens.jsonl"), "refresh": "every"},
    )
    result = stream(document, tmp_path / "out", StreamOptions(keep="all"))
    assert [record.statistics_from for record in result.steps] == [1, 2]
    assert [bool(record.calibration_tokens) for record in result.steps] == [False, True]


def test_another_models_statistics_are_refused_before_anything_is_written(
    run: Path, tmp_path: Path
) -> None:
    given = {"activation_stats": str(run / "others")}
    evaluation = {"dataset": str(run / "tokens.jsonl")}
    document = config(run, merge_method="arm", parameters=given, evaluation=evaluation)
    with pytest.raises(InputError, match=r"parameters: activation_stats: .*another model"):
        stream(document, tmp_path / "out")
    assert not (tmp_path / "out" / "steps").exists()


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (None, "whose values differ from base_model's"),
        ("0" * 64, "and measured_on says 0000000000000000"),
        ("base", "must be the content_hash"),
    ],
)
def test_only_what_is_declared_is_found_by_name(
    run: Path, tmp_path: Path, declared: Any, said: str
) -> None:
    """Without the setting, or with another model's hash, a later model has no statistics."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    parameters = {"activation_stats": str(run / "stats")}
    if declared is not None:
        parameters["measured_on"] = declared
    document = {
        "merge_method": "aim",
        "base_model": str(run / "other"),
        "models": [{"model": str(run / "run/checkpoint-1"), "parameters": {"weight": 1.0}}],
        "parameters": parameters,
        "dtype": "float32",
    }
    with pytest.raises(InputError, match=said):
        run_merge(
            MergeConfiguration.model_validate(document), str(tmp_path), MergeOptions(quiet=True)
        )
