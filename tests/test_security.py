"""Nothing is unpickled or run unasked, and nothing is written outside of where it belongs.

The package's own source is read; what mergekit does with a user's models is mergekit's.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mergekit_arm.statistics.combine import combine
from mergekit_arm.statistics.read import Statistics
from mergekit_arm.statistics.write import write_statistics
from tests.support.paths import PACKAGE

CALLS = {
    path: [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    ]
    for path in sorted(PACKAGE.rglob("*.py"))
}
LOADERS = {"from_pretrained", "from_config", "_from_config", "config", "merged"}
"""Functions that import a model's own code where they are told to trust it."""


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def calls(*names: str) -> Iterator[tuple[str, ast.Call]]:
    for path, found in CALLS.items():
        for call in found:
            if name_of(call).rpartition(".")[2] in names:
                yield f"{path.relative_to(PACKAGE)}:{call.lineno}", call


def test_numbers_are_all_that_is_unpickled() -> None:
    """torch.load only with weights_only, and no other way to unpickle."""
    found = [(where, call) for where, call in calls("load") if name_of(call) == "torch.load"]
    assert found
    for where, call in found:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True", where
    unpickling = {"pickle.load", "pickle.loads", "dill.load", "dill.loads", "pickle.Unpickler",
                  "joblib.load", "numpy.load", "np.load", "torch.package", "marshal.loads",
                  "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system"}  # fmt: skip
    gathering = {"gather_object", "all_gather_object", "broadcast_object_list"}
    for path, every in CALLS.items():
        for call in every:
            name = name_of(call)
            assert name not in unpickling, f"{path}:{call.lineno}"
            # A training's own processes tell each other a number, by whichever backend they have.
            if path.name != "callback.py":
                assert name.rpartition(".")[2] not in gathering, f"{path}:{call.lineno}"


def test_code_of_a_model_runs_by_the_users_flag_alone() -> None:
    """Whatever is said of trust_remote_code comes from an option of that name, or is False."""
    for path, every in CALLS.items():
        for call in every:
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code":
                    said = ast.unparse(keyword.value)
                    assert said.endswith("trust_remote_code") or said == "False", (
                        f"{path}:{call.lineno}: {said}"
                    )
    source = "\n".join(path.read_text("utf-8") for path in CALLS)
    # The one place where it is True by name is on the condition of the option.
    (line,) = [one for one in source.splitlines() if '"trust_remote_code": True' in one]
    assert "if source.trust_remote_code else" in line


def test_every_loader_is_told_whether_to_trust() -> None:
    """transformers asks on the terminal where it is not told: a job would wait for an answer."""
    told = {"trust_remote_code", None}  # None: **options
    safe = {"click", "json", "yaml"}
    for where, call in calls("from_pretrained", "from_config"):
        assert name_of(call).partition(".")[0] not in safe
        assert told & {keyword.arg for keyword in call.keywords}, where


EVIL = "../../../evil/a\\b\nc"


def test_names_in_the_metadata_are_no_paths(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    """A site may have any name: it is a name in a file, and never one of a file."""
    room = tmp_path / "a" / "b" / "c"
    room.mkdir(parents=True)
    parts = []
    for number in (1, 2):
        part = measure(
            family / "base", room / str(number), statistics=("importance",), part=f"{number}/2"
        )
        opened = Statistics("part", part)
        sites = dict(opened.metadata.sites)
        old = next(iter(sites))
        renamed = {EVIL if name == old else name: site for name, site in sites.items()}
        weights = {
            name: weight.model_copy(update={"site": EVIL}) if weight.site == old else weight
            for name, weight in opened.metadata.weights.items()
        }
        metadata = opened.metadata.model_copy(update={"sites": renamed, "weights": weights})
        tensors = {
            name.replace(old, EVIL) if name.startswith(f"{old}.") else name: opened.stored(name)
            for name in opened.names
        }
        write_statistics(part, metadata, tensors, "", force=True)
        parts.append(str(part))
    before = files(tmp_path)
    combine(parts, room / "sum")
    names = {"README.md", "activation_stats.json", "model.safetensors"}
    assert files(tmp_path) - before == {room / "sum" / name for name in names}
    assert EVIL in Statistics("sum", room / "sum").metadata.sites


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_a_link_in_the_place_of_the_output_is_not_followed(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    """Replacing statistics behind a link leaves what the link led to as it was."""
    first = measure(family / "base", tmp_path / "first", statistics=("importance",))
    content = {path.name: path.read_bytes() for path in first.iterdir()}
    (tmp_path / "out").symlink_to("first")
    measure(family / "base", tmp_path / "out", statistics=("importance",), seed=3, force=True)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == content
    assert not (tmp_path / "out").is_symlink()


def test_a_pickle_in_the_place_of_a_shard_is_not_read(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Carrying statistics over reads them as any other: with safetensors alone."""
    monkeypatch.setattr(torch, "load", lambda *_args, **_kwargs: pytest.fail("torch.load"))
    opened = Statistics("stats", family / "stats")
    for name in opened.names:
        opened.stored(name)
