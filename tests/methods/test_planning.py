"""What is known of a planned merge belongs to that merge, and what cannot work is refused early."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.methods.parameters import StatisticsReference
from mergekit_arm.statistics.format import NEVER_USED
from tests.support.edits import edit
from tests.support.merges import config, relaxed, run, weights

WHOLE = ((0, 2),)
SWAPPED = ((1, 2), (0, 1))
ALL_SLICES: tuple[tuple[tuple[int, int], ...], ...] = (WHOLE, SWAPPED, ((1, 2),), ((0, 2), (0, 2)))


def document(folder: Path, ranges: tuple[tuple[int, int], ...], **changes: Any) -> dict[str, Any]:
    found = config(folder, **changes)
    (model,) = found.pop("models")
    base = {"model": str(folder / "base")}
    found["slices"] = [
        {"sources": [{**one, "layer_range": list(part)} for one in (base, model)]}
        for part in ranges
    ]
    return found


def plan(found: dict[str, Any], layers: int) -> dict[str, Task[Tensor]]:
    """Plan a merge as mergekit does, without running it: a task for each output tensor."""
    configuration = MergeConfiguration.model_validate(found)
    options = MergeOptions()
    out = ModelReference.parse(found["base_model"]).config()
    out.num_hidden_layers = layers
    architecture = get_architecture_info(configuration, options)
    planner = MergePlanner(configuration, architecture, options, out)
    tasks = planner.plan_to_disk("nowhere")
    return {task.tensor_name: task.tensor_task for task in tasks if isinstance(task, SaveTensor)}


def execute(planned: dict[str, Task[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    names = {task: name for name, task in planned.items()}
    executor = Executor(list(names), math_device="cpu", storage_device="cpu")
    for task, tensor in executor.run(quiet=True):
        yield names[task], tensor


def length(ranges: tuple[tuple[int, int], ...]) -> int:
    return sum(end - start for start, end in ranges)


def assert_right(
    merged: dict[str, Tensor], folder: Path, ranges: tuple[tuple[int, int], ...]
) -> None:
    """Compare with the formula, from the statistics of the layers that were taken."""
    taken = [layer for part in ranges for layer in range(*part)]
    base, other = weights(folder / "base"), weights(folder / "a")
    compared = 0
    for name, tensor in merged.items():
        source = name
        if ".layers." in name:
            number = int(name.split(".")[2])
            source = name.replace(f"layers.{number}.", f"layers.{taken[number]}.")
            compared += 1
        wanted = relaxed(folder, source, base[source], other[source])
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)
    assert compared == 9 * len(taken)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_merge_planned_before_or_after_another(order: tuple[int, int], alike: Path) -> None:
    cases = (SWAPPED, WHOLE)
    planned = [plan(document(alike, ranges), 2) for ranges in cases]
    for index in order:
        assert_right(dict(execute(planned[index])), alike, cases[index])


def test_merges_whose_execution_alternates(alike: Path) -> None:
    """And a third is planned while they run."""
    runs = [execute(plan(document(alike, ranges), 2)) for ranges in (SWAPPED, WHOLE)]
    results: list[dict[str, Tensor]] = [{}, {}]
    for first, second in zip(*runs, strict=True):
        plan(document(alike, ((1, 2),)), 1)
        for result, (name, tensor) in zip(results, (first, second), strict=True):
            result[name] = tensor
    assert_right(results[0], alike, SWAPPED)
    assert_right(results[1], alike, WHOLE)


def test_merges_in_many_threads(alike: Path) -> None:
    cases = ALL_SLICES * 4

    def merge(ranges: tuple[tuple[int, int], ...]) -> dict[str, Tensor]:
        return dict(execute(plan(document(alike, ranges), length(ranges))))

    with ThreadPoolExecutor(6) as pool:
        for ranges, merged in zip(cases, pool.map(merge, cases), strict=True):
            assert_right(merged, alike, ranges)


def test_merges_planned_in_one_thread_and_run_in_others(alike: Path) -> None:
    planned = [plan(document(alike, ranges), length(ranges)) for ranges in ALL_SLICES]
    with ThreadPoolExecutor(4) as pool:
        for ranges, merged in zip(
            ALL_SLICES, pool.map(lambda tasks: dict(execute(tasks)), planned), strict=True
        ):
            assert_right(merged, alike, ranges)


@pytest.mark.parametrize("count", [1, 3])
def test_failures_leave_nothing_behind(count: int, alike: Path, tmp_path: Path) -> None:
    """Not the slices of a merge that failed, nor its statistics, which may be gone by now."""
    gone = tmp_path / "stats"
    for number in range(count):
        shutil.copytree(alike / "stats", gone)
        omega = [{"filter": "layers.1.mlp.down", "value": 2.0}, {"value": 0.3}]
        broken = document(alike, SWAPPED, parameters={"activation_stats": str(gone)})
        broken["parameters"]["omega"] = omega if number % 2 else 2.0
        with pytest.raises(InputError, match="omega must lie in"):
            plan(broken, 2)
        shutil.rmtree(gone)
    assert_right(dict(execute(plan(document(alike, WHOLE), 2))), alike, WHOLE)
    states = {name: weights(alike / name) for name in ("base", "a")}
    parameters = {"activation_stats": str(alike / "stats"), "omega": 0.3, "weight": 1.0}
    merged = merge_state_dicts(states, "aim", base="base", parameters=parameters)
    assert_right(merged, alike, WHOLE)


def test_a_planned_merge_can_be_copied_and_pickled() -> None:
    reference = StatisticsReference("./stats")
    reference.names = {ModelReference.parse("org/name"): "layers.1.weight"}
    for twin in (pickle.loads(pickle.dumps(reference)), copy.deepcopy(reference)):
        assert twin == "./stats"
        assert twin.names == reference.names


def test_without_a_plan_values_that_fit_two_layers_are_not_guessed(alike: Path) -> None:
    """As if mergekit, some day, hid the inputs' names: models, but no names of theirs."""
    name = "model.layers.0.input_layernorm.weight"
    states = [weights(alike / model)[name] for model in ("base", "a")]
    ids = [ModelReference.parse(str(alike / model)) for model in ("base", "a")]
    parameters = {"activation_stats": str(alike / "stats"), "weight": 1.0}
    with pytest.raises(InputError, match="2 weights hold the same values"):
        merge_tensors(states, "aim", parameters=parameters, ids=ids, base_index=0, name=name)


