"""A fine-tune by transformers' ``Trainer``, which leaves a checkpoint at each of ``FRACTIONS``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tests.evidence.encoding import Encoded, padded
from tests.evidence.sizes import FRACTIONS, Size


class _Checkpoints(TrainerCallback):
    """Saves after the given steps, and keeps every step's loss."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = set(steps)
        self.losses: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_save = state.global_step in self.steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(round(logs["loss"], 4))


def train(
    model: PreTrainedModel, data: Sequence[Encoded], size: Size, *, seed: int, folder: Path
) -> list[float]:
    """Train on the answers; ``folder`` gets a ``checkpoint-N`` for each of ``FRACTIONS``.

    AdamW in float32; the learning rate rises over a tenth of the steps and falls along a cosine.
    Returns every step's loss.
    """
    fill = int(model.config.eos_token_id)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        learning_rate=size.learning_rate,
        weight_decay=0.01,
        warmup_steps=size.steps // 10,
        lr_scheduler_type="cosine",
        seed=seed,
        use_cpu=size.device == "cpu",
        bf16=size.device == "cuda",
        save_strategy="no",  # the callback says when
        save_only_model=True,
        logging_strategy="steps",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    callback = _Checkpoints([size.step(fraction) for fraction in FRACTIONS])
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(data),
        data_collator=lambda rows: padded(rows, fill),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    with torch.random.fork_rng():
        trainer.train()
    model.eval()
    return callback.losses
