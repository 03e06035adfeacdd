"""What ``check`` says of disk and memory, held against what examples say of it."""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, LlamaConfig

from mergekit_arm.cli.check import command
from mergekit_arm.units import size_text
from tests.support.paths import EXAMPLES

LAYER = re.compile(r"layers\.(\d+)\.")


def write_hollow(folder: Path, config: LlamaConfig) -> dict[str, int]:
    """Write a checkpoint whose values are holes, a file a layer; return the bytes of each file."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    files: Mapping[str, dict[str, object]] = defaultdict(dict)
    sizes: dict[str, int] = defaultdict(int)
    names = {}
    for name, tensor in state.items():
        layer = LAYER.search(name)
        file = names[name] = f"model-{layer[1] if layer else 'rest'}.safetensors"
        end = sizes[file] + 2 * tensor.numel()
        place = [sizes[file], end]
        files[file][name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": place}
        sizes[file] = end
    config.save_pretrained(folder)
    for file, entries in files.items():
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(8 + len(header) + sizes[file])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return sizes


def test_the_example_of_70_billion_says_what_check_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (EXAMPLES / "aim_70b.yml").read_text(encoding="utf-8")
    said = " ".join(re.findall(r"^# (.*)$", text, re.M))
    document = yaml.safe_load(text)
    # Statistics add nothing to what a merge holds, and need weights.
    document |= {"merge_method": "ties", "parameters": {}}
    document["base_model"] = "./base"
    for one in document["models"]:
        one["model"] = f"./{Path(one['model']).name}"
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    for name in ("./base", *(one["model"] for one in document["models"])):
        sizes = write_hollow(tmp_path / name, config)
    assert f"one layer of 80 takes about {size_text(sizes['model-79.safetensors'])}" in said
    monkeypatch.chdir(tmp_path)
    Path("merge.yml").write_text(yaml.safe_dump(document))
    done = CliRunner().invoke(command, ["merge.yml", "--out-shard-size", "2B", "--json"])
    (room,) = json.loads(done.stdout)["room"]
    assert room["disk"] == sum(sizes.values())
    memory, disk = size_text(room["memory"]), size_text(room["disk"])
    assert f"about {memory} of memory and {disk} of disk" in said
