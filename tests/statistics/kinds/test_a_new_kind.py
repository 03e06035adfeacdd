"""A third kind of statistic, in one class and one line: the largest |x| of every channel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.running.preflight import Preflight
from mergekit_arm.cli.calibrate import command
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.combine import combine
from mergekit_arm.statistics.kinds import chosen, kind, kinds, register, unregister
from mergekit_arm.statistics.kinds.base import (
    Kind,
    MeasuredInput,
    Observer,
    Operation,
    TensorSpec,
)
from mergekit_arm.statistics.read import Statistics, open_statistics
from tests.support.calibrations import WAYS, Killed, kill_at, options
from tests.support.models import VOCABULARY
from tests.support.ranks import run_ranks


class LargestObserver(Observer):
    def update(self, x: Tensor) -> None:
        if len(x):
            torch.maximum(self.sums["largest"], x.abs().amax(0).float(), out=self.sums["largest"])


@dataclass(frozen=True)
class Largest(Kind):
    """The largest |x| of every channel, over all tokens."""

    name: ClassVar[str] = "largest"
    recorded: ClassVar[tuple[str, ...]] = ("norms",)

    norms: bool = True
    """Measure the inputs of norms, too."""

    def state(self, width: int) -> dict[str, TensorSpec]:
        return {"largest": TensorSpec(torch.float32, (width,), Operation.MAX)}

    def observer(self, width: int, device: torch.device) -> Observer:
        return LargestObserver(self.state(width), device)

    def left_out(self, source: MeasuredInput) -> str | None:
        return None if source.matrix or self.norms else "norms only"

    def describe(self, tensors: Any) -> dict[str, Any]:
        return {"peak": round(float(tensors["largest"].max()), 3)}


LARGEST = Largest(norms=False)
BOTH: dict[str, Any] = {"statistics": ("importance", "largest")}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(LARGEST)
    yield
    unregister("largest")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    folder = tmp_path_factory.mktemp("moe")
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def largest_inputs(model: Path, tokens: Path) -> dict[str, Tensor]:
    """Return the largest |x| of every linear layer's input channels, by hooks of our own."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    found: dict[str, Tensor] = {}

    def hook(name: str, x: Tensor) -> None:
        peak = x.detach().reshape(-1, x.shape[-1]).abs().max(0).values
        found[name] = torch.maximum(found.get(name, torch.zeros_like(peak)), peak)

    for name, layer in loaded.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _layer, args, _out, name=name: hook(name, args[0]))
    with torch.no_grad():
        for line in tokens.read_text().splitlines():
            loaded(torch.tensor([json.loads(line)["input_ids"]]))
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    """Return the new kind's tensors, by site."""
    tensors = load_file(folder / "model.safetensors")
    suffix = ".largest"
    return {k.removesuffix(suffix): v for k, v in tensors.items() if k.endswith(suffix)}


def check(folder: Path, model: Path, tokens: Path) -> None:
    """Compare a directory with what our own hooks have seen."""
    wanted = largest_inputs(model, tokens)
    statistics = open_statistics(str(folder))
    checked = 0
    for name, record in statistics.metadata.weights.items():
        layer = name.removesuffix(".weight")
        if layer in wanted:
            found = LARGEST.read(statistics, record)["largest"]
            torch.testing.assert_close(found, wanted[layer], rtol=1e-5, atol=0)
            assert record.site is not None
            facts = LARGEST.from_record(statistics.metadata.sites[record.site])
            assert facts == {"peak": round(float(found.max()), 3)}
            checked += 1
    assert checked == len(wanted)
    assert statistics.metadata.settings.statistics == ["importance", "largest"]
    assert statistics.metadata.settings.kinds == {"largest": {"norms": False}}


