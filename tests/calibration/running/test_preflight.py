"""What a calibration says before the long run: time, memory, disk, and what will not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mergekit_arm import machine
from mergekit_arm.calibration import prepare as run
from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.running import estimate as estimates
from mergekit_arm.calibration.running.preflight import Preflight
from mergekit_arm.cli.calibrate import command
from mergekit_arm.errors import InputError
from mergekit_arm.machine import free_memory
from mergekit_arm.models import loading
from tests.support.calibrations import WAYS, options
from tests.support.models import VOCABULARY

CPU = torch.device("cpu")
ESTIMATE = Preflight(
    tokens=131_072,
    seconds=9_000,
    weights=16_000_000_000,
    sums=900_000_000,
    activations=3_000_000_000,
    batch_size=8,
    free=40_000_000_000,
    device="cuda:0",
    output=1_600_000_000,
    parameters=8_000_000_000,
    disk=1_800_000_000,
    disk_free=50_000_000_000,
)


def test_the_estimate_in_words() -> None:
    assert ESTIMATE.lines() == [
        "131,072 tokens will take about 2.5 h.",
        (
            "Memory: 16 GB weights, 900 MB sums, about 3.0 GB activations for 8 sequences at once "
            "(40 GB free on cuda:0)."
        ),
        (
            "Disk: 1.6 GB statistics at most (10% of a bfloat16 checkpoint), 1.8 GB for progress "
            "(50 GB free)."
        ),
    ]
    assert "one layer's weights" in replace(ESTIMATE, low_memory=True).lines()[1]
    assert ESTIMATE.warnings() == []


@pytest.mark.parametrize(
    ("changed", "named", "not_named"),
    [
        ({"free": 1_500_000_000}, ["--batch-size 4", "--low-memory"], ["--sequence-length"]),
        ({"free": 300_000_000}, ["--sequence-length", "--low-memory"], ["--batch-size"]),
        ({"free": 1_500_000_000, "low_memory": True}, ["--batch-size 4"], ["--low-memory"]),
        ({"disk_free": 3_000_000_000}, ["3.0 GB free", "OUT", "--samples"], ["--batch-size"]),
    ],
)
def test_what_will_not_fit_is_said_with_the_flag_that_helps(
    changed: dict[str, Any], named: list[str], not_named: list[str]
) -> None:
    (warning,) = replace(ESTIMATE, **changed).warnings()
    assert all(word in warning for word in named)
    assert not any(word in warning for word in not_named)


@pytest.mark.parametrize("low_memory", WAYS)
def test_a_dry_run_says_the_estimate_and_writes_nothing(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path
) -> None:
    arguments = [str(family / "base"), str(tmp_path / "s"), f"--dataset={token_file}", "--dry-run"]
    # Without a budget, hidden states would go to the disk.
    more = ["--low-memory", "--activation-budget=0"] if low_memory else []
    done = CliRunner().invoke(command, [*arguments, *more])
    assert done.exit_code == 0, done.output
    assert "384 tokens will take about" in done.stderr
    assert "of a bfloat16 checkpoint" in done.stderr
    assert ("one layer's weights" in done.stderr) is low_memory
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_leaves_saved_progress_alone(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done > 100:
            raise Stop

    given = options(family, tmp_path / "s", token_file)
    with pytest.raises(Stop):
        calibrate(given, stop)
    (before,) = (tmp_path / "s.partial").iterdir()
    content = before.read_bytes()
    calibrate(replace(given, dry_run=True))
    assert [path.read_bytes() for path in (tmp_path / "s.partial").iterdir()] == [content]
    assert [path.name for path in tmp_path.iterdir()] == ["s.partial"]


@pytest.mark.parametrize("low_memory", WAYS)
def test_one_block_goes_through_first(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path
) -> None:
    events: list[Any] = []
    given = options(family, tmp_path / "s", token_file, batch_size=5, low_memory=low_memory)
    calibrate(given, lambda done, total: events.append(done), preflight=events.append)
    estimate = events.pop(0)
    assert isinstance(estimate, Preflight)
    # The bar counts the tokens of the data: a layer is its share of each, two here.
    assert events[0] == (16 if low_memory else 32)
    assert events == sorted(events)
    assert events[-1] == 384
    assert len(events) == 4 * (3 if low_memory else 1)  # 1 + 5 + 5 + 1 blocks
    assert (estimate.tokens, estimate.batch_size) == (384, 5)
    weights = load_file(family / "base" / "model.safetensors")
    whole = sum(weight.nbytes for weight in weights.values())
    assert estimate.parameters == whole // 4
    layer = sum(w.nbytes for name, w in weights.items() if ".layers.0." in name)
    if low_memory:
        assert layer <= estimate.weights < whole
    else:
        assert whole <= estimate.weights < whole * 1.01


def save_wide_llama(folder: Path) -> None:
    """Write one whose statistics are mostly subspaces, as a large model's are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("low_memory", WAYS)
