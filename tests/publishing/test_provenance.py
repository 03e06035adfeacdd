"""A merged model says with which statistics it was merged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mergekit import merge
from mergekit.config import MergeConfiguration
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.errors import InputError
from mergekit_arm.publishing.provenance import HEADING, attach, named
from mergekit_arm.statistics.read import open_statistics
from mergekit_arm.statistics.write import check_destination
from tests.support.fake_hub import card_problem
from tests.support.merges import config, run
from tests.support.stored import Folder

FILE = "activation_stats.json"


def test_it_stands_beside_the_configuration_and_in_the_card(family: Path, tmp_path: Path) -> None:
    out = run(mergekit_yaml, yaml.safe_dump(config(family)), tmp_path)
    said = json.loads((out / FILE).read_text())
    stored = Folder.open(family / "stats").metadata
    (one,) = said["statistics"]
    assert one["reference"] == str(family / "stats")
    for part in ("digest", "model", "data", "settings", "versions"):
        assert one[part] == stored[part]
    assert "weights" not in one
    card = (out / "README.md").read_text()
    assert card.count(HEADING) == 1
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front  # all models are local: mergekit's list is empty
    assert {"mergekit", "merge"} <= set(front["tags"])
    assert card_problem(card) is None
    assert card.endswith(f"`{stored['digest'][:16]}` |\n")
    for fact in (stored["model"]["content_hash"][:16], stored["data"]["content_hash"][:16]):
        assert fact in card
    assert (out / "mergekit_config.yml").is_file()


def test_every_directory_is_named_once(family: Path) -> None:
    stats = str(family / "stats")
    several = config(
        family,
        merge_method="arm",
        models=[
            {"model": str(family / "a"), "parameters": {"activation_stats": "./a-stats"}},
            {"model": str(family / "b"), "parameters": {
                "activation_stats": [{"filter": "mlp", "value": "./b-stats"}, {"value": stats}]
            }},
        ],
        parameters={"activation_stats": stats, "task_stats": "./task"},
    )  # fmt: skip
    found = list(named(MergeConfiguration.model_validate(several)))
    assert found == [stats, "./task", "./a-stats", "./b-stats", stats]


def test_without_statistics_or_a_card_there_is_nothing(family: Path, tmp_path: Path) -> None:
    plain = config(family, merge_method="task_arithmetic", parameters={})
    out = run(mergekit_yaml, yaml.safe_dump(plain), tmp_path / "plain")
    assert not (out / FILE).exists()
    assert HEADING not in (out / "README.md").read_text()
    bare = yaml.safe_dump(config(family))
    out = run(mergekit_yaml, bare, tmp_path / "bare", "--no-write-model-card")
    assert {one.name for one in out.iterdir()} == {"config.json", "model.safetensors"}


def test_it_goes_with_the_merge_that_it_was_of(family: Path, tmp_path: Path) -> None:
    run(mergekit_yaml, yaml.safe_dump(config(family)), tmp_path)
    plain = config(family, merge_method="task_arithmetic", parameters={})
    out = run(mergekit_yaml, yaml.safe_dump(plain), tmp_path)
    assert not (out / FILE).exists()
    (out / FILE).write_text('{"mine": 1}')
    assert (run(mergekit_yaml, yaml.safe_dump(plain), tmp_path) / FILE).exists()


def test_every_stage_of_a_multi_merge(family: Path, tmp_path: Path) -> None:
    text = yaml.safe_dump({**config(family), "name": "first"}) + "---\n" + yaml.safe_dump(
        config(family, models=[{"model": "first", "parameters": {"weight": 1.0}}])
    )  # fmt: skip
    out = run(mergekit_multi, text, tmp_path, multi=True)
    assert (out / FILE).is_file()
    assert (tmp_path / "stages" / "first" / FILE).is_file()


def test_attaching_again_changes_nothing() -> None:
    before = merge.run_merge
    attach()
    assert merge.run_merge is before


def test_the_command_in_a_process_of_its_own(family: Path, tmp_path: Path) -> None:
    """mergekit imports its parts in an order that only a fresh process shows."""
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config(family)))
    hook = "from mergekit_arm.autoload import install; install(); "
    code = f"{hook}from mergekit.scripts.run_yaml import main; main()"
    words = [str(tmp_path / "config.yml"), str(tmp_path / "out"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / FILE).is_file()


def test_a_merged_model_is_never_taken_for_statistics(family: Path, tmp_path: Path) -> None:
    out = run(mergekit_yaml, yaml.safe_dump(config(family)), tmp_path)
    with pytest.raises(InputError, match="holds no statistics"):
        check_destination(out, force=True)
    with pytest.raises(InputError, match="this is a merged model; the statistics that it was"):
        open_statistics(str(out))
