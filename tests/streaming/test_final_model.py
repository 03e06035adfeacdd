"""What is published: the chat template that was judged with, and every file of the base."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from mergekit_arm.errors import Failure
from mergekit_arm.merging import merge as merge_module
from mergekit_arm.streaming import stream
from tests.support.models import perturbed, tiny_llama
from tests.support.streams import add_tokenizer, config, write_run

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def write_chats(folder: Path) -> dict[str, Any]:
    """Save a base without a template, checkpoints with one, and held-out chats."""
    base = tiny_llama(0)
    base.resize_token_embeddings(320)
    base.save_pretrained(folder / "base")
    GenerationConfig(max_new_tokens=77).save_pretrained(folder / "base")
    add_tokenizer(folder / "base")
    for number in (1, 2):
        perturbed(base, number).save_pretrained(folder / "run" / f"checkpoint-{number}")
        add_tokenizer(folder / "run" / f"checkpoint-{number}", template=TEMPLATE)
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    return config(folder, evaluation={"dataset": str(folder / "chats.jsonl"), "keep": "last"})


def test_the_template_that_judged_is_published(tmp_path: Path) -> None:
    document = write_chats(tmp_path)
    notes: list[str] = []
    result = stream(document, tmp_path / "out", say=notes.append)
    assert AutoTokenizer.from_pretrained(result.model).chat_template == TEMPLATE
    assert any("the base has no chat template" in note for note in notes)
    # And again where the checkpoints that had it are gone.
    for number in (1, 2):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{number}")
    shutil.rmtree(tmp_path / "out" / "model")
    again = stream(document, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(again.model).chat_template == TEMPLATE


@pytest.mark.parametrize("template", [None, "auto", "chatml"])
def test_the_generation_config_stays(tmp_path: Path, template: str | None) -> None:
    document = write_chats(tmp_path)
    result = stream({**document, "chat_template": template} if template else document,
                    tmp_path / "out")  # fmt: skip
    assert GenerationConfig.from_pretrained(result.model).max_new_tokens == 77
    assert AutoTokenizer.from_pretrained(result.model).chat_template


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, (1,))

    def full(configuration: Any, out: str, **_: Any) -> None:
        (Path(out) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "run_merge", full)
        with pytest.raises(Failure, match="No space left on device"):
            stream(config(tmp_path), tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".model.partial"))
    assert len(stream(config(tmp_path), tmp_path / "out").steps) == 1


def test_what_a_killed_merge_left_is_removed_before_anything_needs_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, (1, 2))

    class Enough(Exception):
        pass

    def stop(record: Any) -> None:
        raise Enough

    with pytest.raises(Enough):
        stream(config(tmp_path), tmp_path / "out", on_step=stop)
    left = tmp_path / "out" / "steps" / "002" / ".model.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")

    def full(*_: Any, **__: Any) -> str:
        if left.exists():
            raise OSError(28, "No space left on device")
        return made(*_, **__)

    made = tempfile.mkdtemp
    make_file = tempfile.mkstemp

    def full_too(*_: Any, **__: Any) -> tuple[int, str]:
        assert not left.exists(), "a file was written before there was room"
        return make_file(*_, **__)

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    monkeypatch.setattr(tempfile, "mkstemp", full_too)
    assert len(stream(config(tmp_path), tmp_path / "out").steps) == 2
    assert not left.exists()
