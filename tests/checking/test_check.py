"""What is wrong with a configuration is found, and named with its line and its remedy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mergekit_arm.checking.check import Checked, check
from mergekit_arm.cli.check import command
from tests.support.models import tiny_llama
from tests.support.paths import EXAMPLES

GOOD = """\
merge_method: aim_ties
base_model: ./base
models:
  - model: ./a
    parameters: {weight: 1.0, density: 0.5}
  - model: ./b
    parameters:
      weight: [{filter: mlp, value: 0.3}, {value: 0.5}]
      density: [0.2, 0.8]
parameters:
  activation_stats: ./stats
  omega: 0.4
dtype: float32
"""
STREAM = """\
merge_method: arm
base_model: ./base
checkpoints: [./a, ./b]
calibration: {dataset: ./tokens.jsonl}
"""


@pytest.fixture
def here(family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the family's models and statistics."""
    for name in ("base", "a", "b", "stats"):
        (tmp_path / name).symlink_to(family / name)
    (tmp_path / "tokens.jsonl").symlink_to(token_file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def checked(text: str) -> Checked:
    Path("merge.yml").write_text(text)
    return check("merge.yml")


def lines(text: str) -> list[str]:
    return [str(one) for one in checked(text).findings if one.severity == "error"]


def test_a_good_configuration_has_no_errors_and_tells_what_it_takes(here: Path) -> None:
    found = checked(GOOD)
    assert found.accepted
    assert [one.message for one in found.findings] == [
        "has no tokenizer, so that the merged model gets none"
    ]
    (room,) = found.rooms
    size = (here / "base" / "model.safetensors").stat().st_size
    assert 0.8 * size < room.disk < size  # the file has a header
    assert room.memory > room.disk


CASES: dict[str, tuple[str, str, str]] = {
    "key": (
        "dtype: float32",
        "dtpye: float32",
        ("merge.yml:13: error: dtpye: nothing reads this key (did you mean 'dtype'?)"),
    ),
    "flag": (
        "dtype: float32",
        "random_seed: 3",
        (
            "merge.yml:13: error: random_seed: nothing reads "
            "this key: it is an option of mergekit-yaml, --random-seed"
        ),
    ),
    "flag under parameters": (
        "omega: 0.4",
        "random_seed: 3",
        (
            "merge.yml:12: error: "
            "parameters.random_seed: aim_ties has no parameter 'random_seed': "
            "it is an option"
        ),
    ),
    "key of a model": (
        "- model: ./a",
        "- model: ./a\n    weight: 1",
        ("merge.yml:5: error: models[0].weight: nothing reads this key"),
    ),
    "top-level key under parameters": (
        "omega: 0.4",
        "dtype: float32",
        (
            "merge.yml:12: error: "
            "parameters.dtype: aim_ties has no parameter 'dtype': it "
            "belongs at the top level"
        ),
    ),
    "parameter": (
        "omega: 0.4",
        "omgea: 0.4",
        (
            "merge.yml:12: error: parameters.omgea: aim_ties has "
            "no parameter 'omgea' (did you mean 'omega'?)"
        ),
    ),
    "parameter under a model": (
        "weight: 1.0,",
        "omega: 1.0, weight: 1.0,",
        ("merge.yml:5: error: models[0].parameters.omega: aim_ties reads omega once"),
    ),
    "statistics under a model": (
        "weight: 1.0,",
        "activation_stats: ./stats, weight: 1,",
        "models[0].parameters.activation_stats: aim_ties reads",
    ),
    "base's weight": (
        "- model: ./a",
        "- model: ./base",
        (
            "merge.yml:5: error: models[0].parameters."
            "weight: aim_ties reads weight of every model but the base"
        ),
    ),
    "twice": (
        "dtype: float32",
        "dtype: float32\ndtype: bfloat16",
        ("merge.yml:14: error: dtype: stands twice, first on line 13"),
    ),
    "method": (
        "aim_ties",
        "dare-ties",
        ("merge.yml:1: error: merge_method: no method 'dare-ties' (did you mean 'dare_ties'?)"),
    ),
    "method of ours": (
        "aim_ties",
        "aim_tise",
        ("merge_method: no method 'aim_tise' (did you mean 'aim_ties'?)"),
    ),
    "filter": (
        "filter: mlp",
        "filter: mpl",
        (
            "merge.yml:8: error: models[1].parameters.weight[0]: "
            "filter 'mpl' matches no tensor (did you mean 'mlp'?)"
        ),
    ),
    "filter too late": (
        "{filter: mlp, value: 0.3}, {value: 0.5}",
        "{value: 0.5}, {filter: mlp, value: 0.3}",
        "models[1].parameters.weight[1]: is never reached",
    ),
    "setting": (
        "weight: 1.0,",
        "weight: {filter: mlp},",
        ("merge.yml:5: error: models[0].parameters.weight: must be a number"),
    ),
    "range": ("omega: 0.4", "omega: 1.4", "merge.yml:12: error: parameters.omega: omega must lie"),
    "a share above 1": (
        "density: 0.5",
        "density: 5",
        "merge.yml:5: error: models[0].parameters.density: 5 is outside [0, 1]",
    ),
    "a share below 0, in a gradient": ("[0.2, 0.8]", "[-0.2, 0.8]", "-0.2 is outside [0, 1]"),
    "no number": ("density: 0.5", "density: half", "models[0].parameters.density: "),
    "no statistics": (
        "./stats",
        "./state",
        (
            "merge.yml:11: error: parameters.activation_stats: "
            "activation_stats ./state: no such directory"
        ),
    ),
    "other statistics": (
        "base_model: ./base",
        "base_model: ./a",
        ("merge.yml:11: error: parameters.activation_stats: "),
    ),
    "absent model": (
        "- model: ./b",
        "- model: ./c",
        ("merge.yml:6: error: models[1].model: model ./c: no such directory"),
    ),
    "model on the Hub, offline": (
        "- model: ./b",
        "- model: org/c",
        ("models[1].model: model org/c: neither a directory here nor reachable on the Hub"),
    ),
    "name that the Hub has, offline": ("- model: ./b", "- model: b", "write ./b"),
    "same model twice": ("- model: ./b", "- model: ./a", "Duplicate merge inputs"),
    "dtype": (
        "dtype: float32",
        "dtype: bf16",
        ("merge.yml:13: error: dtype: 'bf16' is none of bfloat16"),
    ),
    "chat template": (
        "dtype: float32",
        "chat_template: chatlm",
        ("merge.yml:13: error: chat_template: mergekit has no 'chatlm' (did you mean 'chatml'?)"),
    ),
    "no tokenizer to build": (
        "dtype: float32",
        "tokenizer: {source: base}",
        ("merge.yml:13: error: tokenizer: mergekit cannot build the tokenizer"),
    ),
    "two kinds of inputs": ("dtype: float32", "slices: []\nmodules: {}", ""),
    "nothing": (
        "models:",
        "modeles:",
        ("merge.yml:3: error: modeles: nothing reads this key (did you mean 'models'?)"),
    ),
    "weights that add up to 0": ("aim_ties", "aim_linear", "parameters.density: aim_linear has no"),
    "calibration": (
        "dtype: float32",
        "calibration: {./stats: {datset: x}}",
        ("merge.yml:13: error: calibration../stats"),
    ),
}


@pytest.mark.parametrize(("old", "new", "said"), CASES.values(), ids=CASES)
def test_it_is_named(here: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    found = lines(GOOD.replace(old, new))
    if said:
        assert any(said in line for line in found), found
    else:
        assert not found


def test_nan_is_found_without_weights(here: Path) -> None:
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"  - {{model: ./{name}, parameters: {{weight: {weight}}}}}\n"
        for name, weight in (("a", 1), ("b", -1))
    )
    (line,) = lines(text)
    assert "linear makes NaN or infinity" in line
    assert not lines(text.replace("-1", "1"))


def test_shapes_and_layers(here: Path) -> None:
    tiny_llama(0, layers=1).save_pretrained(here / "short")
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ./a}, {model: ./short}]"
    assert lines(text)
    slices = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: ./a, layer_range: {one}}}]\n" for one in ("[0, 2]", "[1, END]")
    )
    assert not lines(slices.replace("END", "2"))
    assert any(
        "model ./a has no tensor model.layers.2" in one for one in lines(slices.replace("END", "3"))
    )
    assert any("is no range of layers" in one for one in lines(slices.replace("END", "1")))


