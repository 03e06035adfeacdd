"""Several evaluation sets by name: weights, bounds, and what is told of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_arm.cli.stream import command
from mergekit_arm.errors import InputError
from mergekit_arm.streaming import stream
from mergekit_arm.streaming.config import load_config
from mergekit_arm.streaming.verdict import Evaluation
from tests.support.streams import config, write_run, write_tokens

MINIMAL = {"merge_method": "task_arithmetic", "base_model": "base", "checkpoints": "run"}
TWO = {"task": {"dataset": "t"}, "general": {"dataset": "g", "at_most": 0.02}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, (1, 2, 3))
    for seed, name in enumerate(("task", "general")):
        write_tokens(folder / f"{name}.jsonl", 20 + seed, rows=2)
    return folder


def told(folder: Path, name: str, *numbers: float) -> dict[str, Any]:
    """Return a set whose command answers with ``numbers``, one at a call, base first."""
    file = folder / name
    file.write_text("".join(f"{number}\n" for number in numbers))
    says = f"test {{model}} && head -n1 {file} && sed -i 1d {file}"
    return {"metric_command": says, "goal": "minimize"}


def test_the_file_names_sets_beside_what_follows_from_them() -> None:
    written = {**TWO, "samples": 8, "keep": "last", "patience": 2}
    found = load_config({**MINIMAL, "evaluation": written})
    assert found.evaluation is not None
    assert list(found.evaluation.sets) == ["task", "general"]
    assert [one.samples for one in found.evaluation.sets.values()] == [8, 8]
    assert found.evaluation.deciding == ["task"]
    assert (found.evaluation.keep, found.evaluation.patience) == ("last", 2)
    assert load_config(found.document()) == found


def evaluation(**sets: Any) -> Evaluation:
    return Evaluation.model_validate(sets)


def test_the_best_is_the_best_that_keeps_its_bounds() -> None:
    judge, base = evaluation(**TWO), {"task": 3.0, "general": 2.0}
    mild, bold = {"task": 2.5, "general": 2.01}, {"task": 1.0, "general": 2.03}
    assert judge.better(mild, bold, base)
    assert judge.better(mild, base, base)
    assert not judge.better(bold, base, base)
    assert judge.standing(bold, base) == (False, 2.0)
    assert judge.standing(mild, base) == (True, 0.5)
    # Among those that break a bound, the task decides again.
    assert judge.better(bold, {"task": 2.0, "general": 2.5}, base)


def test_weights_say_what_a_set_is_worth() -> None:
    base = {"a": 1.0, "b": 1.0}
    one, other = {"a": 0.8, "b": 1.0}, {"a": 1.0, "b": 0.7}
    a, b = {"dataset": "a"}, {"dataset": "b"}
    assert evaluation(a=a, b=b).better(other, one, base)
    assert evaluation(a={**a, "weight": 2}, b=b).better(one, other, base)
    # A bound alone decides nothing; with a weight that is written, the set does both.
    bounded = {"dataset": "b", "at_most": 0.5, "weight": 1}
    assert evaluation(a=a, b=bounded).deciding == ["a", "b"]
    score = {"metric_command": "{model}", "goal": "maximize"}
    assert evaluation(a=a, b=score).better({"a": 1.0, "b": 1.2}, {"a": 0.9, "b": 1.0}, base)


def test_a_stream_keeps_the_best_step_within_the_bound(run: Path, tmp_path: Path) -> None:
    """The step that is best at the task breaks the bound, which a first run's losses give."""
    general = {"dataset": str(run / "general.jsonl")}
    first = stream(config(run, evaluation=general), tmp_path / "first")
    rises = [record.current["loss"] - record.base["loss"] for record in first.steps]
    *_, second, highest = sorted(rises)
    worst = rises.index(highest) + 1
    task = [9, *(1 if step == worst else 5 + step for step in (1, 2, 3))]
    for bound, wanted in ((highest + 1, worst), ((second + highest) / 2, 1 if worst != 1 else 2)):
        sets = {
            "task": told(tmp_path, f"task-{bound}", *task),
            "general": {**general, "at_most": max(bound, 0)},
        }
        result = stream(config(run, evaluation=sets), tmp_path / str(bound))
        assert result.chosen == wanted