def refuse(found: dict[str, Any], folder: Path) -> str:
    """Run ``mergekit-yaml`` with the smallest shards: one line, and not one of them written."""
    (folder / "config.yml").write_text(yaml.safe_dump(found))
    command = [str(folder / "config.yml"), str(folder / "out"), "--quiet", "--out-shard-size", "1"]
    done = CliRunner().invoke(mergekit_yaml, command)
    assert done.exit_code == 2, done.output or repr(done.exception)
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert not list((folder / "out").glob("*.safetensors"))
    return line


def arm(folder: Path, stats: Path, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "arm",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "a")}],
        "parameters": {"activation_stats": str(stats), **parameters},
        "dtype": "float32",
    }


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def unused(family: Path, tmp_path: Path) -> Path:
    """Statistics of data on which one weight was never used."""
    stats = tmp_path / "stats"
    shutil.copytree(family / "stats", stats)
    without = {"site": None, "input_axis": None, "reason": NEVER_USED}
    return edit(stats, lambda metadata: metadata["weights"][LAST].update(without))


def test_a_weight_never_used_is_refused_before_the_first_tensor(
    family: Path, unused: Path, tmp_path: Path
) -> None:
    parameters = {"activation_stats": str(unused), "omega": 0.3}
    line = refuse(config(family, parameters=parameters), tmp_path)
    assert LAST in line
    assert f"omega: [{{filter: {LAST}, value: 1}}, {{value: 0.3}}]" in line
    line = refuse(arm(family, unused), tmp_path)
    assert f"rotation: [{{filter: {LAST}, value: 0}}, {{value: -1.0}}]" in line