def test_an_overruled_value_is_noted(here: Path) -> None:
    found = checked(GOOD.replace("  omega: 0.4", "  omega: 0.4\n  weight: 0.7"))
    assert found.accepted
    (note,) = [one for one in found.findings if one.thing == "parameters.weight"]
    assert str(note) == (
        "merge.yml:13: note: parameters.weight: has no effect: every model has a value of its own"
    )


def test_several_documents(here: Path) -> None:
    first = GOOD + "name: first\n"
    second = "merge_method: linear\nmodels: [{model: first}, {model: ./a}]\nparameters: {weight: 1}"
    found = checked(f"{first}---\n{second}\n")
    assert found.accepted, [str(one) for one in found.findings]
    assert any("is made by another document" in one.message for one in found.findings)
    circle = first.replace("./b", "second") + f"---\nname: second\n{second}\n"
    needed = [one for one in lines(circle) if "needs what needs it (first → second → first)" in one]
    assert [one.partition(" error: ")[0] for one in needed] == ["merge.yml:14:", "merge.yml:16:"]
    (spoilt,) = lines(f"{first}---\nname: linear\n{second}\n")
    assert "merge_method: linear is the name of a document too" in spoilt
    wrong = checked(f"{first}---\n{second.replace('weight', 'wieght')}\n")
    (line,) = [one for one in wrong.findings if one.severity == "error"]
    assert (line.line, line.thing) == (18, "parameters.wieght")


