"""How steps are judged: losses to the digit, answers only, and the decisions they lead to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.options import MergeOptions

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.judging import metric
from mergekit_arm.judging.judge import Judge
from mergekit_arm.streaming import StreamOptions, stream
from mergekit_arm.streaming.verdict import Evaluation
from tests.support.models import VOCABULARY, perturbed, tiny_llama
from tests.support.streams import config, weights, write_run, write_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, (1, 2, 3, 4, 5, 6))
    return folder


def scripted(folder: Path, *numbers: float) -> dict[str, Any]:
    """Return an evaluation whose command answers with ``numbers``, one at a call, base first."""
    file = folder / "numbers.txt"
    file.write_text("".join(f"{number}\n" for number in numbers))
    return {
        "metric_command": f"test -e {{model}}/config.json && head -n1 {file} && sed -i 1d {file}",
        "metric_goal": "minimize",
    }


def test_the_journal_holds_the_losses_of_current_base_and_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    heldout = write_tokens(tmp_path / "heldout.jsonl", 12)
    settings = {"dataset": str(heldout), "keep": "last"}
    result = stream(config(run, evaluation=settings), tmp_path / "out", StreamOptions(keep="all"))
    sets = Evaluation.model_validate(settings).sets
    judge = Judge(sets, [str(run / "base")], MergeOptions())
    for record in result.steps:
        expected = {
            "current": judge.score(
                str(tmp_path / "out" / "steps" / f"{record.step:03d}" / "model"),
                tmp_path,
            ),
            "base": judge.score(str(run / "base"), tmp_path),
            "checkpoint": judge.score(record.merged[0].reference, tmp_path),
        }
        found = {"current": record.current, "base": record.base}
        found["checkpoint"] = record.merged[0].scores
        for which, scores in expected.items():
            assert set(found[which]) == {"loss"}
            assert found[which]["loss"] == pytest.approx(scores["loss"], rel=1e-7)
    assert result.chosen == 6  # keep: last


def test_what_takes_long_says_how_far_it_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a loss its tokens; of a command the seconds that it took the last time."""
    monkeypatch.setattr(metric, "TICK", 0.05)
    told: list[tuple[str, int, int]] = []
    evaluation = {
        "dataset": str(write_tokens(tmp_path / "heldout.jsonl", 12)),
        "metric_command": "test {model} && sleep 1.1 && echo 1",
        "metric_goal": "minimize",
    }
    checkpoints = [str(run / "run" / "checkpoint-1")]
    stream(
        config(run, evaluation=evaluation, checkpoints=checkpoints),
        tmp_path / "out",
        evaluating=lambda *what: told.append(what),
    )
    assert ("Evaluating", 8 * 23, 8 * 23) in told
    running = [(done, total) for name, done, total in told if "metric_command" in name]
    assert running[0] == (0, 0)
    assert {total for _, total in running[1:]} == {1}


def test_the_best_step_becomes_the_model(run: Path, tmp_path: Path) -> None:
    evaluation = scripted(tmp_path, 9, 5, 3, 4, 3, 6, 7)
    out = tmp_path / "out"
    result = stream(config(run, evaluation=evaluation), out, StreamOptions(keep="all"))
    assert [record.current["metric"] for record in result.steps] == [5, 3, 4, 3, 6, 7]
    assert [record.best_step for record in result.steps] == [1, 2, 2, 2, 2, 2]
    assert result.chosen == 2  # the first of equals
    best, model = weights(out / "steps" / "002" / "model"), weights(result.model)
    assert all(torch.equal(best[name], model[name]) for name in best)


def test_a_goal_to_maximise_turns_everything_round(run: Path, tmp_path: Path) -> None:
    evaluation = {**scripted(tmp_path, 0.1, 0.5, 0.8, 0.3, 0.2, 0.1, 0), "metric_goal": "maximize"}
    result = stream(config(run, evaluation=evaluation), tmp_path / "out")
    assert result.chosen == 2


def test_patience_ends_the_stream(run: Path, tmp_path: Path) -> None:
    evaluation = {**scripted(tmp_path, 9, 5, 6, 7, 4, 3, 2), "patience": 2}
    result = stream(config(run, evaluation=evaluation), tmp_path / "out")
    assert len(result.steps) == 3
    assert result.chosen == 1
    assert "no step was better for 2 steps" in result.stopped


def test_no_step_better_than_the_base_leaves_the_base(run: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    evaluation = scripted(tmp_path, 1, 2, 3, 4, 5, 6, 7)
    result = stream(config(run, evaluation=evaluation), tmp_path / "out", say=notes.append)
    assert result.chosen == 0
    assert any("no step was better than the base" in note for note in notes)
    base, model = weights(run / "base"), weights(result.model)
    assert all(torch.equal(base[name], model[name]) for name in base)


def test_backtracking_halves_the_rate_until_it_helps(run: Path, tmp_path: Path) -> None:
    # Step 1 is better at once, step 2 at the second halving, step 3 never: it is left out.
    numbers = [9, 8, 8.5, 8.2, 7, *[7.5] * 5, 6, 5, 4]
    evaluation = {**scripted(tmp_path, *numbers), "backtrack": True}
    out = tmp_path / "out"
    result = stream(config(run, evaluation=evaluation), out, StreamOptions(keep="all"))
    assert [record.learning_rate for record in result.steps[:3]] == [0.5, 0.125, 0.03125]
    assert [len(record.tried) for record in result.steps] == [1, 3, 5, 1, 1, 1]
    assert [record.accepted for record in result.steps] == [True, True, False, True, True, True]
    assert result.steps[2].current["metric"] == 7
    current = weights(run / "base")
    rates = {1: 0.5, 2: 0.125, 4: 0.5, 5: 0.5, 6: 0.5}
    for number, rate in rates.items():
        incoming = weights(run / "run" / f"checkpoint-{number}")
        current = {n: w + rate * (incoming[n] - w) for n, w in current.items()}
    final = weights(result.model)
    assert all(torch.allclose(final[n], current[n], rtol=1e-5, atol=1e-7) for n in final)
    assert not (out / "steps" / "003" / "model").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo out of memory >&2; exit 3 # {model}", "ended with status 3: out of memory"),
        ("exit 4 # {model}", "ended with status 4: it said nothing"),
        ("echo nan {model}", "metric_command's last line is 'nan"),
    ],
)
def test_a_failing_metric_command_stops_the_stream_and_resumes(
    run: Path, tmp_path: Path, command: str, said: str
) -> None:
    evaluation = {"metric_command": command, "metric_goal": "maximize"}
    with pytest.raises(Failure) as caught:
        stream(config(run, evaluation=evaluation), tmp_path / "out")
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_a_broken_model_is_not_given_a_score(tmp_path: Path) -> None:
    base = tiny_llama(0)
    base.save_pretrained(tmp_path / "base")
    perturbed(base, 1).save_pretrained(tmp_path / "run" / "checkpoint-1")
    base.model.norm.weight.data[0] = math.inf
    base.save_pretrained(tmp_path / "base")
    heldout = write_tokens(tmp_path / "heldout.jsonl", 12)
    with pytest.raises(Failure, match=r"the loss of .* is nan"):
        stream(config(tmp_path, evaluation={"dataset": str(heldout)}), tmp_path / "out")


def test_foreign_tokens_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "heldout.jsonl"
    file.write_text(json.dumps({"input_ids": [1, 2, VOCABULARY]}) + "\n")
    with pytest.raises(InputError, match=f"holds token {VOCABULARY}"):
        stream(config(run, evaluation={"dataset": str(file)}), tmp_path / "out")
