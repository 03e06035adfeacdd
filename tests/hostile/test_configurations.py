"""YAML of merges, streams and searches: files that are none, and documents that cannot work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_arm.cli.main import cli
from tests.hostile.refusals import Result, assert_refused, run
from tests.support import merges, streams, tuning

Case = tuple[str, Any, tuple[str, ...]]

REMOVED = object()
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
"""A billion words in half a kilobyte."""

FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("nothing in it", b"", ("c.yml",)),
    ("no mapping", b"- a\n- b\n", ("c.yml", "must be a mapping")),
    ("a word", b"hello", ("c.yml", "must be a mapping")),
    ("an open bracket", b"merge_method: [", ("c.yml", "not YAML")),
    ("a tab", b"a:\n\t- b", ("c.yml", "not YAML")),
    ("a zero", b"merge_method: \x00", ("c.yml", "not YAML")),
    ("bytes", bytes(range(256)), ("c.yml", "not YAML")),
    ("UTF-16", "merge_method: ties".encode("utf-16"), ("c.yml", "not YAML")),
    ("a key twice", b"merge_method: arm\nmerge_method: ties\n", ("c.yml", "twice")),
    ("a Python object", b"a: !!python/object/apply:os.system [id]", ("c.yml", "not YAML")),
    ("no such date", b"merge_method: 2001-99-99", ("c.yml", "not YAML")),
    ("a number beyond counting", b"passes: " + b"9" * 5000, ("c.yml", "not YAML")),
    ("a mapping that is none", b"merge_method: !!map x", ("c.yml", "not YAML")),
    ("a list for a key", b"? [a, b]\n: c\n", ("c.yml", "not YAML")),
    ("a bottomless list", b"a: " + b"[" * 5000, ("c.yml", "not YAML")),
    ("an alias of nothing", b"a: *b", ("c.yml", "not YAML")),
    ("an alias of itself", b"merge_method: &a [*a]", ("c.yml", "not YAML", "aliases")),
    ("a billion words", LAUGHS.encode(), ("c.yml", "not YAML", "aliases")),
    ("a model's size", b"a: b\n" * 300_000, ("c.yml", "not YAML", "longer than")),
]
"""Refused by every command that reads a configuration."""

STREAMS: list[Case] = [
    ("chekpoints", "x", ("'chekpoints'", "did you mean 'checkpoints'")),
    ("models", [], ("models", "list them under checkpoints")),
    ("merge_method", "tise", ("'tise'", "did you mean 'ties'")),
    ("merge_method", 7, ("merge_method", "string")),
    ("merge_method", "linear", ("linear", "takes no base")),
    ("base_model", REMOVED, ("base_model", "required")),
    ("base_model", "./nowhere", ("./nowhere", "no such directory")),
    ("base_model", "./stats", ("stats", "no config.json")),
    ("base_model", "a+b+c", ("a+b+c",)),
    ("base_model", "", ("model", "no config.json")),
    ("checkpoints", REMOVED, ("checkpoints", "required")),
    ("checkpoints", "./nowhere", ("./nowhere", "no directory")),
    ("checkpoints", [], ("checkpoints", "list model references")),
    ("checkpoints", ["./a", 7], ("checkpoints",)),
    ("checkpoints", ["./nowhere"], ("./nowhere",)),
    ("checkpoints", ["./base"], ("./base", "is the base_model")),
    ("checkpoints", "./a", ("./a", "it is a model itself")),
    ("learning_rate", 0, ("learning_rate", "(0, 2]")),
    ("learning_rate", float("nan"), ("learning_rate", "(0, 2]")),
    ("learning_rate", 10**400, ("learning_rate", "(0, 2]")),
    ("learning_rate", [0.5, 0.5, 0.5, 0.5, 0.5], ("learning_rate has 5 entries", "one a step")),
    ("learning_rate", {"schedule": "cosin", "peak": 1}, ("learning_rate.schedule", "cosine")),
    ("learning_rate", {"search": "all"}, ("learning_rate", "must be a list such as")),
    ("passes", 0, ("passes", "greater than")),
    ("passes", "many", ("passes", "integer")),
    ("parameters", [1], ("parameters", "dictionary")),
    ("parameters", {"weight": 1}, ("set learning_rate",)),
    ("parameters", {"denstiy": 1}, ("denstiy",)),
    ("dtype", "float15", ("dtype", "did you mean 'float16'")),
    ("dtype", ["float16"], ("dtype", "string")),
    ("calibration", "x.jsonl", ("calibration", "must be a mapping")),
    ("calibration", {"sampels": 1}, ("'sampels'", "did you mean 'samples'")),
    ("evaluation", {}, ("evaluation", "needs a dataset")),
    ("evaluation", {"dataset": "./no.jsonl"}, ("evaluation", "no.jsonl", "no such file")),
    ("evaluation", {"dataset": 7}, ("evaluation",)),
    ("evaluation", {"metric_command": "true"}, ("evaluation", "metric_goal")),
    ("evaluation", {"dataset": "./base"}, ("evaluation", "./base", "this is a model")),
    ("tokenizer", {"sorce": "base"}, ("tokenizer", "did you mean 'source'")),
    ("chat_template", "chatmll", ("chatmll", "did you mean 'chatml'")),
    ("compare", {"angels": True}, ("'angels'", "did you mean 'angles'")),
]
"""A key, its value, and what the line says."""

SEARCHES: list[Case] = [
    ("tuning", REMOVED, ("no section tuning", "add tuning:")),
    ("tuning", 7, ("no section tuning", "add tuning:")),
    ("tuning.evaluation", {}, ("tuning.evaluation", "named sets")),
    ("tuning.evaluation", {"one": {}}, ("tuning.evaluation.one",)),
    ("tuning.evaluation", {7: {"dataset": "x"}}, ("tuning.evaluation",)),
    ("tuning.evaluation.one.dataset", "./no.jsonl", ("tuning.evaluation.one", "no such file")),
    ("tuning.evaluation.one.dataset", 7, ("tuning.evaluation.one", "dataset")),
    ("tuning.evaluation.one.weigth", 1, ("tuning.evaluation.one", "did you mean 'weight'")),
    ("tuning.trails", 3, ("'trails'", "did you mean 'trials'")),
    ("tuning.trials", 10**30, ("trials",)),
    ("tuning.timeout", "soon", ("soon", "write 90s")),
    ("tuning.timeout", [1], ("timeout",)),
    ("tuning.objective", "pareto", ("pareto", "two evaluation sets")),
    ("tuning.seed", -1, ("seed", "greater than")),
    ("tuning.seed", 10**30, ("seed",)),
    ("merge_method", "tise", ("'tise'", "did you mean 'ties'")),
    ("merge_method", 7, ("merge_method", "must be a name")),
    ("merge_method", {"tune": ["ties", "ties"]}, ("merge_method", "twice")),
    ("base_model", REMOVED, ("base",)),
    ("base_model", "./nowhere", ("./nowhere",)),
    ("models", REMOVED, ("nothing is to be tuned",)),
    ("models.0.model", "./nowhere", ("./nowhere",)),
    ("models.0.model", 7, ("model",)),
    ("models.0.parameters.weight", {"tune": []}, ("tune is empty", "[LOW, HIGH]")),
    ("models.0.parameters.weight", {"tune": [1, 0]}, ("is empty", "[LOW, HIGH]")),
    ("models.0.parameters.weight", {"tune": [0, float("inf")]}, ("is empty", "[LOW, HIGH]")),
    ("models.0.parameters.weight", {"tune": [0, 10**400]}, ("[LOW, HIGH]",)),
    ("models.0.parameters.weight", {"tune": [0, 1], "log": True}, ("above 0",)),
    ("models.0.parameters.weight", {"tune": ["a", "b"]}, ("no range", "choice: true")),
    ("models.0.parameters.weight", {"tune": [0, 1], "lgo": True}, ("did you mean 'log'",)),
    ("models.0.parameters.weigth", 1, ("weigth", "did you mean 'weight'")),
    ("dtype", {"tune": [1, 2]}, ("dtype", "no number here")),
    ("dtype", "float15", ("dtype",)),
]

MERGES: list[Case] = [
    ("merge_method", "aim_tise", ("aim_tise",)),
    ("merge_method", REMOVED, ("merge_method",)),
    ("base_model", REMOVED, ("merge_method", "requires a base")),
    ("models", REMOVED, ("models",)),
    ("models", [], ("models",)),
    ("models", "./a", ("models",)),
    ("models", [7], ("models",)),
    ("models.0.model", REMOVED, ("model",)),
    ("parameters.activation_stats", REMOVED, ("activation_stats",)),
    ("parameters.activation_stats", 7, ("activation_stats", "not 7", "calibrate")),
    ("parameters.activation_stats", "", ("activation_stats",)),
    ("parameters.omega", "much", ("omega", "much")),
    ("parameters.omega", 2, ("omega", "2")),
    ("parameters.omega", float("nan"), ("omega", "nan")),
    ("parameters.omega", [], ("omega",)),
    ("parameters.omega", [{"fliter": "mlp", "value": 1}], ("omega",)),
    ("parameters.importance", "max", ("importance", "mean_abs")),
    ("calibration", [1], ("calibration", "must hold mappings")),
    ("calibration", {"./stast": {}}, ("./stast", "did you mean './stats'")),
]
"""Refused by ``calibrate --config`` or, where the last words are no other, by ``check``."""


def command(name: str, file: str) -> list[str]:
    return {
        "stream": ["stream", file, "./out"],
        "tune": ["tune", file, "./out"],
        "calibrate": ["calibrate", "--config", file],
        "check": ["check", file],
    }[name]


def changed(document: dict[str, Any], place: str, value: Any) -> str:
    """Return the YAML in which the value at a dotted place is another."""
    document = copy.deepcopy(document)
    *above, last = place.split(".")
    node: Any = document
    for key in above:
        node = node[int(key) if key.isdigit() else key]
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
    return yaml.safe_dump(document)


def ids(cases: list[Case]) -> list[str]:
    return [f"{place}: {'-' if value is REMOVED else str(value)[:40]}" for place, value, _ in cases]


@pytest.mark.parametrize("name", ["stream", "tune", "calibrate", "check"])
@pytest.mark.parametrize(("_", "content", "said"), FILES, ids=[case[0] for case in FILES])
def test_files(_: str, content: bytes, said: tuple[str, ...], name: str, here: Path) -> None:
    (here / "c.yml").write_bytes(content)
    result = run(here, cli, *command(name, "c.yml"))
    if name == "check" and "Error: " not in result.output:
        assert_found(result, said)
    else:
        assert_refused(result, said)


def assert_found(result: Result, said: tuple[str, ...]) -> None:
    """``check`` lists what is wrong, each in a line that begins with the file's."""
    assert result.code == 2, result.output
    (*found, last) = result.output.splitlines()
    assert "errors" in last
    found = [line for line in found if ": error: " in line]
    assert any(all(part in line for part in said) for line in found), found
    assert not result.made


