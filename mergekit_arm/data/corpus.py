"""All calibration data of a run: one data set, or several mixed by weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_arm.data.blocks import Corpus, build_corpus, row_tensor
from mergekit_arm.data.rows import load_rows
from mergekit_arm.data.settings import DataSettings, Share, apportion, parse_share
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import MixtureRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

_EXCERPT_TOKENS = 64


def read_corpus(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    longest: int | None = None,
) -> Corpus:
    """Read, tokenise and cut the data that ``settings`` name.

    Several data sets share ``settings.samples`` sequences by weight. ``longest`` is the number of
    tokens that the model takes: rows of token ids are cut there. Holds the token ids only.

    Raises:
        NeedsTokenizer: text, and no ``tokenizer``.
        InputError: data that cannot be read or used; see
            :func:`~mergekit_arm.data.rows.load_rows` and
            :func:`~mergekit_arm.data.blocks.build_corpus`.
    """
    shares = [parse_share(text) for text in settings.datasets]
    counts = apportion(shares, settings.samples)
    if len(shares) == 1:
        corpus = _read_one(settings, shares[0].name, counts[0], tokenizer, longest)
    else:
        parts = []
        for share, count in zip(shares, counts, strict=True):
            try:
                parts.append(_read_one(settings, share.name, count, tokenizer, longest))
            except InputError as error:
                raise type(error)(f"of the mixture, {share.name}: {error.message}") from error
        corpus = _mix(shares, parts)
    if tokenizer is not None:
        beginning = corpus.blocks[0][:_EXCERPT_TOKENS].tolist()
        corpus = replace(corpus, excerpt=str(tokenizer.decode(beginning)))
    return corpus


def _read_one(
    settings: DataSettings,
    name: str,
    samples: int,
    tokenizer: PreTrainedTokenizerBase | None,
    longest: int | None,
) -> Corpus:
    # The authors shuffle all of their data.
    whole = settings.recipe == "aim"
    rows, split = load_rows(name, settings.subset, settings.split, whole=whole)
    return build_corpus(
        rows,
        tokenizer,
        split=split,
        column=settings.text_column,
        samples=samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        part=settings.part,
        max_tokens_per_row=settings.max_tokens_per_row,
        longest=longest,
        recipe=settings.recipe,
    )


def _mix(shares: list[Share], parts: list[Corpus]) -> Corpus:
    """Put the blocks of several data sets together."""
    blocks = [(block, part.extra(i)) for part in parts for i, block in enumerate(part.blocks)]
    # Equal lengths side by side make full batches; sums do not mind the order.
    blocks.sort(key=lambda pair: len(pair[0]))
    notes = []
    for share, part in zip(shares, parts, strict=True):
        fewer = "" if len(part.blocks) == part.requested else f", not {part.requested}"
        notes.append(f"{share.name}: {len(part.blocks)} sequences{fewer}, {'; '.join(part.notes)}")
    rows = row_tensor(row for part in parts for row in part.rows.tolist())
    twice = sum(len(part.rows) for part in parts) - len(rows)
    if twice:
        notes.append(f"{twice:,} rows stand in more than one of these data sets, and count in each")
    return Corpus(
        [block for block, _ in blocks],
        _distinct(part.column for part in parts) or "",
        _distinct(part.split for part in parts),
        sum(part.requested for part in parts),
        next((part.template_hash for part in parts if part.template_hash), None),
        ready_ids=all(part.ready_ids for part in parts),
        rows=rows,
        extras=[extra for _, extra in blocks] if any(part.extras for part in parts) else [],
        mixture=tuple(
            MixtureRecord(
                dataset=share.name,
                weight=share.weight,
                split=part.split,
                column=part.column,
                sequences=len(part.blocks),
                tokens=part.tokens,
            )
            for share, part in zip(shares, parts, strict=True)
        ),
        notes=tuple(notes),
        noteworthy=True,
    )


def _distinct(values: Iterable[str | None]) -> str | None:
    return " + ".join(dict.fromkeys(value for value in values if value)) or None