@pytest.mark.parametrize("keep_sketch", [False, True])
@pytest.mark.parametrize("rank", [None, 32])
def test_the_output_is_no_larger_than_estimated(
    low_memory: bool, keep_sketch: bool, rank: int | None, token_file: Path, tmp_path: Path
) -> None:
    save_wide_llama(tmp_path / "base")
    estimates: list[Preflight] = []
    given = options(
        tmp_path,
        tmp_path / "s",
        token_file,
        low_memory=low_memory,
        keep_sketch=keep_sketch,
        rank=rank,
        energy=1.0,
    )
    calibrate(given, preflight=estimates.append)
    assert size(tmp_path / "s") <= estimates[0].output
    # And not so much smaller that the estimate would scare anybody off.
    assert estimates[0].output <= 1.5 * size(tmp_path / "s") + 100_000


@pytest.mark.parametrize("low_memory", WAYS)
def test_experts_without_tokens_yet_are_in_the_estimate(
    low_memory: bool, token_file: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=64,  # a block of 32 tokens does not reach them all
        num_experts_per_tok=1,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    estimates: list[Preflight] = []
    calibrate(
        options(tmp_path, tmp_path / "s", token_file, low_memory=low_memory),
        preflight=estimates.append,
    )
    assert (tmp_path / "s" / "model.safetensors").stat().st_size > 64 * 2048 * 16 * 2
    assert size(tmp_path / "s") <= estimates[0].output


def test_weights_that_do_not_fit_are_not_loaded(
    family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=r"1.0 kB are free on cpu: use --low-memory") as error:
        calibrate(options(family, tmp_path / "s", token_file, device="cpu"))
    assert "--dtype bfloat16" in error.value.message
    assert "\n" not in error.value.message


def test_processes_that_share_memory_must_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    loading.check_weights_fit(400, CPU, torch.float32, "model", 2)
    with pytest.raises(InputError, match=r"600 B in float32, in each of 2 processes, and 1\.0 kB"):
        loading.check_weights_fit(600, CPU, torch.float32, "model", 2)


def test_memory_that_is_short_is_warned_of_before_the_run(
    family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "free_memory", lambda device: -1)
    arguments = [str(family / "base"), str(tmp_path / "s"), f"--dataset={token_file}", "--dry-run"]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "may not fit" in done.stderr
    assert "--low-memory" in done.stderr


def test_free_memory_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached files count as used there, and go as soon as memory is wanted."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert free_memory(CPU) > 100_000
    (tmp_path / "memory.max").write_text("70000\n")
    (tmp_path / "memory.current").write_text("50000\n")
    (tmp_path / "memory.stat").write_text("anon 20000\ninactive_file 30000\nactive_file 9\n")
    assert free_memory(CPU) == 50_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 100_000
    (tmp_path / "memory.max").write_text("nonsense\n")
    assert free_memory(CPU) > 100_000
