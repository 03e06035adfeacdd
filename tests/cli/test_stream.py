"""``mergekit-arm stream`` as a command: the plan, the progress, the errors, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mergekit.options import MergeOptions

from mergekit_arm.cli.stream import command
from mergekit_arm.errors import InputError
from mergekit_arm.merging import room
from mergekit_arm.streaming import StreamOptions, stream
from mergekit_arm.streaming.config import load_config
from mergekit_arm.streaming.forecast import disk_needed, forecast_stream
from mergekit_arm.streaming.plan.plan import make_plan
from mergekit_arm.streaming.state import StepRecord
from tests.support import forks
from tests.support.models import perturbed
from tests.support.streams import config, digest, write_run, write_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    write_tokens(folder / "heldout.jsonl", 8)
    document = config(
        folder,
        merge_method="aim",
        parameters={"omega": 0.3},
        learning_rate={"schedule": "cosine", "peak": 0.6, "final": 0.1, "warmup": 1},
        calibration={"dataset": str(folder / "tokens.jsonl"), "samples": 4, "sequence_length": 24},
        evaluation={"dataset": str(folder / "heldout.jsonl")},
        dtype="bfloat16",
    )
    (folder / "stream.yml").write_text(yaml.safe_dump(document))
    return folder


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_a_dry_run_prints_the_plan_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    done = call(run / "stream.yml", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0, done.output
    for piece in ("checkpoint-10", "0.3", "0.6", "0.1", "time ", "disk ", "memory "):
        assert piece in done.output
    assert "nothing is wrong" in done.output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_everything_that_is_wrong(run: Path, tmp_path: Path) -> None:
    document = config(
        run,
        learning_rate=[0.5],
        parameters={"denstiy": 1},
        evaluation={"dataset": "nowhere.jsonl"},
    )
    file = tmp_path / "stream.yml"
    file.write_text(yaml.safe_dump({**document, "base_model": "./nowhere"}))
    done = call(file, tmp_path / "out", "--dry-run", "--keep", "best")
    assert done.exit_code == 2
    assert "'denstiy' (did you mean 'density'?)" in done.output
    assert "./nowhere: no such directory" in done.output
    file.write_text(yaml.safe_dump({**document, "parameters": {}}))
    done = call(file, tmp_path / "out", "--dry-run")
    assert "1 entries for 3 steps" in done.output
    assert "nowhere.jsonl: no such file" in done.output


def test_the_command_streams_and_tells_of_every_step(run: Path, tmp_path: Path) -> None:
    done = forks.run("mergekit-arm", "stream", run / "stream.yml", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for piece in ("step 1", "step 2", "step 3", "checkpoint-30"):
        assert piece in done.stderr
    assert "The stream has ended" in done.stdout
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_an_error_is_one_line(run: Path) -> None:
    done = call(run / "stream.yml", "/dev/null")
    assert done.exit_code == 2
    assert done.output.strip() == "Error: /dev/null is a file; name a directory for the stream"


@pytest.mark.parametrize("rest", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("out", ["/proc/out", "stream.yml/out"])
def test_an_out_that_cannot_be_made_is_one_line(run: Path, out: str, rest: Any) -> None:
    done = call(run / "stream.yml", run / out, *rest)
    assert done.exit_code == 2
    assert "give another OUT" in done.output.splitlines()[-1]


@pytest.mark.parametrize("option", ["--end-marker", "--watch-timeout", "--poll"])
def test_what_belongs_to_watch_is_refused_without_it(run: Path, option: str) -> None:
    done = call(run / "stream.yml", run / "out", option, "3")
    assert done.exit_code == 2
    assert done.output.strip() == f"Error: {option} belongs to --watch: add that"


def test_brackets_in_names_are_printed_as_they_are(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "run" / "checkpoint-10", "a[/b]")
    Path("stream.yml").write_text(yaml.safe_dump(config(run, checkpoints=["./a[/b]"])))
    assert "│ ./a[/b] " in call("stream.yml", "out[/i]", "--dry-run").output
    done = call("stream.yml", "out[/i]")
    assert done.exit_code == 0, done.output  # markup that closes nothing would be an error
    assert "step 1  ./a[/b]" in done.output


def test_every_option_of_mergekit_yaml_is_there() -> None:
    ours = {parameter.name for parameter in command.params}
    assert set(MergeOptions.model_fields) <= ours
    help_text = call("--help").output
    for option in ("--cuda", "--multi-gpu", "--lazy-unpickle", "--dry-run", "--watch"):
        assert option in help_text


def test_a_finished_stream_is_not_done_again(run: Path, tmp_path: Path) -> None:
    first = stream(run / "stream.yml", tmp_path / "out")
    before = digest(tmp_path / "out")
    told: list[Any] = []
    second = stream(run / "stream.yml", tmp_path / "out", on_step=told.append)
    assert not told
    assert second == first
    assert digest(tmp_path / "out") == before
    done = call(run / "stream.yml", tmp_path / "out", "--dry-run")
    assert "3 (done)" in done.output


@pytest.mark.parametrize("keep", ["last", "all"])
def test_nothing_but_a_streams_own_is_deleted(run: Path, tmp_path: Path, keep: Any) -> None:
    """Neither of a finished stream nor of one that goes on, whatever the second call keeps."""
    out = tmp_path / "out"

    class Stopped(Exception):
        pass

    def stop(record: StepRecord) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        stream(run / "stream.yml", out, StreamOptions(keep=keep), on_step=stop)
    others = (".git/HEAD", ".env", ".cache/x", ".README.md.swp", "steps/.hidden", "steps/001/.note")
    for name in others:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    left = (
        ".stream_state.json.a1b2c3d4",
        ".removed.abcdefgh/model/x",
        "steps/002/.model.partial/x",
    )
    for name in left:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("half-written")
    stream(run / "stream.yml", out, StreamOptions(keep=keep))
    assert [name for name in others if not (out / name).is_file()] == []
    assert [name for name in left if (out / name).exists()] == []
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    stream(run / "stream.yml", out)  # finished, and without --keep all
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    if keep == "all":
        assert len(list(out.glob("steps/*/model/model.safetensors"))) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.7}, "learning_rate of step 1 was 0.3 and is now 0.7"),
        ({"parameters": {"omega": 0.4}}, 'parameters was {"omega": 0.3} and is now {"omega": 0.4}'),
        ({"chat_template": "chatml"}, "chat_template was not set and is now"),
        ("a checkpoint's weights", "content of checkpoint-20 was"),
        ("a checkpoint more", "(a schedule without steps: N stretches over all checkpoints)"),
        ("the base's weights", "base_model's content was"),
    ],
)
def test_a_changed_stream_is_refused_and_the_difference_named(
    run: Path, tmp_path: Path, change: Any, said: str
) -> None:
    scene = tmp_path / "scene"
    shutil.copytree(run, scene)
    document = yaml.safe_load((run / "stream.yml").read_text().replace(str(run), str(scene)))
    stream(document, tmp_path / "out")
    models = write_run(tmp_path / "others")
    if isinstance(change, dict):
        document = {k: v for k, v in {**document, **change}.items() if v is not None}
    elif change == "a checkpoint's weights":
        perturbed(models[2], 77).save_pretrained(scene / "run" / "checkpoint-20")
    elif change == "a checkpoint more":
        models[1].save_pretrained(scene / "run" / "checkpoint-40")
    else:
        models[1].save_pretrained(scene / "base")
    before = digest(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        stream(document, tmp_path / "out")
    assert "holds another stream" in caught.value.message
    assert said in caught.value.message
    assert digest(tmp_path / "out") == before


def test_two_processes_cannot_share_a_stream(run: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(InputError, match="another process"):
        stream(run / "stream.yml", tmp_path / "out")


def test_a_damaged_state_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    state = tmp_path / "out" / "stream_state.json"
    for text, said in (("{", "damaged"), ('{"format_version": 99}', "format 99")):
        state.write_text(text)
        with pytest.raises(InputError, match=said):
            stream(run / "stream.yml", tmp_path / "out")


def test_the_disk_that_was_forecast_is_the_disk_that_is_used(run: Path, tmp_path: Path) -> None:
    plan, problems = make_plan(load_config(run / "stream.yml"), MergeOptions())
    assert plan is not None
    assert not problems
    peak = 0

    def weigh(_: Any) -> None:
        nonlocal peak
        files = (tmp_path / "out").rglob("model*.safetensors")
        peak = max(peak, sum(f.stat().st_size for f in files if "statistics" not in str(f)))

    stream(run / "stream.yml", tmp_path / "out", on_step=weigh)
    assert peak <= disk_needed(plan, "last")
    assert disk_needed(plan, "all") == plan.base.parameters * (3 * 4 + 2)
    needs = forecast_stream(
        load_config(run / "stream.yml"), tmp_path / "new", StreamOptions()
    ).needs
    assert needs is not None
    assert needs.disk == disk_needed(plan, "last")
    assert needs.memory > plan.base.parameters * 4


def test_the_time_left_is_that_of_the_steps_done(run: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop_after_two(record: StepRecord) -> None:
        if record.step == 2:
            raise Enough

    settings = load_config(run / "stream.yml")
    assert forecast_stream(settings, tmp_path / "out", StreamOptions()).seconds is None
    with pytest.raises(Enough):
        stream(settings, tmp_path / "out", on_step=stop_after_two)
    state_file = tmp_path / "out" / "stream_state.json"
    state = json.loads(state_file.read_text())
    for record, seconds in zip(state["steps"], (100.0, 500.0), strict=True):
        record["seconds"] = {"merge": seconds - 1, "evaluate": 1.0}
    state_file.write_text(json.dumps(state))
    assert (
        forecast_stream(settings, tmp_path / "out", StreamOptions()).seconds == 300.0
    )  # one step more
    assert "about 5 min more" in call(run / "stream.yml", tmp_path / "out", "--dry-run").output


def test_too_small_a_disk_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = make_plan(load_config(run / "stream.yml"), MergeOptions())
    assert plan is not None
    needed = disk_needed(plan, "last")
    monkeypatch.setattr(room, "free_disk", lambda path: needed - 1)
    with pytest.raises(InputError, match="of disk"):
        stream(run / "stream.yml", tmp_path / "out")
    (problem,) = forecast_stream(run / "stream.yml", tmp_path / "out").problems
    assert "of disk" in problem
    monkeypatch.setattr(room, "free_disk", lambda path: needed)
    assert not forecast_stream(run / "stream.yml", tmp_path / "new").problems


def test_best_needs_an_evaluation(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without evaluation no step is the best"):
        stream(config(run), tmp_path / "out", StreamOptions(keep="best"))


def test_keep_is_one_of_three(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'last'"):
        stream(config(run), tmp_path / "out", StreamOptions(keep="lst"))  # type: ignore[arg-type]


def test_the_journal_is_one_line_a_step(run: Path, tmp_path: Path) -> None:
    stream(run / "stream.yml", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/stream.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {"learning_rate", "calibration_tokens", "rotation_degrees", "update_norm"} <= set(
            line
        )
        assert {"current", "base", "merged", "tried", "seconds", "bytes"} <= set(line)
        assert line["bytes"] > 4 * 20_000
        assert sum(line["seconds"].values()) > 0