def test_everything_shows_the_sets_side_by_side(run: Path, tmp_path: Path) -> None:
    data = {name: {"dataset": str(run / f"{name}.jsonl")} for name in ("task", "general")}
    data["general"]["at_most"] = 0.5
    score = {"metric_command": "test {model} && echo 0.25", "goal": "maximize"}
    document = config(run, evaluation={**data, "score": score})
    (tmp_path / "stream.yml").write_text(yaml.safe_dump(document, sort_keys=False))
    done = CliRunner().invoke(command, [str(tmp_path / "stream.yml"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert re.search(r"step 1 .* merged task \d\.\d+ .*general \d\.\d+ .*score 0\.25", done.output)
    lines = [json.loads(line) for line in (tmp_path / "out/stream.jsonl").read_text().splitlines()]
    assert all(list(line["current"]) == ["task", "general", "score"] for line in lines)
    assert all(list(line["merged"][0]["scores"]) == ["task", "general"] for line in lines)
    card = (tmp_path / "out/model/README.md").read_text()
    beside = card.split("## Beside others")[1].split("##")[0]
    rows = [row.split("|")[1:-1] for row in beside.splitlines() if row.startswith("|")]
    assert [cell.strip() for cell in rows[0]] == ["model", "task", "general", "score"]
    assert [re.sub(r" \(.*", "", row[0].strip()) for row in rows[2:]] == [
        "base", "best single checkpoint", "last checkpoint",
        "uniform average of the checkpoints", "**this model**",
    ]  # fmt: skip
    assert "46 tokens of `task.jsonl` (SHA-256 of the token ids " in beside
    assert "a step may raise it by 0.5" in beside


def test_the_card_names_no_place_of_this_machine(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "secret", dirs_exist_ok=True)
    folder = tmp_path / "secret"
    listed = [str(folder / "run" / f"checkpoint-{n}") for n in (1, 2)]
    (folder / "score.sh").write_text("echo 1")
    says = f"sh {folder}/score.sh --model={{model}}"
    document = config(
        folder,
        checkpoints=listed,
        merge_method="arm",
        calibration={"dataset": str(folder / "tokens.jsonl")},
        evaluation={
            "task": {"dataset": str(folder / "task.jsonl")},
            "said": {"metric_command": says, "goal": "minimize"},
        },
    )
    result = stream(document, tmp_path / "out")
    card = (result.model / "README.md").read_text()
    assert "secret" not in card
    assert str(tmp_path) not in card
    assert "| checkpoint-1 | 0.5 |" in card
    configuration = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert configuration["checkpoints"] == ["checkpoint-1", "checkpoint-2"]
    assert "Activations were measured over 192 tokens of `tokens.jsonl` (SHA-256 of the" in card
    assert configuration["evaluation"]["said"]["metric_command"] == "sh score.sh --model={model}"
    assert configuration["calibration"]["dataset"] == "tokens.jsonl"
    for package in ("mergekit-arm ", "mergekit 0.", "torch ", "transformers "):
        assert package in card.split("Made with ")[-1]


def test_what_is_only_looked_at_can_be_switched_off(run: Path, tmp_path: Path) -> None:
    off = {"checkpoints": False, "average": False, "angles": False}
    judged = {"dataset": str(run / "task.jsonl")}
    plain = stream(config(run, evaluation=judged), tmp_path / "plain")
    bare = stream(config(run, evaluation=judged, compare=off), tmp_path / "bare")
    assert [one.current for one in bare.steps] == [one.current for one in plain.steps]
    assert all(one.update_norm is None and not one.merged[0].scores for one in bare.steps)
    assert all("measure" not in one.seconds for one in bare.steps)
    assert (bool(plain.average), bare.average) == (True, {})
    assert (tmp_path / "bare" / "stream.png").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": {"datset": "x"}}, "task: a set has either a dataset or a metric_command"),
        ({"task": {"dataset": "x", "at_mots": 1}}, "at_mots"),
        ({**TWO, "keeep": "best"}, "unknown key 'keeep' in evaluation (did you mean 'keep'?)"),
        ({"task": {"dataset": "x", "at_most": -1}}, "at_most"),
        ({**TWO, "metric_goal": "minimize"}, "metric_goal"),
    ],
)
def test_a_wrong_set_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config({**MINIMAL, "evaluation": changes})
    assert said in caught.value.message
    assert "\n" not in caught.value.message
