"""Token blocks in batches: which process takes which, and what happens when memory runs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from mergekit_arm.data.blocks import Corpus
from mergekit_arm.data.sample import TokenSample
from mergekit_arm.errors import Failure
from mergekit_arm.machine import out_of_memory

Call = tuple[str, str]
"""A site and one of its statistics."""


@dataclass(frozen=True)
class Span:
    """Neighbouring blocks of one length."""

    first: int
    count: int

    def pieces(self, limit: int) -> list[Span]:
        """Return the span in pieces of at most ``limit`` blocks."""
        end = self.first + self.count
        return [Span(i, min(limit, end - i)) for i in range(self.first, end, limit)]


@dataclass
class Batch:
    """Blocks on their way through the model, and what of them is in the sums already."""

    span: Span
    ids: Tensor
    """(sequences, length) int64"""
    samples: Mapping[int, Tensor]
    """Rows for sampled statistics, by the number of rows that an input has where it has one for
    each token; of inputs with other numbers all rows are seen."""
    counted: Mapping[Call, int] = field(default_factory=dict)
    """How many calls an earlier attempt, which ran out of memory half-way, has added."""
    calls: Counter[Call] = field(default_factory=Counter)

    def sampled(self, rows: Tensor) -> Tensor:
        """Return the sampled rows of an input that has one row for each token, or all rows."""
        sample = self.samples.get(rows.shape[0])
        return rows if sample is None else rows[sample.to(rows.device)]

    def add(self, site: str, statistic: str, update: Callable[[], None]) -> None:
        """Run ``update``, unless this call's input was added before memory ran out."""
        call = (site, statistic)
        if self.calls[call] >= self.counted.get(call, 0):
            update()
        self.calls[call] += 1


def plan_spans(
    lengths: Sequence[int], batch_size: int, *, process: int = 0, processes: int = 1
) -> list[Span]:
    """Divide blocks into batches and return those of one process, in turn with the others.

    Which blocks make a batch does not depend on the number of processes, so that every batch
    adds the same float32 partial sums. The first batch is a single block: from it the rest is
    estimated.

    Args:
        lengths: tokens of every block; only neighbours of one length share a batch.
        batch_size: blocks in a batch at most.
        process: number of this process among ``processes``.
        processes: how many there are.
    """
    spans: list[Span] = []
    for number, length in enumerate(lengths):
        last = spans[-1] if len(spans) > 1 else None
        if last and last.count < batch_size and lengths[last.first] == length:
            spans[-1] = Span(last.first, last.count + 1)
        else:
            spans.append(Span(number, 1))
    return spans[process::processes]


class Feeder:
    """Hands batches to a forward pass, in smaller pieces once memory has run out."""

    def __init__(
        self, corpus: Corpus, samples: Sequence[TokenSample], say: Callable[[str], None]
    ) -> None:
        """Prepare; ``samples`` has one for each part of the model that reads tokens of its own."""
        self._corpus = corpus
        self._samples = samples
        self._say = say
        self.limit: int | None = None
        """Blocks at once, after memory ran out; None before."""

    def batch(self, span: Span, counted: Mapping[Call, int] | None = None) -> Batch:
        """Return ``span``'s blocks as one batch."""
        ids = self._corpus.stack(span.first, span.count)
        samples = {}
        for sample in self._samples:
            rows = sample.rows(span.first, span.count)
            if rows is not None:
                samples[sample.lengths[span.first] * span.count] = rows
        return Batch(span, ids, samples, counted or {})

    def feed(self, span: Span, forward: Callable[[Batch], None]) -> None:
        """Pass ``span`` through ``forward``, halving the batch whenever memory runs out.

        What an attempt has added to the sums before it failed is not added again.

        Raises:
            Failure: not even one block fits.
        """
        waiting = [self.batch(piece) for piece in span.pieces(self.limit or span.count)]
        while waiting:
            batch = waiting.pop(0)
            if not self.fits(batch, forward):
                waiting[:0] = self.smaller(batch)

    def smaller(self, batch: Batch) -> list[Batch]:
        """Return ``batch``, which ran out of memory, in pieces; remember to make smaller ones.

        Raises:
            Failure: it is a single block.
        """
        pieces = batch.span.pieces(self._halve(batch.span))
        # A later attempt may have failed before an earlier one did: the longest run counts.
        counted = Counter(batch.counted) | batch.calls
        return [self.batch(piece, counted) for piece in pieces]

    def _halve(self, span: Span) -> int:
        if span.count == 1:
            raise not_even_one(self._corpus.lengths[span.first])
        smaller = -(-span.count // 2)
        if self.limit is None:
            self._say(
                f"Out of memory with {span.count} sequences at once: going on with fewer "
                f"({smaller}). --batch-size {smaller} starts there."
            )
        self.limit = smaller
        return smaller

    @staticmethod
    def fits(batch: Batch, forward: Callable[[Batch], None]) -> bool:
        """Run ``forward`` on ``batch``; say whether memory sufficed."""
        try:
            forward(batch)
            return True
        except Exception as error:  # running out of memory has many classes; all else is raised
            if not out_of_memory(error):
                raise
        # Only here, with the exception gone, do the failed pass's tensors let go of their memory.
        clear_device_cache(garbage_collection=True)
        return False


def not_even_one(length: int) -> Failure:
    """Return the error for memory that does not hold a single block."""
    return Failure(
        f"out of memory with a single sequence of {length} tokens: "
        "use --low-memory, a shorter --sequence-length, or --dtype bfloat16"
    )
