"""Fine-tunes that added tokens: mergekit's own tokenizer keys, and losses that stay comparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mergekit_arm.errors import InputError
from mergekit_arm.streaming import stream
from tests.support.models import perturbed, tiny_llama
from tests.support.streams import add_tokenizer, config, weights

SIZE = 282


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base of ``SIZE`` tokens, a checkpoint with one more, and held-out text."""
    base = tiny_llama(0)
    assert len(add_tokenizer(tmp_path / "base")) == SIZE
    base.resize_token_embeddings(SIZE)
    base.save_pretrained(tmp_path / "base")
    longer = perturbed(base, 1)
    longer.resize_token_embeddings(SIZE + 1)
    folder = tmp_path / "run" / "checkpoint-1"
    longer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<call>"])
    assert len(tokenizer) == SIZE + 1
    tokenizer.save_pretrained(folder)
    rows = [{"text": "nothing much about a small text " * 4}] * 4
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def document(run: Path, **changes: Any) -> dict[str, Any]:
    evaluation = {"dataset": str(run / "heldout.jsonl"), "sequence_length": 16, "keep": "last"}
    return config(run, evaluation=evaluation, **changes)


def test_added_tokens_are_refused_with_the_remedy(run: Path) -> None:
    with pytest.raises(InputError, match="then set tokenizer_source: base or union"):
        stream(document(run), run / "out")


@pytest.mark.parametrize(("source", "size"), [("union", SIZE + 1), ("base", SIZE)])
def test_mergekits_tokenizer_keys_work_in_every_step(run: Path, source: str, size: int) -> None:
    result = stream(document(run, tokenizer_source=source, passes=2), run / "out")
    found = weights(result.model)
    assert found["model.embed_tokens.weight"].shape[0] == size
    assert len(AutoTokenizer.from_pretrained(result.model)) == size
    # Two steps of one half towards the same checkpoint, on a tensor that keeps its shape.
    name = "model.layers.0.mlp.up_proj.weight"
    base, goal = weights(run / "base")[name], weights(run / "run" / "checkpoint-1")[name]
    assert torch.allclose(found[name], base + 0.75 * (goal - base), atol=1e-6)
    losses = [record.current.get("loss") for record in result.steps]
    assert all(loss is not None and 4 < loss < 8 for loss in losses)


def test_ids_that_mean_other_tokens_give_no_loss(run: Path) -> None:
    folder = run / "run" / "checkpoint-1"
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    assert Tokenizer.from_file(str(file)).token_to_id("a") == vocabulary["a"]
    with pytest.raises(InputError, match="so that losses cannot be compared"):
        stream(document(run, tokenizer_source="union"), run / "out")
