"""Rows end to end: what every row gives, and in which order."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mergekit_arm.data.packing import pack

Rows = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> list[tuple[int, list[int]]]:
    """Rows whose tokens say which row they are of, and where in it they stand."""
    return [(row, [row * 1000 + i for i in range(n)]) for row, n in enumerate(lengths)]


@given(Rows, st.integers(1, 60), st.integers(1, 20))
def test_every_row_gives_its_share(lengths: list[int], tokens: int, longest: int) -> None:
    """By another way: deal the rows out in rounds, and stop where enough are dealt."""
    packed = pack(numbered(lengths), tokens, longest)
    dealt: list[int] = []
    for turn in range(0, 40, longest):
        for row, length in enumerate(lengths):
            if len(dealt) < tokens:
                dealt += [row * 1000 + i for i in range(turn, min(turn + longest, length))]
    assert packed.stream.tolist() == dealt
    given_by = Counter(token // 1000 for token in dealt)
    taken = {row for row, _ in packed.starts}
    assert packed.cut == sum(given_by[row] < lengths[row] for row in taken)
    assert all(packed.stream[start] == row * 1000 for row, start in packed.starts)


@given(Rows, st.integers(1, 60), st.integers(1, 20))
def test_no_row_outgrows_the_others(lengths: list[int], tokens: int, longest: int) -> None:
    """A row gives a second share only if every row has given all that it has, or one share."""
    packed = pack(numbered(lengths), tokens, longest)
    counts = Counter(token // 1000 for token in packed.stream)
    if max(counts.values()) > longest:
        assert all(counts[row] >= min(length, longest) for row, length in enumerate(lengths))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 100))
def test_short_rows_are_simply_concatenated(lengths: list[int], tokens: int) -> None:
    stream = pack(numbered(lengths), tokens, 9).stream.tolist()
    everything = [token for _, ids in numbered(lengths) for token in ids]
    assert stream == everything[: len(stream)]
    assert len(stream) >= min(tokens, len(everything))


@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 20))
def test_a_single_document_stays_in_one_piece(length: int, tokens: int, longest: int) -> None:
    packed = pack(numbered([length]), tokens, longest)
    assert packed.stream.tolist() == list(range(len(packed.stream)))
    assert len(packed.stream) >= min(length, tokens)


@given(Rows, st.integers(1, 8), st.integers(1, 10))
def test_blocks_are_whole(lengths: list[int], count: int, length: int) -> None:
    packed = pack(numbered(lengths), count * length, length)
    blocks = packed.blocks(count, length)
    assert all(len(block) == length for block in blocks)
    joined = [int(token) for block in blocks for token in block]
    assert joined == packed.stream.tolist()[: len(joined)]
    assert len(blocks) == min(count, sum(lengths) // length)


def test_no_more_rows_are_taken_than_needed() -> None:
    rows = iter(numbered([5] * 10))
    assert len(pack(rows, 12, 5).stream) == 15
    assert len(list(rows)) == 7


def test_rows_of_one_content_are_counted_each() -> None:
    """Their hashes are the same; that they are used once only would be false."""
    packed = pack([(7, [1, 2, 3])] * 5, 12, 3)
    assert len(packed.rows(12)) == 4