@pytest.mark.parametrize("low_memory", WAYS)
def test_it_is_measured_written_and_read(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    arguments = [str(family / "base"), str(out), f"--dataset={token_file}"]
    more = ["--low-memory"] if low_memory else []
    done = CliRunner().invoke(command, [*arguments, "--statistics", "largest, importance", *more])
    assert done.exit_code == 0, done.output
    assert "without largest" in done.stdout
    check(out, family / "base", token_file)
    norms = Statistics("s", out).metadata.sites["model.norm"]
    assert norms.kinds == {"largest": {"left_out": "norms only"}}


@pytest.mark.parametrize("low_memory", WAYS)
def test_each_expert_has_its_own(
    low_memory: bool, moe: Path, token_file: Path, tmp_path: Path
) -> None:
    """A token goes to some experts only, so that no expert's channels reach all of the peaks."""
    settings = {"model": str(moe), "low_memory": low_memory, **BOTH}
    calibrate(options(moe, tmp_path / "s", token_file, **settings))
    check(tmp_path / "s", moe, token_file)
    found = stored(tmp_path / "s")
    gate = found["model.layers.1.mlp.gate"]
    (experts,) = (
        value for name, value in found.items() if value.ndim == 2 and "1.mlp.experts.gate" in name
    )
    assert experts.shape == (4, 32)
    torch.testing.assert_close(experts.max(0).values, gate, rtol=1e-6, atol=0)
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("low_memory", WAYS)
def test_a_run_that_was_killed_goes_on(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path
) -> None:
    given = options(family, tmp_path / "s", token_file, low_memory=low_memory, **BOTH)
    with pytest.raises(Killed):
        calibrate(given, kill_at(3))
    calibrate(given)
    check(tmp_path / "s", family / "base", token_file)


def register_largest() -> None:
    register(LARGEST)


@pytest.mark.parametrize("low_memory", WAYS)
def test_processes_take_the_largest_of_what_each_saw(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path
) -> None:
    command = ["calibrate", str(family / "base"), str(tmp_path / "s"), f"--dataset={token_file}"]
    command += ["--statistics=importance,largest", "--batch-size=2", "--device=cpu"]
    if low_memory:
        command.append("--low-memory")
    ended = run_ranks([command] * 2, tmp_path, prepare=register_largest)
    assert [one.status for one in ended] == [0, 0], ended
    assert all(one.batches for one in ended)
    check(tmp_path / "s", family / "base", token_file)


@pytest.mark.parametrize("experts", [False, True])
def test_directories_add_up(
    experts: bool, family: Path, moe: Path, token_file: Path, tmp_path: Path
) -> None:
    model = moe if experts else family / "base"
    settings = {"model": str(model), **BOTH}
    for part in (1, 2):
        calibrate(options(family, tmp_path / f"{part}", token_file, part=f"{part}/2", **settings))
    combine([str(tmp_path / "1"), str(tmp_path / "2")], tmp_path / "sum")
    check(tmp_path / "sum", model, token_file)
    one, two, both = (stored(tmp_path / name) for name in ("1", "2", "sum"))
    assert both
    for site, value in both.items():
        assert torch.equal(value, torch.maximum(one[site], two[site]))


def test_the_preflight_counts_it(family: Path, token_file: Path, tmp_path: Path) -> None:
    estimates: list[Preflight] = []
    sizes = []
    for name, chosen_kinds in (("with", BOTH), ("without", {"statistics": ("importance",)})):
        given = options(family, tmp_path / name, token_file, **chosen_kinds)
        calibrate(given, preflight=estimates.append)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / name).iterdir()))
    added = sum(value.nbytes for value in stored(tmp_path / "with").values())
    assert estimates[0].output - estimates[1].output == added
    assert all(one.output >= size for one, size in zip(estimates, sizes, strict=True))


def test_a_directory_is_opened_and_not_added_where_its_kind_is_unknown(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    for part in (1, 2):
        calibrate(options(family, tmp_path / f"{part}", token_file, part=f"{part}/2", **BOTH))
    unregister("largest")
    try:
        opened = Statistics("s", tmp_path / "1")
        assert opened.holds("model.norm", "abs_sum")
        with pytest.raises(InputError, match="no kind of statistic named 'largest'"):
            combine([str(tmp_path / "1"), str(tmp_path / "2")], tmp_path / "sum")
    finally:
        register(LARGEST)


def test_names_are_unique_and_a_wrong_one_names_the_nearest(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    assert [one.name for one in kinds()] == ["importance", "subspace", "largest"]
    assert chosen(["all"]) == kinds()
    assert [one.name for one in chosen(["largest", "importance"])] == ["importance", "largest"]
    with pytest.raises(ValueError, match="named 'largest' is registered already"):
        register(Largest())

    class Rival(Largest):
        name: ClassVar[str] = "rival"

    with pytest.raises(ValueError, match="rival and largest both store largest"):
        register(Rival())
    with pytest.raises(InputError, match="did you mean 'largest'"):
        kind("larges")
    with pytest.raises(InputError, match=r"'importanc' \(did you mean 'importance'\?\)"):
        calibrate(options(family, tmp_path / "s", token_file, statistics=("importanc",)))
    assert list(tmp_path.iterdir()) == []
