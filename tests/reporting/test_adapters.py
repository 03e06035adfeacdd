"""The report on a merge with an adapter, which is merged into its base once more."""

from __future__ import annotations

from pathlib import Path

import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.reporting.merged import merged_page
from tests.reporting.scene import merge
from tests.streaming.test_adapters import write_adapters
from tests.support.merges import config, run
from tests.support.models import tiny_llama


def test_an_adapter_is_merged_again(family: Path, tmp_path: Path) -> None:
    """The page is that of the merge with the model that base and adapter make."""
    write_adapters(tmp_path, tiny_llama(0))  # the family's base
    adapter = tmp_path / "run" / "checkpoint-3"
    models = [{"model": f"{tmp_path / 'base'}+{adapter}", "parameters": {"weight": 1.0}}]
    text = yaml.safe_dump(config(family, models=models))
    out = run(mergekit_yaml, text, tmp_path, "--lora-merge-cache", str(tmp_path / "cache"))
    shown = merged_page(out)
    assert not shown.notes
    (merged,) = (tmp_path / "cache").iterdir()
    models[0]["model"] = str(merged)
    expected = merged_page(merge(family, tmp_path / "plain", models=models))
    assert [one.data for one in shown.drawings] == [one.data for one in expected.drawings]
    assert "before-and-after" in [one.name for one in shown.drawings]
    (adapter / "adapter_model.safetensors").unlink()
    (note,) = merged_page(out).notes
    assert str(adapter) in note
