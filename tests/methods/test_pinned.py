"""A merge keeps to the statistics it was planned with: never a mixture of two measurements."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.methods.parameters import StatisticsReference, activation_stats
from mergekit_arm.statistics.kinds.importance import Importance
from tests.methods.test_planning import execute, plan
from tests.support.edits import edit
from tests.support.merges import config

Replace = Callable[[Path, Path], None]


@pytest.fixture
def scene(family: Path, tmp_path: Path) -> Path:
    """Statistics ``old``, ``new`` ones of the same model whose sums differ, and a ``link``."""
    shutil.copytree(family / "stats", tmp_path / "old")
    new = edit(Path(shutil.copytree(family / "stats", tmp_path / "new")))
    tensors = load_file(new / "model.safetensors")
    changed = {n: x.flip(0) if n.endswith("abs_sum") else x for n, x in tensors.items()}
    save_file({name: x.contiguous() for name, x in changed.items()}, new / "model.safetensors")
    (tmp_path / "link").symlink_to("old")
    return tmp_path


def turn(scene: Path) -> None:
    (scene / "link").unlink()
    (scene / "link").symlink_to("new")


def exchange(scene: Path) -> None:
    (scene / "old").rename(scene / "gone")
    (scene / "new").rename(scene / "old")


def replace_tensors(scene: Path) -> None:
    (scene / "new" / "model.safetensors").replace(scene / "old" / "model.safetensors")


CHANGES = [turn, exchange, replace_tensors]


@pytest.mark.parametrize("change", CHANGES)
def test_between_planning_and_the_first_tensor(
    change: Callable[[Path], None], scene: Path, family: Path
) -> None:
    parameters = {"activation_stats": str(scene / "link"), "omega": 0.3}
    planned = plan(config(family, parameters=parameters), 2)
    change(scene)
    with pytest.raises(InputError, match="replaced since the merge was planned"):
        dict(execute(planned))
    if change is replace_tensors:  # beside the old digests
        with pytest.raises(InputError, match="are not those that were written"):
            plan(config(family, parameters=parameters), 2)
        return
    # A merge that is planned now takes the new ones, whole.
    assert dict(execute(plan(config(family, parameters=parameters), 2)))


@pytest.mark.parametrize("change", CHANGES)
def test_in_the_middle_of_a_merge(
    change: Callable[[Path], None],
    scene: Path,
    family: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the command: one line, exit status 2, when the next tensor is read."""
    read = Importance.values
    seen: list[object] = []
    planning = 2 * 9 + 2  # the weights that are measured, each looked at once before the merge

    def values(*arguments: object) -> Tensor:
        seen.append(arguments)
        if len(seen) == planning + 4:
            change(scene)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Importance, "values", values)
    parameters = {"activation_stats": str(scene / "link"), "omega": 0.3}
    (scene / "config.yml").write_text(yaml.safe_dump(config(family, parameters=parameters)))
    done = CliRunner().invoke(
        mergekit_yaml, [str(scene / "config.yml"), str(scene / "out"), "--quiet"]
    )
    assert done.exit_code == 2, done.output or repr(done.exception)
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert str(scene / "link") in line
    assert "replaced since" in line or "have changed since" in line
    assert planning + 4 <= len(seen) <= planning + 5
    assert not (scene / "out" / "config.json").exists()


def test_in_threads(scene: Path, family: Path) -> None:
    """Merges planned before and after run together: the former end, the latter do not."""
    parameters = {"activation_stats": str(scene / "link"), "omega": 0.3}
    found = config(family, parameters=parameters)
    before = [plan(found, 2) for _ in range(4)]
    turn(scene)
    after = [plan(found, 2) for _ in range(4)]

    def run(planned: object) -> str:
        try:
            dict(execute(planned))  # type: ignore[arg-type]
        except InputError as error:
            return error.message
        return ""

    with ThreadPoolExecutor(4) as pool:
        ends = list(
            pool.map(run, [one for pair in zip(before, after, strict=True) for one in pair])
        )
    assert all("replaced since" in message for message in ends[::2])
    assert not any(ends[1::2])


@pytest.mark.parametrize("change", CHANGES)
def test_a_pickled_reference(change: Callable[[Path], None], scene: Path) -> None:
    reference = activation_stats("", "shared").validate(str(scene / "link"))  # type: ignore[arg-type]
    assert isinstance(reference, StatisticsReference)
    twin = pickle.loads(pickle.dumps(reference))
    assert twin.open() is reference.open()
    change(scene)
    for one in (twin, reference):
        with pytest.raises(InputError, match="replaced since the merge was planned"):
            one.open()


def test_a_directory_that_is_replaced_while_a_merge_is_planned(scene: Path, family: Path) -> None:
    """Some tensors were planned with one and some with the other: that cannot run through."""
    parameters = {"activation_stats": str(scene / "link"), "omega": 0.3}
    planned = plan(config(family, parameters=parameters), 2)
    turn(scene)
    names = sorted(planned)
    later = plan(config(family, parameters=parameters), 2)
    mixed = {name: (planned if n % 2 else later)[name] for n, name in enumerate(names)}
    with pytest.raises(InputError, match="replaced since the merge was planned"):
        dict(execute(mixed))
