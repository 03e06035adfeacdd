"""Every example is run as its first lines say, with tiny models under the names that it has."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.cli.main import cli
from mergekit_arm.imatrix.exporting import export_imatrix
from mergekit_arm.statistics.read import Statistics
from tests.support.models import perturbed, tiny_experts
from tests.support.paths import EXAMPLES
from tests.support.streams import write_run, write_tokens

PROGRAMS = {"mergekit-arm": cli, "mergekit-yaml": mergekit_yaml, "mergekit-multi": mergekit_multi}
CONFIGS = sorted(EXAMPLES.glob("*.yml"))
LM_EVAL = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1]) / "model"
folder.mkdir()
names = {{
    "arc_easy": "acc,none",
    "gsm8k": "exact_match,strict-match",
    "mbpp": "pass_at_1,none",
    "ifeval": "prompt_level_strict_acc,none",
}}
tasks = sys.argv[sys.argv.index("--tasks") + 1].split(",")
result = {{"results": {{task: {{names[task]: 0.5}} for task in tasks}}}}
(folder / "results_now.json").write_text(json.dumps(result))
"""
"""What lm-evaluation-harness leaves, as far as the examples read it."""
NO_GPU = {"--cuda"}
"""Flags that only a machine with a GPU takes."""


def commands(path: Path) -> list[list[str]]:
    """Return the commands in the comment that an example begins with."""
    head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert head, f"{path.name} begins with no comment"
    lines = re.findall(r"^#   (mergekit-.*)$", head[0], re.M)
    assert lines, f"{path.name} does not say how it is run"
    return [[word for word in shlex.split(line) if word not in NO_GPU] for line in lines]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    """A base, fine-tunes and a training run; the same of a mixture of experts."""
    folder = tmp_path_factory.mktemp("models")
    trained = write_run(folder, (10, 20))
    perturbed(trained[0], 8).save_pretrained(folder / "tuned-0")
    perturbed(trained[0], 9).save_pretrained(folder / "tuned-1")
    perturbed(trained[0], 10).save_pretrained(folder / "tuned-2")
    experts = tiny_experts(0)
    experts.save_pretrained(folder / "experts" / "base")
    for number in range(2):
        perturbed(experts, number).save_pretrained(folder / "experts" / f"tuned-{number}")
    measure(folder / "base", folder / "stats")
    export_imatrix(Statistics("stats", folder / "stats"), folder / "im.gguf")
    return folder


def names(value: object, key: str) -> list[str]:
    """Return every text under ``key``, anywhere in a document."""
    if isinstance(value, dict):
        own = [one for name, one in value.items() if name == key and isinstance(one, str)]
        return own + [text for one in value.values() for text in names(one, key)]
    return [text for one in value for text in names(one, key)] if isinstance(value, list) else []


def lay_out(path: Path, models: Path, here: Path) -> dict[str, str]:
    """Put everything that an example names where it looks; return Hub names → local ones."""
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    made = {one.get("name") for one in documents}
    source = models / "experts" if "expert" in path.name else models
    bases = list(dict.fromkeys(names(documents, "base_model")))
    inputs = dict.fromkeys(names(documents, "model"))
    others = [one for one in inputs if one not in {*bases, *made}]
    replaced = {}
    for name, folder in [(one, "base") for one in bases] + [
        (one, f"tuned-{number}") for number, one in enumerate(others)
    ]:
        local = name if name.startswith("./") else f"./{name.replace('/', '--')}"
        replaced[name] = local
        (here / local).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source / folder, here / local)
    for name in names(documents, "checkpoints"):
        shutil.copytree(models / "run", here / name)
    text = path.read_text(encoding="utf-8")
    for number, file in enumerate(sorted(set(re.findall(r"\./[\w-]+\.jsonl", text)))):
        write_tokens(here / file, number + 40)
    for file in set(re.findall(r"\./[\w.-]+\.gguf", text)):
        shutil.copy(models / "im.gguf", here / file)
    for name in re.findall(r"--dataset (\w[\w/-]+)", text):  # on the Hub
        replaced[name] = f"./{name.replace('/', '--')}"
        (here / replaced[name]).mkdir()
        write_tokens(here / replaced[name] / "validation.jsonl", 50)
    for name in names(documents, "activation_stats"):
        if not name.startswith("./"):  # on the Hub
            replaced[name] = f"./{name.replace('/', '--').partition('@')[0]}"
            shutil.copytree(models / "stats", here / replaced[name])
    return replaced


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs_as_it_says(
    path: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "lm_eval").write_text(LM_EVAL.format(python=sys.executable))
    (programs / "lm_eval").chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    replaced = lay_out(path, models, tmp_path)

    def local(text: str) -> str:
        for name, here in replaced.items():
            text = text.replace(name, here) if not name.startswith("./") else text
        return text

    example = tmp_path / "example_configs" / path.name
    example.parent.mkdir()
    text = local(path.read_text(encoding="utf-8")).replace(
        "trials: 40", "trials: 1\n  baseline: false"
    )
    example.write_text(text)
    data = tmp_path / "default.jsonl"
    write_tokens(data, 60)
    for program, *arguments in commands(path):
        words = [local(word) for word in arguments]
        if words[0] == "calibrate" and "--config" not in words and "--dataset" not in words:
            words += ["--dataset", str(data)]
        command: click.Command = PROGRAMS[program]
        if "--watch" in words:
            (tmp_path / yaml.safe_load(text)["checkpoints"] / "stream.end").touch()
        done = CliRunner().invoke(command, words)
        assert done.exit_code == 0, f"{program} {words}: {done.output} {done.exception!r}"
    (result,) = [one for one in ("merged", "streamed/model", "tuned/model") if Path(one).is_dir()]
    merged = Path(result)
    assert list(merged.glob("*.safetensors"))
    assert json.loads((merged / "config.json").read_text())["num_hidden_layers"] == 2