@pytest.mark.parametrize("method", ["aim", "arm"])
def test_a_weight_never_used_and_the_same_everywhere_is_not(
    method: str, family: Path, unused: Path, tmp_path: Path
) -> None:
    shutil.copytree(family / "a", tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    state[LAST] = weights(family / "base")[LAST]
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    found = arm(family, unused) | {"merge_method": method}
    found["models"] = [{"model": str(tmp_path / "a")}]
    if method == "aim":
        found["models"][0]["parameters"] = {"weight": 1.0}
    assert torch.equal(dict(execute(plan(found, 2)))[LAST], state[LAST])


@pytest.mark.parametrize("energy", [0.999, [0.5, 0.999]])
def test_more_energy_than_was_stored(energy: Any, family: Path, tmp_path: Path) -> None:
    line = refuse(arm(family, family / "stats", energy=energy), tmp_path)
    assert "calibrate again with --energy 0.999" in line


@pytest.mark.parametrize(("kind", "method"), [("importance", "arm"), ("subspace", "aim")])
def test_statistics_of_the_wrong_kind(
    kind: str, method: str, family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    measure(family / "base", tmp_path / "stats", statistics=(kind,))
    found = arm(family, tmp_path / "stats") | {"merge_method": method}
    if method == "aim":
        found["models"][0]["parameters"] = {"weight": 1.0}
    assert "was not measured" in refuse(found, tmp_path)


@pytest.mark.parametrize("method", ["arm", "aim", "regmean"])
def test_vocabularies_that_are_cut_short_change_nothing_else(
    method: str, family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    """mergekit wraps the inputs of a plan once more for it, also where all have one length."""
    found = arm(family, family / "stats") | {"merge_method": method}
    own: dict[str, Any] = {} if method == "arm" else {"weight": 1.0}
    if method == "regmean":
        own["activation_stats"] = str(measure(family / "b", tmp_path / "stats"))
    found["models"] = [{"model": str(family / "b"), "parameters": own}]
    plain = run(mergekit_yaml, yaml.safe_dump(found), tmp_path / "plain")
    cut = run(
        mergekit_yaml, yaml.safe_dump(found), tmp_path / "cut", "--unsafe-truncate-embeddings"
    )
    one, other = weights(plain), weights(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_aim_over_arm_checks_what_both_read(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    measure(family / "base", tmp_path / "stats", statistics=("importance",))
    found = arm(family, tmp_path / "stats") | {"merge_method": "aim_arm"}
    assert "eigenvalues" in refuse(found, tmp_path)


def test_statistics_of_an_input_are_checked_too(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    measure(family / "b", tmp_path / "stats")
    found = arm(family, family / "stats", alignment=0.5)
    found["models"][0]["parameters"] = {"activation_stats": str(tmp_path / "stats")}
    assert "another model or revision" in refuse(found, tmp_path)


def test_slices_of_other_layers_of_another_revision(family: Path, tmp_path: Path) -> None:
    """The layer that is taken is looked at, not the one whose number the output gets."""
    shutil.copytree(family / "base", tmp_path / "base")
    shutil.copytree(family / "a", tmp_path / "a")
    shutil.copytree(family / "stats", tmp_path / "stats")
    state = load_file(tmp_path / "base" / "model.safetensors")
    state[LAST] *= 1.01
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert LAST in refuse(document(tmp_path, ((1, 2),)), tmp_path)
    assert_right(dict(execute(plan(document(tmp_path, ((0, 1),)), 1))), tmp_path, ((0, 1),))
