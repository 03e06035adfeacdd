"""``mergekit-arm calibrate --config``: what a merge will read is measured, each on its own text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.calibration.from_config import plan_calibrations
from mergekit_arm.cli.calibrate import command
from mergekit_arm.errors import InputError
from tests.support.calibrations import files
from tests.support.models import perturbed, tiny_llama
from tests.support.paths import EXAMPLES
from tests.support.streams import write_tokens


@pytest.fixture
def scene(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three models and a text for each."""
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name).symlink_to(family / name)
        write_tokens(tmp_path / f"{name}.jsonl", seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(**changes: Any) -> dict[str, Any]:
    found = {
        "merge_method": "regmean",
        "base_model": "./base",
        "models": [
            {"model": f"./{name}", "parameters": {"activation_stats": f"./stats/{name}"}}
            for name in ("a", "b")
        ],
        "calibration": {
            "default": {"samples": 8},
            "./stats/a": {"dataset": "./a.jsonl"},
            "stats/b": {"dataset": "./b.jsonl", "samples": 4},
        },
        "dtype": "float32",
    }
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def write(found: dict[str, Any]) -> str:
    Path("merge.yml").write_text(yaml.safe_dump(found))
    return "merge.yml"


def calibrate(*words: str) -> Result:
    return CliRunner().invoke(command, list(words))


def plan(found: dict[str, Any], **given: Any) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Return model and data set by directory, and what was said."""
    said: list[str] = []
    planned = plan_calibrations(write(found), given, said.append)
    return {one.out: (one.model, one.dataset) for one in planned}, said


def test_two_commands_are_the_whole_job(scene: Path) -> None:
    config = write(document())
    done = calibrate("--config", config)
    assert done.exit_code == 0, done.output
    merged = CliRunner().invoke(mergekit_yaml, [config, "merged"])
    assert merged.exit_code == 0, merged.output
    # The same as each by hand.
    by_hand = calibrate("./a", "by-hand", "--dataset", "./a.jsonl", "--samples", "8")
    assert by_hand.exit_code == 0, by_hand.output
    assert files(scene / "by-hand") == files(scene / "stats" / "a")


def test_a_search_is_measured_for_like_a_merge(scene: Path) -> None:
    found = document(merge_method={"tune": ["regmean", "aim_regmean"]})
    found["models"][0]["parameters"]["weight"] = {"tune": [0.2, 1.0]}
    found["parameters"] = {"omega": [0.4, {"tune": [0.0, 1.0]}]}
    found["tuning"] = {"trials": 3}
    assert plan(found)[0] == plan(document())[0]


def test_what_is_there_is_left(scene: Path, measure: Callable[..., Path]) -> None:
    measure(scene / "a", scene / "stats" / "a")
    before = files(scene / "stats" / "a")
    planned, said = plan(document())
    assert planned == {"./stats/b": ("./b", "./b.jsonl")}
    assert said[0] == "./stats/a: there already, of ./a"
    assert said[1] == "./stats/b: to be measured on ./b with ./b.jsonl"
    done = calibrate("--config", "merge.yml")
    assert done.exit_code == 0, done.output
    assert files(scene / "stats" / "a") == before
    again, said = plan(document())
    assert not again
    assert all("there already" in line for line in said)
    assert set(plan(document(), force=True)[0]) == {"./stats/a", "./stats/b"}


@pytest.mark.parametrize("place", ["default", "./stats/a"])
def test_the_section_is_checked_where_nothing_is_left_to_measure(
    place: str, scene: Path, measure: Callable[..., Path]
) -> None:
    for name in ("a", "b"):
        measure(scene / name, scene / "stats" / name)
    found = document()
    found["calibration"][place]["sampels"] = 3
    with pytest.raises(InputError, match=rf"{place}: unknown key 'sampels'"):
        plan(found)


def test_a_dry_run_lists_and_writes_nothing(scene: Path) -> None:
    before = set(scene.rglob("*"))
    config = write(document())
    done = calibrate("--config", config, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "./stats/a: to be measured on ./a with ./a.jsonl" in done.output
    assert "./stats/b: to be measured on ./b with ./b.jsonl" in done.output
    assert set(scene.rglob("*")) == {*before, scene / "merge.yml"}


def test_statistics_of_another_model_are_refused(scene: Path, measure: Callable[..., Path]) -> None:
    measure(scene / "b", scene / "stats" / "a")
    with pytest.raises(InputError, match="another model or revision"):
        plan(document())


def test_everything_is_checked_before_the_first_measurement(scene: Path) -> None:
    found = document()
    found["calibration"]["stats/b"]["dataset"] = "./nowhere.jsonl"
    done = calibrate("--config", write(found))
    assert done.exit_code == 2
    assert "nowhere.jsonl" in done.output
    assert not (scene / "stats").exists()


def test_the_bases_texts(scene: Path) -> None:
    """General text for ``activation_stats``, the task's for ``task_stats``."""
    found = document(
        merge_method="arm",
        models=[{"model": "./a"}],
        parameters={
            "activation_stats": "./general",
            "task_stats": [{"filter": "mlp", "value": "./mlp"}, {"value": "./task"}],
        },
        calibration={
            "general": {"dataset": "./base.jsonl"},
            "./mlp": {"dataset": ["./a.jsonl", "./b.jsonl:2"]},
            "./task/": {"dataset": "./a.jsonl"},
        },
    )
    planned, _ = plan(found)
    assert planned == {
        "./general": ("./base", "./base.jsonl"),
        "./mlp": ("./base", ("./a.jsonl", "./b.jsonl:2")),
        "./task": ("./base", "./a.jsonl"),
    }


def test_slices_and_what_the_command_line_says(scene: Path) -> None:
    found = document(models=None)
    found["slices"] = [
        {
            "sources": [
                {"model": "./base", "layer_range": [0, 2]},
                {
                    "model": "./a",
                    "layer_range": [0, 2],
                    "parameters": {"activation_stats": "./stats/a"},
                },
            ]
        }
    ]
    found["calibration"] = {}
    planned, _ = plan(found, dataset="./a.jsonl", batch_size=2)
    assert planned == {"./stats/a": ("./a", "./a.jsonl")}
    (only,) = plan_calibrations("merge.yml", {"dataset": "./a.jsonl", "batch_size": 2}, print)
    assert only.batch_size == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": None}, "no dataset for ./stats/a: add calibration"),
        ({"calibration": {"./stats/c": {}}}, "./stats/c is no statistics directory of this merge"),
        ({"calibration": {"./stats/a": "./a.jsonl"}}, "calibration must hold mappings"),
        (
            {"calibration": {"default": {"sampels": 3, "dataset": "./a.jsonl"}}},
            "unknown key 'sampels' (did you mean 'samples'?)",
        ),
        (
            {"calibration": {"default": {"trust_remote_code": True, "dataset": "./a.jsonl"}}},
            "unknown key 'trust_remote_code'",
        ),
        (
            {"calibration": {"default": {"samples": "many", "dataset": "./a.jsonl"}}},
            "default: samples: Input should be a valid integer",
        ),
        ({"models": [{"model": "./a"}]}, "no activation_stats or task_stats in it"),
        ({"slices": []}, "mergekit does not accept it"),
        ({"merge_method": None}, "mergekit does not accept it"),
        (
            {"parameters": {"task_stats": "stats/../stats/a"}},
            "./stats/a is named for ./base and for ./a",
        ),
    ],
)
def test_refused_in_one_line(changes: dict[str, Any], words: str, scene: Path) -> None:
    found = document(**changes)
    if "slices" in changes:
        found["slices"] = [{"sources": []}]
    done = calibrate("--config", write(found))
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert words in line
    assert not (scene / "stats").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing argument 'MODEL'"),
        (["./a"], "Missing argument 'OUT'"),
        (["./a", "./out", "--config", "merge.yml"], "leave MODEL out"),
    ],
)
def test_a_model_or_a_configuration(words: list[str], said: str, scene: Path) -> None:
    write(document())
    done = calibrate(*words)
    assert done.exit_code == 2
    assert said in done.output


def test_the_example_is_the_whole_job(scene: Path, family: Path) -> None:
    """Three specialists, three small files, two commands; with tiny models in their places."""
    found = yaml.safe_load((EXAMPLES / "regmean.yml").read_text())
    commands = re.findall(r"^#   (.+)$", (EXAMPLES / "regmean.yml").read_text(), re.M)
    assert [one.split()[0] for one in commands] == ["mergekit-arm", "mergekit-yaml"]
    for seed, model in enumerate(found["models"]):
        perturbed(tiny_llama(0), seed).save_pretrained(model["model"])
    for seed, settings in enumerate(found["calibration"].values()):
        if "dataset" in settings:
            write_tokens(Path(settings["dataset"]), seed)
    config = write({**found, "base_model": "./base"})
    done = calibrate("--config", config)
    assert done.exit_code == 0, done.output
    merged = CliRunner().invoke(mergekit_yaml, [config, "merged"])
    assert merged.exit_code == 0, merged.output
    stats = [model["parameters"]["activation_stats"] for model in found["models"]]
    assert all((scene / one / "activation_stats.json").is_file() for one in stats)
