"""The stream's YAML: what it means, and one line for everything that is wrong with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.judging.metric import run_metric
from mergekit_arm.judging.sets import MetricSet
from mergekit_arm.models.references import absolute_reference
from mergekit_arm.streaming.config import StreamConfig, load_config
from mergekit_arm.streaming.plan.method import fit_method
from mergekit_arm.streaming.plan.plan import make_plan
from mergekit_arm.streaming.rates import Schedule, check_rates, entries, rates_at, rule_at
from tests.support.paths import EXAMPLES
from tests.support.streams import config, write_run

MINIMAL = {"merge_method": "task_arithmetic", "base_model": "base", "checkpoints": "run"}


def test_everything_that_the_readme_shows_is_understood() -> None:
    config = load_config(
        yaml.safe_load("""
merge_method: arm
base_model: Qwen/Qwen3-1.7B
checkpoints: ./runs/sft
parameters: {rotation: -0.4}
learning_rate: {schedule: cosine, peak: 0.6, final: 0.1, warmup: 1}
passes: 2
calibration: {dataset: ./calibration.jsonl, samples: 256, sequence_length: 512, refresh: once}
evaluation: {dataset: ./heldout.jsonl, keep: best, patience: 3}
dtype: bfloat16
""")
    )
    assert config.learning_rate == Schedule(schedule="cosine", peak=0.6, final=0.1, warmup=1)
    assert config.calibration is not None
    assert config.calibration.settings["dataset"] == "./calibration.jsonl"
    assert config.calibration.settings["seed"] == 42  # calibrate's default
    assert config.evaluation is not None
    assert config.evaluation.patience == 3
    assert set(config.evaluation.sets) == {"loss"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chekpoints": "x"}, "unknown key 'chekpoints' (did you mean 'checkpoints'?)"),
        ({"models": []}, "models: a stream merges checkpoints step by step"),
        ({"slices": []}, "slices: a stream merges whole models"),
        ({"base_model": None}, "base_model: input should be a valid string"),
        ({"checkpoints": []}, "checkpoints: name a Trainer's output directory"),
        ({"checkpoints": 3}, "checkpoints: input should be a valid"),
        ({"passes": 0}, "passes: input should be greater than or equal to 1"),
        ({"dtype": "bfloat"}, "dtype: 'bfloat' is none of bfloat16"),
        ({"learning_rate": 3}, "learning_rate: must lie in (0, 2], not 3"),
        ({"learning_rate": [0.5, 0]}, "learning_rate: must lie in (0, 2], not 0"),
        ({"learning_rate": []}, "learning_rate: must lie in (0, 2], not []"),
        ({"learning_rate": "fast"}, "learning_rate: must lie in (0, 2], not 'fast'"),
        ({"learning_rate": {"schedule": "cosin", "peak": 1}}, "learning_rate.schedule: input"),
        (
            {"learning_rate": {"schedule": "cosine", "peek": 1}},
            "unknown key 'peek' in learning_rate (did you mean 'peak'?)",
        ),
        ({"learning_rate": {"schedule": "cosine"}}, "learning_rate.peak: field required"),
        ({"calibration": "x.jsonl"}, "calibration: must be a mapping"),
        ({"calibration": {"sample": 3}}, "unknown key 'sample' (did you mean 'samples'?)"),
        ({"calibration": {"samples": "many"}}, "calibration"),
        ({"calibration": {"samples": 0}}, "calibration: samples must be 1 or more, not 0"),
        ({"evaluation": {"dataset": "x", "samples": 0}}, "samples: input should be greater"),
        ({"calibration": {"refresh": 0}}, "must be once, every, or N for every Nth step, not 0"),
        ({"calibration": {"refresh": True}}, "or N for every Nth step, not True"),
        ({"calibration": {"refresh": "every 2"}}, "calibration.refresh: must be once, every, or"),
        ({"evaluation": {}}, "evaluation: needs a dataset, a metric_command, or both"),
        (
            {"evaluation": {"data": "x", "dataset": "y"}},
            "unknown key 'data' in evaluation",
        ),
        ({"evaluation": {"metric_command": "run {model}"}}, "metric_goal"),
        (
            {"evaluation": {"metric_command": "run", "metric_goal": "minimize"}},
            "must say where the model goes: {model}",
        ),
        ({"evaluation": {"dataset": "x", "patience": 0}}, "evaluation.patience: input should"),
    ],
)
def test_a_wrong_key_or_value_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config({**MINIMAL, **changes})
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "\x00", "passes: 1\npasses: 2"])
def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "stream.yml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(file)
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "none.yml")


def test_local_references_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "lora").mkdir()
    assert absolute_reference("base") == str(tmp_path / "base")
    assert absolute_reference("base+lora") == f"{tmp_path}/base+{tmp_path}/lora"
    assert absolute_reference("org/model@main") == "org/model@main"
    with pytest.raises(InputError, match="does not parse"):
        absolute_reference("a+b+c")
    (tmp_path / "at@home").mkdir()
    monkeypatch.chdir(tmp_path / "at@home")
    (tmp_path / "at@home" / "base").mkdir()
    with pytest.raises(InputError, match="adapter and revision"):
        absolute_reference("base")


def test_a_rate_in_scientific_notation_is_a_number() -> None:
    # YAML reads 5e-1, without a point, as text.
    assert load_config({**MINIMAL, "learning_rate": "5e-1"}).learning_rate == 0.5
    assert load_config({**MINIMAL, "learning_rate": ["5e-1", 1]}).learning_rate == [0.5, 1.0]


def test_schedules_meet_their_ends() -> None:
    cosine = Schedule(schedule="cosine", peak=0.6, final=0.1, warmup=2)
    rates = [rule_at(cosine, i, 7) for i in range(7)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[6] == pytest.approx(0.1)
    # Half-way between its ends at half the time, and symmetric about that point.
    assert rates[4] == pytest.approx((0.6 + 0.1) / 2)
    assert rates[3] == pytest.approx(0.1 + 0.5 * (1 + math.cos(math.pi / 4)) / 2)
    linear = Schedule(schedule="linear", peak=0.8, final=0.2)
    assert [rule_at(linear, i, 4) for i in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert rule_at(linear, 9, 4) == pytest.approx(0.2)
    assert rule_at(Schedule(schedule="linear", peak=0.8), 3, 4) == pytest.approx(0.08)
    constant = Schedule(schedule="constant", peak=0.8, warmup=1)
    assert [rule_at(constant, i, None) for i in range(3)] == pytest.approx([0.4, 0.8, 0.8])
    assert rule_at(Schedule(schedule="cosine", peak=0.5), 0, 1) == 0.5
    assert rates_at([0.1, 0.2], 1, 2) == [0.2]
    assert (entries([0.1, 0.2]), entries(0.3), entries([{"value": 0.3}])) == (2, None, None)
    assert rates_at(0.3, 99, None) == [0.3]


@pytest.mark.parametrize(
    ("setting", "steps", "said"),
    [
        ([0.1, 0.2], 3, "2 entries for 3 steps"),
        (Schedule(schedule="cosine", peak=1), None, "must know its length: add steps: N"),
        (Schedule(schedule="cosine", peak=1, warmup=3), 3, "warmup 3 leaves none of 3 steps"),
        (Schedule(schedule="constant", peak=1, final=0.1), 3, "a constant schedule ends at its"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(setting: Any, steps: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_rates(setting, steps)


def test_which_methods_can_be_steps() -> None:
    assert fit_method("task_arithmetic", {}).rate_parameter == "weight"
    # A single weight divided by itself would make every learning rate 1.
    assert fit_method("ties", {"density": 0.5}).fixed == {"normalize": False}
    assert fit_method("slerp", {}).rate_is_shared
    assert fit_method("nearswap", {"t": 0.01}).rate_parameter is None
    aim = fit_method("aim_ties", {"omega": 0.3, "density": 0.5})
    assert (aim.rate_parameter, aim.statistics) == ("weight", ("importance",))


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("task_aritmetic", {}, "did you mean 'task_arithmetic'?"),
        ("linear", {"weight": 1}, "takes no base"),
        ("aim_linear", {"weight": 1}, "takes no base"),
        ("model_stock", {}, "cannot be a step"),
        ("passthrough", {}, "cannot be a step"),
        ("task_arithmetic", {"weight": 0.3}, "set learning_rate"),
        ("task_arithmetic", {"denstiy": 0.3}, "did you mean 'density'?"),
        ("ties", {"normalize": True}, "divides the learning rate by itself"),
        ("nearswap", {}, "nearswap needs t"),
        ("aim", {"measured_on": "0" * 64}, "measured_on: the stream sets it where it holds"),
    ],
)
def test_a_method_that_cannot_be_a_step_is_refused(
    name: str, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        fit_method(name, parameters)
    assert said in caught.value.message


def test_subspaces_hold_the_energy_that_the_merge_asks_for(tmp_path: Path) -> None:
    write_run(tmp_path, (1,))
    arm = {"merge_method": "arm", "calibration": {"dataset": str(tmp_path / "tokens.jsonl")}}
    filtered = [{"filter": "mlp", "value": 0.001}]  # every other weight reads the default
    for asked, measured in ((None, 0.01), (0.5, 0.5), ([0.2, 0.95], 0.95), (filtered, 0.01)):
        parameters = {"energy": asked} if asked else {}
        document = load_config(config(tmp_path, **arm, parameters=parameters))
        plan, problems = make_plan(document, MergeOptions())
        assert not problems
        assert plan is not None
        assert plan.calibration is not None
        assert plan.calibration.settings["energy"] == measured
    arm["calibration"] = {**arm["calibration"], "energy": 0.9}  # calibrate's default, but asked for
    plan, _ = make_plan(load_config(config(tmp_path, **arm)), MergeOptions())
    assert plan is not None
    assert plan.calibration is not None
    assert plan.calibration.settings["energy"] == 0.9
    arm["calibration"] = {**arm["calibration"], "energy": 0.6}
    asking = config(tmp_path, **arm, parameters={"energy": 0.9})
    _, problems = make_plan(load_config(asking), MergeOptions())
    (problem,) = problems
    assert "calibration.energy 0.6 is less than the merge's energy 0.9" in problem


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("stream*.yml")), ids=lambda file: file.stem)
def test_the_examples_are_right(file: Path) -> None:
    """Nothing in them is a default that could be left out, and every parameter is the method's."""
    written = yaml.safe_load(file.read_text())
    example = load_config(file)
    step = fit_method(example.merge_method, example.parameters)
    assert step.rate_parameter == "learning_rate"
    assert set(written) <= set(StreamConfig.model_fields)
    for index in range(3):
        (rate,) = rates_at(example.learning_rate, index, 3) or [0]
        assert 0 < rate <= 2
    # What was written is what the stream does: read again, its own document is the same stream.
    assert load_config(example.document()) == example
    assert set(written["calibration"]) - {"refresh"} <= set(example.calibration.settings)


def test_the_harness_example_reads_what_the_harness_writes(tmp_path: Path) -> None:
    """With a stand-in for lm_eval that writes a results file where the real one does."""
    evaluation = load_config(EXAMPLES / "stream_lm_eval.yml").evaluation
    assert evaluation is not None
    judged = evaluation.sets["metric"]
    assert isinstance(judged, MetricSet)
    harness = tmp_path / "bin" / "lm_eval"
    harness.parent.mkdir()
    harness.write_text(
        '#!/bin/sh\nwhile [ "$1" != --output_path ]; do shift; done\nmkdir -p "$2/org__model"\n'
        'echo \'{"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.625}}}\' '
        '> "$2/org__model/results_2026-01-01T00-00-00.json"\necho 17\n'
    )
    harness.chmod(0o755)
    scratch = tmp_path / "a scratch"
    scratch.mkdir()
    command = f"PATH={harness.parent}:$PATH; {judged.metric_command}"
    assert run_metric(command, "some/model", scratch) == 0.625
