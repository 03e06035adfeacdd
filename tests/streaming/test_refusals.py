"""What a stream refuses before its first step, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.streaming import StreamOptions, stream
from tests.support.models import tiny_llama
from tests.support.streams import config, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoints": "nowhere"}, "nowhere is no directory"),
        ({"base_model": "./nowhere"}, "no such directory"),
        ({"learning_rate": [0.5]}, "1 entries for 3 steps"),
        ({"parameters": {"weight": 1}}, "set learning_rate"),
        ({"parameters": {"density": "x"}}, "density"),
        ({"merge_method": "nearswap", "parameters": {"t": 0.1}}, "nearswap has none"),
        (
            {"evaluation": {"dataset": "nowhere.jsonl"}},
            "evaluation: dataset nowhere.jsonl: no",
        ),
        ({"chat_template": "chatmll"}, "no 'chatmll' (did you mean 'chatml'?)"),
        ({"chat_template": "chat"}, "there are: auto, alpaca, chatml"),
        (
            {"merge_method": "ties", "parameters": {"density": [{"fliter": "mlp", "value": 0.3}]}},
            "parameters.density[0]: mergekit knows no key 'fliter' here (did you mean 'filter'?)",
        ),
        (
            {"tokenizer": {"sorce": "base"}},
            "tokenizer: mergekit knows no key 'sorce' here (did you mean 'source'?)",
        ),
        ({"tokenizer_source": "unoin"}, "no model 'unoin' here (did you mean 'union'?)"),
        ({"tokenizer": {"source": "bse"}}, "no model 'bse' here (did you mean 'base'?)"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        stream(config(run, **changes), tmp_path / "out")
    assert said in caught.value.message
    assert not (tmp_path / "out" / "steps").exists()


def test_a_device_that_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    options = StreamOptions(MergeOptions(device="cuda:99"))
    with pytest.raises(InputError, match="--device cuda:99 cannot be used here"):
        stream(config(run), tmp_path / "out", options)
    evaluation = {"dataset": str(run / "tokens.jsonl"), "device": "cuda:99"}
    with pytest.raises(InputError, match="evaluation: device cuda:99 cannot be used here"):
        stream(config(run, evaluation=evaluation), tmp_path / "out")


def test_the_base_in_the_list_and_a_model_for_a_directory_are_refused(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is the base_model"):
        stream(config(run, checkpoints=[str(run / "base")]), tmp_path / "out")
    with pytest.raises(InputError, match="it is a model itself"):
        stream(config(run, checkpoints=str(run / "base")), tmp_path / "out")


def test_another_architecture_is_refused(run: Path, tmp_path: Path) -> None:
    other = tiny_llama(1)
    other.resize_token_embeddings(100)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"weight has shape \[100, 32\]"):
        stream(config(run, checkpoints=[str(tmp_path / "other")]), tmp_path / "out")


def test_a_directory_of_something_else_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="holds no stream"):
        stream(config(run), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
