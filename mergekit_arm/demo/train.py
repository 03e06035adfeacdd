"""A very small Llama, its tokenizer, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

END = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: every text can be encoded, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def new_model(vocabulary: int = 1024, *, seed: int = 42) -> LlamaForCausalLM:
    """Return a Llama of about 0.7 million parameters with random weights, the same for one seed."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int = 128
) -> Tensor:
    """Join ``texts``, an end token after each, and cut them into (blocks, ``length``) token ids.

    The remainder that fills no block is left out.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    seed: int = 42,
    folder: Path | None = None,
    save_at: Collection[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train ``model`` in place on (blocks, length) token ids with transformers' ``Trainer``.

    AdamW in float32 on the CPU. The learning rate rises over the first tenth of the steps and
    falls along a cosine to a tenth of its peak. ``folder`` gets a ``checkpoint-N`` after each of
    the steps ``save_at``; ``on_step`` is called after every update. Steps count from 1.
    """
    with TemporaryDirectory() as nowhere:
        arguments = TrainingArguments(
            output_dir=str(folder or nowhere),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=0.01,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            seed=seed,
            use_cpu=True,
            save_strategy="no",  # the callback says when
            save_only_model=True,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
            processing_class=tokenizer,
            data_collator=default_data_collator,  # the blocks are of one length
            callbacks=[_Steps(save_at, on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint: configuration, safetensors, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Steps(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, save_at: Collection[int], on_step: Callable[[int], None] | None) -> None:
        self._save_at = save_at
        self._on_step = on_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_save = state.global_step in self._save_at
        if self._on_step is not None:
            self._on_step(state.global_step)
