"""Checkpoints that are adapters: base and adapter by mergekit's own grammar and code."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mergekit_arm.errors import InputError
from mergekit_arm.merging.adapters import merge_adapter
from mergekit_arm.streaming import StreamOptions, stream
from mergekit_arm.streaming.config import load_config
from mergekit_arm.streaming.forecast import disk_needed, forecast_stream
from mergekit_arm.streaming.plan.plan import make_plan
from tests.support.models import tiny_llama
from tests.support.streams import add_tokenizer, config, weights, write_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and a Trainer's directory with adapters, as PEFT saves them."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder, tiny_llama(0))
    return folder


def write_adapters(folder: Path, base: PreTrainedModel) -> None:
    base.save_pretrained(folder / "base")
    for number in (3, 6):
        torch.manual_seed(number)
        settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / "run" / f"checkpoint-{number}")


def by_hand(run: Path, number: int) -> dict[str, torch.Tensor]:
    """W + α/r · B A, computed from the adapter's file."""
    merged = weights(run / "base")
    adapter = load_file(run / "run" / f"checkpoint-{number}" / "adapter_model.safetensors")
    for key, a in adapter.items():
        if "lora_A" in key:
            b = adapter[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            merged[name] = merged[name] + 8 / 4 * (b @ a)
    return merged


def test_adapters_are_merged_into_the_base_and_streamed(run: Path, tmp_path: Path) -> None:
    evaluation = {"dataset": str(write_tokens(tmp_path / "heldout.jsonl", 3)), "keep": "last"}
    document = config(run, merge_method="arm", parameters={"rotation": 0}, evaluation=evaluation)
    document["calibration"] = {"dataset": str(write_tokens(tmp_path / "tokens.jsonl", 4))}
    result = stream(document, tmp_path / "out")
    assert [record.merged[0].reference for record in result.steps] == [
        f"{run}/base+{run}/run/checkpoint-{number}" for number in (3, 6)
    ]
    expected = weights(run / "base")
    for number in (3, 6):
        incoming = by_hand(run, number)
        expected = {name: w + 0.5 * (incoming[name] - w) for name, w in expected.items()}
    found = weights(result.model)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], expected[n], rtol=1e-5, atol=1e-6) for n in found)
    assert not (tmp_path / "out" / ".adapters").exists()  # merged adapters are not left lying


def test_a_half_merged_adapter_is_never_taken_for_a_whole_one(run: Path, tmp_path: Path) -> None:
    reference = f"{run}/base+{run}/run/checkpoint-3"
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    (tmp_path / "cache" / ".partial.999999999").mkdir(parents=True)  # of a process long dead
    merge_adapter(reference, options)
    (entry,) = (tmp_path / "cache").iterdir()
    # Where mergekit itself looks.
    found = ModelReference.parse(reference).merged(cache_dir=str(tmp_path / "cache"))
    assert found.model.path == str(entry)
    time = entry.stat().st_mtime_ns
    merge_adapter(reference, options)
    assert entry.stat().st_mtime_ns == time


def test_a_users_own_cache_is_used_and_kept(run: Path, tmp_path: Path) -> None:
    options = StreamOptions(MergeOptions(lora_merge_cache=str(tmp_path / "cache")))
    stream(config(run), tmp_path / "out", options)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_listed_adapter_gets_its_base(run: Path, tmp_path: Path) -> None:
    listed = [str(run / "run" / "checkpoint-6")]
    result = stream(config(run, checkpoints=listed), tmp_path / "out")
    assert result.steps[0].merged[0].reference == f"{run}/base+{listed[0]}"


def test_an_adapter_of_another_base_is_noted(run: Path, tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "copy")
    document = config(run, base_model=str(tmp_path / "copy"))
    plan, problems = make_plan(load_config(document), MergeOptions())
    assert plan is not None
    assert not problems
    assert any(f"trained on {run}/base" in note for note in plan.notes)


def test_adapters_on_an_adapter_are_refused(run: Path, tmp_path: Path) -> None:
    base = f"{run}/base+{run}/run/checkpoint-3"
    document = config(run, base_model=base, checkpoints=[str(run / "run" / "checkpoint-6")])
    with pytest.raises(InputError, match="merge base_model into one model first"):
        stream(document, tmp_path / "out")


def test_an_adapter_may_be_the_base_of_whole_models(run: Path, tmp_path: Path) -> None:
    tiny_llama(5).save_pretrained(tmp_path / "whole")
    base = f"{run}/base+{run}/run/checkpoint-3"
    evaluation = {
        "metric_command": "test -f {model}/config.json && echo 1",
        "metric_goal": "minimize",
    }
    document = config(run, base_model=base, checkpoints=[str(tmp_path / "whole")])
    document["evaluation"] = {**evaluation, "keep": "last"}
    result = stream(document, tmp_path / "out")
    start, goal = by_hand(run, 3), weights(tmp_path / "whole")
    found = weights(result.model)
    assert all(torch.allclose(found[n], (start[n] + goal[n]) / 2, atol=1e-6) for n in found)


@pytest.mark.parametrize("place", ["base", "checkpoints"])
def test_text_is_measured_on_a_model_with_an_adapter(tmp_path: Path, place: str) -> None:
    base = tiny_llama(0)
    base.resize_token_embeddings(320)
    write_adapters(tmp_path, base)
    add_tokenizer(tmp_path / "base")
    rows = [{"text": "a small text about nothing much " * 20}] * 4
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration = {"dataset": str(tmp_path / "text.jsonl"), "samples": 4, "sequence_length": 24}
    document = config(tmp_path, merge_method="arm", calibration=calibration)
    if place == "base":
        base.save_pretrained(tmp_path / "whole")
        document["base_model"] = f"{tmp_path}/base+{tmp_path}/run/checkpoint-3"
        document["checkpoints"] = [str(tmp_path / "whole")]
    else:
        document["parameters"] = {"alignment": 0.5}  # measures the checkpoints as well
    out = tmp_path / "out"
    assert forecast_stream(load_config(document), out, StreamOptions()).problems == []
    assert not out.exists()
    result = stream(document, out)
    assert result.steps[0].calibration_tokens == 4 * 24
    assert (result.model / "tokenizer.json").is_file()


def test_the_average_of_adapters_is_in_the_estimate(run: Path, tmp_path: Path) -> None:
    """At a stream's end those of all checkpoints lie merged beside each other."""
    heldout = str(write_tokens(tmp_path / "heldout.jsonl", 4, rows=2))
    listed = [f"{run}/base+{run}/run/checkpoint-{number}" for number in (3, 6)]
    document = config(run, checkpoints=listed, evaluation={"dataset": heldout, "keep": "last"})
    needed = []
    for averages in (True, False):
        changed = {**document, "compare": {"average": averages}}
        plan, problems = make_plan(load_config(changed), MergeOptions())
        assert not problems
        assert plan is not None
        needed.append(disk_needed(plan, "last"))
        model = plan.base.parameters * 4
    assert needed[0] - needed[1] == model
