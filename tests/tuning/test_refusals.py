"""What cannot work is refused before the first merge, in one line that names the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_arm.cli.main import cli
from mergekit_arm.errors import Failure, InputError
from mergekit_arm.tuning import TuneOptions, tune
from mergekit_arm.tuning.tune import plan_tuning
from tests.support.tuning import config, write_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder)
    measure(folder / "base", folder / "stats")
    return folder


def changed(family: Path, place: str, value: Any) -> dict[str, Any]:
    document = config(family, {"trials": 2})
    *above, last = place.split(".")
    node: Any = document
    for key in above:
        node = node[int(key) if key.isdigit() else key]
    node[last] = value
    return document


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("tuning", None, "there is no section tuning"),
        ("tuning.evaluation", {}, "tuning.evaluation: must be named sets"),
        ("tuning.trails", 3, "tuning: unknown key 'trails' (did you mean 'trials'?)"),
        ("tuning.trials", 0, "tuning: trials: input should be greater than"),
        ("tuning.timeout", "soon", "'soon' is no duration"),
        ("tuning.timeout", -5, "tuning: timeout: input should be greater than 0"),
        ("tokenizer_sorce", "base", "no key 'tokenizer_sorce' here (did you mean 'tokenizer_so"),
        ("models.0.wieght", 1, "models[0]: mergekit knows no key 'wieght' here"),
        ("tuning.objective", "pareto", "pareto needs two evaluation sets"),
        ("tuning.sampler", "bayes", "tuning: sampler: input should be"),
        ("tuning.evaluation.one.dataset", "./no.jsonl", "tuning.evaluation.one: "),
        ("tuning.evaluation.one.at_most", 0.1, "at_most is for streams"),
        ("merge_method", "tise", "no method 'tise' (did you mean 'ties'?)"),
        ("merge_method", {"tune": []}, "merge_method: must be a name"),
        ("models.0.parameters.weigth", 1, "has no 'weigth' (did you mean 'weight'?)"),
        ("models.0.parameters.weight", {"tune": []}, "tune is empty"),
        ("models.0.parameters.weight", 0.5, "nothing is to be tuned"),
        ("models.0.parameters.normalize", {"tune": [0.2, 0.7]}, "does not take 0.2 for normalize"),
        (
            "models.0.parameters.density",
            {"tune": [0.2, 1.5]},
            "takes for density, [0, 1]",
        ),
        ("models.0.model", "./nowhere", "nowhere"),
        ("base_model", None, "base"),
        ("dtype", {"tune": [1, 2]}, "dtype: mergekit takes no number here"),
    ],
)
def test_refused_before_anything_is_written(
    family: Path, tmp_path: Path, place: str, value: Any, said: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        tune(changed(family, place, value), out)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert not out.exists()


SOME = {"tune": [0.3, 1.0], "name": "w"}


@pytest.mark.parametrize(
    ("method", "own", "shared", "void"),
    [
        ("ties", (SOME, SOME), {}, True),
        ("aim_ties", (SOME, SOME), {}, True),
        ("ties", (None, None), {"weight": SOME}, True),
        ("task_arithmetic", (SOME, SOME), {"normalize": True}, True),
        ({"tune": ["ties", "aim_ties"]}, (SOME, SOME), {}, True),
        ({"tune": ["ties", "task_arithmetic"]}, (SOME, SOME), {}, False),
        ("ties", (SOME, SOME), {"normalize": False}, False),
        ("ties", (SOME, 0.5), {}, False),
        ("ties", ({"tune": [0.3, 1.0]}, {"tune": [0.3, 1.0]}), {}, False),
        ("task_arithmetic", (SOME, SOME), {}, False),
    ],
)
def test_a_weight_that_is_divided_by_itself(
    family: Path, tmp_path: Path, method: Any, own: Any, shared: dict[str, Any], void: bool
) -> None:
    """mergekit would try one weight after another, and each would be the same merge."""
    document = config(family, {"trials": 2}, merge_method=method)
    if "aim" in str(method):
        shared = {**shared, "activation_stats": str(family / "stats")}
    document["parameters"] = shared
    document["models"] = [
        {"model": str(family / name), "parameters": {"weight": weight} if weight else {}}
        for name, weight in zip("ab", own, strict=True)
    ]
    if not void:
        assert plan_tuning(document, tmp_path / "out")[0].quest.space.dimensions
        return
    with pytest.raises(InputError, match=r"divides weights by their sum.*normalize: false"):
        plan_tuning(document, tmp_path / "out")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"omega": {"tune": [0.0, 1.5]}}, "1.5 is outside what aim takes for omega, [0, 1]"),
        ({"omega": {"tune": [-1, 0.5]}}, "-1.0 is outside what aim takes for omega"),
        ({"omega": {"tune": [0.5, 2], "choice": True}}, "2 is outside what aim takes for omega"),
        ({"importance": {"tune": ["rms", "max"], "choice": True}}, "importance must be mean_abs"),
    ],
)
def test_ranges_outside_a_parameters_own(
    family: Path, tmp_path: Path, parameters: dict[str, Any], said: str
) -> None:
    document = config(family, {"trials": 2}, merge_method="aim")
    document["parameters"] = {"activation_stats": str(family / "stats"), **parameters}
    with pytest.raises(InputError, match=r"aim|importance") as caught:
        tune(document, tmp_path / "out")
    assert said in caught.value.message
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_link(family: Path, tmp_path: Path) -> None:
    """On a cluster it leads to the disk with the room; the search is the same by either name."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    document = config(family, {"trials": 1, "baseline": False})
    by_link = tune(document, tmp_path / "out", TuneOptions(model=False))
    trials = (tmp_path / "disk" / "trials.jsonl").read_bytes()
    again = tune(document, tmp_path / "disk", TuneOptions(model=False))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "trials.jsonl").read_bytes() == trials
    assert again.best == by_link.best
    (tmp_path / "lost").symlink_to("nowhere")
    with pytest.raises(InputError, match="lost is a link that leads nowhere"):
        tune(document, tmp_path / "lost")
    assert not (tmp_path / "nowhere").exists()


