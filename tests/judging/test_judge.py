"""A judge of several sets: every score is that of its set alone, and data is read once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.judging.heldout import load_heldout
from mergekit_arm.judging.judge import Judge
from mergekit_arm.judging.loss import mean_loss
from mergekit_arm.judging.sets import HeldOutSet, MetricSet
from tests.support.models import tiny_llama
from tests.support.streams import write_tokens


def test_a_model_is_scored_on_every_set(tmp_path: Path) -> None:
    model = tiny_llama(3)
    model.save_pretrained(tmp_path / "model")
    sets = {
        "a": HeldOutSet(dataset=str(write_tokens(tmp_path / "a.jsonl", 1))),
        "m": MetricSet(metric_command="ls {model} | wc -l", goal="minimize"),
        "b": HeldOutSet(dataset=str(write_tokens(tmp_path / "b.jsonl", 2)), batch_size=3),
    }
    judge = Judge(sets, [], MergeOptions(), device="cpu", dtype="float32")
    scores = judge.score(str(tmp_path / "model"), tmp_path)
    assert list(scores) == ["a", "m", "b"]
    for name in ("a", "b"):
        settings = sets[name]
        assert isinstance(settings, HeldOutSet)
        assert scores[name] == pytest.approx(mean_loss(model.eval(), load_heldout(settings, [])))
    assert scores["m"] == len(list((tmp_path / "model").iterdir()))
    (tmp_path / "a.jsonl").unlink()
    again = judge.score(str(tmp_path / "model"), tmp_path, run_commands=False)
    assert again == {name: scores[name] for name in ("a", "b")}


def test_a_mistake_names_its_set(tmp_path: Path) -> None:
    judge = Judge({"a": HeldOutSet(dataset=str(tmp_path / "no.jsonl"))}, [], MergeOptions())
    with pytest.raises(InputError, match=r"^evaluation\.a: "):
        judge.heldout("a")


def test_the_digest_tells_tokens_apart(tmp_path: Path) -> None:
    paths = [write_tokens(tmp_path / f"{seed}.jsonl", seed) for seed in (1, 1, 2)]
    one, same, other = (load_heldout(HeldOutSet(dataset=str(path)), []) for path in paths)
    assert one.digest == same.digest != other.digest
