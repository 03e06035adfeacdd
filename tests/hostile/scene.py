"""A family of models and statistics in one place, to be broken, and the commands that meet it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_arm.cli.main import cli as mergekit_arm
from tests.hostile.refusals import Result, run
from tests.support.merges import config

INDEX = "model.safetensors.index.json"
METADATA = "activation_stats.json"
TENSORS = "model.safetensors"


@dataclass
class Scene:
    """``base`` and ``a`` in shards, ``stats`` of the base, ``tokens.jsonl``; all may be broken."""

    folder: Path
    stats: str
    """What ``activation_stats`` says."""
    model: str
    """What ``base_model`` says, and what is calibrated."""

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def merge(self, *, method: str = "aim") -> Result:
        found = config(self.folder, merge_method=method, base_model=self.model)
        found["parameters"]["activation_stats"] = self.stats
        if method == "arm":
            del found["parameters"]["omega"], found["models"][0]["parameters"]
        (self / "config.yml").write_text(yaml.safe_dump(found))
        options = ["--quiet", "--out-shard-size", "1", "--no-copy-tokenizer"]
        return self._run(mergekit_yaml, str(self / "config.yml"), str(self / "out"), *options)

    def calibrate(self, *options: str) -> Result:
        data = ["--dataset", str(self / "tokens.jsonl"), "--samples", "4"]
        out = str(self / "out")
        return self._run(mergekit_arm, "calibrate", self.model, out, *data, *options)

    def combine(self) -> Result:
        return self._run(mergekit_arm, "combine", self.stats, self.stats, str(self / "out"))

    def _run(self, command: click.Command, *arguments: str) -> Result:
        return run(self.folder, command, *arguments)


Break = Callable[[Scene], object]


def each(*changes: Break) -> Break:
    return lambda scene: [change(scene) for change in changes]


def write(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda scene: (scene / name).write_bytes(data)


def remove(name: str) -> Break:
    return lambda scene: (scene / name).unlink()


def cut(name: str, keep: float) -> Break:
    """Keep a share of a file, or so many bytes."""

    def change(scene: Scene) -> None:
        content = (scene / name).read_bytes()
        (scene / name).write_bytes(content[: int(keep * len(content) if keep < 1 else keep)])

    return change


def flip(name: str, tensor: str | None = None) -> Break:
    """Flip a bit of a tensor's first value, or of the header."""

    def change(scene: Scene) -> None:
        content = bytearray((scene / name).read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        place = 8
        if tensor is not None:
            header = json.loads(content[8 : 8 + length])
            place = 8 + length + header[tensor]["data_offsets"][0]
        content[place] ^= 1
        (scene / name).write_bytes(content)

    return change


def long_header(name: str) -> Break:
    """Let the header claim to be longer than the file."""

    def change(scene: Scene) -> None:
        content = (scene / name).read_bytes()
        (scene / name).write_bytes(struct.pack("<Q", 1 << 20) + content[8:])

    return change


def document(name: str, change: Callable[[dict[str, Any]], object]) -> Break:
    """Change a JSON file; statistics as one who means it would, without digests."""

    def edit(scene: Scene) -> None:
        found = json.loads((scene / name).read_text(encoding="utf-8"))
        if name.endswith(METADATA):
            found.pop("digest"), found.pop("digests")
        change(found)
        (scene / name).write_text(json.dumps(found), encoding="utf-8")

    return edit


def put(name: str, path: str, value: Any) -> Break:
    """Set the field ``path``, whose parts are separated by blanks; ``Ellipsis`` takes it out."""

    def change(found: dict[str, Any]) -> None:
        *parts, last = path.split(" ")
        for part in parts:
            found = found[part]
        if value is ...:
            del found[last]
        else:
            found[last] = value

    return document(name, change)


def tensors(
    name: str, change: Callable[[dict[str, Tensor]], object], file: str | None = None
) -> Break:
    """Change the tensors of a safetensors file (of a model: of every shard)."""

    def edit(scene: Scene) -> None:
        files = [scene / name] if file is None else sorted((scene / name).glob(file))
        for one in files:
            found = load_file(one)
            change(found)
            save_file(found, one, metadata={"format": "pt"})

    return edit


def sharded(scene: Scene) -> None:
    """Give the statistics an index, as beyond 5 GB."""
    names = load_file(scene / f"stats/{TENSORS}")
    (scene / f"stats/{TENSORS}").rename(scene / "stats/model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (scene / f"stats/{INDEX}").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def set_up(folder: Path, family: Path, token_file: Path, models: Path) -> Scene:
    """Copy what there is to break."""
    for name in ("base", "a"):
        shutil.copytree(models / name, folder / name)
    shutil.copytree(family / "stats", folder / "stats")
    shutil.copy(token_file, folder / "tokens.jsonl")
    return Scene(folder, str(folder / "stats"), str(folder / "base"))