def test_statistics_of_another_model_are_refused_while_planning(
    family: Path, tmp_path: Path
) -> None:
    document = config(family, {"trials": 2}, merge_method="aim", base_model=str(family / "a"))
    document["models"] = document["models"][:1]
    document["models"][0]["model"] = str(family / "b")
    document["parameters"] = {"activation_stats": str(family / "stats")}
    with pytest.raises(InputError, match="stats"):
        tune(document, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_test_that_the_search_sees_is_none(family: Path, tmp_path: Path) -> None:
    document = config(family, {"test": {"x": {"dataset": str(family / "one.jsonl"), "seed": 3}}})
    with pytest.raises(InputError, match=r"test\.x is what tuning\.evaluation\.one searches on"):
        tune(document, tmp_path / "out")


def test_data_that_statistics_were_measured_on_is_said(
    family: Path, tmp_path: Path, token_file: Path
) -> None:
    sets = {"seen": {"dataset": str(token_file)}, "new": {"dataset": str(family / "one.jsonl")}}
    tuning = {"evaluation": sets, "trials": 1, "baseline": False}
    document = config(family, tuning, merge_method="aim")
    document["parameters"] = {"activation_stats": str(family / "stats")}
    notes: list[str] = []
    tune(document, tmp_path / "out", TuneOptions(model=False), say=notes.append)
    (note,) = [one for one in notes if "was measured on" in one]
    assert note.startswith(f"evaluation.seen is judged on {token_file}")


def test_a_directory_of_something_else_is_left_alone(family: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    for force in (False, True):
        with pytest.raises(InputError, match=r"holds no search \(but thesis\.tex\)"):
            tune(config(family, {}), tmp_path, TuneOptions(force=force))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file; name a directory for the search"):
        tune(config(family, {}), tmp_path / "thesis.tex")


def test_a_directory_that_mergekit_would_read_as_an_adapter_is_refused(
    family: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="adapter and revision"):
        tune(config(family, {}), tmp_path / "a+b")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_ends_the_search_at_the_base(family: Path, tmp_path: Path) -> None:
    sets = {"m": {"metric_command": "echo oops {model}", "goal": "minimize"}}
    with pytest.raises(Failure, match="last line is 'oops"):
        tune(config(family, {"evaluation": sets}), tmp_path / "out")


def test_trials_that_fail_in_a_row_end_the_search(family: Path, tmp_path: Path) -> None:
    """The command serves base and inputs, and no merge."""
    command = "case {model} in *.work.*) exit 3;; *) echo 1;; esac"
    sets = {"m": {"metric_command": command, "goal": "minimize"}}
    with pytest.raises(Failure, match="3 trials in a row failed, the last because: metric_command"):
        tune(config(family, {"evaluation": sets}), tmp_path / "out")
    assert not list((tmp_path / "out").glob(".work.*"))


def test_a_dry_run_says_what_would_be_and_writes_nothing(family: Path, tmp_path: Path) -> None:
    file = tmp_path / "tune.yml"
    document = config(family, {"trials": 7, "sampler": "random"})
    file.write_text(yaml.safe_dump(document))
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, ["tune", str(file), str(out), "--dry-run"])
    assert done.exit_code == 0, done.output
    for said in (
        "7 trials, random, seed 42",
        "weight of a",
        "[0, 1]",
        "baseline task arithmetic at 0.3, 0.5, 0.7, 1.0",
        "scored tokens for every model",
        "for 14 models",
        "disk",
        "nothing is wrong",
    ):
        assert said in done.output
    assert not out.exists()
    bad = yaml.safe_dump(changed(family, "merge_method", "tise"))
    file.write_text(bad)
    refused = CliRunner().invoke(cli, ["tune", str(file), str(out), "--dry-run"])
    assert refused.exit_code == 2
    file.write_text("merge_method: ties\nmerge_method: aim\n")
    refused = CliRunner().invoke(cli, ["tune", str(file), str(out)])
    assert refused.exit_code == 2
    assert "the key merge_method stands twice" in refused.output


def test_the_command_prints_every_trial_and_the_end(family: Path, tmp_path: Path) -> None:
    file = tmp_path / "tune.yml"
    test = {"held": {"dataset": str(family / "test.jsonl")}}
    file.write_text(yaml.safe_dump(config(family, {"test": test})))
    arguments = ["tune", str(file), str(tmp_path / "out"), "--trials", "2", "--no-model"]
    done = CliRunner().invoke(cli, [*arguments, "--no-baseline"])
    assert done.exit_code == 0, done.output
    for said in ("1/2  trial 0", "2/2  trial 1", "gain", "best", "Evaluation, on which",
                 "Test, on which nothing was searched", "best.yml"):  # fmt: skip
        assert said in done.output
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("options", "out", "said"),
    [
        (TuneOptions(seed=1 << 40), "out", "--seed: input should be less than"),
        (TuneOptions(model=False), "what?x=1", "cannot hold a ?; give another OUT"),
    ],
)
def test_what_is_said_beside_the_file_is_checked(
    family: Path, tmp_path: Path, options: TuneOptions, out: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        tune(config(family, {"trials": 1}), tmp_path / out, options)
    assert said in caught.value.message
    assert not (tmp_path / "what").exists()


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("models.1.parameters.density", 5, "density: 5 is outside [0, 1]"),
        ("models.0.parameters.lambda", {"tune": [0.5, 1.0]}, "reads lambda once for all models"),
        (
            "models.0.parameters.weight",
            [{"filter": "mpl", "value": {"tune": [0.0, 1.0]}}, {"value": 0.5}],
            "mpl",
        ),
    ],
)
def test_an_unknown_that_nothing_reads(
    family: Path, tmp_path: Path, place: str, value: Any, said: str
) -> None:
    """The command looks at its trials as ``check`` looks at a merge."""
    file, out = tmp_path / "tune.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump(changed(family, place, value)))
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(cli, ["tune", str(file), str(out), *more])
        assert done.exit_code == 2, done.output
        assert said in done.output
        assert not out.exists()
