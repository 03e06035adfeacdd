"""What people point ``calibrate`` at: adapters, damaged tokenizers, paths that are not there."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from mergekit.common import ModelReference
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.errors import InputError
from tests.support.models import tiny_llama

WORDS = ["[UNK]", "one", "two", "three"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_llama(0, layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(model: Path) -> Path:
    folder = model.with_name("adapter")
    wrapped = get_peft_model(tiny_llama(0, layers=1), LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("one two three one two three\n" * 20)
    return path


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def options(model: Path | str, dataset: Path, **rest: Any) -> CalibrationOptions:
    out = str(dataset.with_name("stats"))
    settings = {"out": out, "dataset": str(dataset), "device": "cpu", "sequence_length": 8}
    return CalibrationOptions(model=str(model), samples=4, **{**settings, **rest})


def test_text_for_a_model_with_an_adapter(model: Path, adapter: Path, text: Path) -> None:
    """The merged model has no tokenizer of its own; its parts have."""
    save_tokenizer(model)
    result = calibrate(options(f"{model}+{adapter}", text))
    assert result is not None
    assert result.metadata.data.tokens == 32


def test_a_damaged_tokenizer_is_not_called_absent(model: Path, text: Path) -> None:
    (model / "tokenizer.json").write_text("{half")
    with pytest.raises(InputError, match=r"tokenizer of .*model cannot be loaded"):
        calibrate(options(model, text))


def test_token_ids_need_no_tokenizer(model: Path, token_file: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("{half")
    result = calibrate(options(model, token_file, out=str(tmp_path / "stats")))
    assert result is not None
    assert result.metadata.data.tokenizer_hash is None


@pytest.mark.parametrize("place", ["{0}/absent", "{0}/model+{0}/absent", "./absent/model"])
def test_a_path_that_is_not_there(place: str, model: Path, text: Path) -> None:
    with pytest.raises(InputError, match=r"absent.* is no such directory") as error:
        calibrate(options(place.format(model.parent), text))
    assert "Repo id" not in error.value.message


def test_a_dry_run_beside_statistics_that_exist(
    model: Path, token_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stats"
    calibrate(options(model, token_file, out=str(out)))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    notes: list[str] = []
    estimates: list[Any] = []
    given = options(model, token_file, out=str(out), dry_run=True)
    assert calibrate(given, say=notes.append, preflight=estimates.append) is None
    assert len(estimates) == 1
    assert "add --force" in notes[0]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(InputError, match="add --force"):
        calibrate(options(model, token_file, out=str(out)))


def test_a_signal_while_an_adapter_is_merged_leaves_nothing(
    model: Path, adapter: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    plain = ModelReference.merged
    seen: list[Path] = []

    def merged(self: ModelReference, *args: Any, **rest: Any) -> ModelReference:
        found = plain(self, *args, **rest)
        seen.extend((tmp_path / "tmp").rglob("*.safetensors"))
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(ModelReference, "merged", merged)
    before = signal.getsignal(signal.SIGTERM)
    # Without calibrate's own handler the signal would end the test's process.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt):
            calibrate(options(f"{model}+{adapter}", text))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen
    assert list((tmp_path / "tmp").iterdir()) == []