def test_anchors_and_merge_keys(here: Path) -> None:
    text = (
        "merge_method: ties\nbase_model: ./base\nmodels:\n  - model: ./a\n    parameters: &own\n"
        "      weight: 1.0\n      densty: 0.5\n  - model: ./b\n    parameters:\n      <<: *own\n"
        "      weight: 0.5\n"
    )
    found = [one for one in checked(text).findings if one.severity == "error"]
    assert [(one.line, one.thing) for one in found] == [
        (7, "models[0].parameters.densty"),
        (7, "models[1].parameters.densty"),
    ]


def test_streams_are_checked_as_streams(here: Path) -> None:
    found = checked(STREAM)
    assert found.accepted, [str(one) for one in found.findings]
    assert len(found.rooms) == 1
    (line,) = lines(STREAM + "learning_rat: 0.5\n")
    assert line.startswith("merge.yml:5: error: learning_rat: ")
    (line,) = lines(STREAM + "evaluation: {dataset: ./absent.jsonl}\n")
    assert line.startswith("merge.yml:5: error: evaluation: ")


def test_a_stream_without_checkpoints(here: Path) -> None:
    """It is told as a stream, and the rest of it is checked all the same."""
    fed = STREAM.replace("checkpoints: [./a, ./b]\n", "evaluation: {dataset: ./tokens.jsonl}\n")
    (line,) = lines(fed)
    assert "there are no checkpoints: name a run's directory" in line
    (_, line) = lines(fed + "learning_rate: {schedule: cosine, peak: 1.0}\n")
    assert "steps" in line


