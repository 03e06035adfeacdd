"""A very small Llama, its tokenizer, and the loop that trains it and measures its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as AnyTokenizer

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


def pack(tokenizer: AnyTokenizer, texts: Iterable[str], length: int = 128) -> torch.Tensor:
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
    blocks: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    seed: int = 42,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train ``model`` in place on (blocks, length) token ids with AdamW.

    The learning rate rises over the first tenth of the steps and falls along a cosine to a tenth
    of its peak. ``on_step(step, loss)`` is called after every update, ``step`` counting from 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, steps))
    batches = _batches(len(blocks), batch_size, seed)
    model.train()
    for step in range(1, steps + 1):
        batch = blocks[next(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    model.eval()


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 16) -> float:
    """Return the mean cross-entropy in nats per predicted token over (blocks, length) token ids."""
    model.eval()
    total = 0.0
    for batch in torch.split(blocks, batch_size):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(blocks)


def save(model: PreTrainedModel, tokenizer: AnyTokenizer, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint: configuration, safetensors, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def checkpoints(
    model: PreTrainedModel, tokenizer: AnyTokenizer, folder: Path, every: int
) -> Callable[[int, float], None]:
    """Return an ``on_step`` that saves ``folder/checkpoint-N`` as Trainer does, every few steps."""

    def on_step(step: int, _loss: float) -> None:
        if step % every == 0:
            save(model, tokenizer, folder / f"checkpoint-{step}")

    return on_step


def _rate(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _batches(blocks: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield index batches for ever, every block once before any is seen again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(blocks, generator=generator)])
        yield order[:batch_size]
        order = order[batch_size:]
