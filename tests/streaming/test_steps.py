"""A stream's arithmetic, and what it leaves on the disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_arm.merging.movement import compare
from mergekit_arm.statistics.locate import read_metadata
from mergekit_arm.streaming import StreamOptions, stream
from tests.support.models import perturbed, tiny_llama
from tests.support.streams import add_tokenizer, config, weights, write_run, write_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


def recurrence(run: Path, rates: list[float], numbers: list[int]) -> dict[str, torch.Tensor]:
    """W ← W + η (W_c − W) in float64, over the files' tensors."""
    current = {name: tensor.double() for name, tensor in weights(run / "base").items()}
    for rate, number in zip(rates, numbers, strict=True):
        incoming = weights(run / "run" / f"checkpoint-{number}")
        current = {n: w + rate * (incoming[n].double() - w) for n, w in current.items()}
    return current


def assert_float32_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        # A few roundings to float32, one or two a step, of values below the largest.
        bound = 8 * torch.finfo(torch.float32).eps * expected[name].abs().max()
        assert (tensor.double() - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize(
    ("method", "neutral"),
    [
        ("task_arithmetic", None),
        ("ties", None),
        ("aim", {"omega": 1.0}),
        ("arm", {"rotation": 0}),
        ("aim_arm", {"rotation": 0, "omega": 1}),
    ],
)
def test_one_pass_is_the_recurrence(
    run: Path, tmp_path: Path, method: str, neutral: dict[str, float] | None
) -> None:
    changes: dict[str, Any] = {"merge_method": method, "parameters": neutral}
    if neutral:
        changes["calibration"] = {"dataset": str(run / "tokens.jsonl")}
    result = stream(config(run, **changes), tmp_path / "out")
    assert_float32_equal(weights(result.model), recurrence(run, [0.5] * 3, [10, 20, 30]))


def test_rates_and_passes_follow_the_plan(run: Path, tmp_path: Path) -> None:
    rates = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    result = stream(config(run, learning_rate=rates, passes=2), tmp_path / "out")
    assert [record.learning_rate for record in result.steps] == rates
    assert [record.passed for record in result.steps] == [1, 1, 1, 2, 2, 2]
    assert_float32_equal(weights(result.model), recurrence(run, rates, [10, 20, 30] * 2))


def test_the_running_model_is_never_rounded(run: Path, tmp_path: Path) -> None:
    result = stream(config(run, dtype="bfloat16", learning_rate=0.1), tmp_path / "out")
    exact = recurrence(run, [0.1] * 3, [10, 20, 30])
    for name, tensor in weights(result.model).items():
        # Half a unit in the last of eight bits: one rounding, not three.
        difference = (tensor.double() - exact[name]).abs()
        assert (difference <= exact[name].abs() * 2**-8 * 1.001).all()
    assert json.loads((result.model / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_list_of_references_is_merged_in_its_order(run: Path, tmp_path: Path) -> None:
    references = [str(run / "run" / f"checkpoint-{n}") for n in (30, 10)]
    result = stream(config(run, checkpoints=references), tmp_path / "out")
    assert_float32_equal(weights(result.model), recurrence(run, [0.5, 0.5], [30, 10]))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        # Random, so that the seed matters too; with a gradient over the layers.
        ("aim_dare_ties", {"density": 0.5, "omega": [0.2, 0.6]}),
        ("arm", {"rotation": [{"filter": "mlp", "value": [-0.4, -0.8]}, {"value": -0.2}]}),
        ("arm", {"alignment": 0.5, "energy": 0.8}),  # the checkpoints are measured as well
        ("slerp", None),
        ("nearswap", {"t": 0.01}),  # no learning rate
    ],
)
def test_every_step_can_be_repeated_with_mergekit_yaml(
    run: Path, tmp_path: Path, method: str, parameters: dict[str, Any] | None
) -> None:
    document = config(
        run,
        merge_method=method,
        parameters=parameters,
        learning_rate=None if method == "nearswap" else 0.4,
        calibration={"dataset": str(run / "tokens.jsonl"), "refresh": 2},
    )
    out = tmp_path / "out"
    stream(document, out, StreamOptions(keep="all"))
    for step in (1, 2, 3):
        folder = out / "steps" / f"{step:03d}"
        command = next(
            line.removeprefix("# By hand: mergekit-yaml ")
            for line in (folder / "config.yml").read_text().splitlines()
            if "By hand" in line
        )
        again = tmp_path / f"again-{step}"
        words = [str(again) if word == "OUT" else word for word in command.split()]
        done = CliRunner().invoke(mergekit_yaml, [*words, "--quiet"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        by_hand, kept = (load_file(p / "model.safetensors") for p in (again, folder / "model"))
        assert all(torch.equal(by_hand[name], kept[name]) for name in kept)


def test_refresh_says_when_the_model_is_measured(run: Path, tmp_path: Path) -> None:
    for refresh, measured in (("once", [1, 1, 1, 1]), ("every", [1, 2, 3, 4]), (3, [1, 1, 1, 4])):
        document = config(
            run,
            merge_method="aim",
            checkpoints=[str(run / "run" / f"checkpoint-{n}") for n in (10, 20, 30, 10)],
            calibration={"dataset": str(run / "tokens.jsonl"), "refresh": refresh},
        )
        result = stream(document, tmp_path / str(refresh), StreamOptions(keep="all"))
        assert [record.statistics_from for record in result.steps] == measured
        tokens = [record.calibration_tokens for record in result.steps]
        assert tokens == [192 if m == s else 0 for s, m in enumerate(measured, start=1)]
    assert [path.parent.name for path in tmp_path.glob("once/steps/*/statistics")] == ["001"]


def test_statistics_of_an_earlier_model_say_so_and_stay_as_they_were(
    run: Path, tmp_path: Path
) -> None:
    settings = {"dataset": str(run / "tokens.jsonl"), "refresh": 2}
    out = tmp_path / "out"
    stream(config(run, merge_method="arm", calibration=settings), out, StreamOptions(keep="all"))
    measured = {}
    for step, parent in ((1, 1), (2, 1), (3, 3)):
        folder = out / "steps" / f"{step:03d}"
        document = yaml.safe_load((folder / "config.yml").read_text())["parameters"]
        assert document["activation_stats"] == str(out / f"steps/00{parent}/statistics")
        facts = json.loads((folder / "statistics.json").read_text())
        assert facts["measured_on"] == f"step {parent - 1}"
        measured[step] = facts["model"]["content_hash"]
        assert document.get("measured_on") == (measured[parent] if step != parent else None)
    own = read_metadata("third", out / "steps/003/statistics").model
    assert own.reference == str(out / "steps/002/model")
    assert measured[3] == own.content_hash != measured[1]


def test_what_a_step_reports_is_what_its_models_say(run: Path, tmp_path: Path) -> None:
    document = config(run, merge_method="aim", calibration={"dataset": str(run / "tokens.jsonl")})
    out = tmp_path / "out"
    result = stream(document, out, StreamOptions(keep="all"))
    before, goal, after = (
        {n: t.double() for n, t in weights(path).items()}
        for path in (
            out / "steps" / "001" / "model",
            run / "run" / "checkpoint-20",
            out / "steps" / "002" / "model",
        )
    )
    update = torch.cat([(after[n] - before[n]).flatten() for n in after])
    record = result.steps[1]
    assert record.update_norm == pytest.approx(float(update.norm()), rel=1e-9)
    angles = []
    for name in (n for n in after if after[n].ndim > 1):
        u, t = (after[name] - before[name]).flatten(), (goal[name] - before[name]).flatten()
        angles.append(math.degrees(math.acos(float(u @ t / u.norm() / t.norm()))))
    assert record.rotation_degrees is not None
    assert record.rotation_degrees["mean"] == pytest.approx(sum(angles) / len(angles), rel=1e-6)
    assert record.rotation_degrees["max"] == pytest.approx(max(angles), rel=1e-6)
    assert record.rotation_degrees["max"] > 1
    lines = [json.loads(line) for line in (out / "stream.jsonl").read_text().splitlines()]
    assert lines == [one.model_dump(mode="json") for one in result.steps]


def test_rotation_turns_the_steps(run: Path, tmp_path: Path) -> None:
    found = {}
    for rotation in (0.0, -0.4, -0.8):
        document = config(
            run,
            merge_method="arm",
            parameters={"rotation": rotation, "energy": 0.6},
            calibration={"dataset": str(run / "tokens.jsonl")},
        )
        result = stream(document, tmp_path / str(rotation))
        angles = [record.rotation_degrees for record in result.steps]
        assert all(record.task_norm > record.update_norm > 0 for record in result.steps)
        found[rotation] = [angle["mean"] for angle in angles if angle]
    assert all(angle < 1e-3 for angle in found[0.0])
    assert all(0.1 < less < more for less, more in zip(found[-0.4], found[-0.8], strict=True))


def test_angles_are_good_to_a_millionth_of_a_degree() -> None:
    before = torch.zeros(3, dtype=torch.float64)
    task = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for degrees in (0.0, 1e-6, 30.0, 90.0, 180.0):
        turn = math.radians(degrees)
        after = 2 * torch.tensor([math.cos(turn), math.sin(turn), 0.0], dtype=torch.float64)
        move = compare(after, before, task)
        assert move.angle == pytest.approx(degrees, abs=2e-6)
        assert (move.update, move.task) == pytest.approx((2.0, 1.0))
    assert compare(before, before, task).angle is None


@pytest.mark.parametrize(
    ("keep", "kept"), [("all", ["001", "002", "003"]), ("last", ["003"]), ("best", [])]
)
def test_keep_says_whose_weights_stay(run: Path, tmp_path: Path, keep: Any, kept: Any) -> None:
    heldout = write_tokens(tmp_path / "heldout.jsonl", 11)
    document = config(run, evaluation={"dataset": str(heldout)})
    result = stream(document, tmp_path / "out", StreamOptions(keep=keep))
    found = [path.parent.name for path in sorted((tmp_path / "out").glob("steps/*/model"))]
    # The best is kept beside the last, for a stream that goes on must not lose it.
    best = [f"{result.chosen:03d}"] if result.chosen else []
    assert found == sorted({*kept, *best})
    for step in ("001", "002", "003"):
        assert (tmp_path / "out" / "steps" / step / "config.yml").is_file()


def test_the_final_model_is_complete(tmp_path: Path) -> None:
    base = tiny_llama(0)
    base.resize_token_embeddings(320)
    base.save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base")
    perturbed(base, 1).save_pretrained(tmp_path / "run" / "checkpoint-5")
    result = stream(config(tmp_path, dtype=None), tmp_path / "out")
    text = "a small text"
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (tmp_path / "base", result.model)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert model.dtype == base.dtype
    assert (result.out / "stream.png").read_bytes().startswith(b"\x89PNG")
    card = (result.model / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "mergekit-arm" in yaml.safe_load(front)["tags"]
    assert "| **1** | checkpoint-5 | 0.5 |" in body
    configuration = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert configuration["merge_method"] == "task_arithmetic"


def test_incomplete_checkpoints_are_left_out(run: Path, tmp_path: Path) -> None:
    write_run(tmp_path, (5, 7, 11))
    file = tmp_path / "run" / "checkpoint-7" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "run" / "checkpoint-11" / "config.json").unlink()
    (tmp_path / "run" / "checkpoint-best").mkdir()
    notes: list[str] = []
    result = stream(config(tmp_path), tmp_path / "out", say=notes.append)
    assert [record.checkpoint for record in result.steps] == ["checkpoint-5"]
    assert any("checkpoint-7 is left out" in note and "truncated" in note for note in notes)
    assert any("checkpoint-11 is left out" in note and "no config.json" in note for note in notes)


def test_checkpoints_come_in_numeric_order(tmp_path: Path) -> None:
    write_run(tmp_path, (1000, 200, 30))
    result = stream(config(tmp_path), tmp_path / "out")
    assert [r.checkpoint for r in result.steps] == [
        "checkpoint-30", "checkpoint-200", "checkpoint-1000",
    ]  # fmt: skip