TUNING = """\
merge_method: ties
base_model: ./base
models:
  - model: ./a
    parameters: {weight: {tune: [0.2, 1.2]}, density: 0.5}
  - model: ./b
    parameters:
      weight: 0.4
      density: {tune: [0.2, 0.5, 0.8], choice: true}
tuning:
  trials: 3
  evaluation:
    held: {dataset: ./tokens.jsonl}
"""


def test_a_search_is_checked_as_a_search(here: Path) -> None:
    (here / "merge.yml").write_text(TUNING)
    done = run("merge.yml")
    assert done.exit_code == 0, done.output
    assert not list(here.glob(".*"))


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("trials: 3", "trails: 3", 11, "unknown key 'trails' (did you mean 'trials'?)"),
        ("dataset: ./tokens", "datset: ./tokens", 13, "either a dataset or"),
        ("[0.2, 1.2]", "[1.2, 0.2]", 5, "[1.2, 0.2]"),
        ("trials: 3", "trials: -3", 11, "greater than"),
        ("./tokens.jsonl", "./absent.jsonl", 13, "no such file"),
        ("- model: ./b", "- model: ./absent", 6, "./absent: no such directory"),
        ("density: 0.5}", "density: 5}", 5, "5 is outside [0, 1]"),
        ("weight: 0.4", "weight: [{filter: mpl, value: {tune: [0, 1]}}, {value: 0.4}]", 8, "mpl"),
        ("base_model: ./base", "base_model: ./base\ndtpye: float32", 3, "no key 'dtpye'"),
    ],
)
def test_mistakes_in_a_search(here: Path, old: str, new: str, line: int, said: str) -> None:
    assert old in TUNING
    (here / "merge.yml").write_text(TUNING.replace(old, new))
    done = run("merge.yml", "--json")
    assert done.exit_code == 2
    (error,) = [one for one in json.loads(done.stdout)["findings"] if one["severity"] == "error"]
    assert said in error["message"]
    assert error["line"] == line, error


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "merge.yml:1: not YAML"), ("", "it is empty"), ("- a\n", "must be a mapping")],
)
def test_what_is_no_configuration(here: Path, text: str, said: str) -> None:
    (here / "merge.yml").write_text(text)
    done = run("merge.yml")
    assert done.exit_code == 2
    assert said in done.output


def test_status_and_json(here: Path) -> None:
    (here / "merge.yml").write_text(GOOD)
    assert run("merge.yml").exit_code == 0
    assert run("absent.yml").exit_code == 2
    (here / "merge.yml").write_text(GOOD.replace("omega", "omgea"))
    done = run("merge.yml", "--json")
    assert done.exit_code == 2
    document = json.loads(done.stdout)
    assert not document["accepted"]
    (error,) = [one for one in document["findings"] if one["severity"] == "error"]
    assert (error["file"], error["line"], error["thing"]) == ("merge.yml", 12, "parameters.omgea")
    assert not list(here.glob(".*"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yml")), ids=lambda path: path.stem)
def test_examples_lack_nothing_but_their_models(here: Path, path: Path) -> None:
    for one in check(path).findings:
        absent = "neither a directory here nor" in one.message or "no such directory" in one.message
        absent |= "is no directory" in one.message
        assert one.severity == "note" or absent, str(one)


def test_no_weight_is_read(here: Path, family: Path) -> None:
    huge = here / "huge"
    huge.mkdir()
    (huge / "config.json").write_bytes((family / "a" / "config.json").read_bytes())
    source = (family / "a" / "model.safetensors").read_bytes()
    length = int.from_bytes(source[:8], "little")
    # Values of no size in memory: a hole of the right length behind the header.
    with (huge / "model.safetensors").open("wb") as file:
        file.write(source[: 8 + length])
        file.truncate(len(source))
    assert not lines(GOOD.replace("- model: ./b", "- model: ./huge"))


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from mergekit_arm.cli.main import cli\n"
        "cli.main(['check', '--help'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'mergekit' not in sys.modules"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
    assert time.perf_counter() - began < 5  # half a second on a quiet machine
