"""Models on the Hub: what ``check`` accepts of them without their weights, the merge accepts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.checking.check import Checked, check
from tests.statistics.test_hub import publish
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.merges import assert_relaxed, config, run, weights

FAR = {"base": "someone/base", "a": "someone/a"}


def far(family: Path, **changes: object) -> str:
    """Return a configuration with both models on the Hub."""
    models = [{"model": FAR["a"], "parameters": {"weight": 1.0}}]
    return yaml.safe_dump(config(family, base_model=FAR["base"], models=models, **changes))


def checked(text: str, folder: Path) -> Checked:
    file = folder / "merge.yml"
    file.write_text(text)
    return check(file, out=folder / "out")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(family: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.address)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for local, name in FAR.items():
            files = {one.name: one.read_bytes() for one in (family / local).iterdir()}
            running.repositories[name] = files
        yield running


def test_models_on_the_hub(hub: FakeHub, family: Path, cache: Path, tmp_path: Path) -> None:
    found = checked(far(family), tmp_path)
    assert found.accepted, found.findings
    assert found.rooms[0].disk > 0.8 * len(hub.repositories["someone/base"]["model.safetensors"])
    assert not list(cache.rglob("*.safetensors"))  # asked for, by its first bytes
    merged = run(mergekit_yaml, far(family), tmp_path)
    for name, tensor in weights(merged).items():
        assert_relaxed(tensor, family, name)


def test_cached_models_without_the_hub(
    family: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit lists a repository's files before it looks into the cache, and fails offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for local, name in FAR.items():
        publish(family / local, name, cache)
    text = far(family)
    found = checked(text, tmp_path)
    assert len(found.findings) == 2
    for one in found.findings:
        model, _, folder = one.message.partition(": name the directory ")
        assert "mergekit asks the Hub" in model
        text = text.replace(model.split()[1].rstrip(":"), folder)
    assert checked(text, tmp_path).accepted
    for name, tensor in weights(run(mergekit_yaml, text, tmp_path)).items():
        assert_relaxed(tensor, family, name)