@pytest.mark.parametrize(("place", "value", "said"), STREAMS, ids=ids(STREAMS))
def test_streams(place: str, value: Any, said: tuple[str, ...], here: Path) -> None:
    document = streams.config(Path(), base_model="./base", checkpoints=["./a", "./b"])
    (here / "c.yml").write_text(changed(document, place, value))
    assert_refused(run(here, cli, *command("stream", "c.yml")), said)
    assert run(here, cli, *command("check", "c.yml")).code == 2


@pytest.mark.parametrize(("place", "value", "said"), SEARCHES, ids=ids(SEARCHES))
def test_searches(place: str, value: Any, said: tuple[str, ...], here: Path) -> None:
    document = tuning.config(here, {"evaluation": {"one": {"dataset": "./tokens.jsonl"}}})
    (here / "c.yml").write_text(changed(document, place, value))
    assert_refused(run(here, cli, *command("tune", "c.yml")), said)


@pytest.mark.parametrize(("place", "value", "said"), MERGES, ids=ids(MERGES))
def test_merges(place: str, value: Any, said: tuple[str, ...], here: Path) -> None:
    document = merges.config(Path("."))
    document["base_model"], document["models"][0]["model"] = "./base", "./a"
    document["parameters"]["activation_stats"] = "./stats"
    (here / "c.yml").write_text(changed(document, place, value))
    if place == "calibration":
        assert_refused(run(here, cli, *command("calibrate", "c.yml")), said)
    else:
        assert_found(run(here, cli, *command("check", "c.yml")), said)


def test_what_is_right_is_accepted(here: Path) -> None:
    """Otherwise the tables above would prove nothing."""
    stream = streams.config(Path(), base_model="./base", checkpoints=["./a", "./b"])
    search = tuning.config(here, {"evaluation": {"one": {"dataset": "./tokens.jsonl"}}})
    for document in (stream, search, merges.config(here)):
        (here / "c.yml").write_text(yaml.safe_dump(document))
        done = run(here, cli, *command("check", "c.yml"))
        assert done.code == 0, done.output
